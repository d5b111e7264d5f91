"""The one error that ends a command: its text is the sentence that the reader sees."""


class RunError(Exception):
    """A clear sentence with the remedy; main() prints it and exits with a non-zero code."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived: unwind like Ctrl-C does, so that every `finally` runs."""
