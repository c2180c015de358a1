"""One request, one trace, collected by a real OTLP receiver."""

import re
from typing import Any

import openai
import pytest
from live import LiveStack, OtlpReceiver, eventually

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(600)]

MARKER = "zebra-quartz-violin"


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_one_trace_holds_every_leg(stack: LiveStack, sdk: openai.OpenAI, otlp: OtlpReceiver) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    sdk.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": f"Say {MARKER} and tell me a story."}],
        max_tokens=20,
        extra_headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"},
    )

    def collected() -> dict[str, tuple[str, Any]] | None:
        mine = {s.name: (service, s) for service, s in otlp.spans if s.trace_id.hex() == trace_id}
        return mine if {"proxy.request", "decode.sequence"} <= mine.keys() else None

    spans = eventually("all spans arrived", collected, 20)
    services = {service for service, _ in spans.values()}
    assert {"omni-proxy", "omni-prefill", "omni-decode"} <= services

    by_id = {s.span_id: s for _, s in spans.values()}
    root = spans["proxy.request"][1]
    assert root.parent_span_id.hex() == "00f067aa0ba902b7"
    for name, (_, span) in spans.items():
        if span is not root:
            assert span.parent_span_id in by_id, f"{name} has no parent in the trace"
    prefill = next(s for service, s in spans.values() if service == "omni-prefill")
    decode = spans["decode.sequence"][1]
    assert by_id[prefill.parent_span_id].name == "proxy.prefill"
    assert by_id[decode.parent_span_id].name == "proxy.decode"

    seen = attributes(root)
    needed = {
        "omni.prompt_tokens",
        "omni.cached_tokens",
        "omni.uncached_tokens",
        "omni.output_tokens",
        "omni.ttft_ms",
        "omni.prefill_worker_id",
        "omni.decode_worker_id",
        "omni.finish_reason",
        "omni.queue_ms",
        "omni.transfer_ms",
    }
    assert needed <= seen.keys(), f"missing {needed - seen.keys()} in {sorted(seen)}"
    assert {"omni.worker_id", "omni.queue_ms"} <= attributes(prefill).keys()
    assert {"omni.worker_id", "omni.transfer_ms"} <= attributes(decode).keys()
    assert seen["omni.uncached_tokens"] + seen["omni.cached_tokens"] == seen["omni.prompt_tokens"]


def test_no_prompt_text_in_spans_or_logs(stack: LiveStack, sdk: openai.OpenAI, otlp: OtlpReceiver) -> None:
    sdk.completions.create(model=stack.model, prompt=f"{MARKER} {MARKER}", max_tokens=4)
    with pytest.raises(openai.BadRequestError):
        sdk.completions.create(model=stack.model, prompt=f"{MARKER} " * 5000, max_tokens=4)
    everything = "".join(str(span) for _, span in otlp.spans) + "".join(stack.log(n) for n in stack.processes())
    assert not re.search(MARKER, everything)
