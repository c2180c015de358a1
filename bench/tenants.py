"""Three tenants, one of which floods: what the others notice.

    python bench/tenants.py
    python bench/tenants.py --quick --json tenants.json

Simulated: engines compute by a stated model of time, no device is involved. The quiet tenants' time to first token is
measured alone, beside the flood, and beside the flood with fairness switched off: once on a virtual clock (the
product's scheduling over the fleet of bench/scheduler.py, for fleets of several sizes), once with a real proxy and
kvstore over engine processes. An engine ends the prompt it has begun, so what the quiet must notice is the rest of the
prompt that ends first: the less, the more engines there are.
"""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from fleetsim.simulation import Scene as FleetScene
from fleetsim.simulation import simulate
from fleetsim.systems import SYSTEMS, held
from livereplay.client import Answer, Order, body_of, replay
from livereplay.processes import Proxy, Shape, engines, proxy
from prefixindex.timing import latency_of
from rich.console import Console
from sidebyside.machine import machine
from sidebyside.tables import Block, markdown, show
from tracereplay.trace import BLOCK_TOKENS, Request

ROOT = Path(__file__).resolve().parents[1]
QUIET, FLOOD = ("quiet-a", "quiet-b"), "flood"
OUTPUT_TOKENS = 8
PREFILL_MS = 8.0, 0.4
"""Of a prompt on an engine process: base, and per token. So slow that the limit is neither the machine's cores nor the
proxy's: what waits for its core waits before the queue that treats tenants fairly."""
GOAL = 1.3


@dataclass(frozen=True, slots=True)
class Case:
    """`is_warm`: the proxy has served other prompts before, which no engine has cached."""

    is_flooded: bool = True
    fairness: str = "least_attained_service"
    is_warm: bool = True


