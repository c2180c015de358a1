"""What `omni attention` and `omni kernels table` say to wrong files, folders and options: a message, no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omni_kernels.commands import app as kernels
from omni_kernels.patterns.commands import app
from omni_kernels.patterns.pattern import Pattern

GOOD = Pattern("m", 32, 512, (None,) * 4).to_json()
QUESTION = {"prompt": "What is it?", "answer": "b", "expect": ["b"]}
TINY_MOE = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "pattern.json").write_text(json.dumps(GOOD))
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "folder").mkdir()
    return tmp_path


def refused(*given: Any, command: Any = app) -> str:
    """What was said, on one line whatever the width of the frame around it."""
    ran = CliRunner().invoke(command, [str(part) for part in given], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert ran.exit_code == 2, ran.output
    assert isinstance(ran.exception, SystemExit)
    return " ".join(ran.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        pytest.param("", "char 0", id="empty"),
        pytest.param("{", "line 1", id="cut short"),
        pytest.param("[1]", "must be an object", id="a list"),
        pytest.param(json.dumps(GOOD | {"layers": [{"kind": "window"}]}), "layers[0].kind", id="unknown kind"),
        pytest.param(json.dumps(GOOD | {"model": 1}), "model: must be a string", id="model"),
        pytest.param(
            json.dumps(GOOD | {"found": GOOD["found"] | {"accuracy": 0.5, "full_accuracy": "high"}}),
            "found.full_accuracy: must be a number", id="a word for a number",
        ),
    ],
)  # fmt: skip
def test_a_wrong_pattern_is_refused_by_file_and_field(files: Path, content: str, named: str) -> None:
    (files / "wrong.json").write_text(content)
    said = refused("show", files / "wrong.json")
    assert "PATTERN" in said and "wrong.json" in said and named in said


@pytest.mark.parametrize(
    ("content", "named"),
    [
        pytest.param(b"", "no questions", id="empty"),
        pytest.param(b'{"prompt"', ":1:", id="cut short"),
        pytest.param(b"[1]\n", ":1: must be an object", id="a list"),
        pytest.param(json.dumps(QUESTION | {"expect": "b"}).encode(), ":1: expect: must be a list", id="one string"),
        pytest.param(json.dumps(QUESTION | {"prompt": None}).encode(), ":1: prompt: must be a string", id="no prompt"),
        pytest.param(b"\xff\xfe\x00", "decode", id="no text"),
    ],
)
def test_wrong_questions_are_refused_by_line_and_field(files: Path, content: bytes, named: str) -> None:
    (files / "wrong.jsonl").write_bytes(content)
    given = ("--model", files / "folder", "--questions", files / "wrong.jsonl")
    said = refused("evaluate", files / "pattern.json", *given)
    assert "--questions" in said and "wrong.jsonl" in said and named in said


@pytest.mark.parametrize("config", [None, "{", "[1]", '{"model_type": "unheard-of"}'])
def test_a_folder_without_a_model_is_refused(files: Path, config: str | None) -> None:
    pytest.importorskip("transformers")
    if config is not None:
        (files / "folder" / "config.json").write_text(config)
    given = ("--model", files / "folder", "--questions", files / "questions.jsonl")
    assert f"--model: {files / 'folder'} holds no model" in refused("evaluate", files / "pattern.json", *given)


def test_a_prompt_of_one_token_is_refused(files: Path) -> None:
    pytest.importorskip("transformers")
    (files / "questions.jsonl").write_text(json.dumps(QUESTION | {"prompt": ""}) + "\n")
    given = ("--model", TINY_MOE, "--questions", files / "questions.jsonl")
    assert "--questions: prompt 1 must have 2 tokens" in refused("evaluate", files / "pattern.json", *given)


def test_a_pattern_for_another_model_is_refused(files: Path) -> None:
    pytest.importorskip("transformers")
    (files / "pattern.json").write_text(json.dumps(Pattern("m", 32, 512, (None,)).to_json()))
    given = ("--model", TINY_MOE, "--questions", files / "questions.jsonl")
    assert "has 1 layers, the model 4" in refused("evaluate", files / "pattern.json", *given)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        pytest.param("--sinks", "a", "--sinks", id="no number"),
        pytest.param("--recents", "0", "recent_blocks", id="no recent block"),
        pytest.param("--out", "gone/pattern.json", "no folder", id="no folder to write to"),
        pytest.param("--out", "folder", "is a directory", id="a folder"),
        pytest.param("--plot", "gone/plot.png", "no folder", id="no folder for the plot"),
    ],
)
def test_a_search_refuses_before_it_loads_the_model(files: Path, option: str, value: str, named: str) -> None:
    wrong = files / value if option in ("--out", "--plot") else value
    given = ["--model", files / "folder", "--questions", files / "questions.jsonl", "--kv-share", "0.5"]
    said = refused("search", *given, "--out", files / "out.json", option, wrong)
    assert option in said and named in said


def test_a_budget_that_no_pattern_keeps_is_refused(files: Path) -> None:
    pytest.importorskip("transformers")
    given = ["--model", TINY_MOE, "--questions", files / "questions.jsonl", "--out", files / "out.json"]
    for method in ("random", "greedy", "genetic"):
        said = refused("search", *given, "--kv-share", "0", "--method", method, "--block-size", "4")
        assert "--kv-share" in said and "allow more" in said


def test_a_table_that_cannot_be_written_is_refused_before_it_is_made(files: Path) -> None:
    assert "no folder" in refused("table", "--json", files / "gone" / "table.json", command=kernels)


@pytest.mark.parametrize(
    ("command", "app_of"),
    [(name, app) for name in ("search", "evaluate", "show")]
    + [(name, kernels) for name in ("status", "table", "lint", "contract")],
)
def test_help_has_an_example(command: str, app_of: Any) -> None:
    ran = CliRunner().invoke(app_of, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    area = "attention" if app_of is app else "kernels"
    assert f"omni {area} {command}" in ran.output.partition("Examples:")[2]
