import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidebyside.wire import Answer, BadAnswer

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(value: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


def body(texts: list[str]) -> bytes:
    usage = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts)}})
    return delta("") + b"".join(map(delta, texts)) + usage + b"data: [DONE]\n\n"


def chunked(payload: bytes, size: int) -> bytes:
    parts = [payload[i : i + size] for i in range(0, len(payload), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


@given(
    texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6),
    chunk=st.integers(1, 200),
    read=st.integers(1, 200),
)
def test_answer_is_the_same_however_it_is_cut(texts: list[str], chunk: int, read: int) -> None:
    stream = HEAD + chunked(body(texts), chunk)
    answer = Answer()
    fresh = sum(answer.feed(stream[i : i + read]) for i in range(0, len(stream), read))
    assert (fresh, answer.token_events, answer.done) == (len(texts), len(texts), True)
    assert (answer.completion_tokens, answer.prompt_tokens) == (len(texts), 7)


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}", id="status"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", id="not chunked"),
        pytest.param(HEAD + chunked(event({"error": {"message": "gone"}}), 500), id="error event"),
    ],
)
def test_what_must_not_be_counted_is_refused(stream: bytes) -> None:
    with pytest.raises(BadAnswer):
        Answer().feed(stream)
