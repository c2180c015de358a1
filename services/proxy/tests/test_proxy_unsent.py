"""Sequences for a decode worker that takes no more messages: which of them it may know of."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from omni.decode.v1 import decode_service_pb2 as pb
from omni_proxy.feed import Feed
from omni_proxy.health import HealthSettings
from omni_proxy.metrics import Metrics
from omni_proxy.ports import Submission
from omni_proxy.sampling import Sampling
from omni_proxy.sessions import DecodeSession
from omni_proxy.stalls import StallWatch

TAKEN, ON_THE_WAY, KEPT, GIVEN_UP = range(1, 5)


class Call:
    """The worker takes a hello and one sequence; a second one is on its way for as long as `flows` is not set."""

    def __init__(self) -> None:
        self.written: list[pb.SessionRequest] = []
        self.begun: asyncio.Queue[None] = asyncio.Queue()
        self.flows = asyncio.Event()
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.answers.put_nowait(pb.SessionResponse(welcome=pb.Welcome(worker_id="d", epoch=1)))

    async def write(self, request: pb.SessionRequest) -> None:
        self.begun.put_nowait(None)
        if len(self.written) == 2:
            await self.flows.wait()
        self.written.append(request)

    async def read(self) -> Any:
        return await self.answers.get()

    def cancel(self) -> None: ...

    @property
    def stream_ids(self) -> list[Any]:
        """Of submits, and in tuples of aborts."""
        return [r.submit.stream_id if r.HasField("submit") else tuple(r.abort.stream_ids) for r in self.written[1:]]


class Channel:
    def __init__(self, call: Call) -> None:
        self._call = call

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return lambda: self._call


@asynccontextmanager
async def stuck() -> AsyncIterator[tuple[Call, DecodeSession, list[Feed]]]:
    """Four sequences, of which the last one's client has left."""
    call, opened = Call(), asyncio.Event()
    watch = StallWatch(lambda: HealthSettings.model_validate({}))
    channel: Any = Channel(call)
    session = DecodeSession(channel, "proxy", 5, Metrics(CollectorRegistry()), opened.set, watch)
    running = asyncio.create_task(session.run())
    async with asyncio.timeout(10):
        await opened.wait()
        feeds = [session.submit(Submission("r", "m", [1], 0, Sampling(4), None, "", 0)) for _ in range(4)]
        for _ in range(3):
            await call.begun.get()
        session.abort(feeds[-1])
        try:
            yield call, session, feeds
        finally:
            running.cancel()
            await asyncio.wait({running})


async def test_what_has_not_left_when_the_session_breaks_is_unknown_to_the_worker():
    async with stuck() as (call, session, feeds):
        call.answers.put_nowait(grpc.aio.EOF)
        await session.wait_idle()
        assert [feed.is_unsent for feed in feeds] == [False, False, True, True]
        assert [feed.end is not None for feed in feeds] == [True, True, True, False]
        assert call.stream_ids == [TAKEN]


@pytest.mark.parametrize("is_quiet", [False, True])
async def test_what_ended_before_it_left_is_not_sent(is_quiet):
    async with stuck() as (call, session, feeds):
        if is_quiet:
            session.abandon()
        call.flows.set()
        while not call.written or session._outbox:  # noqa: ASYNC110
            await asyncio.sleep(0)
        sent = [TAKEN, ON_THE_WAY, (TAKEN, ON_THE_WAY)] if is_quiet else [TAKEN, ON_THE_WAY, KEPT]
        assert call.stream_ids == sent
        assert feeds[KEPT - 1].is_unsent is is_quiet
        assert feeds[GIVEN_UP - 1].is_unsent
