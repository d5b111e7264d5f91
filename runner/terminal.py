"""One line of status on a terminal that rewrites itself; plain lines, sparingly, where the output is not a terminal."""

import shutil
import sys
import time

QUIET_SECONDS = 20.0  # between two status lines in a log file


class Status:
    """`update` replaces the line, `done` leaves it and goes on below it. One at a time."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.shown = False
        self.last_printed = 0.0

    def update(self, text: str) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r" + text[:width].ljust(width) if self.shown else text[:width])
            sys.stdout.flush()
            self.shown = True
        elif time.monotonic() - self.last_printed >= QUIET_SECONDS:
            self.last_printed = time.monotonic()
            print(text, flush=True)

    def done(self, text: str) -> None:
        self.clear()
        self.last_printed = time.monotonic()
        print(text, flush=True)

    def clear(self) -> None:
        if self.live and self.shown:
            sys.stdout.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            sys.stdout.flush()
        self.shown = False


def duration(seconds: float) -> str:
    """Seconds as people say them: 7 s, 1 min 30 s."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
