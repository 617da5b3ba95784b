"""Errors that a user can cause: one line with what happened, the values, and what to do."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_FAILED = 3
TRACEBACK = "SFT_TRACEBACK"  # set by a person who wants more than a line


class UserError(Exception):
    """A mistake in what the user gave. Its message is the whole output: no traceback, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message.encode("utf-8", "backslashreplace").decode()
        )  # a row's own text may hold half characters


class FailedError(UserError):
    """The machine failed, not the user: a full disk, a process that was killed. One line all the same, exit code 3."""


class RowError(UserError):
    """One row cannot be used. Raised without a place; whoever knows file and line adds it with `at`."""

    def at(self, place: str) -> RowError:
        return RowError(f"{place}: {self}")


def shorten(value: object, limit: int = 60) -> str:
    """A value for a message: one line, not too long, quotes where it is text."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class OneLineParser(argparse.ArgumentParser):
    """A wrong flag is a line, as all that a user can cause."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message}: see {self.prog} -h\n")


def exit_code_of(program: str, main: Callable[[], int]) -> int:
    """Run `main` as a command: a UserError becomes one line on stderr and exit code 2, a failure or a crash one line
    and 3.

    Python's own exit code for a crash is 1, which says that a run is finished already.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no UTF-8, and is printed all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except UserError as error:
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, FailedError) else EXIT_USER_ERROR
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output (head, less) went away: not an error
        return EXIT_OK
    except KeyboardInterrupt:
        print(f"{program}: interrupted; unfinished work is discarded", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        text = " ".join(str(error).split())[:500]
        print(
            f"{program}: {type(error).__name__}{f': {text}' if text else ''}; {TRACEBACK}=1 shows where",
            file=sys.stderr,
        )
        return EXIT_FAILED
