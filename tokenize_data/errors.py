"""Errors that a user can cause: one line with what happened, the values, and what to do."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_FAILED = 3
TRACEBACK = "SFT_TRACEBACK"  # set by users who want a traceback
ERROR_FILE = "SFT_ERROR_FILE"  # set by programs: the message goes to this file instead of stderr


class UserError(Exception):
    """A mistake in what the user gave. Its message is the whole output: no traceback, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # a row's text may hold lone surrogates


class FailedError(UserError):
    """The machine failed, not the user: a full disk, a killed process. Also one line, exit code 3."""


class RowError(UserError):
    """One row cannot be used. Raised without a place; whoever knows file and line adds it with `at`."""

    def at(self, place: str) -> RowError:
        return RowError(f"{place}: {self}")


def shorten(value: object, limit: int = 60) -> str:
    """Format a value for a message: one line, shortened, in quotes if it is text."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Suggest the known name that is closest to a misspelt one."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)), None)


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a wrong flag in one line. Switches take `=true` and `=false`."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        arguments, unknown = self.parse_known(argv)
        if unknown:
            flags = (flag.removeprefix("--") for flag in self._option_string_actions if "=" not in flag)
            first = next((word for word in unknown if word.startswith("--")), "").partition("=")[0]
            close = did_you_mean(first.removeprefix("--"), flags) if first else None
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f': did you mean --{close}?' if close else ''}")
        return arguments

    def parse_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns (parsed values, unknown words)."""
        for action in list(self._actions):
            if action.nargs == 0 and isinstance(action.const, bool):
                self._add_spellings(action)
        return self.parse_known_args(list(argv))

    def _add_spellings(self, action: argparse.Action) -> None:
        for flag in action.option_strings:
            for word, value in (("true", action.const), ("false", not action.const)):
                for spelling in (f"{flag}={word}", f"{flag}={word.title()}"):
                    self.add_argument(
                        spelling,
                        dest=action.dest,
                        action="store_const",
                        const=value,
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {self.explained(message)}\n")

    def explained(self, message: str) -> str:
        message = message.replace("ignored explicit argument", "takes no value but true or false, not")
        return f"{message}: see {self.prog} -h"


class RaisingParser(OneLineParser):
    """For settings given in Python: errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.explained(message))


def exit_code_of(program: str, main: Callable[[], int]) -> int:
    """Run `main` as a command: a UserError becomes one line on stderr and exit code 2, a failure or a crash one line
    and 3.

    Python's own exit code for a crash is 1, which says that a run is finished already.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except UserError as error:
        _tell(program, " ".join(str(error).splitlines()))
        return EXIT_FAILED if isinstance(error, FailedError) else EXIT_USER_ERROR
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output (head, less) closed it: not an error
        return EXIT_OK
    except KeyboardInterrupt:
        print(f"{program}: interrupted; unfinished work is discarded", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        text = " ".join(str(error).split())[:500]
        _tell(program, f"{type(error).__name__}{f': {text}' if text else ''}; {TRACEBACK}=1 shows where")
        return EXIT_FAILED


def _tell(program: str, error: str) -> None:
    if (file := os.environ.get(ERROR_FILE)) is None:
        print(f"{program}: {error}", file=sys.stderr)
    else:
        Path(file).write_text(error, encoding="utf-8", errors="backslashreplace")
