"""One vLLM engine as Omni starts it, in a process of its own, measured on demand: `python -m quantizationbench.engine`
with a JSON line of settings, then one JSON line per call."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

SEED = 99


class Measured:
    """The engine, the tokenizer and the held-out text of `recipe`, the folder of models/recipe."""

    def __init__(self, folder: str, recipe: str, settings: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        from omni_engine.vllm_args import plan_launch
        from omni_engine.vllm_settings import VllmSettings

        sys.path.insert(0, recipe)
        plan = plan_launch(VllmSettings.model_validate(settings), Path(folder), "measured", "both")
        os.environ |= plan.environment
        from vllm import LLM

        self.llm = LLM(**plan.arguments, disable_log_stats=False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def perplexity(self, documents: int) -> dict[str, Any]:
        """Of the answers in held-out documents, and every token's log-probability."""
        from corpus import held_out
        from tokens import weighted
        from vllm import SamplingParams

        rows = [weighted(document, self.tokenizer) for document in held_out(SEED, 20)]
        rows = [row for row in rows if len(row[0]) < 900][::3][:documents]
        scored = self.llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in rows],
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
        answers, every = [], []
        for (ids, weights), output in zip(rows, scored, strict=True):
            found = [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            every += found
            answers += [value for value, weight in zip(found, weights[1:], strict=True) if weight == 1.0]
        return {"perplexity": math.exp(-sum(answers) / len(answers)), "logprobs": every}

    def accuracy(self, per_topic: int) -> dict[str, Any]:
        """Right answers to held-out questions: the expected text is there and the answer ends by itself."""
        asked = self._questions(per_topic)
        outputs = self._answers([ids for ids, _ in asked], 200)
        right = 0
        for (_, expected), output in zip(asked, outputs, strict=True):
            text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
            right += output.finish_reason == "stop" and all(part in text for part in expected)
        return {"right": right, "questions": len(asked)}

    def round(self, batch: int, questions: int) -> dict[str, Any]:
        """Generated tokens per second over so many questions, `batch` at a time, each answered to its own end."""
        prompts = [ids for ids, _ in self._questions(1)][:questions]
        began = time.perf_counter()
        groups = [self._answers(prompts[first : first + batch], 64) for first in range(0, len(prompts), batch)]
        tokens = sum(len(output.token_ids) for group in groups for output in group)
        return {"tokens_s": tokens / (time.perf_counter() - began)}

    def drafts(self) -> dict[str, Any]:
        """Verified drafts, drafted and accepted tokens since the engine started; zeros where nobody drafts."""
        counted = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("drafts", "draft_tokens", "accepted_tokens")
        return {name: counted.get(f"vllm:spec_decode_num_{name}", 0) for name in names}

    def _questions(self, per_topic: int) -> list[tuple[list[int], tuple[str, ...]]]:
        from corpus import held_out
        from evaluate import chat_prompt

        found = held_out(SEED, per_topic)
        return [(self.tokenizer(chat_prompt(self.tokenizer, d))["input_ids"], tuple(d.expect)) for d in found]

    def _answers(self, prompts: list[list[int]], longest: int) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=longest, temperature=0)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    measured = Measured(**json.loads(sys.stdin.readline()))
    calls: dict[str, Callable[..., dict[str, Any]]] = {
        "perplexity": measured.perplexity,
        "accuracy": measured.accuracy,
        "round": measured.round,
        "drafts": measured.drafts,
    }
    say(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        say(answers, calls[asked.pop("call")](**asked))


def say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
