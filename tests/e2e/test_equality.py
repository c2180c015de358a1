"""Greedy output of 1P1D, of one aggregated Omni engine, and of vLLM's own server on the same weights."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import MODEL_DIR, ROOT, LiveStack, eventually, free_port
from tokenizers import Tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(900)]

LENGTHS = [1, 2, 3, 5, 8, 16, 64, 126, 127, 128, 129, 255, 256, 257, 384, 500, 511, 512, 640, 900]
LENGTHS += [1024, 1500, 2000, 2559, 2560, 3000, *range(20, 44)]
# bf16 keeps 8 bits: logits near 20 are 0.125 apart, and two orders of summation may differ by as much.
NOISE = 0.25
LOGPROB_TOLERANCE = 0.05
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: list[str]
    logprobs: list[float]
    margins: list[float]


def prompts() -> list[list[int]]:
    """Token ids of text in the model's domain, cut to the lengths wanted."""
    rng = random.Random(5)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    asked = [
        "What is {} plus {}?",
        "Tell me a short story about number {} and {}.",
        "Count from {} to {}.",
        "Spell {} {}.",
    ]
    result = []
    for length in LENGTHS:
        ids: list[int] = []
        while len(ids) < length:
            question = rng.choice(asked).format(rng.randrange(50), rng.randrange(50))
            ids += tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
        result.append(ids[-length:])
    return result


def complete(url: str, prompt: list[int]) -> Answer:
    body = {"model": "tiny-moe", "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    found = choice["logprobs"]
    margins = []
    for best in found["top_logprobs"]:
        ranked = sorted(best.values(), reverse=True)
        # Two different tokens may have one text (parts of a character); then the margin is unknown.
        margins.append(ranked[0] - ranked[1] if len(ranked) > 1 else 0.0)
    return Answer(choice["text"], found["tokens"], found["token_logprobs"], margins)


def is_whole(token: str) -> bool:
    """Parts of a character are written in different ways; their log-probabilities and the text are compared."""
    return bool(token) and token.isascii() and not token.startswith("bytes:")


def check_same(prompt_tokens: int, seen: Answer, reference: Answer) -> int:
    """Equal where the margin is clear, close log-probabilities; returns how many tokens were compared."""
    for i, (token, expected) in enumerate(zip(seen.tokens, reference.tokens, strict=False)):
        if token != expected and is_whole(token) and is_whole(expected):
            assert reference.margins[i] < NOISE, f"{prompt_tokens} tokens: {token!r} for {expected!r} at {i}"
            return i
        assert abs(seen.logprobs[i] - reference.logprobs[i]) <= max(
            LOGPROB_TOLERANCE, NOISE if reference.margins[i] < NOISE else 0
        ), f"{prompt_tokens} tokens: log-probability at {i}"
    assert len(seen.tokens) == len(reference.tokens)
    # Cut off inside a character, our text ends as the tokenizer decodes it; vLLM's server leaves the part out.
    assert seen.text.rstrip(REPLACEMENT) == reference.text.rstrip(REPLACEMENT)
    return len(seen.tokens)


@contextmanager
def running(command: list[str], url: str, ready: str, log: Path, environ: dict[str, str]) -> Iterator[str]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | environ, cwd=ROOT, stdout=output, stderr=output)
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            return httpx.get(f"{url}{ready}").status_code == 200

        eventually(f"{command[2]} is ready", is_ready, 240)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def aggregated(stack: LiveStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second proxy that knows the decode worker alone, which then prefills itself."""
    port = free_port()
    worker = stack.processes()["decode-0"]["address"]
    environ = {
        "OMNI_PROXY_PORT": str(port),
        "OMNI_PROXY_MODEL_DIR": str(MODEL_DIR),
        "OMNI_PROXY_WORKERS": f"[{worker}]",
    }
    log = tmp_path_factory.mktemp("aggregated") / "proxy.log"
    command = [sys.executable, "-m", "omni_proxy"]
    with running(command, f"http://127.0.0.1:{port}", "/ready", log, environ) as url:
        yield url


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    options = {
        "--model": str(MODEL_DIR),
        "--served-model-name": "tiny-moe",
        "--port": str(port),
        "--host": "127.0.0.1",
        "--max-model-len": "4096",
        "--max-num-seqs": "64",
        "--max-num-batched-tokens": "4096",
        "--kv-cache-memory-bytes": str(1 << 28),
    }
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command = [*server, *(x for kv in options.items() for x in kv)]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with running(command, f"http://127.0.0.1:{port}", "/health", log, {"VLLM_CPU_OMP_THREADS_BIND": "1"}) as url:
        # Without a prefill first, a long-context decode may end the worker (see libs/engine/UPSTREAM.md).
        complete(url, list(range(10, 210)))
        yield url


def test_greedy_output_is_the_same_everywhere(stack: LiveStack, aggregated: str, vllm_server: str) -> None:
    compared = {"1P1D": 0, "aggregated": 0}
    total = 0
    for prompt in prompts():
        reference = complete(vllm_server, prompt)
        total += len(reference.tokens)
        for name, url in (("1P1D", stack.url), ("aggregated", aggregated)):
            compared[name] += check_same(len(prompt), complete(url, prompt), reference)
    print(f"\n{len(LENGTHS)} prompts, {total} tokens of vLLM's server; equal before any near-tie: {compared}")
    assert all(count > 0.8 * total for count in compared.values())


def test_prompts_are_varied() -> None:
    assert len(LENGTHS) == 50
    assert all(a != b for a, b in pairwise(prompts()))
