"""`omni placement` against a running service: layouts go out and come back exactly; what an operator does, holds."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub
from omni_common.errors import InvalidRequest, NotFound, Unavailable
from omni_common.rpc import channel
from omni_placement.app import running
from omni_placement.commands import formats
from omni_placement.commands.app import app
from omni_placement.layout import Layout, Topology
from omni_placement.problem import Problem
from omni_placement.settings import Settings
from omni_placement.solvers import SOLVERS

SHAPE = {"num_layers": 2, "num_experts": 8, "num_ranks": 4, "slots_per_rank": 4, "ranks_per_host": 2, "expert_bytes": 5}
TOPOLOGY = Topology(**SHAPE)
LOAD = np.array([[90, 10, 5, 5, 40, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 80]])


class _Service:
    """Two models, one of a name with a slash; lives in a thread."""

    def __init__(self, folder: Path) -> None:
        self.address = ""
        self._folder, self._ready, self._loop = folder, threading.Event(), asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)
        self._loop.close()

    async def _run(self) -> None:
        models = {"org/busy": SHAPE, "idle": SHAPE}
        settings = Settings.model_validate(
            {"port": 0, "state_dir": self._folder, "models": models, "rebalance_interval_s": 0}
        )
        async with running(settings, CollectorRegistry()) as placement:
            self.address = f"127.0.0.1:{placement.port}"
            async with channel(self.address) as connected:
                stub: Any = PlacementServiceStub(connected)  # type: ignore[no-untyped-call]
                tokens = pb.ExpertLoad(num_layers=2, num_experts=8, tokens=LOAD.ravel().tolist())
                report = pb.ReportLoadRequest(
                    model="org/busy", worker_id="w", first_step=1, last_step=9, load=tokens, phase=pb.PHASE_DECODE
                )
                await stub.ReportLoad(iter([report]))
            self._ready.set()
            await self._over.wait()


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    running_service = _Service(tmp_path_factory.mktemp("state"))
    yield running_service.address
    running_service.close()


def run(service: str, *arguments: object) -> Any:
    command = [str(argument) for argument in (*arguments, "--placement", service)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "120"})


def answer(service: str, *arguments: object) -> Any:
    result = run(service, *arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


def busy_layout() -> Layout:
    return SOLVERS["greedy_lpt"](Problem(TOPOLOGY, LOAD.astype(np.float64)))


def test_a_layout_goes_out_and_comes_back_exactly(service: str, tmp_path: Path) -> None:
    mine, back = tmp_path / "mine.npy", tmp_path / "back.npy"
    formats.write_layout(mine, formats.Named(busy_layout()))
    planned = answer(service, "import", mine, "--model", "org/busy", "--dry-run")
    assert planned["version"] == 0 and planned["rounds"] > 0 and planned["gain_ms"] > 0 and planned["cost_ms"] > 0
    assert planned["ms_per_token"] == 0.0005
    assert planned["step_load"] < planned["step_load_before"]
    published = answer(service, "import", mine, "--model", "org/busy")
    assert published["version"] == 2
    assert [row["solver"] for row in answer(service, "show", "--history", "--model", "org/busy")] == [
        "imported",
        "identity",
    ]
    assert run(service, "export", back, "--model", "org/busy").exit_code == 0
    assert back.read_bytes() == mine.read_bytes()
    assert run(service, "export", tmp_path / "back.json", "--model", "org/busy").exit_code == 0
    named = formats.read_layout(tmp_path / "back.json")
    assert (named.model, named.version, named.layout.topology) == ("org/busy", 2, TOPOLOGY)
    assert run(service, "export", tmp_path / "first.npy", "--model", "org/busy", "--version", 1).exit_code == 0
    identity = SOLVERS["identity"](Problem(TOPOLOGY, np.ones((2, 8))))
    np.testing.assert_array_equal(np.load(tmp_path / "first.npy"), identity.indicator)


def test_history_and_rollback(service: str, tmp_path: Path) -> None:
    formats.write_layout(tmp_path / "mine.npy", formats.Named(busy_layout()))
    answer(service, "import", tmp_path / "mine.npy", "--model", "org/busy")
    assert answer(service, "rollback", "--model", "org/busy") == {"version": 3}
    rows = answer(service, "show", "--history", "--model", "org/busy")
    assert [row["version"] for row in rows] == [3, 2, 1]
    assert {"solver", "reason", "published", "outcome"} <= set(rows[0])
    shown = run(service, "show", "--history", "--model", "org/busy").output
    assert "version" in shown and "no worker" in shown
    run(service, "export", tmp_path / "third.npy", "--model", "org/busy")
    run(service, "export", tmp_path / "first.npy", "--model", "org/busy", "--version", 1)
    assert (tmp_path / "third.npy").read_bytes() == (tmp_path / "first.npy").read_bytes()


def test_ranks_go_out_and_come_back(service: str, tmp_path: Path) -> None:
    assert answer(service, "ranks", "--model", "idle") == {"version": 1, "excluded_ranks": []}
    out = answer(service, "ranks", "--model", "idle", "--exclude", "1,3")
    assert out["excluded_ranks"] == [1, 3] and out["version"] == 2
    run(service, "export", tmp_path / "a.npy", "--model", "idle")
    assert np.load(tmp_path / "a.npy")[[1, 3]].sum() == 0
    assert answer(service, "show", "--model", "idle")["usable_ranks"] == 2
    assert answer(service, "ranks", "--model", "idle", "--return", "3")["excluded_ranks"] == [1]
    refused = run(service, "ranks", "--model", "idle", "--exclude", "0,2,3").exception
    assert isinstance(refused, InvalidRequest) and refused.field == "--exclude"
    assert refused.message.startswith("--exclude: leaves")


def test_plan_with_what_the_service_knows(service: str, tmp_path: Path) -> None:
    said = answer(service, "plan", "--from-service", "org/busy", "-o", tmp_path / "a.npy")
    assert said["ranks"] == 4 and said["hosts"] == 2 and said["before"]["name"] == "in force"
    assert said["after"]["step_load"] < said["before"]["step_load"]
    assert said["moves"]["bytes"] == 5 * said["moves"]["experts"]
    which = run(service, "plan", "--from-service", "", "-o", tmp_path / "a.npy").exception
    assert isinstance(which, InvalidRequest) and which.field == "--from-service"
    missing = run(service, "plan", "--from-service", "idle", "-o", tmp_path / "a.npy").exception
    assert isinstance(missing, NotFound) and "nothing was reported" in missing.message


def test_show_what_is_in_force(service: str, tmp_path: Path) -> None:
    said = answer(service, "show", "--model", "org/busy", "--phase", "decode")
    assert (said["model"], said["version"], said["worker"], said["load_known"]) == ("org/busy", 1, "", True)
    identity = SOLVERS["identity"](Problem(TOPOLOGY, np.ones((2, 8))))
    assert said["after"]["step_load"] == identity.step_load(LOAD) and said["tokens"] == LOAD.sum()
    shown = run(service, "show", "--model", "org/busy").output
    assert "org/busy" in shown and "none is watching" in shown and "rank 0 to 3" in shown
    assert "error not known yet, drift since planned not known yet" in shown
    assert not answer(service, "show", "--model", "idle")["load_known"]
    assert run(service, "show", "--model", "idle", "--html", tmp_path / "a.html").exit_code == 0
    assert "equally busy" in (tmp_path / "a.html").read_text()


def test_groups_are_listed(service: str) -> None:
    rows = answer(service, "show")
    assert [(row["group"], row["version"], row["applied"]) for row in rows] == [("idle", 1, 0), ("org/busy", 1, 0)]
    assert "org/busy" in run(service, "show").output


def test_the_load_comes_out_as_it_went_in(service: str, tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    assert run(service, "export", path, "--load", "--phase", "decode", "--model", "org/busy").exit_code == 0
    np.testing.assert_array_equal(formats.read_load(path), LOAD)
    none = run(service, "export", path, "--load", "--phase", "prefill", "--model", "org/busy").exception
    assert isinstance(none, NotFound) and none.field == "--phase"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(("rollback",), InvalidRequest, "There are: idle, org/busy", id="which of two"),
        pytest.param(("show", "--model", "gone"), NotFound, "there are: idle, org/busy", id="unknown"),
        pytest.param(("export", "a.npy", "--model", "idle", "--version", "9"), NotFound, "not kept", id="version"),
        pytest.param(("rollback", "--model", "idle", "--to-version", "9"), NotFound, "9", id="rollback"),
        pytest.param(("ranks", "--model", "idle", "--return", "2"), InvalidRequest, "not out", id="not out"),
    ],
)
def test_refusals(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run(service, *arguments).exception
    assert isinstance(refused, error) and message in str(refused)


def test_a_layout_of_other_ranks_is_refused(service: str, tmp_path: Path) -> None:
    other = Topology(2, 8, 2, 4)
    layout = SOLVERS["identity"](Problem(other, np.ones((2, 8))))
    formats.write_layout(tmp_path / "a.npy", formats.Named(layout))
    refused = run(service, "import", tmp_path / "a.npy", "--model", "idle").exception
    assert isinstance(refused, InvalidRequest) and "asked for were 2 of 8 on 4" in refused.message


def test_a_layout_with_experts_on_ranks_that_are_out_is_refused(service: str, tmp_path: Path) -> None:
    formats.write_layout(tmp_path / "mine.npy", formats.Named(busy_layout()))
    answer(service, "ranks", "--model", "idle", "--exclude", "3")
    for extra in ((), ("--dry-run",)):
        refused = run(service, "import", tmp_path / "mine.npy", "--model", "idle", *extra).exception
        assert isinstance(refused, InvalidRequest) and "excluded ranks [3] hold experts" in refused.message


def test_a_service_that_is_away_is_named() -> None:
    away = run("127.0.0.1:1", "show").exception
    assert isinstance(away, Unavailable) and "127.0.0.1:1" in away.message
