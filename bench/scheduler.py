"""Compare scheduling policies on a simulated fleet that replays a trace.

    python bench/scheduler.py --trace mooncake_conversation_trace.jsonl
    python bench/scheduler.py --trace mooncake_conversation_trace.jsonl --quick --json policies.json

Simulated: engines compute by a stated model of time, and no device is involved. The proxy's scheduling is the product's
own code: fleet view, ledger, predictors, prefix index with marks, policies and the queue that holds requests.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from fleetsim.bounds import most_kept, unreachable
from fleetsim.compare import ATTAINED, KNEE_SYSTEMS, Runner, served_speed
from fleetsim.constants import DECODE, PREFILL
from fleetsim.plot import svg
from fleetsim.report import Fleet, as_json, blocks_of, goals, rivals
from fleetsim.simulation import Scene
from fleetsim.slo import PROMISES
from fleetsim.systems import SYSTEMS
from rich.console import Console
from sidebyside.tables import markdown, show
from tracereplay.trace import Request, read_trace

LEVELS = {"below": 0.8, "knee": 1.0, "above": 1.25}
SWEEP = (0.7, 0.85, 1.0, 1.1, 1.2, 1.35, 1.5, 1.7)
"""Speeds relative to the knee."""
KNEE_SEARCH = (0.18, 0.23, 0.26, 0.29, 0.32, 0.35)
"""Speeds for each prefill worker between which the knee is looked for."""
QUICK_REQUESTS, QUICK_SPEEDS = 1500, (2.0, 2.5, 3.0)
QUICK_SYSTEMS = ("cost", "cost/no-hold", "round_robin", "least_loaded", "least_uncached_tokens")


@dataclass(frozen=True, slots=True)
class Plan:
    """`speeds`: the levels, the middle one taken for the knee; none: looked for."""

    speeds: tuple[float, ...]
    sweeps: bool


def notes_of(requests: list[Request], scene: Scene, seeds: int, fixed_speeds: bool) -> list[str]:
    """What the reader must know of the model."""
    tokens = sum(request.input_tokens for request in requests)
    promise, network = scene.promise, scene.network
    knee = (
        "speeds were given, the middle one stands for the knee"
        if fixed_speeds
        else f"the knee is the highest speed at which the best of {', '.join(KNEE_SYSTEMS)} keeps the SLO for "
        f"{ATTAINED:.0%} of requests (one seed, interpolated); the other levels are "
        + ", ".join(f"{factor:g}x" for factor in LEVELS.values() if factor != 1)
        + " of it"
    )
    return [
        f"{len(requests):,} requests, {tokens / 1e6:.1f} million prompt tokens; {knee}",
        f"simulated, no device: a prompt step takes {PREFILL.prefill_base_ms:g} ms + {PREFILL.prefill_token_ms:g} ms "
        f"per token + {PREFILL.prefill_context_ms:g} ms per token and token of context, at most "
        f"{PREFILL.max_num_batched_tokens} tokens (beside decode {DECODE.max_num_batched_tokens}); a decode step "
        f"{DECODE.step_base_ms:g} ms + {DECODE.step_sequence_ms:g} ms per sequence + {DECODE.step_context_ms:g} ms per "
        f"token of context; transfer {PREFILL.transfer_latency_ms:g} ms + {PREFILL.kv_bytes_per_token} bytes per token "
        f"at {PREFILL.transfer_gib_per_s:g} GiB/s; each with {PREFILL.noise:.0%} of noise; "
        f"{PREFILL.num_blocks * 512 / 1e6:.1f} million tokens of KV per worker",
        f"SLO, told to the policies: first token within {promise.ttft_s:g} s"
        + (f" + {promise.unloaded_factor:g}x the unloaded prompt's time" if promise.unloaded_factor else "")
        + f", mean gap within {promise.itl_s * 1e3:g} ms; scaled: {PROMISES['scaled'].ttft_s:g} s + "
        f"{PROMISES['scaled'].unloaded_factor:g}x unloaded; strict: 99% of a request's gaps within 100 ms as well",
        f"workers' stats each {network.stats_s * 1e3:g} ms, messages take {network.message_s * 1e3:g} ms, block events "
        f"are published each {network.publish_s:g} s; {scene.proxies} proxies",
        f"{seeds} seeds: median (lowest-highest); a seed means the same arrivals and noise for every system",
        "other policies run as systems with them do: dispatched at once, engines serve in order of arrival",
    ]


def fleet_of(
    runner: Runner, requests: list[Request], scene: Scene, plan: Plan, systems: list[str], seeds: int
) -> Fleet:
    """Find the knee unless speeds are given, run all levels, then sweep `cost` and the best others."""
    levels = levels_of(plan, runner, scene)
    found = runner.levels(scene, levels, systems, seeds)
    knee = levels["knee"]
    grid = [round(factor * knee, 3) for factor in SWEEP]
    sweep: Mapping[str, list[float]] = {}
    if plan.sweeps:
        promise = scene.promise.name
        at_knee = next(level for level in found if level.title == "knee")
        best = sorted(rivals(systems), key=lambda s: -at_knee.median(s, lambda o: o.goodput(promise)))[:2]
        names = [name for name in ("cost", "cost/no-hold", *best, "round_robin") if name in systems]
        sweep = runner.sweep(scene, list(dict.fromkeys(names)), grid)
    bounds = {}
    for title, speed in levels.items():
        faster = [Request(r.at_s / speed, r.input_tokens, r.output_tokens, r.keys) for r in requests]
        bounds[title] = {
            "unreachable": unreachable(faster, scene.promise),
            "prefill": most_kept(faster, scene.promise, scene.prefills),
            "all": most_kept(faster, scene.promise, scene.prefills + scene.decodes),
        }
    return Fleet(scene.title, knee, found, grid, sweep, bounds)


def levels_of(plan: Plan, runner: Runner, scene: Scene) -> dict[str, float]:
    """Speeds by title; one of them is the knee."""
    if plan.speeds:
        middle = len(plan.speeds) // 2
        return {"knee" if n == middle else f"x{speed:g}": speed for n, speed in enumerate(plan.speeds)}
    search = [round(speed * scene.prefills, 3) for speed in KNEE_SEARCH]
    knee = max(served_speed(search, kept) for kept in runner.sweep(scene, KNEE_SYSTEMS, search).values())
    return {title: factor * knee for title, factor in LEVELS.items()}


def main(
    trace: Annotated[Path, typer.Option(help="Trace in Mooncake's format, JSON lines", exists=True, dir_okay=False)],
    quick: Annotated[bool, typer.Option(help=f"{QUICK_REQUESTS} requests, few systems, one fleet, one seed")] = False,
    requests: Annotated[int | None, typer.Option(min=1, help="Only so many of the trace's requests")] = None,
    fleets: Annotated[str, typer.Option(help="Prefill x decode workers")] = "",
    speeds: Annotated[str, typer.Option(help="The trace so many times as fast, instead of a search; for all")] = "",
    systems: Annotated[str, typer.Option(help="Names, separated by commas; default: all")] = "",
    sweep: Annotated[bool, typer.Option(help="Also find the load that cost and the best others serve")] = True,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default 3, quick 1")] = None,
    slo: Annotated[str, typer.Option(help=f"Told to the policies: {', '.join(PROMISES)}")] = "fixed",
    slow: Annotated[str, typer.Option(help="worker:factor of its times, such as 0:1.5,9:1.5")] = "",
    proxies: Annotated[int, typer.Option(min=1)] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = max(1, (os.cpu_count() or 2) // 2),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw goodput over load here, as SVG")] = None,
) -> None:
    """Goodput, latency and prediction error of every policy at three loads around the knee."""
    began_s = time.perf_counter()
    names = systems.split(",") if systems else list(QUICK_SYSTEMS if quick else SYSTEMS)
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; known: {', '.join(SYSTEMS)}", param_hint="--systems")
    if slo not in PROMISES:
        raise typer.BadParameter(f"known: {', '.join(PROMISES)}", param_hint="--slo")
    limit = requests or (QUICK_REQUESTS if quick else None)
    given = tuple(float(speed) for speed in speeds.split(",")) if speeds else QUICK_SPEEDS if quick else ()
    plan = Plan(given, sweep and not quick)
    factors = tuple((int(n), float(f)) for n, f in (pair.split(":") for pair in slow.split(",") if pair))
    count = seeds or (1 if quick else 3)
    source, results = read_trace(trace, limit), []
    scene = Scene(promise=PROMISES[slo], slow=factors, proxies=proxies)
    with Runner(trace, limit, jobs) as runner:
        for fleet in (fleets or ("8x8" if quick else "8x8,4x4")).split(","):
            prefills, decodes = map(int, fleet.split("x"))
            shape = Scene(prefills, decodes, promise=scene.promise, slow=factors, proxies=proxies)
            results.append(fleet_of(runner, source, shape, plan, names, count))
    machine = f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    took = f"took {time.perf_counter() - began_s:.0f} s in {jobs} processes on {machine}"
    notes = [*notes_of(source, scene, count, bool(given)), took]
    blocks, lines = blocks_of(results), [*(line for fleet in results for line in goals(fleet)), *notes]
    show(blocks, lines, Console(width=max(Console().width, 220)))
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "fleets": as_json(results)}, indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(blocks, lines))
    if plot_file:
        plot_file.write_text(svg(results))


if __name__ == "__main__":
    typer.run(main)
