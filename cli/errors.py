"""How a command fails: one line on stderr that says what to do, and an exit code; never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

USAGE_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as shells have it


class CommandError(Exception):
    """A command cannot go on. The message is one line with a remedy; `exit_code` is not 0."""

    def __init__(self, message: str, *, exit_code: int = FAILURE_EXIT_CODE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageProblem(CommandError):
    """The command line itself is wrong: an unknown name, a value out of range, flags that exclude each other."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=USAGE_EXIT_CODE)


def one_line(text: str) -> str:
    """`text` without line breaks and runs of blanks."""
    return " ".join(text.split())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the nearest known word, or "" when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def no_cluster_at(address: str, *, flag: str) -> CommandError:
    """Nobody listens at `address`, which the option `flag` set."""
    return CommandError(
        f"no Phasewise cluster at {address}; start one with 'phasewise serve' or name it with {flag} HOST:PORT"
    )
