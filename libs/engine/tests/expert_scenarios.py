"""What the tests do with an engine whose experts move, run in the engine's own process."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_engine.ports import DecodeJob, ExpertLayout, ExpertMove, SequenceOutput
from omni_engine.vllm import VllmEngine

EMPTY = -1
SERVING_TIMEOUT_S = 50.0


async def serve(engine: VllmEngine, jobs: Sequence[DecodeJob]) -> list[tuple[list[SequenceOutput], list[float]]]:
    """Every job's outputs and the times they came at, in seconds."""
    return list(await asyncio.gather(*(_serve(engine, job) for job in jobs)))


async def serve_while_moving(engine: VllmEngine, jobs: Sequence[DecodeJob], target: Any) -> dict[str, Any]:
    """Serve, and lay the experts out as `target` layer by layer once every job has begun."""
    begun = [asyncio.Event() for _ in jobs]
    serving = [asyncio.create_task(_serve(engine, job, event)) for job, event in zip(jobs, begun, strict=True)]
    async with asyncio.timeout(SERVING_TIMEOUT_S):
        for event in begun:
            await event.wait()
        rounds_ms = await lay_out(engine, target)
        still_running = engine.stats().running
        outputs = await asyncio.gather(*serving)
    return {"outputs": outputs, "rounds_ms": rounds_ms, "running_after": still_running}


async def lay_out(engine: VllmEngine, target: Any) -> list[float]:
    """One round per layer that differs; how long each took, in milliseconds."""
    rounds_ms = []
    for layer in range(len(target)):
        layout = engine.expert_layout()
        assert layout is not None
        physical = layout.physical.copy()
        if (physical[layer] == target[layer]).all():
            continue
        moves = [
            ExpertMove(*map(int, (layer, target[layer, rank, slot], *source, rank, slot)))
            for rank, slot in np.argwhere((physical[layer] != target[layer]) & (target[layer] != EMPTY))
            for source in np.argwhere(physical[layer] == target[layer, rank, slot])[:1]
        ]
        physical[layer] = target[layer]
        began_s = time.perf_counter()
        await engine.move_experts(moves, ExpertLayout(layout.version + 1, physical))
        rounds_ms.append((time.perf_counter() - began_s) * 1e3)
    return rounds_ms


async def _serve(
    engine: VllmEngine, job: DecodeJob, begun: asyncio.Event | None = None
) -> tuple[list[SequenceOutput], list[float]]:
    outputs: list[SequenceOutput] = []
    times_s: list[float] = []
    ended = asyncio.Event()

    def sink(batch: list[SequenceOutput]) -> None:
        outputs.extend(batch)
        times_s.append(time.perf_counter())
        if begun is not None:
            begun.set()
        if batch[-1].finish_reason is not None:
            ended.set()

    await engine.submit(job, sink)
    async with asyncio.timeout(SERVING_TIMEOUT_S):
        await ended.wait()
    return outputs, times_s
