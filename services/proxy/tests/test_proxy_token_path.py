"""Tokens from a step frame to the client: shown in the frame's own callback, or left to the writer's task."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_proxy.choice import Choice, TextRules
from omni_proxy.detokenize import ByteLevelDetokenizer
from omni_proxy.eager_send import EagerSend
from omni_proxy.feed import End, Feed, Show
from omni_proxy.ports import FinishReason, LogprobRow, SequenceStart, Timings
from omni_proxy.sequence import TokenBatch


class Wire:
    """An ASGI server's `send` that waits while `is_slow`; `most_waiting` is how many messages it ever held."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.is_slow = False
        self.waiting = self.most_waiting = 0
        self.keeps_up = asyncio.Event()

    async def send(self, message: Any) -> None:
        if self.is_slow:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            await self.keeps_up.wait()
            self.waiting -= 1
        self.sent.append(message)

    @property
    def text(self) -> str:
        events = b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body").split(b"\n\n")
        bodies = [json.loads(e[6:]) for e in events if e.startswith(b"data: {")]
        return "".join(c["delta"].get("content", "") for body in bodies for c in body["choices"])


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_messages_keep_their_order_whichever_way_they_go():
    wire = Wire()
    send = EagerSend(wire.send)
    send.at_once("a")
    assert send.is_clear and wire.sent == ["a"]
    wire.is_slow = True
    send.at_once("b")
    assert not send.is_clear and wire.sent == ["a"]
    after = asyncio.create_task(send("c"))
    wire.keeps_up.set()
    await after
    assert send.is_clear and wire.sent == ["a", "b", "c"]


async def test_a_message_that_waits_is_given_up_on_close():
    wire = Wire()
    send = EagerSend(wire.send)
    wire.is_slow = True
    send.at_once("a")
    send.close()
    await until(lambda: send.is_clear)
    wire.keeps_up.set()
    await asyncio.sleep(0)
    assert wire.sent == []


async def test_a_message_that_waited_and_failed_fails_the_next_one():
    broken = asyncio.get_running_loop().create_future()

    async def failing(message: Any) -> None:
        await broken

    send = EagerSend(failing)
    send.at_once("a")
    broken.set_exception(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        await send("b")
    assert not send.is_clear


START = SequenceStart(0, 0, False, Timings(0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("prepare", "is_waiting", "takes", "is_shown"),
    [
        pytest.param(lambda feed: None, True, True, True, id="plain tokens"),
        pytest.param(lambda feed: None, False, True, False, id="the writer is busy"),
        pytest.param(lambda feed: None, True, False, False, id="refused"),
        pytest.param(lambda feed: setattr(feed, "start", START), True, True, False, id="with a start"),
        pytest.param(lambda feed: feed.logprobs.append(LogprobRow([1], [0.0])), True, True, False, id="with logprobs"),
        pytest.param(lambda feed: feed.finish(End(FinishReason.LENGTH)), True, True, False, id="after the end"),
    ],
)
async def test_only_plain_tokens_of_a_waiting_writer_are_shown(prepare, is_waiting, takes, is_shown):
    feed, shown = Feed(1), list[Sequence[int]]()
    feed.show = lambda tokens: shown.append(tokens) or takes
    waiting = asyncio.create_task(feed.wait())
    if is_waiting:
        await asyncio.sleep(0)
    prepare(feed)
    feed.push([5])
    assert (feed.tokens == []) is is_shown
    assert bool(shown) is (is_shown or not takes)
    feed.finish(End(FinishReason.LENGTH))
    await waiting


class Run:
    """A sequence of steps; those that `show` does not take are yielded. `noted` has what was shown."""

    def __init__(self, steps: Sequence[Sequence[int]]) -> None:
        self._steps = steps
        self.noted: list[int] = []

    def sent(self, tokens: Sequence[int]) -> None:
        self.noted.extend(tokens)

    async def stream(self, show: Show | None = None) -> AsyncGenerator[TokenBatch, None]:
        for step in self._steps:
            if show is None or not show(step):
                yield TokenBatch(step)
        yield TokenBatch([], (), FinishReason.LENGTH)


class Outlet:
    """Open at the steps that `openings` says."""

    def __init__(self, openings: Sequence[bool]) -> None:
        self._openings = iter(openings)
        self.parts: list[str] = []

    @property
    def is_open(self) -> bool:
        return next(self._openings)

    def show(self, text: str) -> None:
        self.parts.append(text)


def choice_of(run: Any, rules: TextRules) -> Choice:
    return Choice(0, run, ByteLevelDetokenizer([c.encode() for c in "ab\n<"]), rules)


async def answer_of(choice: Choice, parts: list[str]) -> tuple[str, Any, str | None, int]:
    last = None
    async for piece in choice.pieces():
        parts.append(piece.text)
        last = piece
    assert last is not None
    return "".join(parts), last.finish_reason, last.stop, choice.output_tokens


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.booleans()), max_size=12),
    st.lists(st.text("ab\n<", min_size=1, max_size=3), max_size=3, unique=True),
    st.booleans(),
    st.integers(0, 3),
)
async def test_an_answer_does_not_depend_on_the_way_its_tokens_went(steps, stops, include_stop, min_tokens):
    rules = TextRules(tuple(stops), include_stop, min_tokens)
    tokens = [step for step, _ in steps]
    expected = await answer_of(choice_of(Run(tokens), rules), [])
    run, outlet = Run(tokens), Outlet([is_open for _, is_open in steps])
    choice = choice_of(run, rules)
    choice.outlet = outlet
    assert await answer_of(choice, outlet.parts) == expected
    assert len(run.noted) <= expected[3]


