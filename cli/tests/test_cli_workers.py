"""`omni workers` against real workers on simulated engines, and a proxy: its page that names them, or a real one."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from omni_cli.main import app
from omni_cli.workers_commands import _show

MODEL_DIR = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"
LOAD = {"running": 3, "waiting": 1, "queued_tokens": 512, "kv_usage": 0.25}


class _Worker:
    """A decode worker in a thread of its own; `started_for` fixes its role."""

    def __init__(self, started_for: str = "") -> None:
        self.address, self.host = "", None
        self._started_for = started_for
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)
        self._loop.close()

    async def _run(self) -> None:
        # The worker's code is no dependency of the command; the test environment has it.
        from omni_engine.hosting.host import WorkerHost
        from omni_engine.hosting.settings import WorkerSettings
        from omni_engine.sim import SimEngine

        values = {"role": "decode", "engine": "sim", "sim": {"fixed_role": self._started_for}}
        settings = WorkerSettings.model_validate(values)
        self.host = WorkerHost(settings, SimEngine(settings.sim), CollectorRegistry())
        self.address = f"127.0.0.1:{await self.host.start()}"
        serving = asyncio.create_task(self.host.serve())
        while not self.host.admission.is_ready:
            await self.host.admission.changed(0.1)
        self._ready.set()
        await self._over.wait()
        serving.cancel()
        await asyncio.wait({serving})
        await self.host.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[_Worker]:
    running = _Worker()
    yield running
    running.close()


@pytest.fixture(scope="module")
def fixed() -> Iterator[_Worker]:
    running = _Worker("started as kv_consumer")
    yield running
    running.close()


@pytest.fixture
def url(worker: _Worker, fixed: _Worker) -> Iterator[str]:
    """A proxy's page on three workers, one of which does not answer."""

    def entry(worker_id: str, address: str, **more: Any) -> dict[str, Any]:
        own = {"id": worker_id, "address": address, "role": "decode", "labels": {}, "load": LOAD, "refusal": None}
        return own | {"in_flight": {"requests": 2}} | more

    page = {
        "model": "m",
        "workers": [
            entry("d0", worker.address, labels={"omni.group": "west"}, saturation=0.5),
            entry("d1", fixed.address),
            entry("p0", "127.0.0.1:1", role="prefill", refusal="unreachable"),
        ],
    }

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(page).encode()
            self.send_response(200 if self.path == "/workers" else 404)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def proxy(worker: _Worker, nobody: str) -> Iterator[str]:
    """A proxy whose settings name one worker that is there and two that are not."""
    settings = {
        "PORT": "0", "MODEL_DIR": str(MODEL_DIR), "SERVED_MODEL_NAME": "sim",
        "WORKERS": f"{worker.address},{nobody},[fd00::1]:9",
    }  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OMNI_")}
    environ |= {f"OMNI_PROXY_{name}": value for name, value in settings.items()}
    with subprocess.Popen([sys.executable, "-m", "omni_proxy"], env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            entries = (json.loads(line) for line in process.stderr)
            yield f"http://127.0.0.1:{next(entry['port'] for entry in entries if entry['message'] == 'serving')}"
        finally:
            process.kill()


def omni(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["workers", *arguments])
    said = "" if isinstance(result.exception, SystemExit | None) else str(result.exception)
    return result.exit_code, result.output + said


def test_the_list_shows_roles_groups_and_load(url: str) -> None:
    code, shown = omni("--url", url)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in shown.splitlines()}
    assert list(rows) == ["worker", "p0", "d0", "d1"]
    assert rows["d0"] == ["d0", "decode", "west", "3", "1", "512", "25%", "2", "0.50"]
    assert rows["p0"][-1] == "unreachable"
    assert "adapters" not in shown
    assert json.loads(omni("--url", url, "--json")[1])["model"] == "m"


