"""Reasoning and tool calls in the formats of each family of models, over any cut of the text."""

import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from omni_proxy.call_shape import CallShape
from omni_proxy.chat_messages import chat_messages
from omni_proxy.fields import Fields
from omni_proxy.output_formats import FORMATS, OutputFormat, format_of
from omni_proxy.output_parser import OutputParser, Parts, Reading
from omni_proxy.text import ModelText

ARGUMENTS = '{"at": 1}'
HERMES = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
PANGU = '[unused11][{"name": "look", "arguments": {"at": 1}}, {"name": "go", "arguments": {"at": 1}}][unused12]'
DEEPSEEK_V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
    + ARGUMENTS
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_V31 = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>go<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def read(output: str, reading: Reading, cuts: list[int]) -> Parts:
    parser, total = OutputParser(reading), Parts()
    places = sorted({0, len(output), *(cut for cut in cuts if cut < len(output))})
    for start, end in pairwise(places):
        add(total, parser.push(output[start:end]))
    add(total, parser.flush())
    return total


def add(total: Parts, more: Parts) -> None:
    total.reasoning += more.reasoning
    total.content += more.content
    total.calls += more.calls


CASES = [
    ("hermes", "plain text", "", "plain text", []),
    ("hermes", f"Let me see.{HERMES}", "", "Let me see.", ["look"]),
    ("hermes", f"{HERMES}\n{HERMES}", "", "", ["look", "look"]),
    ("hermes", f"Wait. {HERMES}\n\n{HERMES} done \n", "", "Wait.  done \n", ["look", "look"]),
    ("hermes", f"Wait.{HERMES}\n", "", "Wait.", ["look"]),
    ("hermes", f"{HERMES}\n<tool_call>oops</tool_call>", "", "\n<tool_call>oops</tool_call>", ["look"]),
    ("hermes", "<tool_call>oops</tool_call>", "", "<tool_call>oops</tool_call>", []),
    ("hermes", '<tool_call>{"name": "lo', "", '<tool_call>{"name": "lo', []),
    ("hermes", "a < b <tool", "", "a < b <tool", []),
    ("hermes", "<think>a</think>b", "", "<think>a</think>b", []),
    ("qwen3", "<think>\nSo.\n</think>\n\nYes.", "\nSo.\n", "\n\nYes.", []),
    ("qwen3", f"\n<think>So.</think>{HERMES}", "So.", "", ["look"]),
    ("qwen3", "Yes <think>no</think>", "", "Yes <think>no</think>", []),
    ("qwen3", "<think>never closed </thin", "never closed </thin", "", []),
    ("qwen3", "<thi", "", "<thi", []),
    ("qwen3", f"<think>forgot to close {HERMES} done", "forgot to close ", " done", ["look"]),
    ("deepseek", f"<think>So.</think>Wait.{DEEPSEEK_V3}", "So.", "Wait.", ["look"]),
    ("deepseek", f"Wait.{DEEPSEEK_V31}", "", "Wait.", ["look", "go"]),
    ("pangu", "[unused16]So.[unused17]Yes.", "So.", "Yes.", []),
    ("pangu", f"[unused16]So.[unused17]{PANGU}", "So.", "", ["look", "go"]),
    ("pangu", "[unused11][{oops}][unused12]", "", "[unused11][{oops}][unused12]", []),
    ("plain", f"<think>a</think>{HERMES}", "", f"<think>a</think>{HERMES}", []),
]


@pytest.mark.parametrize(("name", "output", "reasoning", "content", "calls"), CASES)
@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=60))
def test_an_output_is_read_alike_however_it_is_cut(name, output, reasoning, content, calls, cuts):
    found = read(output, Reading(FORMATS[name], with_calls=True), cuts)
    assert (found.reasoning, found.content, [c.name for c in found.calls]) == (reasoning, content, calls)
    assert all(call.arguments == ARGUMENTS for call in found.calls)


@pytest.mark.parametrize(("name", "output"), [("pangu", f"Wait.{PANGU} So."), ("deepseek", f"Wait.{DEEPSEEK_V31} So.")])
@pytest.mark.parametrize("cuts", [[], list(range(0, 400, 7))])
def test_one_call_at_a_time_keeps_the_first(name, output, cuts):
    whole = read(output, Reading(FORMATS[name], with_calls=True), cuts)
    found = read(output, Reading(FORMATS[name], with_calls=True, max_calls=1), cuts)
    assert [call.name for call in whole.calls] == ["look", "go"]
    assert [call.name for call in found.calls] == ["look"]
    assert found.content == whole.content


