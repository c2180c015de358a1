#!/usr/bin/env python3
"""Accuracy and speed of W8A8 and of drafted tokens against bf16, on vLLM's CPU engine with Omni's fixes and experts.

    python bench/quantization.py --quick                 a few minutes
    python bench/quantization.py --json out.json         all models, more questions and rounds

Each variant is an engine of its own, one after another on the same core. Accuracy: perplexity of the answers of
held-out documents, right answers to held-out questions (`models/recipe/evaluate.py`), and the mean distance of prompt
log-probabilities from bf16's. Speed: generated tokens per second, median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "models" / "recipe"
TRAINED = ("tiny-moe", "tiny-deepseek")
FIXES = "latent_rotary,int8_experts"


def variants(model: str, quick: bool) -> list[tuple[str, str]]:
    """(weights, drafter)."""
    plain = [("bf16", ""), ("w8a8", "")]
    if model != "tiny-deepseek":
        return plain
    return [*plain, ("bf16", "mtp"), ("w8a8", "mtp")] + ([] if quick else [("bf16", "ngram")])


def held_out_rows(folder: Path, count: int) -> list[tuple[list[int], list[bool]]]:
    """Token ids of held-out documents, and which of them are an answer's."""
    sys.path.insert(0, str(RECIPE))
    from corpus import held_out
    from tokens import weighted
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [weighted(document, tokenizer) for document in held_out(99, 20)]
    return [(ids, [weight == 1.0 for weight in weights]) for ids, weights in rows if len(ids) < 900][::3][:count]


def questions(folder: Path, per_topic: int) -> list[tuple[list[int], tuple[str, ...]]]:
    sys.path.insert(0, str(RECIPE))
    from corpus import held_out
    from evaluate import chat_prompt
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [(tokenizer(chat_prompt(tokenizer, d))["input_ids"], tuple(d.expect)) for d in held_out(99, per_topic)]


