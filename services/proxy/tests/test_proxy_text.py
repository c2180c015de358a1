"""Tokens to text: exactness over any split, stop strings, templates."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from omni_common.errors import InvalidRequest
from omni_proxy.detokenize import MAX_HELD_BYTES
from omni_proxy.stops import StopMatcher
from omni_proxy.text import ModelText

TINY_MOE = Path(__file__).parents[3] / "models" / "tiny-moe"


def byte_fallback_tokenizer() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "fox", "▁你", "好", "ab"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture(scope="module", params=["byte level", "tiny-moe", "byte fallback"])
def text(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    if request.param == "byte level":
        return ModelText(model_dir)
    if request.param == "tiny-moe":
        if not (TINY_MOE / "tokenizer.json").exists():
            pytest.skip("the tiny model is not there")
        return ModelText(TINY_MOE)
    folder = tmp_path_factory.mktemp("fallback")
    byte_fallback_tokenizer().save(str(folder / "tokenizer.json"))
    return ModelText(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_full_decode(text, data):
    ids = data.draw(st.lists(st.integers(0, text.vocab_size - 1), max_size=MAX_HELD_BYTES - 1))
    skip = data.draw(st.booleans())
    detokenizer = text.detokenizer(skip_special_tokens=skip)
    joined, at = "", 0
    while at < len(ids):
        size = data.draw(st.integers(1, 4))
        joined += detokenizer.push(ids[at : at + size])
        at += size
    assert joined + detokenizer.flush() == text.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(words=st.text(st.sampled_from("aé你🙂 b"), max_size=30))
async def test_split_characters_are_never_shown(text, words):
    ids = await text.encode(words, add_special_tokens=False)
    detokenizer = text.detokenizer(skip_special_tokens=True)
    pieces = [detokenizer.push([i]) for i in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_tokens_of_byte_fallback_are_told_apart(tmp_path):
    tokenizer = byte_fallback_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = ModelText(tmp_path)
    shown = {t: text.token_text(tokenizer.token_to_id(t)) for t in ("▁the", "▁你", "fox", "<0x41>", "<0xE4>", "</s>")}
    assert shown == {
        "▁the": (" the", b" the"),
        "▁你": (" 你", " 你".encode()),
        "fox": ("fox", b"fox"),
        "<0x41>": ("A", b"A"),
        "<0xE4>": ("\N{REPLACEMENT CHARACTER}", b"\xe4"),
        "</s>": ("</s>", b"</s>"),
    }


def test_a_long_run_of_byte_tokens_is_shown_before_it_ends(tmp_path):
    byte_fallback_tokenizer().save(str(tmp_path / "tokenizer.json"))
    detokenizer = ModelText(tmp_path).detokenizer(skip_special_tokens=True)
    ids = [3 + b for b in ("好" * 100).encode()]
    shown = [detokenizer.push([i]) for i in ids]
    assert any(shown[:MAX_HELD_BYTES])
    assert "".join(shown) + detokenizer.flush() == "好" * 100


def whole_cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The reference: character by character, the first stop string to be complete."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stops_do_not_depend_on_the_cut(pieces, stops, include):
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == whole_cut("".join(pieces), stops, include)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        (MESSAGES, {"add_generation_prompt": True}),
        (MESSAGES, {"add_generation_prompt": False, "tools": [{"type": "function", "function": {"name": "é<f>"}}]}),
        ([*MESSAGES, {"role": "assistant", "content": "Well, "}], {"continue_final_message": True}),
    ],
)
def test_templates_render_as_transformers_renders_them(messages, variables, model_dir):
    from transformers.utils.chat_template_utils import render_jinja_template

    for folder in (model_dir, TINY_MOE):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        expected: Any = render_jinja_template(
            [messages], chat_template=config["chat_template"], eos_token="<|im_end|>", **variables
        )
        assert ModelText(folder).render(messages, **variables) == expected[0][0]


def test_a_template_may_refuse(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ModelText(tmp_path / "m").render(MESSAGES)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}"])
def test_what_a_template_cannot_do_is_told_to_the_caller(model_dir, tmp_path, template):
    shutil.copytree(model_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequest, match="cannot render the messages"):
        ModelText(tmp_path / "m").render(MESSAGES)


def test_tools_nested_too_deeply_are_the_callers_to_mend(model_dir):
    schema: dict[str, Any] = {}
    for _ in range(sys.getrecursionlimit()):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="RecursionError"):
        ModelText(model_dir).render(MESSAGES, tools=[schema])


def test_a_default_of_zero_is_a_default(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.0, "top_p": null}')
    assert ModelText(tmp_path / "m").sampling_defaults == {"temperature": 0.0}


async def test_truncation_and_padding_left_in_the_file_do_not_touch_prompts(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    for words in ("fox", "The quick brown fox " * 10):
        ids = await ModelText(folder).encode(words, add_special_tokens=True)
        assert ids == await ModelText(model_dir).encode(words, add_special_tokens=True)


async def test_long_texts_are_tokenized_like_short_ones(model_dir):
    text = ModelText(model_dir)
    long = "The quick brown fox " * 1000
    ids = await text.encode(long, add_special_tokens=False)
    assert ids == Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(long, add_special_tokens=False).ids
    assert text.decode(ids) == long
