"""The commands and where their functions are. A command's module is imported when that command runs, not before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from cli.errors import UsageProblem, did_you_mean, one_line

COMMANDS: dict[str, tuple[str, str, str]] = {
    "serve": ("cli.serve", "serve_command", "Start a cluster on this machine: gateway, prefill and decode workers."),
    "generate": ("cli.talk", "generate_command", "Generate from a prompt and stream the answer to stdout."),
    "chat": ("cli.talk", "chat_command", "Talk with the model, line by line."),
    "status": ("cli.watch", "status_command", "Show the workers: role, state, load, KV use, handoffs."),
    "scale": ("cli.operate", "scale_command", "Give pools another number of workers: prefill=2 decode=3."),
    "drain": ("cli.operate", "drain_command", "Have a worker move or finish what it has, and be replaced."),
    "role": ("cli.operate", "role_command", "Give a worker another role: prefill, decode or mixed."),
    "stop": ("cli.operate", "stop_command", "Stop a cluster."),
    "doctor": ("cli.doctor", "doctor_command", "Measure the links, check the pools, predict handoffs."),
    "profile": ("cli.profile", "profile_command", "Measure a model on this device, for placement and planning."),
    "bench": ("cli.bench.command", "bench_command", "Measure a server under load: TTFT, TBT, E2E, goodput."),
}
"""Name → (module, function, one line for the overview)."""

# Typer's older versions raise Click's exceptions, newer ones their own; both have BadParameter as a UsageError.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


class LazyGroup(typer.core.TyperGroup):
    """A group that knows its commands by a line of help each, and loads one when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            module, function, _ = COMMANDS[name]
            command = _build_command(name, vars(importlib.import_module(module))[function])
        return name, command, rest


def invoke(arguments: Sequence[str]) -> int:
    """Runs a command line; returns its exit code.

    Raises:
        UsageProblem: unknown command or option (with the nearest one), missing or wrong value.
    """
    tree = typer.main.get_command(_build_tree())
    try:
        result = tree.main(args=list(arguments), prog_name="phasewise", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _USAGE_ERROR as error:
        raise _explain_usage(error) from None
    return result if isinstance(result, int) else 0


def _build_tree() -> typer.Typer:
    app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    for name, (_, _, line) in COMMANDS.items():
        app.command(name, help=line)(_placeholder)
    return app


def _build_command(name: str, function: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name)(function)
    return typer.main.get_command(app)


def _placeholder() -> None:
    """Stands for a command in the overview; `LazyGroup` puts the real one in its place."""
    raise AssertionError("a placeholder was called")


def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. Must come first.")] = False,
) -> None:
    """Phasewise: disaggregated serving of generative language models.

    Examples:

    \b
      phasewise serve smollm2-135m --prefill 1 --decode 1

    \b
      phasewise generate "The capital of France is" --max-tokens 16

    \b
      phasewise COMMAND --help
    """
    if show_version:
        typer.echo(f"phasewise {installed_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def installed_version() -> str:
    try:
        return version("phasewise")
    except PackageNotFoundError:
        return "(not installed: running from a source tree)"


def _explain_usage(error: Any) -> UsageProblem:
    """The parser's message as one line, with the nearest name and the place where to read more."""
    command = error.ctx.command_path if error.ctx is not None else "phasewise"
    message = one_line(str(error.message) if _names_option(error) else error.format_message()).rstrip(".")
    if _names_option(error) and error.ctx is not None:
        known = [name for parameter in error.ctx.command.params for name in parameter.opts + parameter.secondary_opts]
        message = f"no option {error.option_name!r}{did_you_mean(error.option_name, [*known, '--help'])}"
    return UsageProblem(f"{message}; see '{command} --help'")


def _names_option(error: Any) -> bool:
    return type(error).__name__ == "NoSuchOption"
