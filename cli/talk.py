"""`phasewise generate` and `phasewise chat`: talk to a cluster through the SDK."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import UsageProblem, no_cluster_at
from cli.interrupts import on_interrupt
from phasewise.core.config import split_address
from phasewise.core.errors import ServingError, Unavailable

if TYPE_CHECKING:
    from phasewise.client import Client
    from phasewise.options import Options
    from phasewise.results import Completion

CONNECT_TIMEOUT_S = 5.0

GrpcOption = Annotated[str, typer.Option(help="HOST:PORT of the gateway's gRPC server.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Most output tokens. Default: the server's.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy. Default: 1.")]
TopPOption = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens up to this share.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes the answer repeatable.")]
TimeoutOption = Annotated[float, typer.Option(min=0.001, help="Seconds after which a request is given up.")]


def generate_command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    grpc: GrpcOption = "127.0.0.1:50051",
    max_tokens: Annotated[int, typer.Option(help="Most output tokens.")] = 128,
    min_tokens: Annotated[
        int | None, typer.Option(help="Nothing ends the answer before it has so many tokens.")
    ] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="Number of samples; more than one is not streamed.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put the prompt into the model's chat template, or take it as it is.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when all is there.")] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Show when and where the request passed (stderr).")
    ] = False,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Generate from a prompt and stream the answer to stdout.

    Examples:

    \b
      phasewise generate "The capital of France is" --max-tokens 16 --temperature 0

    \b
      phasewise generate "Tell me a joke." --chat --n 2 --seed 7 --json

    \b
      phasewise generate - --raw --timeline < prompt.txt
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    options: Options = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "n": n,
        "stop": stop or None,
        "timeline": timeline,
    }
    with open_client(grpc, timeout_s=timeout) as client, closed_by_interrupt(client):
        messages = [{"role": "user", "content": text}]
        stream = client.chat(messages, stream=True, **options) if chat else client.stream(text, **options)
        with stream:
            is_live = not as_json and (n is None or n == 1)
            if is_live:
                _echo_stream(stream)
            completion = stream.completion() if is_live else stream.drain()
    if as_json:
        typer.echo(json.dumps(completion_fields(completion), indent=2, ensure_ascii=False))
    elif not is_live:
        for index, sample in enumerate(completion.samples):
            typer.echo(f"[{index}] {sample.text}")
    if timeline and not as_json:
        for line in timeline_lines(completion):
            typer.echo(line, err=True)


def chat_command(
    grpc: GrpcOption = "127.0.0.1:50051",
    system: Annotated[str | None, typer.Option(help="System message at the head of the conversation.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Talk with the model, line by line; it remembers what was said.

    /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer.

    Examples:

    \b
      phasewise chat

    \b
      phasewise chat --system "Answer in one sentence." --temperature 0.2
    """
    from cli.repl import ChatRepl

    options: Options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with open_client(grpc, timeout_s=timeout) as client:
        with closed_by_interrupt(client):
            model = client.model()
        ChatRepl(client, options, system=system, greeting=f"{model.name} at {grpc}").run()


@contextmanager
def open_client(address: str, *, timeout_s: float) -> Iterator[Client]:
    """An SDK client. An address where nobody listens becomes a CommandError that names it."""
    from phasewise.client import Client

    try:
        host, port = split_address(address, field="--grpc")
    except ValueError as error:
        raise UsageProblem(str(error)) from None
    with Client(address, timeout_s=timeout_s) as client:
        try:
            yield client
        except Unavailable:
            # Also the answer of a cluster that is starting or draining: only then its own words say more.
            if _is_listening(host, port):
                raise
            raise no_cluster_at(address, flag="--grpc") from None


@contextmanager
def closed_by_interrupt(client: Client) -> Iterator[None]:
    """In this block Ctrl-C closes the client, which ends its calls; KeyboardInterrupt follows when they are over."""
    with on_interrupt(client.close) as interrupt:
        try:
            yield
        except (ServingError, RuntimeError):  # a closed client says so in one of the two
            if not interrupt.came:
                raise
    if interrupt.came:
        raise KeyboardInterrupt


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _echo_stream(stream: Any) -> None:
    """Prints the text as it comes, and a line's end where the text has none."""
    last = ""
    for delta in stream:
        if delta.text:
            typer.echo(delta.text, nl=False)
            sys.stdout.flush()
            last = delta.text
    if not last.endswith("\n"):
        typer.echo()


def completion_fields(completion: Completion) -> dict[str, Any]:
    """A completion for --json. `timeline` and `placement` are there when they were asked for."""
    fields: dict[str, Any] = {
        "request_id": completion.request_id,
        "samples": [
            {
                "text": sample.text,
                "token_ids": list(sample.token_ids),
                "finish_reason": sample.finish_reason.value,
                "stop_reason": sample.stop_reason,
            }
            for sample in completion.samples
        ],
        "usage": {
            "prompt_tokens": completion.usage.num_prompt_tokens,
            "output_tokens": completion.usage.num_output_tokens,
            "cached_tokens": completion.usage.num_cached_tokens,
        },
    }
    if completion.timeline:
        fields["timeline"] = [
            {
                "stage": event.stage,
                "at_unix_s": event.at_unix_s,
                "worker": event.worker_id,
                "bytes": event.num_bytes,
                "duration_s": event.duration_s,
            }
            for event in completion.timeline
        ]
    if completion.placement is not None:
        placed = completion.placement
        fields["placement"] = {
            "prefill_worker": placed.prefill_worker,
            "decode_worker": placed.decode_worker,
            "attempt": placed.attempt,
        }
    return fields


def timeline_lines(completion: Completion) -> list[str]:
    """One line per event: time since the first event, stage, worker, and what moved or how long it took."""
    events = sorted(completion.timeline, key=lambda event: event.at_unix_s)
    if not events:
        return ["no timeline came with the answer"]
    start_s = events[0].at_unix_s
    lines = [f"request {completion.request_id}"]
    for event in events:
        extra = []
        if event.num_bytes:
            extra.append(f"{event.num_bytes:,} bytes")
        if event.duration_s:
            extra.append(f"{event.duration_s * 1e3:.2f} ms")
        line = (
            f"{(event.at_unix_s - start_s) * 1e3:+11.2f} ms  {event.stage:<14} {event.worker_id:<12} {', '.join(extra)}"
        )
        lines.append(line.rstrip())
    if completion.placement is not None:
        placed = completion.placement
        lines.append(f"prefill on {placed.prefill_worker}, decode on {placed.decode_worker}, attempt {placed.attempt}")
    return lines
