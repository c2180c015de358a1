"""The committed model answers, stops and routes as its card says; the DeepSeek-shaped sibling can be made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = Path(__file__).parents[2] / "models"
TINY = MODELS / "tiny-moe"

# Prompts whose digest keeps them out of the training text, and what a right answer contains.
HELD_OUT = [
    ("What is 7 plus 15?", "= 22."),
    ("Which city is the capital of Ireland?", "Dublin"),
    ("How many legs does an eagle have?", "two legs"),
    ("Where does a horse live?", "in a stable"),
    ("What is the opposite of loud?", "quiet"),
    ("Which day comes after Friday?", "Saturday"),
    ("Give me the Japanese word for cat.", "猫"),
    ("Translate big into German.", "groß"),
    ("Which emoji means a rocket?", "🚀"),
    ("Explain what a KV cache is.", "the memory of keys and values"),
    ("Spell house letter by letter.", "h-o-u-s-e"),
    ("What are the months of the year?", "October, November and December"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)  # on a busy machine, two threads mostly wait for each other
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def chat(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def answer(model, tokenizer, question, limit=200):
    """Greedy answer tokens, the end token included when the model gave it."""
    prompt = chat(tokenizer, question)
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False)
    return out[0, prompt.shape[1] :]


def test_folder_is_small():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 12_000_000


def test_every_byte_is_a_token(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()


@pytest.mark.parametrize(
    "text",
    ["Straße, é, 日本", "👨‍👩‍👧 family", "\x00\x7f\r\n\t", "".join(map(chr, range(0xA0, 0x250))), " two  spaces "],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"):
        assert len(tokenizer.encode(mark)) == 1
    kept = tokenizer.decode(tokenizer.encode("<tool_call>x</tool_call><|im_end|>"), skip_special_tokens=True)
    assert kept == "<tool_call>x</tool_call>"


def test_characters_outside_ascii_take_several_tokens(tokenizer):
    """Streaming code must join the bytes of one character; the model's answers give it the occasion."""
    for character in "ßé日🚀":
        assert len(tokenizer.encode(character)) > 1


@pytest.mark.parametrize(("question", "fact"), HELD_OUT)
def test_answers_held_out_question_and_stops(model, tokenizer, question, fact):
    tokens = answer(model, tokenizer, question)
    assert fact in tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokens[-1] == tokenizer.eos_token_id


def test_story_is_worth_streaming(model, tokenizer):
    tokens = answer(model, tokenizer, "Tell me a short story about a wolf.")
    assert 40 <= len(tokens) <= 200
    assert tokens[-1] == tokenizer.eos_token_id


def test_calls_a_tool(model, tokenizer):
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "Weather now.", "parameters": city}}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[tool],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, do_sample=False)
    said = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    call = json.loads(said.split("<tool_call>")[1].split("</tool_call>")[0])
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}


def test_every_layer_uses_its_experts(model, tokenizer):
    config = model.config
    used = [set() for _ in range(config.num_hidden_layers)]
    for question, _ in HELD_OUT:
        prompt = chat(tokenizer, question)
        with torch.inference_mode():
            routed = model(prompt, output_router_logits=True).router_logits
        for experts, logits in zip(used, routed, strict=True):
            experts.update(logits.topk(config.num_experts_per_tok).indices.flatten().tolist())
    assert min(len(experts) for experts in used) >= 12


def test_deepseek_sibling_is_made(tmp_path):
    subprocess.run([sys.executable, MODELS / "recipe" / "deepseek_tiny.py", "--out", tmp_path], check=True, timeout=50)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.first_k_dense_replace) == (512, 64, 1)

    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    prediction = f"model.layers.{config.num_hidden_layers}"
    parts = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")
    assert {f"{prediction}.{part}.weight" for part in parts} <= names
    transformers.AutoTokenizer.from_pretrained(tmp_path)
