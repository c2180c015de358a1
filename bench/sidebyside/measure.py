"""One measured window: the load process runs, and CPU time is read at its two marks."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from sidebyside.child import Broken
from sidebyside.processes import Running
from sidebyside.prompts import Prompts
from sidebyside.systems import HOST, MODEL, OTHER_CORE

SHORT_PROMPT_TOKENS = 112  # about 128 with the chat template
SHORT_OUTPUT_TOKENS = (64, 128)
LONG_OUTPUT_TOKENS = (4, 4)
_START_AND_END_S = 30.0
_MACHINE = "whole machine"


@dataclass(frozen=True, slots=True)
class Load:
    """What the client does: `streams` closed loops, and long prompts at a rate when it is above 0."""

    name: str
    streams: int
    warm_s: float
    measure_s: float
    long_rate_per_s: float = 0.0
    long_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """Figures of one window. Times in ms, CPU in microseconds per output token, shares of one core in [0, 1].

    `foreign_share` is of the whole machine: what processes outside the benchmark used.
    """

    tokens_per_s: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tpot_ms: float
    long_ttft_p50_ms: float
    long_ttft_p99_ms: float
    serving_cpu_us: float
    engine_cpu_us: float
    parts_cpu_us: Mapping[str, float]
    serving_core_share: float
    client_core_share: float
    foreign_share: float
    tokens_per_event: float
    requests: int
    long_requests: int
    skipped_arrivals: int


def plan(load: Load, port: int, model_dir: Path, seed: str) -> dict[str, Any]:
    """What the load process reads from its standard input."""
    prompts = Prompts(model_dir, seed)
    short = prompts.draw(
        max(64, int(load.streams * (load.warm_s + load.measure_s) * 4)), SHORT_PROMPT_TOKENS, SHORT_OUTPUT_TOKENS
    )
    duties: dict[str, Any] = {
        "host": HOST,
        "port": port,
        "model": MODEL,
        "streams": load.streams,
        "warm_s": load.warm_s,
        "measure_s": load.measure_s,
        "short": [asdict(p) for p in short],
    }
    if load.long_rate_per_s:
        arrivals = int(load.long_rate_per_s * (load.warm_s + load.measure_s)) + 2
        long = prompts.draw(arrivals, load.long_prompt_tokens, LONG_OUTPUT_TOKENS)
        duties |= {"long": [asdict(p) for p in long], "long_rate_per_s": load.long_rate_per_s, "long_connections": 16}
    return duties


def measure(load: Load, port: int, model_dir: Path, seed: str, parts: Sequence[Running]) -> Point:
    """Run one load.

    Raises:
        Broken: the load process failed, an answer was not as long as asked, or nothing arrived.
    """
    duties = plan(load, port, model_dir, seed)
    client = subprocess.Popen(
        [sys.executable, "-m", "sidebyside.load"],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_to_other_core,
    )
    watchdog = threading.Timer(load.warm_s + load.measure_s + _START_AND_END_S, client.kill)
    watchdog.start()
    try:
        marks, result = _converse(client, duties, parts)
    finally:
        watchdog.cancel()
        client.kill()
        client.wait()
    if "error" in result or len(marks) != 2:
        raise Broken(f"load {load.name}: {result.get('error', 'the load process ended early')}")
    return _point(load, result, marks[0], marks[1])


def _converse(
    client: "subprocess.Popen[str]", duties: Mapping[str, Any], parts: Sequence[Running]
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    if client.stdin is None or client.stdout is None:
        raise Broken("the load process has no pipes")
    client.stdin.write(json.dumps(duties))
    client.stdin.close()
    marks: list[dict[str, float]] = []
    result: dict[str, Any] = {}
    for line in client.stdout:
        message = json.loads(line)
        if "mark" in message:
            marks.append(_cpu_of(parts))
        else:
            result = message
    return marks, result


def _cpu_of(parts: Sequence[Running]) -> dict[str, float]:
    times = psutil.cpu_times()
    total = {_MACHINE: times.user + times.nice + times.system + times.irq + times.softirq}
    for part in parts:
        for name, seconds in part.cpu_s().items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def _point(load: Load, result: Mapping[str, Any], before: Mapping[str, float], after: Mapping[str, float]) -> Point:
    ttft, itl = result["ttft_ms"], result["itl_ms"]
    if not itl["count"] or not ttft["short"]["count"]:
        raise Broken(f"load {load.name}: no tokens arrived in the window")
    if result["wrong_lengths"]:
        raise Broken(f"load {load.name}: {result['wrong_lengths']} answers were not as long as asked")
    window_s = result["window_s"]
    tokens = sum(result["window_events"].values()) * result["tokens_per_event"]
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
    engine_s, machine_s = spent.pop("engine", 0.0), spent.pop(_MACHINE)
    serving_s = sum(spent.values())
    foreign_s = max(0.0, machine_s - serving_s - engine_s - result["client_cpu_s"])
    return Point(
        tokens_per_s=result["window_events"]["short"] * result["tokens_per_event"] / window_s,
        ttft_ms=ttft["short"]["p50"],
        itl_p50_ms=itl["p50"],
        itl_p99_ms=itl["p99"],
        tpot_ms=result["tpot_ms"]["p50"],
        long_ttft_p50_ms=ttft["long"]["p50"],
        long_ttft_p99_ms=ttft["long"]["p99"],
        serving_cpu_us=serving_s / tokens * 1e6,
        engine_cpu_us=engine_s / tokens * 1e6,
        parts_cpu_us={name: seconds / tokens * 1e6 for name, seconds in spent.items()},
        serving_core_share=serving_s / window_s,
        client_core_share=result["client_cpu_s"] / window_s,
        foreign_share=foreign_s / window_s / (os.cpu_count() or 1),
        tokens_per_event=result["tokens_per_event"],
        requests=ttft["short"]["count"],
        long_requests=ttft["long"]["count"],
        skipped_arrivals=result["skipped_arrivals"],
    )


def _to_other_core() -> None:
    os.sched_setaffinity(0, {OTHER_CORE})
