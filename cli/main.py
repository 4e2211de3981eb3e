"""Entry point of the `phasewise` command. Only the standard library here, so that a bare installation can say what it
lacks; the command tree is in `cli/command_tree.py`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from cli.errors import FAILURE_EXIT_CODE, INTERRUPT_EXIT_CODE, CommandError, one_line
from phasewise.core.errors import ConfigError, ServingError

DEBUG_FLAG = "--debug"
OWN_PACKAGES = (
    "phasewise",
    "cli",
    "control_plane",
    "workers",
    "prefill_workers",
    "decode_workers",
    "engine",
    "kv_transfer",
)


def main() -> None:
    """Runs the command of this process and exits with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line; returns its exit code. A failure is one line on stderr; its traceback shows with --debug."""
    try:
        from cli.command_tree import invoke

        code = invoke(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPT_EXIT_CODE
    except BrokenPipeError:
        # The reader of our output has left (`phasewise … | head`). Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE_EXIT_CODE
    except Exception as error:
        if DEBUG_FLAG in arguments[:1]:
            traceback.print_exc()
        print(f"phasewise: {explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, CommandError) else FAILURE_EXIT_CODE
    return code


def explain(error: Exception) -> str:
    """One line for a person: what went wrong and, where we know, what to do."""
    if isinstance(error, CommandError):
        return one_line(str(error))
    if isinstance(error, ServingError):
        hint = "; it is safe to try again" if error.retry_safe and not isinstance(error, ConfigError) else ""
        return one_line(error.message) + hint
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OWN_PACKAGES:
        return f"this command needs the package {error.name!r}; install it with: pip install 'phasewise[server]'"
    text = one_line(str(error))
    return f"internal error: {type(error).__name__}: {text}; run 'phasewise {DEBUG_FLAG} …' to see where and report it"


if __name__ == "__main__":
    main()
