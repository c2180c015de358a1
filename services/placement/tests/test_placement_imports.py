"""OmniPlacement's activation dumps, in and out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_placement.load import Phase
from omni_placement.load.imports import BadDump, read, write_csv

# (layers, ranks, positions of a rank)
COUNTS = np.arange(2 * 3 * 4).reshape(2, 3, 4)


def dump(folder: Path, step: int, counts: np.ndarray = COUNTS, ending: str = "\t\n") -> None:
    """One file per rank; the engine ends its rows with a tab, its Python side does not."""
    for rank in range(counts.shape[1]):
        rows = ["\t".join(map(str, row)) for row in counts[:, rank].tolist()]
        (folder / f"activation_counts_recordstep_{step}_rank_{rank}.txt").write_text("".join(r + ending for r in rows))


def log_lines(phase: str = "decode", step: int = 1) -> list[str]:
    return [
        f"[dump activation] {phase} step {step} in rank {rank} for layer {layer} get 4 experts data: "
        + "\t".join(map(str, COUNTS[layer, rank].tolist()))
        for layer in range(2)
        for rank in range(3)
    ]


@pytest.mark.parametrize("ending", ["\t\n", "\n", "\r\n"])
def test_folder_adds_steps_and_joins_ranks(tmp_path: Path, ending: str) -> None:
    for step in (1, 20):
        dump(tmp_path, step, ending=ending)
    (tmp_path / "notes.txt").write_text("not a dump")
    load = read(tmp_path)
    assert load.dtype == np.int64
    assert load.tolist() == (2 * COUNTS.reshape(2, 12)).tolist()


def test_log_chooses_a_phase(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text("\n".join(["INFO started", *log_lines("prefill", 3), "", *log_lines("decode", 9)]) + "\n")
    once = COUNTS.reshape(2, 12)
    assert read(path).tolist() == (2 * once).tolist()
    assert read(path, phase=Phase.DECODE).tolist() == once.tolist()
    path.write_bytes("INFO 启动\n".encode("gbk") + "\n".join(log_lines()).encode())
    assert read(path).tolist() == once.tolist()


@settings(deadline=None, max_examples=30)
@given(
    counts=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 2**48), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_csv_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, counts: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "topk_ids_count.csv"
    write_csv(path, np.array(counts, dtype=np.int64))
    assert read(path).tolist() == counts


def test_csv_is_the_tools_own_form(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    write_csv(path, np.array([[5, 0], [1, 2]]))
    assert path.read_text() == ",ep_0,ep_1\nlayer_0,5,0\nlayer_1,1,2\n"
    path.write_bytes(b",ep_0,ep_1\r\nlayer_0,5,0\r\nlayer_1,1,2\r\n")
    assert read(path).tolist() == [[5, 0], [1, 2]]


@pytest.mark.parametrize(
    ("name", "text", "where", "what"),
    [
        pytest.param("a.csv", "1,2\n3,4\n", "a.csv:1", "header", id="no header"),
        pytest.param("a.csv", ",ep_0\nlayer_1,1\n", "a.csv:2", "expected layer_0", id="layer skipped"),
        pytest.param("a.csv", ",ep_0,ep_1\nlayer_0,1\n", "a.csv:2", "1 counts where 2 belong", id="short row"),
        pytest.param("a.csv", ",ep_0\nlayer_0,-1\n", "a.csv:2", "'-1' is not a count", id="negative"),
        pytest.param("a.csv", ",ep_0\nlayer_0,1.5\n", "a.csv:2", "'1.5' is not a count", id="fraction"),
        pytest.param("a.csv", f",ep_0\nlayer_0,{2**60}\n", "a.csv:2", "larger than", id="too large"),
        pytest.param("a.csv", ",ep_0\n", "a.csv", "no layers", id="no rows"),
        pytest.param("a.log", "nothing here\n", "a.log", "no '.dump activation.' line", id="empty log"),
        pytest.param("a.log", "x\n[dump activation] decode step\n", "a.log:2", "cannot be read", id="torn line"),
        pytest.param("a.log", log_lines()[0] + "\t7\n", "a.log:1", "5 counts where 4 belong", id="too many counts"),
        pytest.param("a.log", "\n".join(log_lines()[:-1]), "a.log", "layer 1 of rank 2 is missing", id="layer missing"),
        pytest.param("a.log", "\n".join(log_lines()[1::3]), "a.log", "rank 0 is missing", id="rank missing"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, where: str, what: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadDump, match=what) as refused:
        read(path)
    assert refused.value.message.startswith(str(tmp_path / where))
    assert refused.value.reason == "bad_dump"


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadDump, match="no activation_counts"):
        read(tmp_path)
    dump(tmp_path, 1)
    odd = tmp_path / "activation_counts_recordstep_2_rank_1.txt"
    for text, what in (("1\t2\n3\n", r"_rank_1\.txt:2: 1 counts where 2"), ("1\n2\n", "2 layers of 1 experts")):
        odd.write_text(text)
        with pytest.raises(BadDump, match=what):
            read(tmp_path)
    odd.unlink()
    (tmp_path / "activation_counts_recordstep_1_rank_1.txt").unlink()
    with pytest.raises(BadDump, match="rank 1 is missing of 3"):
        read(tmp_path)
    (tmp_path / "activation_counts_recordstep_x.txt").write_text("")
    with pytest.raises(BadDump, match="the name is not"):
        read(tmp_path)
    with pytest.raises(BadDump, match="No such file"):
        read(tmp_path / "gone.log")
