"""`omni placement` on files: what it writes reads back exactly, what it says is what the layouts say, what is wrong is
named with the option that mends it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_placement.commands import formats
from omni_placement.commands.app import app
from omni_placement.commands.options import numbers, pins, repeated
from omni_placement.layout import EMPTY, Layout, Topology, from_indicator
from omni_placement.load import imports
from omni_placement.solvers import SOLVERS

LOAD = np.random.default_rng(3).zipf(1.7, (4, 16)).clip(1, 900)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def answer(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def load(tmp_path: Path) -> Path:
    path = tmp_path / "load.npy"
    np.save(path, LOAD)
    return path


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Valid layouts with empty slots, copies and slots in any order."""
    layers, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    slots = draw(st.integers(1, 5))
    experts = draw(st.integers(1, min(slots * ranks, 12)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    physical = np.full((layers, ranks, slots), EMPTY, dtype=np.int32)
    for layer in physical:
        for expert in range(experts):
            row, slot = random.permutation(np.argwhere(layer == EMPTY))[0]
            layer[row, slot] = expert
        for rank in layer:
            others = random.permutation([e for e in range(experts) if e not in rank])
            free = np.flatnonzero(rank == EMPTY)
            count = int(random.integers(0, min(len(others), len(free)) + 1))
            rank[free[:count]] = others[:count]
    return Layout(Topology(layers, experts, ranks, slots, draw(st.integers(0, ranks)), expert_bytes=3), physical)


@settings(deadline=None, max_examples=60)
@given(layout=layouts())
def test_layouts_read_back_exactly(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    named = formats.Named(layout, "a/model", "group 1", 7, "omni")
    formats.write_layout(folder / "a.json", named)
    assert formats.read_layout(folder / "a.json") == named
    formats.write_layout(folder / "a.npy", named)
    array = np.load(folder / "a.npy")
    assert array.dtype == np.int32 and array.shape == (*layout.topology.shape[1::-1], layout.topology.num_experts)
    read = formats.read_layout(folder / "a.npy", layout.topology).layout
    assert read.topology == layout.topology
    np.testing.assert_array_equal(read.indicator, layout.indicator)
    formats.write_layout(folder / "b.npy", formats.Named(read))
    assert (folder / "b.npy").read_bytes() == (folder / "a.npy").read_bytes()


@pytest.mark.parametrize("ending", [".npy", ".csv"])
def test_loads_read_back_exactly(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"load{ending}"
    formats.write_load(path, LOAD.astype(np.float64))
    np.testing.assert_array_equal(formats.read_load(path), LOAD)


def test_a_plan_is_a_layout_and_its_figures_are_the_layouts_own(load: Path, tmp_path: Path) -> None:
    output = tmp_path / "next.npy"
    said = answer("plan", load, "--ranks", 4, "--slots", 5, "--ranks-per-host", 2, "-o", output)
    array = np.load(output)
    assert array.dtype == np.int32 and array.shape == (4, 4, 16) and set(np.unique(array)) == {0, 1}
    layout = from_indicator(array, 5)
    assert said["after"]["name"] == "omni" and said["layout"] == str(output)
    assert said["after"]["step_load"] == pytest.approx(layout.step_load(LOAD), rel=1e-12)
    assert said["after"]["balancedness_mean"] == pytest.approx(layout.balancedness(LOAD).mean(), rel=1e-12)
    assert said["bound"]["step_load"] <= said["after"]["step_load"] <= said["before"]["step_load"]
    assert said["tokens"] == LOAD.sum() and said["hosts"] == 2


def test_a_plan_shows_before_after_and_bound(load: Path, tmp_path: Path) -> None:
    shown = run("plan", load, "--ranks", 4, "-o", tmp_path / "a.npy", "--report", tmp_path / "report").output
    for word in ("before (identity)", "after (omni)", "bound", "balancedness, worst layer", "rounds", "a.npy"):
        assert word in shown
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert "SHA-256" in (tmp_path / "report" / "report.html").read_text()


def test_planning_on_from_a_layout_moves_little(load: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.npy", tmp_path / "second.npy"
    moved = answer("plan", load, "--ranks", 4, "--slots", 6, "-o", first)["moves"]["experts"]
    again = answer("plan", load, "--current", first, "-o", second)
    assert again["before"]["name"] == "in force" and again["slots_per_rank"] == 6
    assert again["moves"]["experts"] == 0 < moved
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_a_layout_in_force_may_be_seen_with_other_hosts_and_slots(load: Path, tmp_path: Path, ending: str) -> None:
    first = tmp_path / f"first{ending}"
    answer("plan", load, "--ranks", 4, "--slots", 5, "-o", first)
    asked = ("--current", first, "--slots", 6, "--ranks-per-host", 2, "--expert-bytes", 7)
    said = answer("plan", load, *asked, "-o", tmp_path / "next.json")
    layout = formats.read_layout(tmp_path / "next.json").layout
    assert (layout.topology.slots_per_rank, layout.topology.ranks_per_host, said["hosts"]) == (6, 2, 2)
    assert said["moves"]["bytes"] == 7 * said["moves"]["experts"]


def test_a_rank_that_failed_is_left(load: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    run("plan", load, "--ranks", 4, "--slots", 8, "-o", first)
    said = answer("plan", load, "--current", first, "--exclude-rank", 1, "-o", tmp_path / "next.npy")
    assert np.load(tmp_path / "next.npy")[1].sum() == 0
    assert said["before"]["above_bound"] is None and said["after"]["above_bound"] >= 0


def test_constraints_hold(load: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    run(
        "plan", load, "--ranks", 8, "--slots", 4, "--shared-ranks", "6-7", "--exclude-rank", 2, "--rank-slots", "4x7,3",
        "--budget", 9, "--max-replicas", 2, "--pin", "1:5:4", "--pin", "1:5:0", "-o", output,
    )  # fmt: skip
    layout = formats.read_layout(output).layout
    assert layout.topology.shared_ranks == (6, 7) and layout.topology.rank_slots == (4,) * 7 + (3,)
    assert layout.indicator[[2, 6, 7]].sum() == 0
    assert layout.indicator[4, 1, 5] == layout.indicator[0, 1, 5] == 1
    assert layout.replicas.max() == 2 and (layout.replicas - 1).sum() <= 9


def test_compare_has_every_solver(load: Path, tmp_path: Path) -> None:
    said = answer("compare", load, "--ranks", 4, "--slots", 5, "--png", tmp_path / "solvers.png")
    assert {row["name"] for row in said["solvers"]} == set(SOLVERS) and said["refused"] == {}
    best = min(row["step_load"] for row in said["solvers"])
    assert said["after"]["step_load"] == best
    assert (tmp_path / "solvers.png").stat().st_size > 5_000
    shown = run("compare", load, "--ranks", 4, "--slots", 5).output
    assert all(name in shown for name in SOLVERS)


def test_compare_says_who_cannot(load: Path) -> None:
    said = answer("compare", load, "--ranks", 4, "--slots", 5, "--pin", "0:3:2")
    assert "pinned" in said["refused"]["greedy_lpt"] and said["after"]["name"] == "omni"


def test_show_a_file(load: Path, tmp_path: Path) -> None:
    layout = tmp_path / "a.npy"
    run("plan", load, "--ranks", 4, "--slots", 5, "-o", layout, "--solver", "round_robin")
    said = answer("show", layout, "--load", load)
    assert said["after"]["step_load"] == from_indicator(np.load(layout)).step_load(LOAD)
    shown = run("show", layout, "--load", load).output
    assert "balancedness" in shown and "rank 0 to 3" in shown and "× the mean of the layer" in shown
    assert "copies of each expert" in run("show", layout).output
    assert (
        run("show", layout, "--load", load, "--png", tmp_path / "p.png", "--html", tmp_path / "p.html").exit_code == 0
    )
    names = {path.name for path in tmp_path.glob("p*")}
    assert names == {"p.html", "p-expert-load.png", "p-rank-load.png", "p-balancedness.png", "p-replicas.png"}


def test_ranks_that_hold_nothing_are_not_counted(load: Path, tmp_path: Path) -> None:
    layout = tmp_path / "a.npy"
    run("plan", load, "--ranks", 6, "--slots", 5, "--shared-ranks", "4,5", "-o", layout)
    assert answer("show", layout, "--load", load)["usable_ranks"] == 4


def test_import_converts(load: Path, tmp_path: Path) -> None:
    layout, table = tmp_path / "a.npy", tmp_path / "load.csv"
    run("plan", load, "--ranks", 4, "-o", layout)
    assert run("import", layout, "--to", tmp_path / "a.json").exit_code == 0
    assert run("import", tmp_path / "a.json", "--to", tmp_path / "b.npy").exit_code == 0
    assert (tmp_path / "b.npy").read_bytes() == layout.read_bytes()
    dump = tmp_path / "dump"
    dump.mkdir()
    for rank, part in enumerate(np.split(LOAD, 2, axis=1)):
        rows = ("\t".join(map(str, row)) for row in part.tolist())
        (dump / f"activation_counts_recordstep_1_rank_{rank}.txt").write_text("\n".join(rows))
    assert run("import", dump, "--to", table).exit_code == 0
    np.testing.assert_array_equal(imports.read_csv(table), LOAD)


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        pytest.param(("plan",), "load", "Give a file, or --from-service", id="no load"),
        pytest.param(("plan", "LOAD"), "--ranks", "how many ranks", id="no ranks"),
        pytest.param(("plan", "gone.npy", "--ranks", "4"), "file", "gone.npy", id="no such file"),
        pytest.param(("plan", "gone.csv", "--ranks", "4"), "load", "gone.csv", id="no such table"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--slots", "3"), "--slots", "cannot hold 16 experts", id="slots"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--solver", "best"), "--solver", "there are", id="solver"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--pin", "1:2"), "--pin", "layer:expert:rank", id="pin"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--pin", "9:2:1"), "--pin", "not exist", id="pin nowhere"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--exclude-rank", "x"), "--exclude-rank", "0,4-6", id="range"),
        pytest.param(
            ("plan", "LOAD", "--ranks", "2", "--slots", "9", "--exclude-rank", "0"), "--exclude-rank", "leaves 9 slots",
            id="too few left",
        ),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--groups", "5"), "--groups", "does not divide", id="groups"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "--rank-slots", "5x3"), "--rank-slots", "3 entries", id="caps"),
        pytest.param(("plan", "LOAD", "--ranks", "4", "-o", "a.txt"), "file", ".npy or .json", id="ending"),
        pytest.param(("plan", "LOAD", "--current", "LOAD"), "file", "0/1 integers", id="a load is no layout"),
        pytest.param(("show", "LOAD"), "file", "0/1 integers", id="show a load"),
        pytest.param(("show", "a.txt"), "file", ".npy or .json", id="show a text"),
        pytest.param(("show",), "--placement", "host:port", id="no service"),
        pytest.param(("show", "--placement", "placement"), "--placement", "'placement': write host:port", id="no port"),
        pytest.param(("show", "a.npy", "--history"), "--history", "no history", id="history of a file"),
        pytest.param(("ranks", "--exclude", "1", "--return", "1"), "--return", "in both", id="out and back"),
        pytest.param(("export", "a.csv"), "file", ".npy or .json", id="a layout as a table"),
    ],
)  # fmt: skip
def test_refusals_name_the_option(
    load: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], option: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(str(load) if argument == "LOAD" else argument for argument in arguments))
    assert isinstance(result.exception, InvalidRequest), result.output
    assert result.exception.field == option and message in result.exception.message
    assert not list(tmp_path.glob("layout.npy")), "a refused plan writes nothing"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.npy", b"\x93NUMPY rubbish", "no .npy array", id="rubbish"),
        pytest.param("a.json", b"{", "is no layout", id="half a file"),
        pytest.param("a.json", b'{"format": "other"}', "'other' is not", id="another format"),
        pytest.param("a.json", b"[]", "is no layout", id="a list"),
    ],
)
def test_broken_layouts_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message) as refused:
        formats.read_layout(path)
    assert str(path) in refused.value.message


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array([[1, -1]]), id="negative"),
        pytest.param(np.array([[1, 1e300]]), id="huge"),
        pytest.param(np.array([[1.0, np.nan]]), id="not a number"),
        pytest.param(np.array([1, 2]), id="one dimension"),
        pytest.param(np.array([["a"]]), id="text"),
        pytest.param(np.zeros((0, 4)), id="no layers"),
    ],
)
def test_broken_loads_are_refused(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InvalidRequest, match=r"a\.npy"):
        formats.read_load(tmp_path / "a.npy")


