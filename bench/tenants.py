"""Three tenants, one of which floods: what the others notice. A real proxy and kvstore over simulated engines.

    python bench/tenants.py
    python bench/tenants.py --quick --json tenants.json

Simulated: engines compute by a stated model of time, no device is involved. The quiet tenants' time to first token is
measured alone, beside the flood, and beside the flood with fairness switched off.
"""

import asyncio
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from livereplay.client import Answer, Order, body_of, replay
from livereplay.processes import Proxy, Shape, engines, proxy
from prefixindex.timing import latency_of
from rich.console import Console
from rich.table import Table
from sidebyside.machine import machine

ROOT = Path(__file__).resolve().parents[1]
QUIET, FLOOD = ("quiet-a", "quiet-b"), "flood"
OUTPUT_TOKENS = 8
PREFILL_MS = 4.0, 0.06
"""Of a prompt on a simulated engine: base, and per token."""
GOAL = 1.3
WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Scene:
    """`flood_load`: of what the prefill engines can compute, the share that the flood alone asks for."""

    prefill: int = 6
    decode: int = 2
    prompt_tokens: int = 1500
    quiet_per_s: float = 4.0
    flood_load: float = 2.0
    seconds: float = 30.0
    repeats: int = 3

    @property
    def capacity_per_s(self) -> float:
        return self.prefill / ((PREFILL_MS[0] + PREFILL_MS[1] * self.prompt_tokens) / 1e3)


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds to the first token of both quiet tenants; what became of the flood."""

    name: str
    p50_ms: float
    p99_ms: float
    quiet: int
    quiet_failed: int
    flood: int
    flood_refused: int


def orders_of(scene: Scene, tenant: str, per_s: float, seed: str) -> list[Order]:
    """Poisson arrivals of prompts that share nothing."""
    rng, at_s = random.Random(seed), 0.0
    orders: list[Order] = []
    while (at_s := at_s + rng.expovariate(per_s)) < scene.seconds:
        tokens = [rng.randrange(300, 1000) for _ in range(scene.prompt_tokens)]
        body = body_of("tiny-moe", tokens, OUTPUT_TOKENS)
        orders.append(Order(at_s, body, len(tokens), OUTPUT_TOKENS, {"x-omni-tenant": tenant}))
    return orders


async def ask(at: Proxy, orders: Sequence[Order]) -> list[tuple[str, Answer]]:
    ordered = sorted(orders, key=lambda order: order.at_s)
    answers = await replay(at.port, ordered, lambda number: None, WAIT_S)
    return [(order.headers["x-omni-tenant"], answer) for order, answer in zip(ordered, answers, strict=True)]


def row_of(name: str, answered: Sequence[tuple[str, Answer]]) -> Row:
    quiet = [answer for tenant, answer in answered if tenant != FLOOD]
    flood = [answer for tenant, answer in answered if tenant == FLOOD]
    taken = latency_of([answer.ttft_ms / 1e3 for answer in quiet if not answer.error] or [0.0])
    failed = sum(bool(answer.error) for answer in quiet)
    refused = sum(bool(answer.error) for answer in flood)
    return Row(name, taken.p50_us / 1e3, taken.p99_us / 1e3, len(quiet), failed, len(flood), refused)


def measured(scene: Scene, say: Console) -> list[Row]:
    """Each case over all repeats; cases take turns, all beside the same engines with a proxy of their own."""
    shape = Shape(ROOT / "models" / "tiny-moe", scene.prefill, scene.decode, 16, 4096, 0.0, 0.0, engine="sim")
    cases = {
        "alone": (0.0, "least_attained_service"),
        "beside the flood": (scene.flood_load, "least_attained_service"),
        "beside the flood, no fairness": (scene.flood_load, "none"),
    }
    answered: dict[str, list[tuple[str, Answer]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="omni-bench-tenants-") as folder, engines(shape, Path(folder)) as stack:
        for repeat in range(scene.repeats):
            for name, (load, fairness) in cases.items():
                say.print(f"round {repeat + 1}: {name}", highlight=False)
                orders = [o for t in QUIET for o in orders_of(scene, t, scene.quiet_per_s, f"{t}{repeat}{name}")]
                if load:
                    orders += orders_of(scene, FLOOD, load * scene.capacity_per_s, f"{FLOOD}{repeat}{name}")
                # Nobody's rates are limited: what protects the quiet is the queue alone.
                flow = {"fairness": fairness, "ttl_s": 10, "max_requests": 100_000, "max_tenant_requests": 100_000}
                with proxy(shape, stack, {"flow": flow}, Path(folder)) as at:
                    warm = [replace(order, at_s=order.at_s / 10) for order in orders_of(scene, QUIET[0], 4.0, "warm")]
                    asyncio.run(ask(at, warm))
                    answered[name] += asyncio.run(ask(at, orders))
    return [row_of(name, answers) for name, answers in answered.items()]


def notes_of(scene: Scene, rows: Sequence[Row]) -> list[str]:
    ratio = rows[1].p99_ms / rows[0].p99_ms if rows[0].p99_ms else float("inf")
    failed = sum(row.quiet_failed for row in rows[:2])
    verdict = "met" if ratio <= GOAL and not failed else "NOT met"
    return [
        f"{verdict}: beside the flood the quiet tenants' p99 is {ratio:.2f} of that alone (goal: {GOAL} at most)",
        f"simulated: {scene.prefill} prefill, {scene.decode} decode engines; prompts of {scene.prompt_tokens} tokens "
        f"take {PREFILL_MS[0]:g} ms + {PREFILL_MS[1]:g} ms per token; real proxy and kvstore",
        f"two quiet tenants with {scene.quiet_per_s:g} requests/s each, one with {scene.flood_load:g} times the "
        f"{scene.capacity_per_s:.0f} requests/s that engines can compute; {scene.repeats} rounds of "
        f"{scene.seconds:g} s; what waits longer than 10 s is refused",
        f"machine: {machine()}",
    ]


def main(
    quick: Annotated[bool, typer.Option(help="One short round")] = False,
    prefill: Annotated[int, typer.Option(min=1, help="Simulated prefill engines")] = 6,
    flood_load: Annotated[float, typer.Option(min=0.1, help="Of the engines' capacity, by the flood alone")] = 2.0,
    seconds: Annotated[float | None, typer.Option(min=2, help="Of each round; default 30, quick 6")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds; default 3, quick 1")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
) -> None:
    """How much a flooding tenant is noticed by two quiet ones."""
    scene = Scene(
        prefill=prefill,
        flood_load=flood_load,
        seconds=seconds or (6 if quick else 30),
        repeats=repeats or (1 if quick else 3),
    )
    console = Console()
    rows = measured(scene, console)
    notes = notes_of(scene, rows)
    head = ("quiet tenants", "TTFT p50, ms", "TTFT p99, ms", "requests", "failed", "flood's", "refused")
    cells = [
        (r.name, f"{r.p50_ms:.0f}", f"{r.p99_ms:.0f}", *map(str, (r.quiet, r.quiet_failed, r.flood, r.flood_refused)))
        for r in rows
    ]
    table = Table(title="Isolation of tenants (simulated engines)")
    for title in head:
        table.add_column(title, justify="left" if title == head[0] else "right")
    for line in cells:
        table.add_row(*line)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if markdown_file:
        lines = [f"| {' | '.join(line)} |" for line in (head, ["---", *["---:"] * 6], *cells)]
        markdown_file.write_text("\n".join([*lines, "", *(f"- {note}" for note in notes), ""]))


if __name__ == "__main__":
    typer.run(main)
