"""OmniAttn on this machine's CPU: KV bytes and decode speed against full attention, and what patterns are worth.

    python bench/omniattn.py
    python bench/omniattn.py --quick --json omniattn.json --plot omniattn.png

Speed and bytes: two vLLM engines, one with a pattern, taking turns on the same cores, on random tokens (the tiny
model's weights; positions beyond its 8,192 by `hf_overrides`). Accuracy: the trained tiny model on held-out questions
at the end of long prompts, in transformers under the same rule. A CPU's figures: they say nothing of an NPU.
"""

import functools
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from sidebyside.child import Child

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "tiny-moe"
BLOCK = 32
SPARSE = "full,1+3,1+3,1+3"
sys.path.insert(0, str(ROOT / "models" / "recipe"))


def engine_of(settings: dict[str, Any]) -> Child:
    """A measured engine in a process of its own."""
    started = Child("omniattnbench.engine")
    started.ask(settings)
    return started


def two_cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


def layers_of(text: str) -> tuple[Any, ...]:
    from omni_kernels.patterns.pattern import Budget

    parts = [part.strip() for part in text.split(",")]
    return tuple(None if part == "full" else Budget(*map(int, part.split("+"))) for part in parts)


def settings_of(contexts: list[int], streams: int, cores: str, pattern: Any) -> dict[str, Any]:
    longest = max(contexts) + 512
    settings: dict[str, Any] = {
        "model": str(MODEL), "max_model_len": longest, "block_size": BLOCK, "enforce_eager": True, "cores": cores,
        "hf_overrides": {"max_position_embeddings": longest}, "enable_prefix_caching": False,
        "max_num_batched_tokens": 2048, "max_num_seqs": max(2, streams),
        "kv_cache_memory_bytes": (streams + 1) * longest * 4096,
    }  # fmt: skip
    if pattern is not None:
        settings["worker_cls"] = "omni_kernels.vllm.omni_attn.worker.CpuPatternWorker"
        settings["additional_config"] = {"omni_attention_pattern": pattern.to_json()}
    return settings


def speed(contexts: list[int], streams: int, rounds: int, steps: int, cores: str, sparse: str) -> list[dict[str, Any]]:
    """Each context: medians over rounds in which the engines take turns; the ratio is the median of the rounds'."""
    from omni_kernels.patterns.pattern import Pattern

    pattern = Pattern("tiny-moe", BLOCK, 512, layers_of(sparse))
    engines = {
        name: engine_of(settings_of(contexts, streams, cores, p)) for name, p in [("full", None), ("sparse", pattern)]
    }
    rows = []
    for context in contexts:
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        begin = {"call": "begin", "context": context, "streams": streams, "steps": (rounds + 1) * steps}
        prefill = {name: engine.ask(begin)["prefill_s"] for name, engine in engines.items()}
        for number in range(rounds + 1):
            for name in list(engines)[:: 1 if number % 2 == 0 else -1]:
                told[name].append(engines[name].ask({"call": "decode", "steps": steps}))
        for name, engine in engines.items():
            engine.ask({"call": "end"})
            del told[name][0]  # the first turn warms up
        ratios = sorted(f["step_s"] / s["step_s"] for f, s in zip(told["full"], told["sparse"], strict=True))
        row: dict[str, Any] = {"context": context, "streams": streams, "ratio": median(ratios), "ratios": ratios}
        for name, answers in told.items():
            row[name] = {
                "kv_bytes": answers[0]["kv_bytes"],
                "tokens_per_s": streams / median(a["step_s"] for a in answers),
                "prefill_s": prefill[name],
            }
        rows.append(row)
    for engine in engines.values():
        engine.close()
    return rows