def test_adapters_are_shown_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    load = LOAD | {"adapters": ["sql", "old"]}
    many = {"adapters": ["a", "b", "c", "poet", "sql"], "load": load}
    alike = {"address": "x:1", "role": "decode", "load": LOAD, "refusal": None, "in_flight": {"requests": 0}}
    workers = [
        alike | {"id": name} | more
        for name, more in (("d0", many), ("d1", {"adapters": ["poet"]}), ("d2", {"refusal": "draining"}))
    ]
    _show({"workers": workers})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[7:] for row in rows[1:]] == [["sql*,", "a,", "b,", "c,", "1", "more"], ["poet"], ["draining"]]


def test_different_weights_of_one_name_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    alike = {
        "address": "x:1",
        "role": "decode",
        "load": LOAD,
        "refusal": None,
        "in_flight": {"requests": 0},
        "model": "m",
    }
    holds = {"d0": {"": "1", "sql": "7"}, "d1": {"": "2", "sql": "7"}, "d2": {"": "1"}, "d3": {}}
    workers = [
        alike | {"id": name, "weights": weights, "adapters": sorted(filter(None, weights))}
        for name, weights in holds.items()
    ]
    another = alike | {"id": "d4", "weights": {"": "3", "sql": "8"}, "adapters": ["sql"], "model": "n"}
    _show({"workers": [*workers, another], "model": "m"})
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "m: no KV blocks go between workers of different weights: d0, d2 | d1 | d3"


def test_workers_of_the_settings_that_do_not_answer_are_shown_with_their_address(proxy: str, nobody: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        page = json.loads(omni("--url", proxy, "--json")[1])
        states = {one["address"]: one["state"] for one in page["unreachable"]}
        if page["workers"] and "no answer yet" not in states[nobody]:
            break
        assert time.monotonic() < deadline, page
    assert set(states) == {nobody, "[fd00::1]:9"}
    code, shown = omni("--url", proxy)
    assert code == 0
    rows = [line.split() for line in shown.splitlines()]
    assert rows[1][:2] == [page["workers"][0]["id"], "decode"]
    assert rows[2:4] == [[nobody, "unreachable"], ["[fd00::1]:9", "unreachable"]]
    [reason] = [line for line in shown.splitlines() if line.startswith(f"{nobody}: unreachable: ")]
    assert "no answer yet" not in reason


def test_a_role_is_changed_by_command(url: str, worker: _Worker) -> None:
    assert omni("role", "d0", "both", "--url", url) == (0, "d0: decode -> both\n")
    assert worker.host.admission.role == "both"  # type: ignore[attr-defined]
    assert omni("role", "d0", "both", "--url", url) == (0, "d0 is both already\n")
    assert omni("role", "d0", "decode", "--url", url) == (0, "d0: both -> decode\n")


@pytest.mark.parametrize(
    ("worker_id", "role", "said"),
    [
        pytest.param("d1", "prefill", "started as kv_consumer", id="the engine cannot"),
        pytest.param("d0", "encode", "is no role: choose one of prefill, decode, both", id="no such role"),
        pytest.param("d9", "decode", "knows no worker 'd9' (it knows: d0, d1, p0)", id="no such worker"),
        pytest.param("p0", "decode", "p0 at 127.0.0.1:1", id="no answer"),
    ],
)
def test_what_is_refused_is_explained(url: str, worker_id: str, role: str, said: str) -> None:
    code, shown = omni("role", worker_id, role, "--url", url)
    assert code != 0
    assert said in shown


def test_a_worker_is_drained_and_takes_work_again(url: str, worker: _Worker) -> None:
    host: Any = worker.host
    assert omni("drain", "d0", "--url", url) == (0, "d0 is empty\n")
    assert host.admission.is_draining
    assert omni("drain", "d0", "--resume", "--url", url) == (0, "d0 takes work\n")
    assert not host.admission.is_draining
    host.admission.enter()
    code, shown = omni("drain", "d0", "--timeout-s", "0.5", "--url", url)
    host.admission.leave()
    assert (code, shown) == (3, "d0 takes no new work; left: 1 running, 0 prompts not pulled\n")
    omni("drain", "d0", "--resume", "--url", url)
