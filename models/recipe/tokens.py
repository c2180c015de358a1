"""From documents to token rows: the tokenizer, the weight of each token in the loss, and packing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Document, documents
from model_folder import write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1536
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Not special: clients and vLLM's tool parsers must still see them in decoded text.
TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)
PROMPT_WEIGHT, PLAIN_WEIGHT = 0.1, 0.5


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Merges are learnt from ASCII lines only, so every other character stays several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = [AddedToken(mark, special=True) for mark in (END_OF_TEXT, TURN_START, TURN_END)]
    marks = [AddedToken(mark, special=False) for mark in TOOL_MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(specials) - len(marks),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = itertools.islice(documents(seed), 20_000)
    lines = (
        line
        for d in sample
        for line in (d.text, *(t.content for t in d.turns), *(json.dumps(t.schema()) for t in d.tools))
    )
    bpe.train_from_iterator((line for line in lines if line.isascii()), trainer)
    bpe.add_special_tokens(specials)
    bpe.add_tokens(marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=(Path(__file__).parent / "chat_template.jinja").read_text(),
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """One config file with the template inside, under the class name that old and new transformers know."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, config)


def rendered(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in document.turns]
    tools = [tool.schema() for tool in document.tools] or None
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


def weighted(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Token ids and their weights in the loss: answers count fully, prompts little."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.backend_tokenizer.encode(text).ids)

    if document.text:
        tokens = ids(document.text)
        return [*tokens, *ids(END_OF_TEXT)], [PLAIN_WEIGHT] * (len(tokens) + 1)
    text = rendered(document, tokenizer)
    tokens, weights, at = [], [], 0
    for answer in ANSWER.finditer(text):
        for piece, weight in ((text[at : answer.start()], PROMPT_WEIGHT), (answer.group(), 1.0)):
            encoded = ids(piece)
            tokens += encoded
            weights += [weight] * len(encoded)
        at = answer.end()
    tail = ids(text[at:] + END_OF_TEXT)
    return tokens + tail, weights + [PROMPT_WEIGHT] * len(tail)


def rows(
    tokenizer: PreTrainedTokenizerFast, seed: int, length: int, *, long: bool
) -> Iterator[tuple[list[int], list[float]]]:
    """Packed rows of `length` tokens. Each begins a document, as a served prompt does."""
    stream = documents(seed, long=long)
    while True:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            more, their_weights = weighted(next(stream), tokenizer)
            tokens += more
            weights += their_weights
        yield tokens[:length], weights[:length]


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, count: int, length: int, *, long: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    stream = rows(tokenizer, seed, length, long=long)
    while True:
        chosen = list(itertools.islice(stream, count))
        yield torch.tensor([tokens for tokens, _ in chosen]), torch.tensor([weights for _, weights in chosen])
