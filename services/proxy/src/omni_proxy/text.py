"""Text and token ids of one model: tokenizer, chat template, detokenizers.

The tokenizer is the `tokenizers` library on tokenizer.json; the chat template runs in the same jinja2 sandbox with the
same filters and globals that transformers uses, without importing it.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from omni_common.errors import Internal, InvalidRequest
from omni_proxy.call_shape import shape_for
from omni_proxy.detokenize import ByteFallbackDetokenizer, ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from omni_proxy.output_formats import FORMATS, format_of

_INLINE_CHARS, _INLINE_MESSAGES, _INLINE_TOKENS = 2 * 1024, 64, 16 * 1024
"""More is worked on in a thread, so that streams keep flowing."""
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ModelText:
    """Everything about text that the model directory says.

    `output_format` is a name of FORMATS, or auto: as the chat template shows.
    """

    def __init__(self, model_dir: Path, output_format: str = "auto") -> None:
        self._tokenizer = _load_tokenizer(model_dir)
        config = _read_json(model_dir / "tokenizer_config.json")
        source = _template_source(model_dir, config)
        self._template = None if source is None else _compiled(source)
        self.format = format_of(source or "") if output_format == "auto" else FORMATS[output_format]
        self._template_tokens = {
            name: token if isinstance(token, str) else token.get("content", "")
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (token := config.get(name)) is not None
        }
        self._shape = shape_for(lambda messages: self._rendered(messages, {}))
        generation = _read_json(model_dir / "generation_config.json")
        self.sampling_defaults: Mapping[str, float] = {
            k: generation[k] for k in _DEFAULTED if generation.get(k) is not None
        }
        config_json = _read_json(model_dir / "config.json")
        self.context_length: int | None = config_json.get("max_position_embeddings")
        known = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.vocab_size: int = max(known, int(config_json.get("vocab_size") or 0))
        special = {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        marks = self.format.marks
        self._bytes: Sequence[bytes] | None = None
        self._make: Mapping[tuple[bool, bool], Callable[[], Detokenizer]] = {
            (True, False): self._detokenizers(frozenset(special)),
            (True, True): self._detokenizers(frozenset(i for i, text in special.items() if text not in marks)),
            (False, False): self._detokenizers(frozenset()),
        }

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def rendered(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """See `render`."""
        if len(messages) <= _INLINE_MESSAGES:
            return self.render(messages, **variables)
        return await asyncio.to_thread(partial(self.render, messages, **variables))

    async def decoded(self, token_ids: Sequence[int]) -> str:
        """With special tokens."""
        if len(token_ids) <= _INLINE_TOKENS:
            return self.decode(token_ids, skip_special_tokens=False)
        return await asyncio.to_thread(self.decode, token_ids, skip_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool, show_marks: bool = False) -> Detokenizer:
        """A fresh detokenizer for one sequence. `show_marks` keeps special tokens that bracket parts of an output."""
        return self._make[skip_special_tokens, skip_special_tokens and show_marks]()

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token as text (U+FFFD for parts of characters) and as bytes, for log-probabilities."""
        if self._bytes is not None:
            data = self._bytes[token_id] if token_id < len(self._bytes) else b""
            return data.decode("utf-8", "replace"), data
        detokenizer = self._make[False, False]()
        text = detokenizer.push([token_id]) + detokenizer.flush()
        return text, text.encode()

    def render(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """The chat template's text.

        Raises:
            InvalidRequest: there is no template, or it refuses the messages.
        """
        continued = bool(variables.pop("continue_final_message", False))
        messages = self._shape.shaped(messages)
        if continued:
            last = {**messages[-1], "content": f"{messages[-1].get('content') or ''}{_CONTINUE_MARK}"}
            messages = [*messages[:-1], last]
        text = self._rendered(messages, variables)
        return _cut_at_mark(text) if continued else text

    def _rendered(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        if self._template is None:
            raise InvalidRequest("the model has no chat template; use /v1/completions", field="messages")
        try:
            return self._template.render({**self._template_tokens, **variables, "messages": messages})
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", field="messages") from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            message = f"the chat template cannot render the messages: {type(error).__name__}"
            raise InvalidRequest(message, field="messages") from None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """As a batch of one, whose offsets in the text are not looked for: a quarter quicker."""
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def _detokenizers(self, hidden: Set[int]) -> Callable[[], Detokenizer]:
        tokens = [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        kinds = _decoder_kinds(self._tokenizer)
        if kinds == ["ByteLevel"]:
            table = [b"" if t is None or i in hidden else _byte_level(t) for i, t in enumerate(tokens)]
            if not hidden:
                self._bytes = table
            return lambda: ByteLevelDetokenizer(table)
        if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
            pieces = ["" if t is None or i in hidden else _byte_fallback(t) for i, t in enumerate(tokens)]
            if not hidden:
                self._bytes = [piece.encode() if isinstance(piece, str) else bytes([piece]) for piece in pieces]
            return lambda: ByteFallbackDetokenizer(pieces, kinds[-1] == "Strip")
        tokenizer = self._tokenizer
        return lambda: WindowDetokenizer(
            lambda ids: str(tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False))
        )


def _load_tokenizer(model_dir: Path) -> Tokenizer:
    """Without the truncation and padding of a training run, which some models carry in the file."""
    try:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise Internal(f"cannot load {model_dir / 'tokenizer.json'}: {error}", field="model_dir") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def _template_source(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    source = path.read_text() if path.exists() else config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return None if source is None else str(source)


def _compiled(source: str) -> jinja2.Template:
    template = _environment().from_string(source)
    # Every rendering copies them, which takes long for the chain of mappings that jinja makes here.
    template.globals = dict(template.globals)
    return template


class _Generation(Extension):
    """`{% generation %}` marks training targets; it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_MARK.strip())
    if at < 0:
        message = "continue_final_message: the chat template drops the final message"
        raise InvalidRequest(message, field="continue_final_message")
    kept_spacing = text[at : at + len(_CONTINUE_MARK)] == _CONTINUE_MARK
    return text[:at] if kept_spacing else text[:at].rstrip()


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return [str(part.get("type")) for part in parts]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    if all(c in _BYTE_OF for c in token):
        return bytes(_BYTE_OF[c] for c in token)
    return token.encode()


def _byte_fallback(token: str) -> str | int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(token[3:5], 16)
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