CASES = {
    "alone": Case(is_flooded=False),
    "flooded": Case(),
    "flooded, proxy just started": Case(is_warm=False),
    "flooded, no fairness": Case(fairness="none"),
}
WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Scene:
    """`flood_load`: of what the prefill engines can compute, the share that the flood alone asks for."""

    prefill: int = 16
    decode: int = 2
    prompt_tokens: int = 1500
    quiet_per_s: float = 1.5
    flood_load: float = 2.0
    seconds: float = 40.0
    repeats: int = 3
    virtual_prefills: tuple[int, ...] = (2, 4, 8, 16)
    virtual_tokens: int = 4000
    virtual_seconds: float = 120.0

    @property
    def capacity_per_s(self) -> float:
        return self.prefill / ((PREFILL_MS[0] + PREFILL_MS[1] * self.prompt_tokens) / 1e3)


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds to the first token of both quiet tenants; what became of the flood.

    `p99_by_round_ms` shows a round in which the machine did something else, `proxy_core` the share of a core that the
    proxy's event loop took; both are empty on the virtual clock.
    """

    fleet: str
    name: str
    p50_ms: float
    p99_ms: float
    quiet: int
    quiet_failed: int
    flood: int
    flood_refused: int
    p99_by_round_ms: tuple[float, ...] = ()
    proxy_core: tuple[float, ...] = ()


def orders_of(scene: Scene, tenant: str, per_s: float, seed: str) -> list[Order]:
    """Poisson arrivals of prompts that share nothing."""
    rng, at_s = random.Random(seed), 0.0
    orders: list[Order] = []
    while (at_s := at_s + rng.expovariate(per_s)) < scene.seconds:
        tokens = [rng.randrange(300, 1000) for _ in range(length_of(tenant, scene.prompt_tokens, rng))]
        body = body_of("tiny-moe", tokens, OUTPUT_TOKENS)
        orders.append(Order(at_s, body, len(tokens), OUTPUT_TOKENS, {"x-omni-tenant": tenant}))
    return orders


def length_of(tenant: str, mean_tokens: int, rng: random.Random) -> int:
    """The flood's prompts are of all lengths about the mean: equal ones would keep all engines in step for ever."""
    return rng.randrange(mean_tokens // 2, mean_tokens * 3 // 2) if tenant == FLOOD else mean_tokens


async def ask(at: Proxy, orders: Sequence[Order]) -> list[tuple[str, Answer]]:
    ordered = sorted(orders, key=lambda order: order.at_s)
    answers = await replay(at.port, ordered, lambda number: None, WAIT_S)
    return [(order.headers["x-omni-tenant"], answer) for order, answer in zip(ordered, answers, strict=True)]


@dataclass(frozen=True, slots=True)
class Round:
    """Answers with their tenants; the share of a core that the proxy's event loop took meanwhile."""

    answers: Sequence[tuple[str, Answer]]
    proxy_core: float


def round_of(at: Proxy, orders: Sequence[Order]) -> Round:
    began_s, before_s = time.monotonic(), busy_s(at)
    answers = asyncio.run(ask(at, orders))
    return Round(answers, (busy_s(at) - before_s) / (time.monotonic() - began_s))


def busy_s(at: Proxy) -> float:
    return at.samples()["omni_proxy_event_loop_busy_seconds_total", ()]


def row_of(fleet: str, name: str, rounds: Sequence[Round]) -> Row:
    answered = [each for one in rounds for each in one.answers]
    quiet = [answer for tenant, answer in answered if tenant != FLOOD]
    flood = [answer for tenant, answer in answered if tenant == FLOOD]
    taken = latency_of(ttfts_s(answered))
    failed = sum(bool(answer.error) for answer in quiet)
    refused = sum(bool(answer.error) for answer in flood)
    by_round = tuple(latency_of(ttfts_s(one.answers)).p99_us / 1e3 for one in rounds)
    p50_ms, p99_ms = taken.p50_us / 1e3, taken.p99_us / 1e3
    cores = tuple(one.proxy_core for one in rounds)
    return Row(fleet, name, p50_ms, p99_ms, len(quiet), failed, len(flood), refused, by_round, cores)


def ttfts_s(answered: Sequence[tuple[str, Answer]]) -> list[float]:
    """Of the quiet tenants."""
    return [one.ttft_ms / 1e3 for tenant, one in answered if tenant != FLOOD and not one.error] or [0.0]


def measured(scene: Scene, say: Console) -> list[Row]:
    """Each case over all repeats; cases take turns, all beside the same engines with a proxy of their own."""
    times = {"prefill_base_ms": PREFILL_MS[0], "prefill_token_ms": PREFILL_MS[1]}
    model = ROOT / "models" / "tiny-moe"
    shape = Shape(model, scene.prefill, scene.decode, 16, 4096, 0.0, 0.0, engine="sim", sim=times)
    rounds: dict[str, list[Round]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="omni-bench-tenants-") as folder, engines(shape, Path(folder)) as stack:
        for repeat in range(scene.repeats):
            for name, case in CASES.items():
                say.print(f"round {repeat + 1}: {name}", highlight=False)
                orders = [o for t in QUIET for o in orders_of(scene, t, scene.quiet_per_s, f"{t}{repeat}{name}")]
                if case.is_flooded:
                    per_s = scene.flood_load * scene.capacity_per_s
                    orders += orders_of(scene, FLOOD, per_s, f"{FLOOD}{repeat}{name}")
                # Nobody's rates are limited: what protects the quiet is the queue alone.
                flow = {"fairness": case.fairness, "ttl_s": 10, "max_requests": 100_000, "max_tenant_requests": 100_000}
                with proxy(shape, stack, {"flow": flow}, Path(folder)) as at:
                    if case.is_warm:
                        # Of a tenant of its own: what one has had counts against it.
                        before = orders_of(scene, "warm", 4.0, f"warm{repeat}{name}")
                        asyncio.run(ask(at, [replace(order, at_s=order.at_s / 10) for order in before]))
                    rounds[name].append(round_of(at, orders))
    fleet = f"{shape.title}, processes"
    return [row_of(fleet, name, of_name) for name, of_name in rounds.items()]


def foreseen(scene: Scene) -> list[Row]:
    """The same on a virtual clock: no processes, no wire, nothing shares cores."""
    rows: list[Row] = []
    for count in scene.virtual_prefills:
        fleet = FleetScene(prefills=count, decodes=count, spread_s=0.0, seed=1)
        capacity_per_s = count / fleet.prefill_model.unloaded_s(scene.virtual_tokens)
        for name, case in CASES.items():
            if not case.is_warm:
                continue
            rates = dict.fromkeys(QUIET, 0.05 * capacity_per_s)
            rates |= {FLOOD: scene.flood_load * capacity_per_s} if case.is_flooded else {}
            asked = [one for tenant, per_s in rates.items() for one in arrivals(scene, tenant, per_s)]
            system = replace(SYSTEMS["cost"], flow=held(fairness=case.fairness))
            served = simulate(fleet, system, sorted(asked, key=lambda one: one.at_s)).served
            ttfts_s = [one.ttft_s for one in served if one.tenant != FLOOD]
            taken = latency_of(ttfts_s)
            flood = len(served) - len(ttfts_s)
            title = f"{fleet.title}, virtual"
            rows.append(Row(title, name, taken.p50_us / 1e3, taken.p99_us / 1e3, len(ttfts_s), 0, flood, 0))
    return rows


def arrivals(scene: Scene, tenant: str, per_s: float) -> Iterator[Request]:
    """Poisson arrivals of prompts that share nothing."""
    rng, at_s = random.Random(tenant), 0.0
    while (at_s := at_s + rng.expovariate(per_s)) < scene.virtual_seconds:
        tokens = length_of(tenant, scene.virtual_tokens, rng)
        keys = tuple(rng.randbytes(16) for _ in range(tokens // BLOCK_TOKENS))
        yield Request(at_s, tokens, OUTPUT_TOKENS, keys, tenant)


def notes_of(scene: Scene, rows: Sequence[Row]) -> list[str]:
    by_fleet: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_fleet.setdefault(row.fleet, {})[row.name] = row
    verdicts = [
        verdict(title, cases["alone"], cases[name])
        for title, cases in by_fleet.items()
        for name in cases
        if CASES[name].is_flooded and CASES[name].fairness != "none"
    ]
    by_round = [
        f"{row.fleet}, {row.name}: p99 by round "
        + ", ".join(f"{p99_ms:.0f}" for p99_ms in row.p99_by_round_ms)
        + " ms; the proxy took "
        + ", ".join(f"{share:.0%}" for share in row.proxy_core)
        + " of a core"
        for row in rows
        if row.proxy_core
    ]
    return [
        *verdicts,
        *by_round,
        f"processes: prompts of {scene.prompt_tokens} tokens (the flood's of half to one and a half times that) take "
        f"{PREFILL_MS[0]:g} ms + {PREFILL_MS[1]:g} ms per token; two quiet tenants of {scene.quiet_per_s:g} requests/s "
        f"each, one of {scene.flood_load:g} times the {scene.capacity_per_s:.0f} requests/s that they can compute; "
        f"{scene.repeats} rounds of {scene.seconds:g} s; what waits longer than 10 s is refused",
        f"virtual: the engines of bench/scheduler.py, prompts of {scene.virtual_tokens} tokens, each quiet tenant 5% "
        f"of what they can compute, {scene.virtual_seconds:g} s",
        f"machine: {machine()}",
    ]


def verdict(fleet: str, alone: Row, beside: Row) -> str:
    ratio = beside.p99_ms / alone.p99_ms if alone.p99_ms else float("inf")
    is_met = ratio <= GOAL and not beside.quiet_failed
    return (
        f"{'met' if is_met else 'NOT met'}, {fleet}, {beside.name}: the quiet tenants' p99 is {ratio:.2f} of that alone"
    )


def counts(row: Row) -> tuple[int, int, int, int]:
    return row.quiet, row.quiet_failed, row.flood, row.flood_refused


def main(
    quick: Annotated[bool, typer.Option(help="One short round")] = False,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill engine processes; 0: the virtual clock alone")] = 16,
    flood_load: Annotated[float, typer.Option(min=0.1, help="Of the engines' capacity, by the flood alone")] = 2.0,
    seconds: Annotated[float | None, typer.Option(min=2, help="Of each round; default 40, quick 8")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds; default 3, quick 1")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
) -> None:
    """How much a flooding tenant is noticed by two quiet ones."""
    scene = Scene(prefill=prefill, flood_load=flood_load)
    if quick:
        scene = replace(scene, seconds=8, repeats=1, virtual_prefills=(4, 8), virtual_seconds=20)
    scene = replace(scene, seconds=seconds or scene.seconds, repeats=repeats or scene.repeats)
    console = Console()
    # First: collecting what the simulation leaves behind would hold up the client for a few hundred milliseconds.
    on_processes = measured(scene, console) if prefill else []
    rows = foreseen(scene) + on_processes
    notes = notes_of(scene, rows)
    head = ("fleet", "quiet tenants", "TTFT p50, ms", "TTFT p99, ms", "requests", "failed", "flood's", "refused")
    cells = [(r.fleet, r.name, f"{r.p50_ms:.0f}", f"{r.p99_ms:.0f}", *map(str, counts(r))) for r in rows]
    block = Block("Isolation of tenants (simulated engines)", head, cells, names=2)
    show([block], notes, console)
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown([block], notes))


if __name__ == "__main__":
    typer.run(main)
