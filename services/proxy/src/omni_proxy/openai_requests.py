"""OpenAI request bodies, validated into values."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from omni_common.errors import InvalidRequest, NotFound
from omni_proxy.chat_messages import chat_messages, tool_definitions
from omni_proxy.choice import TextRules
from omni_proxy.fields import Fields, as_fields, kind
from omni_proxy.openai_unsupported import CHAT_NAMES, refuse_names, refuse_unsupported
from omni_proxy.sampling import Sampling

_INT64 = 2**63
_MAX_STOPS = 16
_MAX_N = 16
_MAX_LOGPROBS = 20
_COMPLETION_TOKENS = 16
_MAX_SALT = 256
_INT32_MAX = 2**31 - 1
_ID_DIGITS = 10


@dataclass(frozen=True, slots=True)
class Served:
    """What requests are checked against. `defaults` are the model's own sampling parameters.

    `adapters` are the names by which LoRA adapters of the model may be asked for; asked from any thread.
    """

    model: str
    aliases: tuple[str, ...]
    vocab_size: int
    defaults: Mapping[str, float]
    max_sequences: int
    adapters: Container[str] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """What chat and completions share. `model` is the name to answer with; `max_tokens` None fills the model's length.

    Prompts share cached blocks only with those of the same `cache_salt`.
    """

    model: str
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    skip_special_tokens: bool
    rules: TextRules
    sampling: Sampling
    max_tokens: int | None
    cache_salt: str
    adapter: str = ""
    """Empty: the model itself."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    options: Options
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    reads_calls: bool
    max_calls: int | None
    shows_reasoning: bool
    template: Mapping[str, Any]
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    options: Options
    prompts: Sequence[str | Sequence[int]]
    echo: bool
    add_special_tokens: bool


def parse_json(body: bytes) -> Fields:
    """Raises `InvalidRequest` unless the body is a JSON object in UTF-8."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise InvalidRequest(message, reason="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {kind(value)}", reason="invalid_json")
    return Fields(value)


def parse_chat(fields: Fields, served: Served) -> ChatRequest:
    adapter = adapter_of(fields, served)
    logprobs = _chat_logprobs(fields)
    max_tokens = fields.integer("max_completion_tokens", 1)
    if (older := fields.integer("max_tokens", 1)) is not None and max_tokens is None:
        max_tokens = older
    refuse_names(fields, CHAT_NAMES)
    tools = tool_definitions(fields)
    choice = fields.raw("tool_choice")
    if choice not in (None, "none", "auto"):
        raise fields.refuse("tool_choice", "only 'none' and 'auto' are supported", "unsupported_value")
    return ChatRequest(
        options=_options(fields, served, adapter, 1, max_tokens, logprobs),
        messages=chat_messages(fields),
        tools=tools,
        reads_calls=bool(tools) and choice != "none",
        max_calls=None if fields.boolean("parallel_tool_calls", True) else 1,
        shows_reasoning=fields.boolean("include_reasoning", True),
        template=template_variables(fields),
        add_special_tokens=fields.boolean("add_special_tokens"),
    )


def parse_completion(fields: Fields, served: Served) -> CompletionRequest:
    adapter = adapter_of(fields, served)
    prompts = _prompts(fields, served.vocab_size)
    logprobs = fields.integer("logprobs", 0, _MAX_LOGPROBS)
    echo = fields.boolean("echo")
    if echo and logprobs is not None:
        raise fields.refuse("echo", "cannot be combined with logprobs", "unsupported_value")
    if fields.text("suffix"):
        raise fields.refuse("suffix", "is not supported", "unsupported_parameter")
    max_tokens = fields.integer("max_tokens", 1)
    max_tokens = _COMPLETION_TOKENS if max_tokens is None else max_tokens
    options = _options(fields, served, adapter, len(prompts), max_tokens, logprobs)
    best_of = fields.integer("best_of", 1)
    if best_of is not None and best_of != options.n:
        raise fields.refuse("best_of", "is only supported equal to n", "unsupported_value")
    return CompletionRequest(options, prompts, echo, fields.boolean("add_special_tokens", True))


def adapter_of(fields: Fields, served: Served, *, required: bool = True) -> str:
    """The adapter that `model` names; empty for the model itself. Raises `NotFound` for what is not served here."""
    model = fields.text("model")
    if model is None and required:
        raise fields.refuse("model", "is required", "missing_parameter")
    if model is None or model == served.model or model in served.aliases:
        return ""
    if model not in served.adapters:
        raise NotFound(f"the model {model!r} does not exist here", field="model", reason="model_not_found")
    return model


def _options(
    fields: Fields, served: Served, adapter: str, num_prompts: int, max_tokens: int | None, logprobs: int | None
) -> Options:
    n = fields.integer("n", 1, _MAX_N) or 1
    if n * num_prompts > served.max_sequences:
        raise fields.refuse("n", f"{num_prompts} prompts x {n} choices exceed {served.max_sequences} sequences")
    stream = fields.boolean("stream")
    usage = fields.nested("stream_options")
    if usage is not None and not stream:
        raise fields.refuse("stream_options", "is only allowed when stream is true")
    fields.text("user")
    refuse_unsupported(fields)
    sampling = _sampling(fields, served, logprobs)
    if max_tokens is not None and sampling.min_tokens > max_tokens:
        raise fields.refuse("min_tokens", f"must be at most max_tokens, which is {max_tokens}")
    include_stop = fields.boolean("include_stop_str_in_output")
    return Options(
        model=adapter or served.model,
        n=n,
        stream=stream,
        include_usage=usage is not None and usage.boolean("include_usage"),
        continuous_usage=usage is not None and usage.boolean("continuous_usage_stats"),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        rules=TextRules(_stops(fields), include_stop, sampling.min_tokens, sampling.stop_token_ids),
        sampling=sampling,
        max_tokens=max_tokens,
        cache_salt=cache_salt(fields),
        adapter=adapter,
    )


def cache_salt(fields: Fields) -> str:
    """Empty where the prompt's blocks may be shared with everybody's."""
    salt = fields.text("cache_salt")
    if salt is not None and not 0 < len(salt) <= _MAX_SALT:
        raise fields.refuse("cache_salt", f"must have 1 to {_MAX_SALT} characters")
    return salt or ""


def _sampling(fields: Fields, served: Served, logprobs: int | None) -> Sampling:
    """`max_tokens` is set when the prompt's length is known."""

    def number(name: str, default: float, low: float, high: float | None) -> float:
        value = fields.number(name, low, high)
        return float(served.defaults.get(name, default)) if value is None else value

    top_k = fields.integer("top_k", -1, _INT32_MAX)
    stop_ids = fields.items("stop_token_ids")
    sampling = Sampling(
        max_tokens=1,
        min_tokens=fields.integer("min_tokens", 0, _INT32_MAX) or 0,
        temperature=number("temperature", 1.0, 0, 2),
        top_p=number("top_p", 1.0, 0, 1),
        top_k=max(0, int(served.defaults.get("top_k") or 0) if top_k is None else top_k),
        min_p=number("min_p", 0.0, 0, 1),
        presence_penalty=number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=number("frequency_penalty", 0.0, -2, 2),
        repetition_penalty=number("repetition_penalty", 1.0, 0, None),
        seed=fields.integer("seed", -_INT64, _INT64 - 1),
        stop_token_ids=tuple(dict.fromkeys(token_ids(fields, "stop_token_ids", stop_ids, served.vocab_size))),
        ignore_eos=fields.boolean("ignore_eos"),
        logprobs=logprobs,
        logit_bias=_logit_bias(fields, served.vocab_size),
    )
    for name, value in (("top_p", sampling.top_p), ("repetition_penalty", sampling.repetition_penalty)):
        if value <= 0:
            raise fields.refuse(name, "must be greater than 0")
    return sampling


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, _MAX_LOGPROBS)
    if top and not wanted:
        raise fields.refuse("top_logprobs", "needs logprobs to be true")
    return (top or 0) if wanted else None


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.refuse("stop", "must be a string or a list of strings", "invalid_type")
    if len(stops) > _MAX_STOPS:
        raise fields.refuse("stop", f"at most {_MAX_STOPS} stop strings are allowed, not {len(stops)}")
    if "" in stops:
        raise fields.refuse("stop", "an empty stop string is not allowed")
    return tuple(stops)


