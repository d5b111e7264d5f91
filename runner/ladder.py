"""run.py test: ruff, mypy, then the rungs of the test ladder, each in a Python process of its own.

The rungs cannot share a process: the first imports the repository as it is, the second imports ComfyUI, whose top
level has modules of the same names. The longest one, which mostly waits for its servers, runs beside the others and
tells what it found when they are done. Whatever cannot run is a failure that names its remedy; a skip is one too.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import cache, process
from .browser import find_browser
from .environment import REPOSITORY, Environment
from .pip import pip
from .server import link, unlink
from .terminal import Status, duration

TOOLS = Path(__file__).with_name("test-requirements.txt")
TESTS = REPOSITORY / "tests"
RUNGS = {
    "library": ("maths", "file"),
    "ComfyUI in process": ("comfy",),
    "ComfyUI server": ("install", "server"),
    "browser": ("browser",),
}
BESIDE = "ComfyUI server"
RUNG_MINUTES = 20
TYPES_MINUTES = 5


def test(environment: Environment, pytest_arguments: Sequence[str], *, with_browser: bool, status: Status) -> int:
    """Runs everything -> 0 only if all of it passed."""
    started = time.monotonic()
    installed = [f"ComfyUI: {environment.origin}"]
    tools = provide_tools(environment, status)
    installed.append(f"test tools: {tools}")
    variables = {**os.environ, "PYTHONPATH": str(tools), "COMFYUI_PATH": str(environment.comfyui),
                 "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads crawl where anything else uses the cores
    if with_browser:
        browser, how = find_browser(environment.python, variables, status)
        variables["SODA_BROWSER"] = browser
        installed.append(f"browser: {browser} ({how})")
    for line in installed:
        status.done(line)

    options, chosen = _split(pytest_arguments)
    problems = _unlisted_folders()
    for check in (["check"], ["format", "--check"]):
        if process.run(environment.python, ["-m", "ruff", *check, str(REPOSITORY)], environment=variables) != 0:
            problems.append(f"ruff {check[0]}: see its findings above")
    if _check_types(environment.python, variables, tools) != 0:
        problems.append("mypy: see its findings above")
    rungs = []
    for name, folders in RUNGS.items():
        if name == "browser" and not with_browser:
            status.done("\n== browser: left out, as asked (--no-browser)")
            continue
        targets = [TESTS / folder for folder in folders]
        if chosen:
            targets = [path for path in chosen if any(target in (path, *path.parents) for target in targets)]
        if targets:
            rungs.append(Rung(name, targets, options))
    rungs.sort(key=lambda rung: rung.name == BESIDE)
    counts = Counter()
    with contextlib.ExitStack() as running:
        if len(rungs) > 1 and rungs[-1].name == BESIDE:
            running.enter_context(rungs[-1].started(environment.python, variables, aside=True))
        for rung in rungs:
            with contextlib.nullcontext() if rung.process else rung.started(environment.python, variables):
                problem = rung.finish(counts, status)
            problems += [problem] if problem else []
    if not counts:
        problems.append("no test was run; check the arguments that went to pytest")

    status.done(f"\n== {counts['passed']} passed, {counts['failed']} failed in {duration(time.monotonic() - started)}")
    for problem in problems:
        status.done(f"   {problem}")
    return 1 if problems or counts["failed"] else 0


def _check_types(python: Path, variables: dict[str, str], tools: Path) -> int:
    """mypy's exit code. It sees the pack as ComfyUI does, as a package with relative imports, under a name of ours."""
    with tempfile.TemporaryDirectory(prefix="soda-types-") as stage:
        pack = Path(stage) / "pack"
        link(REPOSITORY, pack)
        try:
            command = ["-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml"), "--cache-dir",
                       str(tools / ".mypy_cache"), "-p", "pack.soda", "-p", "pack.nodes"]  # fmt: skip
            return process.run(python, command, environment=variables, cwd=stage, timeout=60 * TYPES_MINUTES)
        except process.TimeoutExpired:
            print(f"mypy did not end within {TYPES_MINUTES} minutes and was stopped")
            return 1
        finally:
            unlink(pack)


def provide_tools(environment: Environment, status: Status) -> Path:
    """pytest and its like in a cache folder of their own, so that no ComfyUI environment is ever changed."""
    folder = cache.cache_folder()
    tools = folder / f"tools-{cache.key(TOOLS.read_text(), str(environment.python))}"
    if not cache.is_complete(tools):
        with cache.lock(folder, status):
            if not cache.is_complete(tools):
                cache.require_space(folder, 0.5)
                with cache.making(tools, status):
                    arguments = ["install", "--no-deps", "--target", str(tools), "-r", str(TOOLS)]
                    pip(environment.python, arguments, "Installing the test tools", tools.with_suffix(".log"), status)
    return tools


def _split(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The reader's arguments -> pytest's options, and the files or folders to run instead of everything."""
    paths = [argument for argument in arguments if Path(argument.split("::")[0]).exists()]
    return [argument for argument in arguments if argument not in paths], [Path(path).absolute() for path in paths]


class Rung:
    """One pytest process on some files or folders."""

    def __init__(self, name: str, targets: Sequence[Path], options: Sequence[str]) -> None:
        self.name, self.targets, self.options = name, targets, options
        self.process = self.said = None

    @contextlib.contextmanager
    def started(self, python: Path, variables: dict[str, str], aside: bool = False) -> Iterator[None]:
        """Runs from here on and is stopped at the end, however that comes. `aside`: what it says waits for `finish`."""
        with tempfile.TemporaryDirectory(prefix="soda-tests-") as scratch, contextlib.ExitStack() as files:
            self.report = Path(scratch) / "report.xml"
            if aside:
                self.said = files.enter_context((Path(scratch) / "said.log").open("w+b"))
            command = ["-m", "pytest", "-q", f"--junit-xml={self.report}", *self.options, *map(str, self.targets)]
            temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch)  # whatever a test leaves goes with it
            environment = {**variables, **temporary}
            self.process = process.start(python, command, output=self.said, environment=environment, cwd=scratch)
            try:
                yield
            finally:
                process.stop(self.process, polite_seconds=15.0)

    def finish(self, counts: Counter, status: Status) -> str | None:
        """Waits for the end -> None, or what went wrong in one line; adds to `counts`."""
        status.done(f"\n== {self.name}: {', '.join(str(target.relative_to(REPOSITORY)) for target in self.targets)}")
        try:
            code = self.process.wait(60 * RUNG_MINUTES)
        except process.TimeoutExpired:
            code = None
        if self.said is not None:
            self.said.seek(0)
            shutil.copyfileobj(self.said, sys.stdout.buffer)
            sys.stdout.flush()
        if code is None:
            return f"{self.name}: did not end within {RUNG_MINUTES} minutes and was stopped"
        seen, skipped = _read(self.report)
        counts.update(seen)
        if skipped:
            return f"{self.name}: {len(skipped)} skipped, which counts as failed here: {'; '.join(skipped)}"
        if code == 5 and not self.options:
            return f"{self.name}: no test was found; take a complete clone"
        return f"{self.name}: pytest ended with code {code}" if code not in (0, 5) else None


def _read(report: Path) -> tuple[Counter, list[str]]:
    """pytest's JUnit report -> counts of passed and failed, and the reason of each skip."""
    counts, skipped = Counter(), []
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
