"""Who is in the fleet: links are made for workers that come and closed after those that go."""

import asyncio
import logging
from collections.abc import Callable, Collection

from omni_proxy.fleet import Fleet
from omni_proxy.links import WorkerLink
from omni_proxy.worker import Worker

log = logging.getLogger(__name__)


class Roster:
    """Owns one task per worker; use as an async context manager."""

    def __init__(self, fleet: Fleet, connect: Callable[[Worker], WorkerLink], retire_timeout_s: float) -> None:
        self._fleet = fleet
        self._connect = connect
        self._retire_timeout_s = retire_timeout_s
        self._links: dict[str, tuple[WorkerLink, asyncio.Task[None]]] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def join(self, worker: Worker, *, is_draining: bool = False) -> None:
        """Add a worker, or replace it where its epoch or address differ; an older epoch is ignored."""
        known = self._links.get(worker.id)
        if known is not None:
            member = known[0].member
            if worker.epoch < member.worker.epoch:
                return
            if (worker.epoch, worker.address) == (member.worker.epoch, member.worker.address):
                known[0].announced(worker)
                if (member.is_listed, member.is_draining) != (True, is_draining):
                    member.is_listed, member.is_draining = True, is_draining
                    self._fleet.signal()
                return
            self._close(worker.id)
        link = self._connect(worker)
        link.member.is_draining = is_draining
        self._links[worker.id] = (link, asyncio.create_task(_supervised(link), name=f"link {worker.id}"))
        self._fleet.put(link.member)
        log.info("worker joined", extra={"worker": worker.id, "role": worker.role, "address": worker.address})
        if (differs := self._weights_apart(worker)) is not None:
            name, other = differs
            log.warning(
                "another worker tells other weights of this name: no KV blocks go between them",
                extra={"worker": worker.id, "other": other, "name_of_weights": name or worker.model},
            )

    def _weights_apart(self, worker: Worker) -> tuple[str, str] | None:
        """An adapter, or the model by the empty name, and a worker that has other weights of it."""
        for other in (member.worker for member in self._fleet.members if member.is_listed):
            if other.model == worker.model:
                for name in ("", *sorted(worker.adapters & other.adapters)):
                    if worker.weights.get(name) != other.weights.get(name):
                        return name, other.id
        return None

    def leave(self, worker_id: str) -> None:
        """No new work; what runs there may end within the retire timeout."""
        known = self._links.get(worker_id)
        if known is None or not known[0].member.is_listed:
            return
        known[0].member.is_listed = False
        self._fleet.signal()
        task = asyncio.create_task(self._retire(worker_id, known[0]))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        log.info("worker left", extra={"worker": worker_id})

    def omitted(self, worker_ids: Collection[str]) -> None:
        """A snapshot knows these no more. Those that still answer stay: a store that was emptied fills again."""
        for worker_id in worker_ids:
            known = self._links.get(worker_id)
            if known is not None and not known[0].member.is_reachable:
                self.leave(worker_id)

    async def __aenter__(self) -> "Roster":
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*(task for _, task in self._links.values()), *self._retiring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _retire(self, worker_id: str, link: WorkerLink) -> None:
        try:
            async with asyncio.timeout(self._retire_timeout_s):
                await link.wait_idle()
        except TimeoutError:
            log.warning("worker closed with sequences on it", extra={"worker": worker_id})
        if not link.member.is_listed and self._fleet.get(worker_id) is link.member:
            self._close(worker_id)
            self._fleet.drop(worker_id)

    def _close(self, worker_id: str) -> None:
        _, task = self._links.pop(worker_id)
        task.cancel()
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


async def _supervised(link: WorkerLink) -> None:
    """A link that fails for an unknown reason leaves its worker unreachable, and says so."""
    try:
        await link.run()
    except Exception:
        link.member.is_reachable = False
        log.exception("link failed", extra={"worker": link.member.worker.id})
