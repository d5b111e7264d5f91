"""run.py test: ruff, then the rungs of the test ladder, each in a Python process of its own.

The rungs cannot share a process: the first imports the repository as it is, the second imports ComfyUI, whose top
level has modules of the same names. Whatever cannot run is a failure that names its remedy; a skip is one too.
"""

import os
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import cache, process
from .browser import find_browser
from .environment import REPOSITORY, Environment
from .pip import pip
from .terminal import Status, duration

TOOLS = Path(__file__).with_name("test-requirements.txt")
TESTS = REPOSITORY / "tests"
RUNGS = {
    "library": ("maths", "file"),
    "ComfyUI in process": ("comfy",),
    "ComfyUI server": ("install", "server"),
    "browser": ("browser",),
}
RUNG_MINUTES = 20


def test(environment: Environment, pytest_arguments: Sequence[str], *, with_browser: bool, status: Status) -> int:
    """Runs everything -> 0 only if all of it passed."""
    started = time.monotonic()
    installed = [f"ComfyUI: {environment.origin}"]
    tools = provide_tools(environment, status)
    installed.append(f"test tools: {tools}")
    variables = {**os.environ, "PYTHONPATH": str(tools), "COMFYUI_PATH": str(environment.comfyui),
                 "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    if with_browser:
        browser, how = find_browser(environment.python, variables, status)
        variables["SODA_BROWSER"] = browser
        installed.append(f"browser: {browser} ({how})")
    for line in installed:
        status.done(line)

    problems = _unlisted_folders()
    if process.run(environment.python, ["-m", "ruff", "check", str(REPOSITORY)], environment=variables) != 0:
        problems.append("ruff: see its findings above")
    counts = Counter()
    for rung, folders in RUNGS.items():
        if rung == "browser" and not with_browser:
            status.done("\n== browser: left out, as asked (--no-browser)")
            continue
        problem = _run_rung(environment, variables, rung, folders, pytest_arguments, counts, status)
        problems += [problem] if problem else []

    status.done(f"\n== {counts['passed']} passed, {counts['failed']} failed in {duration(time.monotonic() - started)}")
    for problem in problems:
        status.done(f"   {problem}")
    return 1 if problems or counts["failed"] else 0


def provide_tools(environment: Environment, status: Status) -> Path:
    """pytest and its like in a cache folder of their own, so that no ComfyUI environment is ever changed."""
    folder = cache.cache_folder()
    version = "{}.{}".format(*sys.version_info[:2])
    tools = folder / f"tools-python{version}-{cache.key(TOOLS.read_text(), str(environment.python))}"
    if not cache.is_complete(tools):
        with cache.lock(folder, status):
            if not cache.is_complete(tools):
                cache.require_space(folder, 0.5)
                with cache.making(tools, status):
                    arguments = ["install", "--no-deps", "--target", str(tools), "-r", str(TOOLS)]
                    pip(environment.python, arguments, "Installing the test tools", tools.with_suffix(".log"), status)
    return tools


def _run_rung(
    environment: Environment,
    variables: dict[str, str],
    rung: str,
    folders: Sequence[str],
    arguments: Sequence[str],
    counts: Counter,
    status: Status,
) -> str | None:
    """One pytest process -> None, or what went wrong in one line; adds to `counts`."""
    status.done(f"\n== {rung}: tests/{', tests/'.join(folders)}")
    missing = [folder for folder in folders if not (TESTS / folder).is_dir()]
    if missing:
        return f"{rung}: tests/{missing[0]} is missing; take a complete clone"
    with tempfile.TemporaryDirectory(prefix="soda-tests-") as scratch:
        report = Path(scratch) / "report.xml"
        command = ["-m", "pytest", "-q", f"--junit-xml={report}", *arguments]
        command += [str(TESTS / folder) for folder in folders]
        try:
            limit = 60 * RUNG_MINUTES
            code = process.run(environment.python, command, environment=variables, cwd=scratch, timeout=limit)
        except process.TimeoutExpired:
            return f"{rung}: did not end within {RUNG_MINUTES} minutes and was stopped"
        if code == 5 and arguments:
            return None  # the reader's own choice (-k ...) left nothing here
        seen, skipped = _read(report)
    counts.update(seen)
    if skipped:
        return f"{rung}: {len(skipped)} skipped, which counts as failed here: {'; '.join(skipped)}"
    if code == 5:
        return f"{rung}: no test was found; take a complete clone"
    return f"{rung}: pytest ended with code {code}" if code else None


def _read(report: Path) -> tuple[Counter, list[str]]:
    """pytest's JUnit report -> counts of passed and failed, and the reason of each skip."""
    counts, skipped = Counter(passed=0, failed=0), []
    if not report.is_file():
        return counts, skipped
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None:
            skipped.append(f"{case.get('name')}: {skip.get('message')}")
        failed = skip is not None or case.find("failure") is not None or case.find("error") is not None
        counts["failed" if failed else "passed"] += 1
    return counts, skipped


def _unlisted_folders() -> list[str]:
    known = {folder for folders in RUNGS.values() for folder in folders}
    found = {path.parent.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py") if path.parent != TESTS}
    loose = [f"tests/{path.name} lies in no rung; move it into a folder" for path in TESTS.glob("test_*.py")]
    return loose + [f"tests/{name} belongs to no rung; add it to runner/ladder.py" for name in sorted(found - known)]