def test_large_numbers_of_a_call_stay_exact():
    body = '{"name": "pay", "arguments": {"wei": 123456789012345678901234567890}}'
    found = read(f"<tool_call>{body}</tool_call>", Reading(FORMATS["hermes"], True), [])
    assert [call.arguments for call in found.calls] == ['{"wei": 123456789012345678901234567890}']


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"wei": 123456789012345678901234567890}', {"wei": 123456789012345678901234567890}),
        ("", {}),
        ("{", "{"),
        ("[1]", "[1]"),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("[" * 1000 + "]" * 1000, "[" * 1000 + "]" * 1000),
    ],
)
def test_calls_of_earlier_turns_are_objects_or_what_the_model_wrote(written, read):
    call = {"id": "1", "type": "function", "function": {"name": "pay", "arguments": written}}
    messages = chat_messages(Fields({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}))
    (message,) = CallShape().shaped(messages)
    assert message["tool_calls"][0]["function"] == {"name": "pay", "arguments": read}


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ m.content }}|{{ f.name }} {{ f.arguments | tojson }}", '|look {"at": 1}'),
        ("{% for k, v in f.arguments | items %}{{ f.name }} {{ k }}={{ v }}{% endfor %}", "look at=1"),
        ("{{ f.name + ' ' + f.arguments }}", 'look {"at":1}'),
        (
            "{% if m['content'] is none %}{{ f.name + '\\n' + f['arguments'] }}{% else %}said{% endif %}",
            'look\n{"at":1}',
        ),
        ("{% if m.content is none %}{{ f.name }}{{ f.arguments | tojson }}{% else %}said{% endif %}", 'look{"at": 1}'),
        ("{{ m.content }}", ""),
    ],
)
def test_earlier_calls_are_shown_by_templates_of_every_kind(template, shown, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "m")
    loop = "{% for m in messages if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    (folder / "chat_template.jinja").write_text(f"{loop}{template}{{% endfor %}}")
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
    for nothing in ("", None):
        turn = {"role": "assistant", "content": nothing, "tool_calls": [call]}
        messages = chat_messages(Fields({"messages": [{"role": "user", "content": "Hi"}, turn]}))
        assert ModelText(folder).render(messages) == shown


def test_a_turn_may_be_reasoning_alone():
    (message,) = chat_messages(Fields({"messages": [{"role": "assistant", "content": None, "reasoning": "Hm."}]}))
    assert (message["content"], message["reasoning_content"]) == ("", "Hm.")


def test_without_tools_in_the_request_calls_are_text():
    found = read(f"[unused16]So.[unused17]{PANGU}", Reading(FORMATS["pangu"], with_calls=False), [7, 20])
    assert (found.reasoning, found.content, found.calls) == ("So.", PANGU, [])


def test_a_prompt_may_have_opened_the_reasoning():
    reading = Reading(FORMATS["qwen3"], with_calls=False)
    reading.saw_prompt("user: hi\nassistant: <think>\n")
    assert read("So.</think>Yes.", reading, []) == Parts("So.", "Yes.")
    reading.saw_prompt("user: what is <think>?\nassistant: <think>\n\n</think>\n\n")
    assert read("Yes.", reading, []) == Parts("", "Yes.")


def test_reasoning_can_be_left_out():
    reading = Reading(FORMATS["qwen3"], with_calls=False, shows_reasoning=False)
    assert read("<think>So.</think>Yes.", reading, [3, 9]) == Parts("", "Yes.")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '[unused9]用户：' }}", "pangu"),
        ("{{ '<｜tool▁calls▁begin｜>' }}{{ '<think>' }}", "deepseek"),
        ("{{ '<think>' }}<tool_call>", "qwen3"),
        ("<tool_call>", "hermes"),
        ("", "hermes"),
    ],
)
def test_the_format_is_the_templates(template, name):
    assert format_of(template) is FORMATS[name]


def test_marks_that_are_special_tokens_reach_the_parser_and_no_other_does(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"[unused{i}]", special=True) for i in (9, 10, 11, 12, 16, 17)])
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    (tmp_path / "m" / "chat_template.jinja").write_text("[unused9]{{ messages[0].content }}[unused10]")
    text = ModelText(tmp_path / "m")
    ids = tokenizer.encode("[unused9][unused16]So[unused17]Yes[unused10]", add_special_tokens=False).ids

    def told(**how: bool) -> str:
        detokenizer = text.detokenizer(**how)
        return "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()

    assert told(skip_special_tokens=True) == "SoYes"
    assert told(skip_special_tokens=True, show_marks=True) == "[unused16]So[unused17]Yes"
    assert told(skip_special_tokens=False) == "[unused9][unused16]So[unused17]Yes[unused10]"


def vllm_reads(format: OutputFormat, output: str) -> tuple[str | None, str | None, list[tuple[str, object]]]:
    """Reasoning, content and calls as vLLM's own parsers of the same family see a whole output."""
    from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser
    from vllm.tool_parsers.deepseekv3_tool_parser import DeepSeekV3ToolParser
    from vllm.tool_parsers.deepseekv31_tool_parser import DeepSeekV31ToolParser
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    words = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
    marks = ["<think>", "</think>", *(f"<｜tool▁{word}｜>" for word in words)]
    vocabulary = {mark: number for number, mark in enumerate(marks)}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    reasoning, content = None, output
    if "</think>" in output:
        reasoning, content = DeepSeekR1ReasoningParser(tokenizer).extract_reasoning(output, None)
    kind = Hermes2ProToolParser
    if format.name == "deepseek":
        kind = DeepSeekV3ToolParser if "```json" in output else DeepSeekV31ToolParser
    found = kind(tokenizer).extract_tool_calls(content or "", None)
    return reasoning, found.content, [(c.function.name, json.loads(c.function.arguments)) for c in found.tool_calls]


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("hermes", f"Let me see.{HERMES}"),
        ("hermes", "plain text"),
        ("qwen3", f"<think>So.</think>Wait.{HERMES}"),
        ("deepseek", f"<think>\nSo.\n</think>Wait.{DEEPSEEK_V3}"),
        ("deepseek", f"Wait.{DEEPSEEK_V31}"),
    ],
)
def test_outputs_are_read_as_vllms_own_parsers_read_them(name, output):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    found = read(output, Reading(FORMATS[name], with_calls=True), [])
    calls = [(call.name, json.loads(call.arguments)) for call in found.calls]
    assert (found.reasoning or None, found.content or None, calls) == vllm_reads(FORMATS[name], output)
