"""Short answers beside workers whose seats long answers hold: what the proxy expects of a seat, on a virtual clock."""

import asyncio
import statistics
from contextlib import aclosing
from unittest.mock import patch

import virtual_loop
from fleet import MODEL, FleetChaos, Scenario
from opentelemetry.trace import NoOpTracer
from sim_worker import Pulls, SimWorker

from omni_engine.sim import SimSettings, Timing
from omni_proxy.lifecycle import SequenceRun
from omni_proxy.sampling import Sampling
from omni_proxy.sequence import SequenceJob
from omni_proxy.tracing import RequestTrace
from omni_proxy.worker import Role

SEATS, SHORT, LONG = 4, 4, 1000
SETTINGS = SimSettings(
    max_num_seqs=SEATS, mean_output_tokens=100_000, timing=Timing(prefill_base_ms=5, prefill_token_ms=0.01)
)


async def stream(chaos: FleetChaos, name: str, tokens: int) -> float:
    """Until it has ended; milliseconds to its second token, the first that decode computes."""
    now = asyncio.get_running_loop().time
    began, number, second_s = now(), 0, 0.0
    prompt = [*name.encode(), *range(100, 140)]
    job = SequenceJob(name, prompt, Sampling(tokens, ignore_eos=True), began + 600, arrived=began)
    async with aclosing(SequenceRun(chaos.scheduler, job, RequestTrace(NoOpTracer(), {})).stream()) as batches:
        async for batch in batches:
            number += len(batch.token_ids)
            if number > 1 and not second_s:
                second_s = now()
    return (second_s - began) * 1e3


async def scene() -> list[float]:
    """Two decode workers are full of long answers when a third comes; then short ones, six at a time."""
    chaos = FleetChaos(Scenario(workers=2))
    roles = {"p": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE, "d3": Role.DECODE}
    chaos.workers = [SimWorker(name, role, MODEL, SETTINGS, chaos.fleet) for name, role in roles.items()]
    *there, late = chaos.workers
    with patch("omni_engine.sim.engine.open_pull", Pulls(chaos.workers).open):
        for worker in there:
            await worker.start()
        async with asyncio.TaskGroup() as group:
            long = [group.create_task(stream(chaos, f"long{number}", LONG)) for number in range(2 * SEATS)]
            await asyncio.sleep(1)
            await late.start()
            waited_ms = list[float]()
            for turn in range(20):
                waited_ms += await asyncio.gather(*(stream(chaos, f"{turn}-{i}", SHORT) for i in range(6)))
            assert not any(task.done() for task in long)
            for task in long:
                task.cancel()
        for worker in chaos.workers:
            await worker.close()
    return waited_ms


def test_short_answers_do_not_wait_for_long_ones() -> None:
    """They took a seat among long answers for as near as one among their like, and waited for seconds there."""
    waited_ms = virtual_loop.run(scene())
    print(f"\nto the second token: median {statistics.median(waited_ms):.0f} ms, longest {max(waited_ms):.0f} ms")
    assert max(waited_ms) < 1000