def _logit_bias(fields: Fields, vocab_size: int) -> Mapping[int, float]:
    values = fields.raw("logit_bias")
    if values is None:
        return {}
    entries = as_fields(values, fields.path("logit_bias"))
    result: dict[int, float] = {}
    for key in values:
        if not (key.isascii() and key.isdigit() and len(key) <= _ID_DIGITS) or int(key) >= vocab_size:
            raise fields.refuse("logit_bias", f"keys must be token ids below {vocab_size}")
        bias = entries.number(key, -100, 100)
        if bias is not None:
            result[int(key)] = bias
    return result


def _prompts(fields: Fields, vocab_size: int) -> list[str | Sequence[int]]:
    """One entry per prompt: a string, or token ids."""
    value = fields.raw("prompt")
    if value is None:
        raise fields.refuse("prompt", "is required", "missing_parameter")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise fields.refuse("prompt", f"must be a string or a list, not {kind(value)}", "invalid_type")
    if not value:
        raise fields.refuse("prompt", "must not be empty")
    if isinstance(value[0], int):
        return [token_ids(fields, "prompt", value, vocab_size)]
    prompts: list[str | Sequence[int]] = []
    for index, prompt in enumerate(value):
        if isinstance(prompt, list) and prompt:
            prompts.append(token_ids(fields, f"prompt[{index}]", prompt, vocab_size))
        elif isinstance(prompt, str):
            prompts.append(prompt)
        else:
            raise fields.refuse(f"prompt[{index}]", "must be a string or a list of token ids", "invalid_type")
    return prompts


def token_ids(fields: Fields, name: str, values: list[Any], vocab_size: int) -> Sequence[int]:
    """The values, if they are ids of the vocabulary."""
    if not all(type(value) is int for value in values):
        raise fields.refuse(name, "token ids must be integers", "invalid_type")
    if values and (min(values) < 0 or max(values) >= vocab_size):
        raise fields.refuse(name, f"token ids must be between 0 and {vocab_size - 1}")
    return values


def template_variables(fields: Fields) -> Mapping[str, Any]:
    """What a chat template sees besides messages and tools."""
    add = fields.boolean("add_generation_prompt", True)
    continued = fields.boolean("continue_final_message")
    if continued and add and fields.raw("add_generation_prompt") is not None:
        raise fields.refuse("continue_final_message", "cannot be combined with add_generation_prompt")
    base: dict[str, Any] = {"add_generation_prompt": add and not continued, "continue_final_message": continued}
    if effort := fields.text("reasoning_effort"):
        base |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    if documents := fields.items("documents"):
        base["documents"] = documents
    extra = fields.raw("chat_template_kwargs")
    if extra is not None:
        as_fields(extra, fields.path("chat_template_kwargs"))
        reserved = {"messages", "tools", "continue_final_message"} & set(extra)
        if reserved:
            raise fields.refuse("chat_template_kwargs", f"must not set {', '.join(sorted(reserved))}")
    return base | (extra or {})