@pytest.mark.parametrize("number", [2, -1, 2**32 + 1])
def test_other_numbers_than_0_and_1_are_no_layout(tmp_path: Path, number: int) -> None:
    np.save(tmp_path / "a.npy", np.array([[[1, number]]]))
    with pytest.raises(InvalidRequest, match="other numbers than 0 and 1"):
        formats.read_layout(tmp_path / "a.npy")


def test_an_expert_nowhere_is_no_layout(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[[1, 0]], [[1, 0]]], dtype=np.int32))
    with pytest.raises(InvalidRequest, match="expert 1 of layer 0 is on no rank"):
        formats.read_layout(tmp_path / "a.npy")


def test_without_a_drawing_library_all_but_figures_works(
    load: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "omni_placement.report.files", None)
    assert run("plan", load, "--ranks", 4, "-o", tmp_path / "a.npy").exit_code == 0
    refused = run("compare", load, "--ranks", 4, "--png", tmp_path / "a.png").exception
    assert isinstance(refused, FailedPrecondition) and "pip install 'omni-placement[cli]'" in refused.message


def test_ranks_are_written_short() -> None:
    assert numbers("0,4-6", "x") == (0, 4, 5, 6) and numbers(None, "x") == ()
    assert repeated("9x3,7", "x") == (9, 9, 9, 7)
    assert pins(["3:17:0"]) == ((3, 17, 0),)


@pytest.mark.parametrize("command", ["plan", "compare", "show", "import", "export", "rollback", "ranks"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"omni placement {command}" in result.output and "Exit code" in result.output
