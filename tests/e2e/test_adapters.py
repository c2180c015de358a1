"""LoRA adapters through a whole stack on real engines: as models of their own, beside each other and the model itself.

The reference is the model with an adapter's weights added to its own, run by transformers in float32.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import MODEL_DIR, ROOT, LiveStack, eventually, live_stack
from tokenizers import Tokenizer

sys.path.insert(0, str(ROOT / "models" / "recipe"))

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(600)]

ADAPTERS = ("poet", "sql")
SMALL = ("--kv-cache-gib", "0.25", "--max-model-len", "2048")
# The reference is in float32; and prompts here are so short that decode would compute most of them itself.
ENVIRON = {
    "OMNI_PREFILL_VLLM__DTYPE": "float32",
    "OMNI_DECODE_VLLM__DTYPE": "float32",
    "OMNI_PROXY_POLICY": "least_uncached_tokens",
}
LENGTHS = (5, 127, 128, 129, 300, 700)
MAX_TOKENS = 12
CLEAR = 0.02
"""Between the two likeliest tokens' logits: less may fall out the other way."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    recipe = ROOT / "models" / "recipe" / "adapter_tiny.py"
    for seed, name in enumerate(ADAPTERS):
        command = [sys.executable, recipe, "--model", MODEL_DIR, "--out", home / name, "--seed", str(seed)]
        subprocess.run(command, check=True, timeout=60)
    return {name: home / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def stack(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    options = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    with live_stack(tmp_path_factory.mktemp("stack"), *SMALL, *options, environ=ENVIRON) as running:
        yield running


def prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(300, 1000) for _ in range(length)] for length in LENGTHS]


def complete(stack: LiveStack, model: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True} | more
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def references(folders: Mapping[str, Path]) -> Mapping[str, Any]:
    """The models that the names must answer like."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from merged import add_to

    torch.set_num_threads(1)
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        for name in (MODEL_DIR.name, *ADAPTERS)
    }
    for name, folder in folders.items():
        add_to(models[name], folder)
    return models


def test_each_name_answers_like_its_own_model(stack: LiveStack, references: Mapping[str, Any]) -> None:
    """All at once, so that steps mix adapters with the model itself."""
    from merged import greedy

    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    asked = [(name, prompt) for prompt in prompts() for name in references]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: complete(stack, *one, skip_special_tokens=False), asked))
    compared, texts = 0, {}
    for (name, prompt), answer in zip(asked, answers, strict=True):
        tokens, margin = greedy(references[name], prompt, MAX_TOKENS)
        texts[name, len(prompt)] = answer["choices"][0]["text"]
        assert answer["model"] == name
        if margin > CLEAR:
            compared += 1
            assert texts[name, len(prompt)] == tokenizer.decode(tokens, skip_special_tokens=False), (name, len(prompt))
    assert compared > len(asked) / 2
    # Adapters that change nothing would pass as well.
    assert all(len({texts[name, length] for name in references}) == len(references) for length in LENGTHS)


def test_cached_blocks_are_each_names_own(stack: LiveStack) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(300, 1000) for _ in range(520)]
    whole_blocks = 512

    def cached(model: str) -> int:
        usage = complete(stack, model, prompt)["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def known(model: str) -> int:
        page = httpx.post(f"{stack.url}/kv/prefix", json={"model": model, "prompt": prompt}, timeout=10).json()
        return max(max(reached, default=0) for reached in page["members"].values()) * page["block_size"]

    for model in (*ADAPTERS, MODEL_DIR.name):
        assert known(model) == 0
        assert cached(model) == 0
        eventually(f"the index knows {model}'s blocks", lambda m=model: known(m) == whole_blocks, 10)
        assert cached(model) == whole_blocks
    verdict = eventually("the index is right", lambda: verified(stack), 20)
    assert {row["worker_id"].rpartition("-")[0].rpartition("-")[2] for row in verdict} == {"prefill", "decode"}


def verified(stack: LiveStack) -> Any:
    answer = stack.omni("kv", "verify", "--json", check=False)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def test_adapters_are_listed_and_others_are_refused(stack: LiveStack) -> None:
    listed = httpx.get(f"{stack.url}/v1/models", timeout=10).json()["data"]
    assert {model["id"]: model.get("parent") for model in listed} == {
        MODEL_DIR.name: None,
        **dict.fromkeys(ADAPTERS, MODEL_DIR.name),
    }
    body = {"model": "haiku", "prompt": [300], "max_tokens": 1}
    refused = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_the_command_talks_to_an_adapter(stack: LiveStack) -> None:
    said = stack.omni("chat", "--model", "poet", "--max-tokens", "4", "--temperature", "0", "Hello")
    assert said.stdout.strip()
    latest = httpx.get(f"{stack.url}/decisions", params={"limit": 1}, timeout=10).json()
    assert "poet" in json.dumps(latest)
