"""What one scheduling decision costs the proxy: the product's own code, no engines, no network.

python bench/decision.py
python bench/decision.py --quick --json decision.json
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from prefixindex.timing import Latency, latency_of
from prometheus_client import CollectorRegistry
from rich.console import Console
from sidebyside.machine import machine
from sidebyside.tables import Block, markdown, show

from omni_common.prefix_index import HBM, PrefixIndex, warm_up
from omni_proxy.fleet import Fleet
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.flow.ticket import Ticket
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.replica import Replica
from omni_proxy.room import FleetRoom, least_work
from omni_proxy.scheduling.forecast import LoadCost
from omni_proxy.scheduling.policies import POLICIES, policy_of
from omni_proxy.scheduling.request import SchedulingRequest, Slo
from omni_proxy.scheduling.times import prompt_features
from omni_proxy.worker import Load, Member, Role, Worker

MODEL, BLOCK = "m", 16
_TENANTS = 20
GOAL_MS, GOAL_WORKERS, GOAL_WAITING = 1.0, 64, 500


class _Port:
    """Stands for a worker's client; no call is made."""

    ready = True


@dataclass(frozen=True, slots=True)
class Row:
    section: str
    case: str
    latency: Latency


def fleet_of(each: int, prompt_blocks: int, rng: np.random.Generator) -> tuple[Fleet, list[bytes]]:
    """`each` prefill and as many decode workers with learned times, work in flight and some of the prompts' blocks."""
    index = PrefixIndex(max_blocks=4 * each * prompt_blocks + 1024)
    replica = Replica(lambda: index, 2.0, PrefixMetrics(CollectorRegistry()))
    fleet = Fleet(MODEL, replica, dict.fromkeys(("host", "disk", "remote"), LoadCost(0.0, 0.1)))
    prompts = [rng.bytes(16 * prompt_blocks) for _ in range(32)]
    for number in range(2 * each):
        role = Role.PREFILL if number < each else Role.DECODE
        worker = Worker(f"{role}-{number}", "", role, 1, MODEL, BLOCK, 131_072, 256, "c", "sim", 65_536, 8192)
        member = Member(worker, _Port(), _Port(), is_reachable=True)  # type: ignore[arg-type]
        fleet.put(member)
        member.load = Load(running=int(rng.integers(1, 60)), kv_usage=0.4, context_tokens=100_000, steps=1)
        held = prompts[number % len(prompts)]
        index.store(worker.id, HBM, held[: 16 * int(rng.integers(1, prompt_blocks))], [0])
        slot = fleet.columns.slot(worker.id)
        for tokens in rng.integers(100, 20_000, 12):
            fleet.times.saw_prompt(slot, prompt_features(int(tokens), 0), 5 + 0.05 * float(tokens))
        fleet.ledger.charge(worker.id, (int(rng.integers(100, 9000)), 0), 128).__enter__()
    for number in range(8 * each):
        pair = (number % each, each + int(rng.integers(each)))
        fleet.times.saw_transfer(*pair, 4000, float(rng.uniform(5, 20)))
    return fleet, prompts


def tickets_of(waiting: int, tenants: int, now_s: float, rng: np.random.Generator) -> list[Ticket]:
    return [
        Ticket(
            str(number),
            now_s,
            now_s + 600,
            tenant=f"t{number % tenants}",
            priority=int(rng.choice([-10, 0, 0, 0, 10])),
            prompt_tokens=8192,
            uncached_tokens=int(rng.integers(16, 8192)),
            output_tokens=128,
            size_bytes=65_536,
            ttft_slo_ms=float(rng.uniform(500, 60_000)),
            itl_slo_ms=50.0,
            prefill_ms=float(rng.uniform(5, 400)),
        )
        for number in range(waiting)
    ]


def timed(call: Callable[[], object], repeats: int) -> Latency:
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return latency_of(taken)


def decisions(each: int, prompt_blocks: int, policy: str, repeats: int) -> Latency:
    """Look up the prompt, see the fleet, choose."""
    rng = np.random.default_rng(7)
    fleet, prompts = fleet_of(each, prompt_blocks, rng)
    chooser, turns = policy_of(policy), iter(range(10**9))
    tokens = prompt_blocks * BLOCK
    request = SchedulingRequest(tokens, slo=Slo(2000, 50), session="s")

    def once() -> None:
        keys = prompts[next(turns) % len(prompts)]
        view = fleet.view(fleet.forecast(lambda size: keys), tokens, 128)
        chooser.choose(replace(request, waited_ms=3.0), view)

    return timed(once, repeats)


