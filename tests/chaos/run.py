"""Load while parts of a real stack die, stop and slow down at random; then: was every answer right, is all released?

python tests/chaos/run.py --minutes 10 --engine sim --prefill 2 --decode 2 --seed 7 --json chaos.json
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e")]

from clients import Clients, questions  # noqa: E402
from faults import Execution, plan  # noqa: E402
from pair import Pair, pair  # noqa: E402

# Steps long enough that most faults hit running sequences.
SLOW_SIM = {
    f"OMNI_{role}_SIM__TIMING__{name}": value
    for role in ("PREFILL", "DECODE")
    for name, value in (("STEP_BASE_MS", "15"), ("PREFILL_BASE_MS", "30"), ("PREFILL_TOKEN_MS", "0.3"))
} | {f"OMNI_{role}_SIM__LEASE_S": "10" for role in ("PREFILL", "DECODE")}
SMALL_VLLM = ("--kv-cache-gib", "0.25", "--max-model-len", "4096")
SECOND_PATIENCE_S = 90.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What runs, and how often something goes wrong there."""

    seconds: float
    engine: str = "sim"
    prefill: int = 2
    decode: int = 2
    seed: int = 7
    gap_s: float = 5.0
    clients: int = 8
    questions: int = 24


async def chaos(scenario: Scenario, home: Path) -> dict[str, Any]:
    """Run it; the report's `defects` and `leaks` are empty if all promises were kept."""
    is_sim = scenario.engine == "sim"
    options = ["--engine", scenario.engine, "--prefill", str(scenario.prefill), "--decode", str(scenario.decode)]
    options += [] if is_sim else SMALL_VLLM
    async with pair(home, *options, environ=SLOW_SIM if is_sim else {}) as running:
        asked = questions(scenario.seed, scenario.questions, is_seeded=is_sim)
        clients = Clients(running.urls, running.stack.model, scenario.clients, scenario.seed, asked)
        await clients.learn(margins=not is_sim)
        faults = plan(scenario.seed, scenario.seconds, scenario.gap_s, running.processes, list(running.lines))
        execution = Execution(faults, running, running.lines)
        async with clients.running():
            await execution.run()
            await asyncio.sleep(1)
        leaks = await running.quiet()
        after = await _after(clients)
        await asyncio.sleep(1)
        return _report(scenario, clients, execution, running, leaks, after)


async def _after(clients: Clients) -> int:
    """Each question once more, when all is over; how many are not answered right."""
    again = Clients(clients.urls, clients.model, 0, 0, clients.asked)
    try:
        async with asyncio.timeout(SECOND_PATIENCE_S):
            await again.learn(margins=False)
    except (TimeoutError, OSError):
        return len(clients.asked)
    return sum(again.right[q].differs(a) == "wrong" for q, a in clients.right.items())


def _report(
    scenario: Scenario, clients: Clients, execution: Execution, running: Pair, leaks: list[str], after: int
) -> dict[str, Any]:
    outcomes = clients.outcomes
    ended = sum(n for o, n in outcomes.items() if o != "failover")
    errors = {o: n for o, n in sorted(outcomes.items()) if o.startswith("error")}
    ttft = sorted(clients.ttft_s)
    return {
        "scenario": {name: getattr(scenario, name) for name in Scenario.__dataclass_fields__},
        "faults": dict(sorted(execution.done.items())),
        "requests": ended,
        "outcomes": dict(sorted(outcomes.items())),
        "error_rate": round(sum(errors.values()) / max(1, ended), 5),
        "error_rates": {o: round(n / max(1, ended), 5) for o, n in errors.items()},
        "ttft_ms": {q: round(1e3 * ttft[int(p * (len(ttft) - 1))]) for q, p in _PERCENTILES.items()} if ttft else {},
        "mean_ttft_ms": round(1e3 * statistics.fmean(ttft)) if ttft else 0,
        "counters": dict(sorted((+running.seen).items())),
        "defects": clients.defects
        + clients.wrong
        + ([f"{after} questions not answered right afterwards"] if after else []),
        "leaks": leaks,
    }


_PERCENTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--gap-s", type=float, default=5.0, help="mean time between faults")
    parser.add_argument("--json", type=Path, help="where the report goes besides the standard output")
    parser.add_argument("--keep", type=Path, help="folder for the logs, kept afterwards")
    args = parser.parse_args()
    scenario = Scenario(args.minutes * 60, args.engine, args.prefill, args.decode, args.seed, args.gap_s, args.clients)
    with contextlib.ExitStack() as stack:
        home = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(chaos(scenario, home))
    text = json.dumps(report, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 1 if report["defects"] or report["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())
