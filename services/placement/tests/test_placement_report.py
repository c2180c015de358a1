"""Figures and the report: numbers are the layout's own, nothing is fetched, what is pointed at is what is shown."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from omni_placement.layout import Topology
from omni_placement.migration import rounds
from omni_placement.problem import Problem
from omni_placement.report.canvas import Drawing, look
from omni_placement.report.figures import FIGURES, drawings, expert_load
from omni_placement.report.files import write_figures, write_report
from omni_placement.report.page import page
from omni_placement.report.study import Measured, Study
from omni_placement.report.summary import summary
from omni_placement.report.units import duration, percent, size, times, tokens
from omni_placement.solvers import SOLVERS

LOAD = np.random.default_rng(7).zipf(1.6, (6, 24)).clip(1, 500).astype(np.float64)
LOAD[2, 11] = 900.0


def make_study(topology: Topology, **constraints: frozenset[int]) -> Study:
    problem = Problem(topology, LOAD, **constraints)
    before, after = (Measured(name, SOLVERS[name](problem), problem) for name in ("identity", "greedy_lpt"))
    others = [Measured("round_robin", SOLVERS["round_robin"](problem), problem, 0.01)]
    bound = np.maximum(LOAD.sum(axis=1) / (problem.capacity > 0).sum(), LOAD.max(axis=1) / problem.replica_limit)
    steps = rounds(before.layout, after.layout, problem.excluded_ranks)
    return Study("A <b>study</b>", problem, before, after, bound, steps, others)


@pytest.fixture(scope="module")
def study() -> Study:
    """Ten ranks on five hosts, of which two only hold the shared expert and one has failed."""
    topology = Topology(6, 24, 10, 5, ranks_per_host=2, shared_ranks=(8, 9), expert_bytes=1 << 20)
    return make_study(topology, excluded_ranks=frozenset({3}))


@pytest.fixture(scope="module")
def figures(study: Study) -> list[Drawing]:
    with look():
        return drawings(study)


@pytest.fixture(scope="module")
def html(study: Study, figures: list[Drawing]) -> str:
    with look():
        return page(study, figures, {"Load source": "zipf, <seed> 7"})


class Parsed(HTMLParser):
    """Tags with their attributes; closing tags must match opening ones."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [found for kind, attributes in self.tags if kind == tag and (found := attributes.get(name)) is not None]


def test_the_summary_is_what_the_layouts_say(study: Study) -> None:
    found, excluded = summary(study), study.problem.excluded_ranks
    for key, layout in (("before", study.before.layout), ("after", study.after.layout)):
        even = layout.balancedness(LOAD, excluded)
        assert found[key]["step_load"] == layout.step_load(LOAD)
        assert found[key]["balancedness_mean"] == even.mean() and found[key]["balancedness_min"] == even.min()
        assert found[key]["spare_copies"] == layout.replicas.sum() - 6 * 24
    assert found["moves"]["experts"] == sum(
        move.source_rank != move.target_rank for step in study.rounds or () for move in step.moves
    )
    assert found["moves"]["bytes"] == found["moves"]["experts"] << 20
    assert found["usable_ranks"] == 7 and found["hosts"] == 5
    assert json.loads(json.dumps(found)) == found