async def test_what_fails_while_tokens_are_shown_ends_its_own_answer_alone():
    class Broken(Outlet):
        def show(self, text: str) -> None:
            raise OSError("gone")

    choice = choice_of(Run([[0], [1]]), TextRules())
    choice.outlet = Broken([True, True])
    with pytest.raises(OSError, match="gone"):
        await answer_of(choice, [])


async def call(stack: Any, wire: Wire, left: asyncio.Event | None = None, **body: Any) -> None:
    """A chat request straight to the ASGI application, whose client leaves when `left` is set."""
    left = left or asyncio.Event()
    messages = [{"role": "user", "content": "Tell a story"}]
    content = json.dumps({"model": "tiny", "messages": messages, "stream": True, "max_tokens": 24} | body).encode()
    request = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if request:
            return request.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await stack.proxy.app(scope, receive, wire.send)


async def test_a_slow_reader_holds_up_one_message_and_gets_everything(start):
    stack = await start("b")
    whole = (await stack.chat()).json()["choices"][0]["message"]["content"]
    wire = Wire()
    answer = asyncio.create_task(call(stack, wire))
    await until(lambda: len(wire.sent) > 3)
    wire.is_slow = True
    await until(lambda: wire.waiting == 1 and not stack["b"].live)
    assert len(wire.sent) < 24
    wire.keeps_up.set()
    await answer
    assert (wire.most_waiting, wire.text) == (1, whole)
    await stack.until_settled()


async def test_a_reader_that_stops_reading_does_not_slow_the_others(start):
    stack = await start("b")
    whole = (await stack.chat()).json()["choices"][0]["message"]["content"]
    slow, left, quick = Wire(), asyncio.Event(), Wire()
    slow.is_slow = True
    stuck = asyncio.create_task(call(stack, slow, left))
    await until(lambda: slow.waiting == 1)
    await call(stack, quick)
    assert quick.text == whole and slow.sent == []
    left.set()
    await stuck
    await stack.until_settled()


async def test_a_client_that_leaves_within_a_frame_aborts_decode(start):
    stack = await start("b", hold_after=12)
    left = asyncio.Event()

    class Leaving(Wire):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if len(self.sent) == 6:
                left.set()

    wire = Leaving()
    async with asyncio.timeout(10):
        await call(stack, wire, left)
        await stack["b"].aborted.get()
    assert 6 <= len(wire.sent) < 24
    await stack.until_settled()


async def test_a_connection_that_breaks_within_a_frame_leaves_the_others_whole(start):
    stack = await start("b")
    whole = (await stack.chat()).json()["choices"][0]["message"]["content"]

    class Breaking(Wire):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if len(self.sent) == 6:
                raise OSError("gone")

    breaking, quick = Breaking(), Wire()
    await asyncio.gather(call(stack, breaking), call(stack, quick))
    assert quick.text == whole
    assert b'"error"' in breaking.sent[-1]["body"]
    await stack.until_settled()


@pytest.mark.parametrize("burst", [1, 3])
async def test_a_stop_string_across_frames_is_cut_where_the_whole_text_is(start, burst):
    stack = await start("b", burst=burst)
    whole = (await stack.chat(max_tokens=60)).json()["choices"][0]["message"]["content"]
    stop = whole[30:38]
    wire = Wire()
    await call(stack, wire, max_tokens=60, stop=[stop])
    assert wire.text == whole[: whole.index(stop)]
    await stack.until_settled()


@pytest.mark.parametrize("fleet", ["b", "p d"])
async def test_answered_requests_leave_nothing_to_the_garbage_collector(start, fleet):
    stack = await start(fleet, {"output_format": "qwen3"})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]

    async def ask() -> None:
        assert (await stack.chat(stream=True)).status_code == (await stack.chat(tools=tools)).status_code == 200
        assert (await stack.chat(n=0)).status_code == 400
        await stack.until_settled()

    await ask()
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        await ask()
        gc.collect()
        left = {type(o).__qualname__ for o in gc.garbage if type(o).__module__.startswith(("omni_proxy", "uvicorn"))}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == set(), "full collections hold up every stream"
