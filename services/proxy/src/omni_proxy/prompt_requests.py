"""Bodies that name a prompt without asking for an answer to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_proxy.chat_messages import chat_messages, tool_definitions
from omni_proxy.fields import Fields
from omni_proxy.openai_requests import Served, adapter_of, cache_salt, template_variables, token_ids
from omni_proxy.openai_unsupported import TOKENIZE_NAMES, refuse_names


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """Either `prompt` or `messages`."""

    prompt: str | None
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    template: Mapping[str, Any]
    add_special_tokens: bool


def parse_tokenize(fields: Fields, served: Served) -> TokenizeRequest:
    adapter_of(fields, served, required=False)
    refuse_names(fields, TOKENIZE_NAMES)
    prompt = fields.text("prompt")
    has_messages = fields.raw("messages") is not None
    if (prompt is None) == (not has_messages):
        raise fields.refuse("prompt", "give exactly one of prompt and messages", "missing_parameter")
    return TokenizeRequest(
        prompt=prompt,
        messages=chat_messages(fields) if has_messages else (),
        tools=tool_definitions(fields),
        template=template_variables(fields),
        add_special_tokens=fields.boolean("add_special_tokens", prompt is not None),
    )


@dataclass(frozen=True, slots=True)
class PrefixRequest:
    """Either `prompt`, as text or token ids, or `messages`. `block_size` None: that of the workers."""

    prompt: str | Sequence[int] | None
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    template: Mapping[str, Any]
    add_special_tokens: bool
    block_size: int | None
    cache_salt: str
    adapter: str


def parse_prefix(fields: Fields, served: Served) -> PrefixRequest:
    """Token ids, or what `parse_tokenize` takes."""
    block_size, salt = fields.integer("block_size", 1), cache_salt(fields)
    adapter = adapter_of(fields, served, required=False)
    given = fields.raw("prompt")
    if isinstance(given, list) and fields.raw("messages") is None:
        tokens = token_ids(fields, "prompt", given, served.vocab_size)
        return PrefixRequest(tokens, (), (), {}, False, block_size, salt, adapter)
    asked = parse_tokenize(fields, served)
    return PrefixRequest(
        asked.prompt, asked.messages, asked.tools, asked.template, asked.add_special_tokens, block_size, salt, adapter
    )


def parse_detokenize(fields: Fields, served: Served) -> Sequence[int]:
    adapter_of(fields, served, required=False)
    tokens = fields.items("tokens")
    if fields.raw("tokens") is None:
        raise fields.refuse("tokens", "is required", "missing_parameter")
    return token_ids(fields, "tokens", tokens, served.vocab_size)
