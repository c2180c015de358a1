"""The life of a stack, with small stand-ins for the services: real processes, real gRPC health, real HTTP."""

import asyncio
import io
import os
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from omni_cli import machine
from omni_cli.chat import Answer, ChatClient
from omni_cli.errors import NoAnswer, PortTaken, StackExists, StartFailed
from omni_cli.plan import Probe, ProcessSpec, StackOptions, StackPlan
from omni_cli.progress import LineProgress
from omni_cli.restarts import RestartPolicy
from omni_cli.stack import Death, Stack
from omni_cli.state import StateFiles
from omni_cli.status import read_status
from omni_cli.up import Bringup, bring_down, bring_up, show_first_answer

LIMIT_S = 30.0

WORKER = """
import asyncio, os, sys
from omni_common.rpc import Server, run_until_signal

async def main():
    if os.environ.get("STANDIN_BROKEN"):
        sys.exit("no such model folder")
    server = Server([])
    await server.start("127.0.0.1:" + os.environ["STANDIN_PORT"])
    async def drain(): pass
    await run_until_signal(server, drain, 1)

asyncio.run(main())
"""

PROXY = """
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/ready": {}, "/workers": {"workers": [{"id": "w0"}]}, "/v1/models": {"data": [{"id": "tiny"}]},
        }
        self.reply(json.dumps(answers[self.path]).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        if question == "refuse":
            return self.reply(b'{"error": {"message": "no capacity"}}', 503)
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in ("Hello", " you")]
        if question == "fail":
            events.append({"error": {"message": "decode went away"}})
        else:
            events.append({"choices": [], "usage": {"completion_tokens": 2}})
        lines = "".join(f"data: {json.dumps(event)}\\n\\n" for event in events)
        self.reply((lines + ("" if question == "break" else "data: [DONE]\\n\\n")).encode())

    def reply(self, content, status=200):
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments): pass

ThreadingHTTPServer(("127.0.0.1", int(os.environ["STANDIN_PORT"])), Handler).serve_forever()
"""


@pytest.fixture
def environ(tmp_path):
    for name, code in (("omni_decode", WORKER), ("omni_proxy", PROXY)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "__main__.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.fixture
def files(tmp_path):
    return StateFiles(tmp_path / ".omni")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def plan_of_two(**extra: str) -> StackPlan:
    worker, proxy = islice(machine.free_ports(), 2)
    specs = (
        ProcessSpec("decode-0", "decode", {"STANDIN_PORT": str(worker)} | extra, "127.0.0.1", worker),
        ProcessSpec("proxy", "proxy", {"STANDIN_PORT": str(proxy)}, "127.0.0.1", proxy, Probe.HTTP_READY),
    )
    return StackPlan("test", specs, workers=1, notes=())


@pytest.fixture
async def stack(environ, files, tmp_path, console):
    running = Stack(plan_of_two(), files, environ, tmp_path, supervised=False)
    running.start()
    try:
        await running.wait_healthy(LineProgress(console), LIMIT_S)
        yield running
    finally:
        await running.stop(5)


async def test_comes_up_is_seen_healthy_and_goes_down(stack, files, console):
    status = await read_status(files.load("test"))
    assert status.is_healthy
    assert [service.phase for service in status.services] == ["ready", "ready"]
    shown = console.file.getvalue()
    assert "decode-0: ready" in shown
    assert "proxy: ready" in shown
    await bring_down(files.load("test"), files, 10)
    assert all(record.process() is None for record in stack.records)
    assert list(files.all()) == []


async def test_dead_service_is_reported_restarted_and_recorded(stack, files):
    stop, deaths = asyncio.Event(), []

    def report(death: Death) -> None:
        deaths.append(death)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stack.watch(stop, RestartPolicy(first_delay_s=0.01), report))
        first = files.load("test").processes[0]
        psutil.Process(first.pid).send_signal(signal.SIGKILL)
        await _until(lambda: _record(files, first.name).pid != first.pid)
        stop.set()
    assert [(death.name, death.exit_code) for death in deaths] == [("decode-0", -signal.SIGKILL)]
    assert _record(files, "decode-0").process() is not None


async def test_status_says_which_service_is_dead(stack, files):
    record = _record(files, "decode-0")
    psutil.Process(record.pid).kill()
    await _until(lambda: record.process() is None)
    status = await read_status(files.load("test"))
    assert {service.name: service.phase for service in status.services} == {"decode-0": "dead", "proxy": "ready"}
    assert not status.is_healthy


async def test_service_that_cannot_start_is_named(environ, files, tmp_path, console):
    broken = Stack(plan_of_two(STANDIN_BROKEN="1"), files, environ, tmp_path, supervised=False)
    broken.start()
    try:
        with pytest.raises(StartFailed, match="decode-0 ended with exit code 1"):
            await broken.wait_healthy(LineProgress(console), LIMIT_S)
        assert "no such model folder" in broken.log_path("decode-0").read_text()
    finally:
        await broken.stop(5)


async def test_running_name_and_taken_port_are_refused(stack, files, tmp_path, environ, console):
    (tmp_path / "tokenizer.json").write_text("{}")
    port = int(stack.url.rpartition(":")[2])
    base = {"directory": tmp_path, "model_dir": tmp_path, "engine": "sim", "port": port}
    with pytest.raises(StackExists, match="is running"):
        await bring_up(StackOptions(name="test", **base), Bringup(), files, tmp_path, environ, console)
    with pytest.raises(PortTaken, match=f"port {port} .* --port"):
        await bring_up(StackOptions(name="other", **base), Bringup(), files, tmp_path, environ, console)


async def test_first_answer_is_shown(stack, console):
    await asyncio.to_thread(show_first_answer, stack.url, console)
    shown = console.file.getvalue()
    assert "Hello you" in shown
    assert "first token after" in shown


@pytest.mark.parametrize(
    ("question", "says"),
    [("refuse", "HTTP 503: no capacity"), ("fail", "decode went away"), ("break", "broke off")],
)
async def test_failed_answers_say_why(stack, question, says):
    client = ChatClient(stack.url)
    messages = [{"role": "user", "content": question}]
    with pytest.raises(NoAnswer, match=says):
        await asyncio.to_thread(list, client.stream("tiny", messages, Answer(), max_tokens=8, temperature=None))
    client.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


def _record(files: StateFiles, name: str):  # type: ignore[no-untyped-def]
    return next(record for record in files.load("test").processes if record.name == name)


def test_root_is_found_from_below():
    here = Path(__file__).resolve()
    assert (machine.find_root(here.parent) / "cli" / "pyproject.toml").is_file()
