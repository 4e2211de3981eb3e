"""`phasewise bench`: flags in, runs made, report out."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import CommandError, UsageProblem

if TYPE_CHECKING:
    from cli.bench.points import Point, WorkloadFlags
    from cli.bench.summary import RequestRow, Slo
    from cli.bench.target import Target


@dataclass(frozen=True, slots=True)
class BenchFlags:
    """The flags that do not concern the workload."""

    http: str
    model: str | None
    vocab_size: int | None
    headers: dict[str, str]
    extra: dict[str, Any]
    slo: Slo
    warmup: int
    timeout_s: float
    output: str | None
    save_requests: bool
    plot: str | None


def bench_command(
    http: Annotated[str, typer.Option(help="HOST:PORT or URL of an OpenAI-compatible server.")] = "127.0.0.1:8000",
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: so many requests at all times; 1,2,4 sweeps. Default: 1.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: Poisson arrivals, requests/s; 1,2,4 sweeps; inf: all at once.")
    ] = None,
    trace: Annotated[str | None, typer.Option(help="Trace file to replay; its format is known by its content.")] = None,
    time_scale: Annotated[
        float | None, typer.Option(help="Arrival times of the trace are multiplied by this; 0.5 is twice as fast.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many requests of the trace.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longer prompts are cut to this.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Longer outputs are cut to this.")] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Prompt length of synthetic requests: 256 or 64:512. Default: 256.")
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="Output length of synthetic requests: 64 or 16:128. Default: 64.")
    ] = None,
    shared_prefix_tokens: Annotated[
        int, typer.Option(min=0, help="The first so many prompt tokens are the same in all requests.")
    ] = 0,
    num_requests: Annotated[int | None, typer.Option(help="Synthetic requests per run. Default: 100.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds in which requests are sent, per run.")] = None,
    seed: Annotated[int, typer.Option(help="Decides lengths, arrivals and prompts.")] = 0,
    slo: Annotated[
        str | None, typer.Option(help="Limits for goodput: ttft=500ms,tbt=50ms,tpot=40ms,e2e=10s, any of them.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name, where the server has several.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts are made of ids below this. Default: asked from the server.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent before the first run, not measured.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request counts as failed.")] = 600.0,
    header: Annotated[list[str] | None, typer.Option(help="HTTP header 'Name: value'; may be repeated.")] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object laid over every request.")] = None,
    output: Annotated[str | None, typer.Option(help="Write the result as JSON to this file.")] = None,
    save_requests: Annotated[bool, typer.Option("--save-requests", help="With every request's times in it.")] = False,
    plot: Annotated[str | None, typer.Option(help="Write a picture (.png, .svg, .pdf) to this file.")] = None,
) -> None:
    """Measure a server under load: TTFT, TBT, TPOT, E2E, throughput, goodput.

    Prompts are token ids of exact length, outputs have exact length (ignore_eos). The tokens of one event arrive
    together: they count as one gap and zeros.

    Examples:

    \b
      phasewise bench --concurrency 1,2,4,8 --prompt-tokens 512 --output-tokens 128 --output result.json

    \b
      phasewise bench --rate 0.5,1,2 --duration 60 --slo ttft=1s,tbt=100ms --plot sweep.png

    \b
      phasewise bench --trace AzureLLMInferenceTrace_conv.csv --limit 200 --time-scale 10 --max-prompt-tokens 1024
    """
    from cli.bench.points import WorkloadFlags, plan_points
    from cli.bench.summary import Slo, parse_slo

    workload = WorkloadFlags(
        concurrency=concurrency,
        rate=rate,
        trace=trace,
        time_scale=time_scale,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        shared_prefix_tokens=shared_prefix_tokens,
        num_requests=num_requests,
        duration_s=duration,
        seed=seed,
    )
    if save_requests and output is None:
        raise UsageProblem("--save-requests writes into the result; give --output FILE too")
    for flag, path in (("--output", output), ("--plot", plot)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise UsageProblem(f"{flag} {path}: its folder does not exist; make it first")
    try:
        flags = BenchFlags(
            http=http,
            model=model,
            vocab_size=vocab_size,
            headers=_headers(header or []),
            extra=_extra(extra_body),
            slo=parse_slo(slo) if slo is not None else Slo(),
            warmup=warmup,
            timeout_s=timeout,
            output=output,
            save_requests=save_requests,
            plot=plot,
        )
        points, description = plan_points(workload)
    except ValueError as error:
        raise UsageProblem(str(error)) from None
    document, rows = asyncio.run(run_bench(flags, workload, points, description))
    _report(flags, document, rows)


async def run_bench(
    flags: BenchFlags, workload: WorkloadFlags, points: list[Point], description: dict[str, Any]
) -> tuple[dict[str, Any], list[RequestRow]]:
    """(the result document, the rows of the last point). Raises CommandError when the server is not there."""
    from cli.bench.show import result_document
    from cli.bench.summary import summarize
    from cli.bench.target import Target

    entries: list[dict[str, Any]] = []
    rows: list[RequestRow] = []
    async with Target(flags.http, headers=flags.headers, timeout_s=flags.timeout_s, extra=flags.extra) as target:
        served = await target.discover(model=flags.model, vocab_size=flags.vocab_size)
        for number, point in enumerate(points):
            target.error_details.clear()
            rows = await _run_point(target, served.token_ids, workload, point, number, flags.warmup)
            entry = {"label": point.label, "mode": point.mode, "value": point.value}
            entry |= {**summarize(rows, slo=flags.slo), "error_details": dict(target.error_details)}
            if flags.save_requests:
                entry["rows"] = [row.as_json() for row in rows]
            entries.append(entry)
        about = {
            "url": target.url,
            "model": served.model,
            "prompt_token_ids": f"{len(served.token_ids)} ids ({served.token_source})",
            "tbt_basis": "tokens" if target.counts_tokens else "events",
            "status": served.status,
        }
    return result_document(target=about, workload=description, points=entries), rows


async def _run_point(
    target: Target, token_ids: Any, workload: WorkloadFlags, point: Point, number: int, num_warmup: int
) -> list[RequestRow]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cli.bench.load import LoadRun, warm_up_requests
    from cli.bench.workload import PromptBuilder

    # Other prompts in each point: those of the last one are in the server's prefix cache by now.
    prompts = PromptBuilder(token_ids, seed=f"{workload.seed}/{number}", shared_prefix=workload.shared_prefix_tokens)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        if number == 0 and num_warmup:
            task = progress.add_task("warm-up", total=num_warmup)
            warm = LoadRun(target, prompts, lambda row: progress.advance(task))
            await warm.warm_up(warm_up_requests(point, num_warmup))
        task = progress.add_task(point.label, total=point.num_expected)
        return await LoadRun(target, prompts, lambda row: progress.advance(task)).run(point)


def _report(flags: BenchFlags, document: dict[str, Any], rows: list[RequestRow]) -> None:
    """Prints and writes. Raises CommandError when not one request succeeded: such a run measured nothing."""
    from rich.console import Console

    from cli.bench.show import print_report, write_json

    print_report(document, Console())
    if flags.output is not None:
        write_json(document, flags.output)
    points = document["points"]
    if not any(point["completed"] for point in points):
        reasons = sorted({reason for point in points for reason in point["errors"]})
        raise CommandError(f"no request succeeded ({', '.join(reasons) or 'none was sent'}); see the lines above")
    if flags.plot is not None:
        from cli.bench.plot import plot_run, plot_sweep, save_plot

        title = f"{document['target']['model']} at {document['target']['url']}"
        figure = plot_sweep(points, title) if len(points) > 1 else plot_run(rows, f"{title}, {points[0]['label']}")
        save_plot(figure, flags.plot)


def _headers(lines: list[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise UsageProblem("--header must be 'Name: value'")
        found[name.strip()] = value.strip()
    return found


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise UsageProblem(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise UsageProblem(f"--extra-body must be a JSON object such as '{{\"top_k\": 1}}', not {text!r}")
    return extra