def queued(each: int, prompt_blocks: int, waiting: int, repeats: int, *, whole: bool) -> Latency:
    """The head of a queue: room, release, decision. `whole`: with its ticket and offer, and decode's choice."""
    rng = np.random.default_rng(7)
    fleet, prompts = fleet_of(each, prompt_blocks, rng)
    unbounded = {"max_requests": 10**7, "max_tenant_requests": 10**7}
    settings = FlowSettings(**unbounded, max_bytes=1 << 50, max_tenant_bytes=1 << 50, ttl_s=3600)
    queue, room, chooser = FlowQueue(settings), FleetRoom(fleet, settings.lookahead_ms), policy_of("cost")
    tickets = tickets_of(waiting + repeats + 2, _TENANTS, fleet.now(), rng)
    for ticket in tickets[:waiting]:
        queue.offer(ticket, fleet.now())
    coming, tokens = iter(tickets[waiting:]), prompt_blocks * BLOCK
    request = SchedulingRequest(tokens, slo=Slo(2000, 50))

    def once() -> None:
        ticket = next(coming) if whole else tickets[0]
        keys = prompts[int(ticket.request_id) % len(prompts)]
        if whole:
            least_work(fleet.view(fleet.forecast(lambda size: keys), tokens, 128), tokens)
            queue.offer(ticket, fleet.now())
        head = queue.head(fleet.now())
        if head is None:
            raise RuntimeError("the queue is empty")
        room.room_in_ms(head)
        queue.pop(fleet.now())
        found = fleet.forecast(lambda size: keys)
        decision = chooser.choose(request, fleet.view(found, tokens, 128))
        if whole:
            kind = fleet.members[0].worker.kv_kind()
            later = replace(request, may_prefill=False, kv_connector=kind, held_by=decision.prefill)
            chooser.choose(later, fleet.view(found, tokens, 128))

    def once_more() -> None:
        once()
        if not whole:
            queue.offer(next(coming), fleet.now())

    return timed(once_more, repeats)


def measured(quick: bool, prompt_blocks: int, repeats: int) -> list[Row]:
    sizes = (1, 8, 64) if quick else (1, 4, 16, 64, 256)
    queues = (0, 500, 5000) if quick else (0, 50, 500, 5000, 50_000)
    rows = [
        Row("decision, cost", f"{each} x {each} workers", decisions(each, prompt_blocks, "cost", repeats))
        for each in sizes
    ]
    names = ("round_robin", "sticky_until_saturated") if quick else [name for name in POLICIES if name != "cost"]
    rows += [
        Row("decision, others", f"{name}, 64 x 64", decisions(64, prompt_blocks, name, repeats // 2)) for name in names
    ]
    for waiting in queues:
        title = f"64 x 64 workers, {waiting} waiting"
        if waiting:
            rows.append(Row("next of a queue", title, queued(64, prompt_blocks, waiting, repeats, whole=False)))
        rows.append(Row("whole request", title, queued(64, prompt_blocks, waiting, repeats, whole=True)))
    return rows


def goal(rows: Sequence[Row]) -> str:
    wanted = f"{GOAL_WORKERS} x {GOAL_WORKERS} workers, {GOAL_WAITING} waiting"
    p99_ms = {row.section: row.latency.p99_us / 1e3 for row in rows if row.case == wanted}
    verdict = "met" if p99_ms["next of a queue"] < GOAL_MS else "NOT met"
    return (
        f"{verdict}: the next decision at {wanted} takes {p99_ms['next of a queue']:.2f} ms at p99 (goal: under "
        f"{GOAL_MS:g}); all of a request's scheduling {p99_ms['whole request']:.2f} ms"
    )


def main(
    quick: Annotated[bool, typer.Option(help="Fewer sizes and repeats")] = False,
    prompt_blocks: Annotated[int, typer.Option(min=2, help=f"Blocks of {BLOCK} tokens in each prompt")] = 512,
    repeats: Annotated[int | None, typer.Option(min=100, help="Calls per row; default 3000, quick 500")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
) -> None:
    """Latency of scheduling decisions over sizes of fleet and queue."""
    warm_up()

    async def in_loop() -> list[Row]:
        return measured(quick, prompt_blocks, repeats or (500 if quick else 3000))

    rows = asyncio.run(in_loop())
    notes = [
        goal(rows),
        f"prompts of {prompt_blocks * BLOCK:,} tokens; decision: prefix lookup, view of the fleet, choice; next of "
        "a queue: room, release and decision, and another offer; whole request: with its ticket and decode's choice",
        f"one core, in process; machine: {machine()}",
    ]
    head = ("section", "case", "p50, us", "p99, us")
    cells = [(r.section, r.case, f"{r.latency.p50_us:.0f}", f"{r.latency.p99_us:.0f}") for r in rows]
    block = Block("Scheduling decisions", head, cells, names=2)
    show([block], notes, Console())
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown([block], notes))


if __name__ == "__main__":
    typer.run(main)
