"""One vLLM engine in a process of its own, measured on demand: `python -m omniattnbench.engine` with a JSON line of
settings, then one JSON line per call."""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    settings = json.loads(sys.stdin.readline())
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings.pop("cores")
    from vllm import LLM

    engine = LLM(**settings).llm_engine
    say(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        say(answers, CALLS[asked.pop("call")](engine, **asked))


def say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def begin(engine: Any, context: int, streams: int, steps: int) -> dict[str, Any]:
    """Prefill `streams` sequences of `context` random tokens of their own, good for `steps` steps."""
    from vllm import SamplingParams

    rng, params = random.Random(context), SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True)
    for number in range(streams):
        tokens = [rng.randrange(300, 900) for _ in range(context)]
        engine.add_request(f"{context}-{number}", {"prompt_token_ids": tokens}, params)
    told: set[str] = set()
    began = time.perf_counter()
    while len(told) < streams:
        told |= {output.request_id for output in engine.step()}
    return {"prefill_s": time.perf_counter() - began}


def decode(engine: Any, steps: int) -> dict[str, Any]:
    """Median time of so many decode steps, and what the largest sequence holds."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return {"step_s": statistics.median(times), "kv_bytes": max(kv_bytes(engine))}


def end(engine: Any) -> dict[str, Any]:
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    return {}


def kv_bytes(engine: Any) -> list[int]:
    """Bytes of the blocks that each running sequence holds, from vLLM's own cache manager."""
    scheduler = engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager
    groups = manager.kv_cache_config.kv_cache_groups
    sizes = [len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups]
    return [
        sum(
            size * sum(not block.is_null for block in blocks)
            for size, blocks in zip(sizes, manager.coordinator.get_blocks(request.request_id), strict=True)
        )
        for request in scheduler.running
    ]


CALLS: dict[str, Callable[..., dict[str, Any]]] = {"begin": begin, "decode": decode, "end": end}

if __name__ == "__main__":
    main()