def measure(folder: Path, drafter: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One engine's figures. Runs in a process of its own."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    speculative: dict[str, Any] = {"mtp": {"method": "mtp", "num_speculative_tokens": 2}}
    speculative["ngram"] = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 2}
    speculative["ngram"]["prompt_lookup_max"] = 4
    extra = {"speculative_config": speculative[drafter]} if drafter else {}
    llm = LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=2048, max_num_seqs=16,
        kv_cache_memory_bytes=1 << 28, disable_log_stats=False, seed=0, **extra,
    )  # fmt: skip
    rows = held_out_rows(folder, asked["documents"])
    scored = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in rows], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    answers, every = [], []
    for (ids, is_answer), output in zip(rows, scored, strict=True):
        found = [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        every += found
        answers += [value for value, counts in zip(found, is_answer[1:], strict=True) if counts]
    figures: dict[str, Any] = {"perplexity": math.exp(-sum(answers) / len(answers)), "logprobs": every}
    if asked["per_topic"]:
        figures |= task_accuracy(llm, folder, asked["per_topic"], AutoTokenizer.from_pretrained(folder), SamplingParams)
    prompts = [{"prompt_token_ids": ids} for ids, _ in questions(folder, 1)]
    for batch in (1, 16):
        params = SamplingParams(max_tokens=96, temperature=0, ignore_eos=True)
        rates = []
        for _ in range(asked["rounds"] + 1):
            began = time.perf_counter()
            llm.generate(prompts[:batch], params, use_tqdm=False)
            rates.append(batch * 96 / (time.perf_counter() - began))
        figures[f"tokens_per_s_{batch}"] = median(rates[1:])
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    if drafted := counters.get("vllm:spec_decode_num_draft_tokens"):
        figures["acceptance"] = counters["vllm:spec_decode_num_accepted_tokens"] / drafted
    figures["weight_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return figures


def task_accuracy(llm: Any, folder: Path, per_topic: int, tokenizer: Any, params: Any) -> dict[str, Any]:
    asked = questions(folder, per_topic)
    greedy = params(max_tokens=200, temperature=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], greedy, use_tqdm=False)
    right = 0
    for (_, expected), output in zip(asked, outputs, strict=True):
        answer = output.outputs[0]
        text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        right += answer.finish_reason == "stop" and all(part in text for part in expected)
    return {"right": right, "questions": len(asked)}


def run(folder: Path, drafter: str, asked: dict[str, Any], core: str) -> dict[str, Any]:
    environment = os.environ | {
        "OMNI_ENGINE_CPU_FIXES": FIXES, "VLLM_CPU_OMP_THREADS_BIND": core, "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        job = json.dumps({"folder": str(folder), "drafter": drafter, "asked": asked, "answer": answer.name})
        subprocess.run([sys.executable, __file__, "--job", job], env=environment, check=True, timeout=900)
        found: dict[str, Any] = json.load(answer)
        return found


def quantised(folder: Path, out: Path) -> Path:
    from omni_kernels.quantize.checkpoint import read_config, weights_of, write
    from omni_kernels.quantize.choice import choose

    write(folder, out, choose(weights_of(folder), read_config(folder), "w8a8"))
    return out


def folders(names: list[str], work: Path) -> dict[str, Path]:
    found = {name: ROOT / "models" / name for name in names if name in TRAINED}
    if "qwen3-tiny" in names:
        subprocess.run([sys.executable, RECIPE / "qwen3_tiny.py", "--out", work / "qwen3-tiny"], check=True)
        found["qwen3-tiny"] = work / "qwen3-tiny"
    return found


def line(model: str, weights: str, drafter: str, figures: dict[str, Any], base: dict[str, Any]) -> str:
    difference = sum(abs(a - b) for a, b in zip(figures["logprobs"], base["logprobs"], strict=True))
    shares = [figures[f"tokens_per_s_{batch}"] / base[f"tokens_per_s_{batch}"] for batch in (1, 16)]
    rates = [
        f"{figures[f'tokens_per_s_{batch}']:.0f} ({share:.2f})" for batch, share in zip((1, 16), shares, strict=True)
    ]
    right = f"{figures['right']}/{figures['questions']}" if "right" in figures else "-"
    accepted = f"{figures['acceptance']:.0%}" if "acceptance" in figures else "-"
    cells = [
        model, weights, f"{drafter}:2" if drafter else "-", f"{figures['perplexity']:.3f}", right,
        f"{difference / len(base['logprobs']):.4f}", *rates, accepted, f"{figures['weight_bytes'] / 1e6:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer documents, questions and rounds")
    parser.add_argument("--models", default="tiny-moe,tiny-deepseek,qwen3-tiny", help="which, separated by commas")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        Path(job["answer"]).write_text(json.dumps(measure(Path(job["folder"]), job["drafter"], job["asked"])))
        return
    documents, topics, rounds = (40, 2, 3) if args.quick else (120, 20, 5)
    core = str(min(os.sched_getaffinity(0)))
    kept: dict[str, dict[str, Any]] = {}
    columns = "Model|Weights|Drafter|Perplexity|Right|Log-probability off|tokens/s, 1|tokens/s, 16|Accepted|MB"
    head = f"| {columns.replace('|', ' | ')} |"
    print(head + "\n|" + "---|" * 10, flush=True)
    with tempfile.TemporaryDirectory() as work:
        for model, folder in folders(args.models.split(","), Path(work)).items():
            small = quantised(folder, Path(work) / f"{model}-w8a8")
            asked = {"documents": documents, "per_topic": topics if model in TRAINED else 0, "rounds": rounds}
            for weights, drafter in variants(model, args.quick):
                figures = run(folder if weights == "bf16" else small, drafter, asked, core)
                kept[f"{model} {weights} {drafter}".strip()] = figures
                print(line(model, weights, drafter, figures, kept[f"{model} bf16"]), flush=True)
    if args.json:
        for figures in kept.values():
            figures.pop("logprobs")
        args.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
