"""Many LoRA adapters and few slots: which policies keep requests where their adapter is.

    python bench/adapters.py
    python bench/adapters.py --quick --json adapters.json

Simulated: engines compute by a stated model of time, no device is involved. Every engine serves all adapters but holds
a few at once. Bringing one into a slot lengthens a step for everybody in it, and a sequence whose adapter finds no slot
waits until all sequences of another one have ended. A real proxy and kvstore, one policy after the other over the same
engine processes, with the same requests.
"""

import asyncio
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from livereplay.client import Answer, Order, body_of, replay
from livereplay.processes import Engines, Shape, engines, proxy
from prefixindex.timing import quantile
from rich.console import Console
from sidebyside.machine import machine
from sidebyside.tables import Block, markdown, show

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-moe"
WAIT_S = 120.0
PREFILL_MS = 8.0, 0.1
STEP_MS = 20.0
"""So slow that the limit is not the machine's cores."""

SCORERS = [
    {"name": name, "weight": weight} for name, weight in (("queue", 2), ("kv_usage", 2), ("prefix", 3), ("lora", 3))
]
CASES: Mapping[str, Mapping[str, Any]] = {
    "cost": {"policy": "cost"},
    "cost behind the filter lora": {"policy": "cost", "filters": [{"name": "lora"}]},
    "lora_affinity": {"policy": "lora_affinity"},
    "weighted_scorers with lora": {"policy": {"name": "weighted_scorers", "parameters": {"scorers": SCORERS}}},
    "least_loaded": {"policy": "least_loaded"},
    "round_robin": {"policy": "round_robin"},
}


@dataclass(frozen=True, slots=True)
class Scene:
    """`per_s` requests, each of one adapter, the n-th most wanted one in proportion to 1 / n."""

    prefill: int = 4
    decode: int = 4
    adapters: int = 16
    slots: int = 4
    load_ms: float = 100.0
    per_s: float = 12.0
    prompt_tokens: int = 400
    output_tokens: int = 24
    seconds: float = 40.0
    repeats: int = 3

    @property
    def settled_s(self) -> float:
        """Requests that come before do not count: they find the slots as the policy before left them."""
        return self.seconds / 4

    @property
    def names(self) -> list[str]:
        return [f"adapter-{number}" for number in range(self.adapters)]


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds; `itl_p90_ms` of the requests' mean gaps."""

    name: str
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    itl_p90_ms: float
    answered: int
    failed: int
    ttft_p90_by_round_ms: tuple[float, ...]


def orders_of(scene: Scene, repeat: int, case: str) -> list[Order]:
    """Poisson arrivals; in all cases of a round alike but for the prompts' words, so that nothing is cached."""
    rng, words, at_s = random.Random(repeat), random.Random(f"{repeat} {case}"), 0.0
    weights = [1 / (rank + 1) for rank in range(scene.adapters)]
    orders: list[Order] = []
    while (at_s := at_s + rng.expovariate(scene.per_s)) < scene.seconds:
        (adapter,) = rng.choices(scene.names, weights)
        tokens = [words.randrange(300, 1000) for _ in range(rng.randrange(1, 2 * scene.prompt_tokens))]
        output_tokens = rng.randrange(2, 2 * scene.output_tokens)
        orders.append(Order(at_s, body_of(adapter, tokens, output_tokens), len(tokens), output_tokens))
    return orders


