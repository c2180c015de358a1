"""Patterns: the file, the searches over an invented model, and one search over a real one, made here."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from omni_kernels.patterns.commands import app, choices
from omni_kernels.patterns.pattern import Budget, Found, Layer, Pattern, read, write
from omni_kernels.patterns.search import METHODS, Candidate, Goal, Score, Search, Space, front, samples

FULL = Pattern("invented", 32, 512, (None,) * 6)
CHOICES = choices("0,1", "1,2,4")
SPACE = Space(FULL, CHOICES, 2048)
# What each layer loses when it keeps only some blocks: layer 2 hardly anything, layer 4 a lot.
WORTH = (0.08, 0.05, 0.002, 0.03, 0.3, 0.01)


def invented(candidate: Candidate) -> Score:
    lost = sum(w / layer.blocks for w, layer in zip(WORTH, candidate, strict=True) if layer is not None)
    return Score(round(max(0.0, 0.95 - lost), 6), round(1 + lost, 4))


layers = st.none() | st.builds(Budget, st.integers(0, 9), st.integers(1, 9))
patterns = st.builds(
    Pattern, st.text(max_size=9), st.integers(1, 512), st.integers(1, 9999), st.lists(layers, min_size=1).map(tuple)
)


@given(patterns)
def test_a_file_says_what_was_written(pattern: Pattern) -> None:
    assert Pattern.from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


@given(patterns, st.integers(1, 100_000))
def test_bytes_are_bounded_and_never_shrink_with_context(pattern: Pattern, tokens: int) -> None:
    full = Pattern(pattern.model, pattern.block_size, pattern.token_bytes, (None,) * len(pattern.layers))
    assert 0 < pattern.kv_bytes(tokens) <= full.kv_bytes(tokens)
    assert pattern.kv_bytes(tokens) <= pattern.kv_bytes(tokens + 1)
    if not pattern.is_full:
        assert pattern.share(10**7 * pattern.block_size) < 1


def test_bytes_of_a_known_case() -> None:
    pattern = Pattern("m", 128, 512, (None, Budget(1, 3)))
    assert pattern.kv_bytes(16384) == (128 + 4) * 128 * 512
    assert pattern.kv_bytes(200) == (2 + 2) * 128 * 512


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"format": 2}, "format", id="another format"),
        pytest.param({"block_size": 0}, "block_size", id="no block size"),
        pytest.param({"token_bytes": "1k"}, "token_bytes", id="bytes as text"),
        pytest.param({"layers": []}, "layers", id="no layers"),
        pytest.param({"layers": [{"kind": "window"}]}, r"layers\[0\].kind", id="unknown kind"),
        pytest.param(
            {"layers": [{"kind": "sink_recent", "sink_blocks": 1, "recent_blocks": 0}]}, "recent_blocks", id="no recent"
        ),
        pytest.param({"layers": [{"kind": "full", "sink_blocks": 1}]}, r"layers\[0\]", id="full with a budget"),
        pytest.param({"more": 1}, "pattern", id="unknown field"),
    ],
)
def test_a_wrong_file_is_refused_by_the_field_that_is_wrong(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = tmp_path / "pattern.json"
    file.write_text(json.dumps(FULL.to_json() | change))
    with pytest.raises(ValueError, match=f"pattern.json: .*{named}"):
        read(file)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "goal", [Goal(share=0.4), Goal(share=0.04), Goal(accuracy=0.9)], ids=["budget", "small budget", "floor"]
)
def test_a_search_repeats_from_its_seed_and_meets_its_goal(method: str, goal: Goal) -> None:
    runs = [Search(SPACE, goal, invented) for _ in range(2)]
    first, second = (METHODS[method](run, 3) for run in runs)
    assert first == second
    assert list(runs[0].seen) == list(runs[1].seen)
    if goal.share is not None:
        assert SPACE.share(first) <= goal.share
    elif method != "random":
        assert invented(first).accuracy >= 0.9


def test_searches_beat_chance_and_spare_the_layer_that_matters() -> None:
    found = {}
    for method in METHODS:
        run = Search(SPACE, Goal(share=0.25), invented)
        found[method] = METHODS[method](run, 0)
    assert found["genetic"][4] is None
    assert found["greedy"][4] is None
    assert (
        invented(found["genetic"]).accuracy >= invented(found["greedy"]).accuracy > invented(found["random"]).accuracy
    )


def test_random_patterns_keep_within_the_range_asked_for() -> None:
    drawn = samples(SPACE, 0.3, 0, 20, at_least=0.2)
    assert len(set(drawn)) == 20
    assert all(0.2 <= SPACE.share(candidate) <= 0.3 for candidate in drawn)
    with pytest.raises(ValueError, match="no pattern of these choices"):
        samples(SPACE, 0.001, 0, 1)


def test_nothing_on_the_front_is_beaten() -> None:
    run = Search(SPACE, Goal(share=0.5), invented)
    METHODS["genetic"](run, 1)
    best = front(run.seen, SPACE)
    for one in best:
        for other, score in run.seen.items():
            assert not (SPACE.share(other) < SPACE.share(one) and score.accuracy >= run.seen[one].accuracy)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of two layers with random weights, the tokenizer of tiny-moe, and questions for it."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    source = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1536, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, eos_token_id=1531,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    asked = [{"prompt": "one two three " * (10 + n), "answer": "four five", "expect": ["four"]} for n in range(4)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in asked))
    return folder, file


def test_the_same_seed_writes_the_same_file(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, asked = tiny
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file in files:
        given = [
            "search", "--model", str(model), "--questions", str(asked), "--out", str(file), "--block-size", "4",
            "--recents", "1,2", "--kv-share", "0.6", "--context", "64", "--seed", "5", "--plot", f"{file}.png",
        ]  # fmt: skip
        result = CliRunner().invoke(app, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert files[0].read_bytes() == files[1].read_bytes()
    pattern = read(files[0])
    assert pattern.share(64) <= 0.6
    assert pattern.found.seed == 5
    assert Path(f"{files[0]}.png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, ["show", str(files[0]), "--json"], catch_exceptions=False)
    assert json.loads(shown.stdout)["layers"] == pattern.to_json()["layers"]


def test_decoding_under_a_pattern_is_one_forward_pass_with_its_mask(tiny: tuple[Path, Path]) -> None:
    """Against the model's own attention, given each layer's mask by hand, without any cache."""
    import torch

    from omni_kernels.patterns import questions
    from omni_kernels.patterns.decoding import Decoder

    model, asked = tiny
    chosen: tuple[Layer, ...] = (Budget(1, 2), Budget(0, 1))
    decoder = Decoder(model, questions.read(asked), 4)
    said = decoder.answers(chosen, 12)
    for prompt, answer in zip(decoder.prompts, said, strict=True):
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = masked(decoder.model, ids, len(prompt), chosen, 4)[len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


def masked(model: Any, ids: Any, prompt: int, chosen: tuple[Layer, ...], block: int) -> Any:
    import torch

    position = torch.arange(ids.shape[1])
    masks = []
    for layer in chosen:
        mask = torch.zeros(len(position), len(position))
        for query in range(len(position)):
            for key in range(len(position)):
                if key > query or (
                    layer is not None
                    and query >= prompt - 1
                    and key // block >= layer.sink_blocks
                    and key // block <= query // block - layer.recent_blocks
                ):
                    mask[query, key] = float("-inf")
        masks.append(mask)
    model.set_attn_implementation("eager")
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, given, named, mask=mask: (given, named | {"attention_mask": mask[None, None]}), with_kwargs=True
        )
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("omni_pattern")
    return logits


def test_a_found_pattern_is_read_back_with_how_it_was_found(tmp_path: Path) -> None:
    pattern = Pattern("m", 32, 512, (None, Budget(1, 2)), Found("genetic", 4, 70, 64, 0.9, 1.02, 0.93, 1.01))
    write(pattern, tmp_path / "p.json")
    assert read(tmp_path / "p.json") == pattern
