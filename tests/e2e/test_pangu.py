"""openPangu shapes through the whole stack: log-probabilities as other implementations of the models give them."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from live import ROOT, LiveStack, live_stack
from pangu_reference import UltraMoE
from safetensors.torch import load_file
from tokenizers import Tokenizer

from omni_proxy.text import ModelText

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(600)]

# Checkpoints of openPangu bring the class of their configuration along.
TRUSTED = {f"OMNI_{role}_VLLM__ENGINE_ARGS": '{"trust_remote_code": true}' for role in ("PREFILL", "DECODE")}
SMALL = ("--kv-cache-gib", "0.25", "--max-model-len", "2048")
# bf16 keeps 8 bits, and the heads of these models are sharp.
TOLERANCE = 0.2
# Scores of experts closer than this may change places by rounding, and the token's answer with them.
NEAR_TIE = 0.02
STORY = "Tell me about the river and the town beside it. "


@contextmanager
def served(folder: Path, shape: str, *arguments: str) -> Iterator[tuple[LiveStack, Path]]:
    model = folder / f"pangu-{shape}"
    recipe = ROOT / "models" / "recipe" / "pangu_tiny.py"
    subprocess.run([sys.executable, recipe, "--shape", shape, "--out", model], check=True, timeout=60)
    with live_stack(folder, *arguments, *SMALL, model=model, environ=TRUSTED) as stack:
        yield stack, model


def differences(
    stack: LiveStack, model: Path, logits_of: Callable[[torch.Tensor], torch.Tensor], repeats: int
) -> list[float]:
    """By how much what was said was likelier, token by token, than the reference says."""
    messages = [{"role": "user", "content": STORY * repeats}]
    body = {"model": stack.model, "messages": messages, "max_tokens": 24, "temperature": 0}
    with stack.client(120) as http:
        prompt: list[int] = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        answer = http.post("/v1/chat/completions", json=body | {"logprobs": True, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["choices"][0]["logprobs"]["content"]
    text = ModelText(model)
    ids = {text.token_text(i)[1]: i for i in range(Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size())}
    said = [ids[bytes(row["bytes"])] for row in rows]
    assert len(said) == 24
    likely = torch.log_softmax(logits_of(torch.tensor(prompt + said)).double(), -1)
    expected = [float(likely[len(prompt) - 1 + i, token]) for i, token in enumerate(said)]
    return [row["logprob"] - each for row, each in zip(rows, expected, strict=True)]


def test_ultra_moe_through_prefill_and_decode(tmp_path: Path) -> None:
    with served(tmp_path, "ultra-moe", "--prefill", "1", "--decode", "1") as (stack, model):
        reference = UltraMoE(model)
        clear = []
        for repeats in (1, 10, 60):
            found = differences(stack, model, reference.logits, repeats)
            margins = reference.margins[-len(found) - 1 : -1]
            clear += [each for each, margin in zip(found, margins, strict=True) if margin > NEAR_TIE]
        print(f"\n{len(clear)} tokens, largest difference {max(map(abs, clear)):.3f}")
        assert len(clear) > 24
        assert clear == pytest.approx([0.0] * len(clear), abs=TOLERANCE)
        with stack.client() as http:
            rows = http.get("/metrics").text.splitlines()
        pairs = [row for row in rows if row.startswith("omni_proxy_decisions_total") and '"disaggregated"' in row]
        assert sum(float(row.rpartition(" ")[2]) for row in pairs) > 0


def test_embedded(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with served(tmp_path, "embedded", "--prefill", "0", "--decode", "1") as (stack, model):
        # Dense openPangu is Llama's network with biases in attention.
        sizes = {"head_dim": 32, "num_key_value_heads": 2, "vocab_size": 1542}
        sizes |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = LlamaConfig(rms_norm_eps=1e-5, rope_theta=16000000.0, attention_bias=True, **sizes)
        network = LlamaForCausalLM(config).float().eval()
        network.load_state_dict({k: v.float() for k, v in load_file(model / "model.safetensors").items()})
        with torch.no_grad():
            for repeats in (1, 60):
                found = differences(stack, model, lambda ids: network(ids[None]).logits[0], repeats)
                assert found == pytest.approx([0.0] * len(found), abs=TOLERANCE)