def accuracy(count: int, shares: list[float], seed: int, chance: int, plot: Path | None) -> list[dict[str, Any]]:
    import torch
    from omniattnbench.accuracy import compare
    from questions import questions
    from transformers import AutoTokenizer

    from omni_kernels.patterns import questions as files
    from omni_kernels.patterns.commands import choices
    from omni_kernels.patterns.decoding import Decoder
    from omni_kernels.patterns.pattern import Pattern
    from omni_kernels.patterns.plot import draw
    from omni_kernels.patterns.search import Space

    torch.set_num_threads(1)
    tokenizer, decoders = AutoTokenizer.from_pretrained(MODEL), []
    with tempfile.TemporaryDirectory() as folder:
        for which in (99, 7):
            file = Path(folder) / f"{which}.jsonl"
            made = questions(tokenizer, count, (20, 60), which)
            file.write_text("".join(json.dumps(question) + "\n" for question in made))
            decoders.append(Decoder(MODEL, files.read(file), BLOCK))
    scores = [functools.cache(decoder.score) for decoder in decoders]
    results, runs = [], {}
    for share in shares:
        rows, seen = compare(decoders[0], *scores, choices("0,1", "1,2,3,4"), share, 4096, seed, chance)
        results.append({"share": share, "questions": count, "seed": seed, "rows": [asdict(row) for row in rows]})
        for method, scored in seen.items():
            runs[method] = runs.get(method, {}) | scored
    if plot:
        full = Pattern("tiny-moe", BLOCK, 512, (None,) * decoders[0].num_layers)
        draw(runs, Space(full, (None,), 4096), f"tiny-moe, {count} held-out questions, seed {seed}", plot)
    return results


def markdown(figures: dict[str, Any]) -> str:
    lines = []
    if figures["speed"]:
        lines += [
            f"Pattern `{figures['pattern']}` (sink+recent blocks of {BLOCK} tokens, layer by layer):", "",
            "| context | sequences | KV bytes each, full | pattern | part | tokens/s, full | pattern | ratio (range) |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]  # fmt: skip
    for row in figures["speed"]:
        full, sparse = row["full"], row["sparse"]
        lines.append(
            f"| {row['context']:,} | {row['streams']} | {full['kv_bytes']:,} | {sparse['kv_bytes']:,} "
            f"| {sparse['kv_bytes'] / full['kv_bytes']:.1%} "
            f"| {full['tokens_per_s']:.1f} | {sparse['tokens_per_s']:.1f} "
            f"| {row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}) |"
        )
    for part in figures["accuracy"]:
        lines += [
            "", f"At most {part['share']:.1%} of the KV bytes of 4,096 tokens, seed {part['seed']}, judged on "
            f"{part['questions']} other held-out questions:", "",
            "| pattern | layers | KV bytes | accuracy | perplexity | patterns scored |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        lines += [
            f"| {r['name']} | {r['layers']} | {r['share']:.2%} | {r['accuracy']:.1%} | {r['perplexity']:.4f} "
            f"| {r['scored'] or ''} |"
            for r in part["rows"]
        ]
    return "\n".join(lines) + "\n"


def main(
    quick: Annotated[bool, typer.Option(help="One context, one sequence, few questions: does it run?")] = False,
    contexts: Annotated[str, typer.Option(help="Tokens before decoding.")] = "4096,16384",
    streams: Annotated[int, typer.Option(min=1, help="Sequences side by side.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 7,
    steps: Annotated[int, typer.Option(min=4, help="Decode steps timed in a turn.")] = 24,
    cores: Annotated[str | None, typer.Option(help="Cores of both engines, as in 0,1.", show_default="two")] = None,
    pattern: Annotated[str, typer.Option(help="Of the measured engine, layer by layer.")] = SPARSE,
    shares: Annotated[
        str, typer.Option(help="Budgets of KV bytes, as parts of full attention's at 4,096.")
    ] = "0.016,0.024",
    questions: Annotated[
        int, typer.Option(min=8, help="Held-out questions to search on, and others to judge by.")
    ] = 96,
    seed: Annotated[int, typer.Option(help="Of the searches.")] = 0,
    only: Annotated[str, typer.Option(help="speed, accuracy, or both.")] = "speed,accuracy",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures for programs.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG: accuracy against KV bytes, every pattern scored.")] = None,
) -> None:
    """Measure, and print the tables."""
    if quick:
        contexts, streams, rounds, steps, questions, shares = "1024", 1, 1, 8, 24, "0.024"
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "pattern": pattern}
    lengths = [int(context) for context in contexts.split(",")]
    figures["speed"] = speed(lengths, streams, rounds, steps, cores or two_cores(), pattern) if "speed" in only else []
    budgets = [float(share) for share in shares.split(",")]
    figures["accuracy"] = accuracy(questions, budgets, seed, 4 if quick else 16, plot) if "accuracy" in only else []
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    print(markdown(figures))


if __name__ == "__main__":
    typer.run(main)