def measured(scene: Scene, say: Console) -> list[Row]:
    times = {
        "prefill_base_ms": PREFILL_MS[0],
        "prefill_token_ms": PREFILL_MS[1],
        "step_base_ms": STEP_MS,
        "adapter_load_ms": scene.load_ms,
    }
    shape = Shape(
        MODEL, scene.prefill, scene.decode, 16, 4096, 0.0, 0.0, "sim", times, scene.names, adapter_slots=scene.slots
    )
    rounds: dict[str, list[list[Answer]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="omni-bench-adapters-") as folder, engines(shape, Path(folder)) as stack:
        for repeat in range(scene.repeats):
            for name in random.Random(repeat).sample(list(CASES), len(CASES)):
                say.print(f"round {repeat + 1}: {name}", highlight=False)
                orders = orders_of(scene, repeat, name)
                answers = round_of(shape, stack, CASES[name], Path(folder), orders)
                settled = [a for order, a in zip(orders, answers, strict=True) if order.at_s >= scene.settled_s]
                rounds[name].append(settled)
    return [row_of(name, of_name) for name, of_name in rounds.items()]


def round_of(
    shape: Shape, stack: Engines, config: Mapping[str, Any], folder: Path, orders: Sequence[Order]
) -> list[Answer]:
    with proxy(shape, stack, config, folder) as at:
        return asyncio.run(replay(at.port, orders, lambda number: None, WAIT_S))


def row_of(name: str, rounds: Sequence[Sequence[Answer]]) -> Row:
    good = [[answer for answer in answers if not answer.error] for answers in rounds]
    together = [answer for answers in good for answer in answers]
    p50_ms, p90_ms, p99_ms = quantiles([answer.ttft_ms for answer in together], 0.5, 0.9, 0.99)
    (itl_ms,) = quantiles([answer.itl_ms for answer in together], 0.9)
    by_round = tuple(quantiles([answer.ttft_ms for answer in answers], 0.9)[0] for answers in good)
    failed = sum(map(len, rounds)) - len(together)
    return Row(name, p50_ms, p90_ms, p99_ms, itl_ms, len(together), failed, by_round)


def quantiles(values: Sequence[float], *shares: float) -> list[float]:
    ranked = sorted(values) or [0.0]
    return [quantile(ranked, share) for share in shares]


def notes_of(scene: Scene, rows: Sequence[Row]) -> list[str]:
    rounds = [
        f"{row.name}: TTFT p90 by round " + ", ".join(f"{p90_ms:.0f}" for p90_ms in row.ttft_p90_by_round_ms) + " ms"
        for row in rows
    ]
    return [
        *rounds,
        f"{scene.prefill}P{scene.decode}D, {scene.adapters} adapters, {scene.slots} slots in each engine, "
        f"{scene.load_ms:g} ms to bring one in; prompts of {scene.prompt_tokens} tokens on average take "
        f"{PREFILL_MS[0]:g} ms + {PREFILL_MS[1]:g} ms per token, a step {STEP_MS:g} ms; {scene.per_s:g} requests/s "
        f"with {scene.output_tokens} tokens of output on average, {scene.repeats} rounds of {scene.seconds:g} s, of "
        f"which the first {scene.settled_s:g} s do not count",
        f"machine: {machine()}",
    ]


def main(
    quick: Annotated[bool, typer.Option(help="One short round")] = False,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters that are asked for")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Of them in each engine at once")] = 4,
    load_ms: Annotated[float, typer.Option(min=0, help="To bring one into a slot")] = 100.0,
    per_s: Annotated[float, typer.Option(min=0.1, help="Requests per second")] = 12.0,
    seconds: Annotated[float | None, typer.Option(min=2, help="Of each round; default 40, quick 4")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds; default 3, quick 1")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
) -> None:
    """How long requests of many adapters wait, policy by policy, where engines hold few adapters at once."""
    scene = Scene(adapters=adapters, slots=slots, load_ms=load_ms, per_s=per_s)
    scene = replace(scene, seconds=4, repeats=1) if quick else scene
    scene = replace(scene, seconds=seconds or scene.seconds, repeats=repeats or scene.repeats)
    console = Console()
    rows = measured(scene, console)
    notes = notes_of(scene, rows)
    head = ("policy", "TTFT p50, ms", "p90", "p99", "ITL p90, ms", "answered", "failed")
    cells = [
        (
            r.name,
            *(f"{ms:.0f}" for ms in (r.ttft_p50_ms, r.ttft_p90_ms, r.ttft_p99_ms)),
            f"{r.itl_p90_ms:.1f}",
            str(r.answered),
            str(r.failed),
        )
        for r in rows
    ]
    block = Block("Adapters beyond the slots (simulated engines)", head, cells)
    show([block], notes, console)
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown([block], notes))


if __name__ == "__main__":
    typer.run(main)