def test_what_is_drawn_is_what_the_layouts_say(study: Study, figures: list[Drawing]) -> None:
    cells = {(drawing.name, index): c.values for drawing in figures for index, c in enumerate(drawing.cells)}
    usable = [0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(cells["expert-load", 0], LOAD)
    for index, measured in enumerate((study.before, study.after)):
        loads = cells["rank-load", index]
        np.testing.assert_array_equal(loads[:, usable], measured.layout.rank_loads(LOAD)[:, usable])
        assert np.isnan(loads[:, [3, 8, 9]]).all()
    np.testing.assert_array_equal(cells["replicas", 0], study.after.layout.replicas)
    assert cells["moves", 0].sum() == sum(len(step.moves) for step in study.rounds or ())


def test_many_ranks_are_added_up_by_host() -> None:
    study = make_study(Topology(6, 24, 96, 1, ranks_per_host=16))
    with look():
        (moves,) = drawings(study, ("moves",))
    assert moves.cells[0].values.shape == (6, 6)
    assert moves.cells[0].values.sum() == study.traffic.sum() > 0


def test_no_figure_without_something_to_show(study: Study) -> None:
    with look():
        alone = drawings(replace(study, rounds=None, others=()))
    assert {drawing.name for drawing in alone} == set(FIGURES) - {"moves", "solvers"}


@pytest.mark.parametrize("name", FIGURES)
def test_pngs_are_not_blank(figures: list[Drawing], name: str) -> None:
    drawing = next(drawing for drawing in figures if drawing.name == name)
    pixels = imread(io.BytesIO(drawing.png()), format="png")
    assert pixels.shape[1] == 1440, "7.2 inches at 200 dots"
    dark = (pixels[..., :3] < 0.9).any(axis=2)
    assert not dark[0].any() and not dark[-1].any() and not dark[:, 0].any() and not dark[:, -1].any(), "cut off"
    ink = dark.mean()
    assert 0.01 < ink < 0.99
    assert len(np.unique((255 * pixels[..., :3]).astype(np.int64) @ (1, 256, 65536))) > 30


def test_what_is_pointed_at_is_what_is_shown(study: Study) -> None:
    with look():
        drawing = expert_load(study)
        ((left, top, width, height),) = drawing.boxes()
        pixels = imread(io.BytesIO(drawing.png()), format="png")
    rows, columns = LOAD.shape
    hottest = np.unravel_index(int(study.expert_share.argmax()), LOAD.shape)
    y = int((top + (hottest[0] + 0.5) / rows * height) * pixels.shape[0])
    x = int((left + (hottest[1] + 0.5) / columns * width) * pixels.shape[1])
    np.testing.assert_allclose(pixels[y, x, :3], (0.993, 0.906, 0.144), atol=0.02)


def test_the_same_study_gives_the_same_bytes(study: Study, html: str) -> None:
    with look():
        again = drawings(study)
        assert page(study, again, {"Load source": "zipf, <seed> 7"}) == html


def test_the_page_fetches_nothing(html: str) -> None:
    parsed = Parsed(html)
    references = [value for _, attributes in parsed.tags for key, value in attributes.items() if key in ("src", "href")]
    assert references and all(value is not None and value.startswith("data:") for value in references)
    bare = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", bare)
    for picture in re.findall(r"base64,([A-Za-z0-9+/=]+)", html):
        drawn = base64.b64decode(picture).decode()
        assert all(target.startswith(("#", "data:")) for target in re.findall(r'href="([^"]*)"', drawn))


def test_the_page_escapes_what_it_is_given(html: str) -> None:
    assert "A <b>study</b>" not in html and "A <b>study</b>" in Parsed(html).text
    assert "zipf, <seed> 7" in Parsed(html).text


def test_figures_are_numbered_and_described(html: str, figures: list[Drawing]) -> None:
    parsed = Parsed(html)
    assert re.findall(r"Figure (\d+)\.", parsed.text) == [str(number + 1) for number in range(len(figures))]
    assert re.findall(r"Table (\d+)\.", parsed.text) == ["1", "2", "3"]
    for drawing in figures:
        assert drawing.caption in parsed.text
    assert all(parsed.attributes("img", "alt"))
    assert "@media print" in html and "@page" in html
    assert all(word in parsed.text for word in ("Step load", "Balancedness", "Bound", "deterministic"))


def test_the_pages_cells_are_the_figures_cells(html: str, study: Study) -> None:
    found = re.search(r'id="maps">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    maps = json.loads(found[1])
    areas = [int(index) for index in Parsed(html).attributes("div", "data-map")]
    assert areas == list(range(len(maps)))
    assert maps[0]["values"] == LOAD.tolist() and maps[0]["unit"] == "tokens"
    before = np.array(maps[1]["values"], dtype=np.float64)
    np.testing.assert_allclose(before[:, 0], study.before.rank_loads[:, 0], rtol=1e-4)
    assert maps[1]["values"][0][9] is None, "a rank of the shared expert"


def test_a_report_is_a_folder(study: Study, tmp_path: Path) -> None:
    written = write_report(study, tmp_path / "new" / "report", {})
    assert [path.name for path in written] == ["report.html", *(f"{name}.png" for name in FIGURES), "summary.json"]
    assert all(path.stat().st_size > 500 for path in written)
    assert json.loads(written[-1].read_text()) == summary(study)
    assert "Processor" in written[0].read_text()
    assert [path.name for path in write_figures(study, tmp_path / "a.png", ("solvers",))] == ["a.png"]
    assert [p.name for p in write_figures(study, tmp_path / "a.png", ("moves", "replicas"))] == [
        "a-moves.png",
        "a-replicas.png",
    ]


def test_no_load_at_all_can_be_drawn(tmp_path: Path) -> None:
    topology = Topology(1, 4, 2, 3)
    problem = Problem(topology, np.zeros((1, 4)))
    before, after = (Measured(name, SOLVERS[name](problem), problem) for name in ("identity", "round_robin"))
    study = Study("idle", problem, before, after, np.zeros(1), rounds(before.layout, after.layout))
    write_report(study, tmp_path, {})
    assert summary(study)["after"]["balancedness_mean"] == 1.0 and summary(study)["after"]["above_bound"] == 0.0


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        pytest.param(tokens(0), "0", id="none"),
        pytest.param(tokens(999), "999", id="few"),
        pytest.param(tokens(12_345_678), "12.3 M", id="many"),
        pytest.param(size(44_000_000 * 16), "671 MiB", id="bytes"),
        pytest.param(times(1.0), "1×", id="once"),
        pytest.param(times(52.43), "52.4×", id="ratio"),
        pytest.param(percent(0.00251), "0.25%", id="small share"),
        pytest.param(percent(21.5815), "2,158%", id="large share"),
        pytest.param(duration(0.0196), "19.6 ms", id="milliseconds"),
        pytest.param(duration(300), "5 min", id="minutes"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected
