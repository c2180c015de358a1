"""Parameters of OpenAI's and vLLM's APIs that would change the answer and cannot be honoured here.

They are refused: an answer that leaves one out without a word is a wrong answer. Hints, such as `verbosity` or `store`,
are nobody's business.
"""

from omni_proxy.fields import Fields

_NAMES = (
    "functions", "function_call", "audio", "web_search_options", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "structured_outputs", "prompt_logprobs", "use_beam_search", "bad_words", "allowed_token_ids",
    "logits_processors", "logprob_token_ids", "prompt_embeds", "truncate_prompt_tokens", "thinking_token_budget",
    "repetition_detection", "watermarking", "return_token_ids", "return_tokens_as_token_ids", "vllm_xargs",
    "kv_transfer_params", "ec_transfer_params",
)  # fmt: skip
CHAT_NAMES = ("chat_template", "echo", "return_prompt_text")
TOKENIZE_NAMES = ("chat_template", "return_token_strs")


def refuse_unsupported(fields: Fields) -> None:
    """What chat and completions have in common."""
    if (form := fields.nested("response_format")) is not None and form.text("type") != "text":
        raise form.refuse("type", "only 'text' is supported", "unsupported_value")
    if fields.raw("modalities") not in (None, ["text"]):
        raise fields.refuse("modalities", "only ['text'] is supported", "unsupported_value")
    if fields.integer("priority"):
        message = "is not supported; the header x-omni-priority is, where more is more urgent"
        raise fields.refuse("priority", message, "unsupported_parameter")
    refuse_names(fields, _NAMES)


def refuse_names(fields: Fields, names: tuple[str, ...]) -> None:
    """Raises `InvalidRequest` for the first that asks for something; false and empty values do not."""
    for name in names:
        value = fields.raw(name)
        if value is not None and value is not False and value not in ("", []):
            raise fields.refuse(name, "is not supported", "unsupported_parameter")
