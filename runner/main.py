"""The command line: demo and test. Every failure ends here as one sentence and a non-zero exit code."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from . import environment, ladder, process
from .errors import RunError, Stopped
from .terminal import Status


def main(arguments: Sequence[str]) -> int:
    options, extra = _parser().parse_known_args(arguments)
    if extra and options.command != "test":
        _parser().error(f"unknown argument: {extra[0]}")
    end_on_signals()
    status = Status()
    try:
        found = environment.provide(status)
        if options.command == "test":
            return ladder.test(found, extra, with_browser=options.browser, status=status)
        status.done(f"Using {found.origin}")
        return _demo(found, options)
    except RunError as error:
        status.clear()
        print(f"\nrun.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped):
        status.clear()
        print("\nrun.py: stopped; nothing is left running.", file=sys.stderr)
        return 130


def _demo(found: environment.Environment, options: argparse.Namespace) -> int:
    """The demo needs ComfyUI's packages (aiohttp, PIL), so it runs in ComfyUI's Python."""
    arguments = ["--path", str(environment.REPOSITORY), "-m", "runner.demo", "--comfyui", str(found.comfyui)]
    arguments += ["--output", str(Path.cwd() / "soda-demo"), "--port", str(options.port)]
    code = process.run(found.python, [*arguments, *(["--keep"] if options.keep else [])])
    if code < 0:
        raise RunError(f"The demo was killed (signal {-code}), from outside or because the memory ran out.")
    return code


def end_on_signals() -> None:
    """SIGTERM, a closed terminal and Ctrl-C unwind the stack, so that children are stopped.

    Ctrl-C too is set here: a shell that starts a command in the background has it ignored.
    """

    def stop(number, frame):
        raise Stopped

    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port; they go from 1 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="SODA in a real ComfyUI. COMFYUI_PATH (and COMFYUI_PYTHON) name one to use; else it is "
        "installed once into a cache folder (SODA_CACHE names another).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train, save, load, mix and sample; ends with a contact sheet")
    demo.add_argument("--keep", action="store_true", help="leave the server up and open its page with the workflow")
    demo.add_argument("--port", type=_port, default=0, help="the server's port (default: a free one)")
    test = commands.add_parser("test", help="run every test; other arguments go to pytest (-k, -x, a file ...)")
    test.add_argument("--no-browser", dest="browser", action="store_false", help="leave out the browser tests")
    return parser
