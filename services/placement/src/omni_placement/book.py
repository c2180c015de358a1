"""Layouts in force: one per model, versions that only grow, on disk before anyone hears of them."""

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from omni_common.errors import Internal, InvalidRequest, NotFound, ResourceExhausted
from omni_placement.layout import Layout, Topology


@dataclass(frozen=True, slots=True)
class Published:
    """A layout in force. Versions of one model count from 1."""

    model: str
    version: int
    solver: str
    layout: Layout


class LayoutFiles:
    """One JSON file per model in `directory`, replaced whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> list[Published]:
        """Everything saved.

        Raises:
            Internal: a file cannot be read. Going on without it would let a version repeat.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        return [_read(path) for path in sorted(self._directory.glob("*.json"))]

    def save(self, published: Published) -> None:
        path = self._directory / f"{quote(published.model, safe='')}.json"
        draft = path.with_suffix(".draft")
        shape = published.layout.topology
        content = {
            "model": published.model,
            "version": published.version,
            "solver": published.solver,
            "topology": [shape.num_layers, shape.num_experts, shape.num_ranks, shape.slots_per_rank],
            "physical_to_logical": published.layout.physical.ravel().tolist(),
        }
        with draft.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


def _read(path: Path) -> Published:
    try:
        content = json.loads(path.read_text())
        topology = Topology(*content["topology"])
        physical = np.array(content["physical_to_logical"], dtype=np.int32).reshape(topology.shape)
        return Published(content["model"], int(content["version"]), content["solver"], Layout(topology, physical))
    except (OSError, ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise Internal(f"cannot read the layout in {path}: {error}", reason="layout_file") from error


class _Watch:
    """Layouts a watcher has not seen. Over the bound only the newest of each model stays."""

    def __init__(self, model: str, after_version: int, bound: int) -> None:
        self.wake = asyncio.Event()
        self.queue: deque[Published] = deque()
        self._model, self._after, self._bound = model, after_version, bound

    def offer(self, published: Published) -> None:
        if self._model not in ("", published.model) or published.version <= self._after:
            return
        self.queue.append(published)
        if len(self.queue) > self._bound:
            self.queue = deque({p.model: p for p in self.queue}.values())
        self.wake.set()


class LayoutBook:
    """Owner of the layouts in force; `save` runs in a thread, before a layout is in force."""

    def __init__(self, save: Callable[[Published], None] | None, *, models: int, watch_queue: int) -> None:
        self._save, self._models, self._watch_queue = save, models, watch_queue
        self._in_force: dict[str, Published] = {}
        self._watches: set[_Watch] = set()
        self._publishing = asyncio.Lock()
        self._running: set[asyncio.Task[Published]] = set()
        self._is_closed = False

    def restore(self, saved: list[Published]) -> None:
        self._in_force = {published.model: published for published in saved}

    def get(self, model: str) -> Published:
        """The layout in force. Raises `NotFound` where there is none."""
        if model not in self._in_force:
            raise NotFound(f"no layout is in force for model {model!r}", field="model", reason="no_layout")
        return self._in_force[model]

    def find(self, model: str) -> Published | None:
        return self._in_force.get(model)

    @property
    def num_watches(self) -> int:
        return len(self._watches)

    async def publish(self, model: str, layout: Layout, solver: str) -> Published:
        """Put a layout in force as the model's next version. Goes to its end even if the caller is cancelled,
        so that what is saved and what is in force stay the same.

        Raises:
            ResourceExhausted: the bound on models is reached.
        """
        task = asyncio.create_task(self._publish(model, layout, solver))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _publish(self, model: str, layout: Layout, solver: str) -> Published:
        async with self._publishing:
            known = self._in_force.get(model)
            if known is None and len(self._in_force) >= self._models:
                raise ResourceExhausted(f"layouts of {self._models} models are in force", reason="max_models")
            published = Published(model, known.version + 1 if known else 1, solver, layout)
            if self._save is not None:
                await asyncio.to_thread(self._save, published)
            self._in_force[model] = published
        for watch in self._watches:
            watch.offer(published)
        return published

    async def watch(self, model: str, after_version: int) -> AsyncIterator[Published]:
        """What is in force and newer than `after_version`, then every later one; an empty name is all models."""
        watch = _Watch(model, after_version, self._watch_queue)
        for published in self._in_force.values():
            watch.offer(published)
        self._watches.add(watch)
        try:
            while not self._is_closed:
                # Cleared before the queue is read, so that nothing set during a yield is missed.
                watch.wake.clear()
                while watch.queue:
                    yield watch.queue.popleft()
                await watch.wake.wait()
        finally:
            self._watches.discard(watch)

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        for watch in self._watches:
            watch.wake.set()

    async def settle(self) -> None:
        """Wait for publications under way."""
        if self._running:
            await asyncio.wait(self._running)
