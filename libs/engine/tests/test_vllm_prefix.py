"""A real engine under load and eviction: what the mirror says a prompt finds is what the engine then finds.

The rule between the two: vLLM computes the last token of a prompt in any case, and whole blocks only, so of a prompt
of n tokens it reports at most (n - 1) // block blocks as cached, whatever it holds. (A drafting model that reads
hidden states, as MTP and EAGLE do, costs one block more; none runs here.)
"""

import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_process import EngineProcess, started

from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.ports import BlocksCleared, DecodeJob, SamplingParams
from omni_engine.vllm_settings import VllmSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
SOME = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
NUM_PROBES = 200


# Every second layer sees 256 tokens back only. Weights are made up: which tokens come does not matter here.
WINDOWED = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "vocab_size": 1536,
    "max_position_embeddings": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "dtype": "bfloat16",
}


def settings(**values: Any) -> VllmSettings:
    """About 80 blocks of 128 tokens: a few conversations fill them."""
    common = {"cores": "0", "kv_cache_gib": 0.02, "max_model_len": 2048, "enforce_eager": True, "max_num_seqs": 8}
    return VllmSettings(**common | values)


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    engine = EngineProcess(settings(), MODEL_DIR, "both")
    with started(engine):
        yield engine


@pytest.fixture
def windowed_engine(tmp_path: Path) -> Iterator[EngineProcess]:
    (tmp_path / "config.json").write_text(json.dumps(WINDOWED))
    made_up = {"load_format": "dummy", "skip_tokenizer_init": True}
    engine = EngineProcess(settings(kv_connector="", engine_args=made_up), tmp_path, "both")
    with started(engine):
        yield engine


class Observed:
    """The engine's mirror, kept up with the events of its process."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        info = engine.call("info")
        self.block_size: int = info.block_size
        self.num_blocks: int = info.num_blocks
        self._model: str = info.model
        self.mirror = BlockMirror(info.model, info.block_size, 100_000)
        self.kinds: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self._read = 0
        self._marks = itertools.count()

    def settle(self) -> None:
        """Everything the engine did so far is mirrored: a prompt nobody sent before is stored after all of it."""
        number = next(self._marks)
        tokens = [1000 + number % 400, 1000 + number // 400, *[7] * (self.block_size - 1)]
        self._engine.generate(DecodeJob(f"mark-{number}", tokens, ONE, cache_salt="mark"))
        deadline = time.monotonic() + 20
        while not self.prefix(tokens, "mark"):
            self._follow()
            assert time.monotonic() < deadline, "an event does not arrive"

    def prefix(self, tokens: list[int], salt: str = "") -> int:
        """Leading blocks of a prompt that the mirror has."""
        held = {block.key for _, blocks in self.mirror.pages(1000) for block in blocks}
        keys = block_keys(tokens, self.block_size, root_key(self._model, salt=salt))
        names = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        return sum(1 for _ in itertools.takewhile(held.__contains__, names))

    def _follow(self) -> None:
        for batch in self._engine.call("events", self._read):
            self.skipped.update(batch.skipped)
            self._read += 1
            for event in batch.events:
                self.kinds[type(event).__name__] += 1
                if isinstance(event, BlocksCleared):
                    self.mirror.clear()
                else:
                    self.mirror.apply(event)


class Conversations:
    """Prompts that begin alike, grow by turns, and differ by salt."""

    def __init__(self, seed: int, block_size: int) -> None:
        self._rng = random.Random(seed)
        self._block = block_size
        systems = [self._tokens(n) for n in (block_size // 2, 2 * block_size, 3 * block_size + 5)]
        self.all = [(list(systems[i % 3]), "s" if i % 4 == 0 else "") for i in range(12)]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(300, 900) for _ in range(count)]

    def next(self) -> tuple[list[int], str]:
        """A prompt: mostly a turn of a conversation, at times one asked again, cut to whole blocks, or new."""
        tokens, salt = self.all[number := self._rng.randrange(len(self.all))]
        match self._rng.random():
            case chance if chance < 0.5:
                tokens = [*tokens, *self._tokens(self._rng.randrange(1, 2 * self._block))]
                self.all[number] = (tokens if len(tokens) < 1500 else tokens[: self._block], salt)
            case chance if chance < 0.7:
                tokens = tokens[: max(1, len(tokens) // self._block) * self._block]
            case chance if chance < 0.8:
                tokens, salt = self._tokens(self._rng.randrange(1, 4 * self._block)), ""
        return tokens[:1600], salt


def load(engine: EngineProcess, conversations: Conversations) -> None:
    """Sequences side by side, some ended early. The first two of a burst share a prompt: two copies of each block."""
    for burst in range(12):
        prompts = [conversations.next() for _ in range(8)]
        jobs = [
            DecodeJob(f"load-{burst}-{i}", tokens, SOME, cache_salt=salt)
            for i, (tokens, salt) in enumerate([prompts[0], *prompts])
        ]
        engine.generate_all(jobs)
        engine.call("submit_and_abort", DecodeJob(f"gone-{burst}", prompts[0][0][:900] * 2, SOME))


def probe(engine: EngineProcess, observed: Observed, conversations: Conversations) -> tuple[Counter[int], Counter[str]]:
    """Cached minus expected blocks of each prompt, and how much of the prompts the mirror knew."""
    differences: Counter[int] = Counter()
    known_as: Counter[str] = Counter()
    for number in range(NUM_PROBES):
        tokens, salt = conversations.next()
        observed.settle()
        known = observed.prefix(tokens, salt)
        expected = min(known, (len(tokens) - 1) // observed.block_size)
        start = engine.generate(DecodeJob(f"probe-{number}", tokens, ONE, cache_salt=salt))[0].start
        assert start is not None
        differences[start.cached_tokens // observed.block_size - expected] += 1
        known_as["whole" if known > expected else "part" if known else "none"] += 1
    observed.settle()
    print(
        f"\n{NUM_PROBES} prompts on {observed.num_blocks} blocks: cached minus mirrored blocks {dict(differences)}; "
        f"known {dict(known_as)}; events {dict(observed.kinds)}; mirrored {len(observed.mirror)}; "
        f"skipped {dict(observed.skipped + observed.mirror.skipped)}"
    )
    return differences, known_as


def test_the_mirrors_prefix_is_what_the_engine_finds_cached(engine: EngineProcess) -> None:
    observed = Observed(engine)
    conversations = Conversations(1, observed.block_size)
    load(engine, conversations)
    differences, known_as = probe(engine, observed, conversations)
    assert differences == {0: NUM_PROBES}
    assert min(known_as["whole"], known_as["part"], known_as["none"]) >= 5
    assert observed.kinds["BlocksRemoved"] > observed.num_blocks
    assert len(observed.mirror) <= observed.num_blocks
    assert not observed.skipped + observed.mirror.skipped


def test_beside_window_layers_the_mirror_has_what_the_other_layers_have(windowed_engine: EngineProcess) -> None:
    """A prefix whose window is gone cannot be used, so the engine may find less than the mirror has; never more."""
    observed = Observed(windowed_engine)
    conversations = Conversations(2, observed.block_size)
    load(windowed_engine, conversations)
    differences, _ = probe(windowed_engine, observed, conversations)
    assert max(differences) == 0
    assert differences[0] > NUM_PROBES / 2
    assert set(observed.skipped) == {"group"}
    assert not observed.mirror.skipped
