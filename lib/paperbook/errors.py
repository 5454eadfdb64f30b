"""How the press says no: one exception that carries what happened, what to do next, and the exit code.

Exit codes, so that scripts can tell them apart:

- 0  all is well
- 1  the work was done and something in it is wrong: a notebook failed, a verdict changed, the site has a broken link
- 2  the command was wrong: an unknown paper, an option that does not exist
- 3  the machine is not ready: a build folder that cannot be written, a taken port, a missing program
- 130  interrupted with Ctrl-C; run the same command again to resume
"""

OK, FAILED, USAGE, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130


class PressError(Exception):
    """Something that the person at the keyboard must know; the message says what to do next."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code
