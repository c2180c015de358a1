"""The proxy as a process: start, drain on SIGTERM, refuse bad settings."""

import asyncio
import json
import os
import sys
from typing import Any

import httpx
import pytest

from omni_common.errors import InvalidRequest
from omni_proxy.__main__ import main
from omni_proxy.settings import Settings


async def launch(**settings: str) -> asyncio.subprocess.Process:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OMNI_")}
    environ |= {f"OMNI_PROXY_{k.upper()}": v for k, v in settings.items()}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "omni_proxy", env=environ, stderr=pipe)


async def line_with(process: asyncio.subprocess.Process, message: str) -> dict[str, Any]:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        entry: dict[str, Any] = json.loads(line)
        if entry["message"] == message:
            return entry
    raise AssertionError(f"the process ended without {message!r}")


async def test_sigterm_finishes_streams_and_refuses_new_ones(start, model_dir):
    stack = await start("d", hold_after=4)
    worker = stack["d"]
    process = await launch(model_dir=str(model_dir), workers=f"['{worker.address}']", port="0")
    try:
        async with asyncio.timeout(30):
            port = (await line_with(process, "serving"))["port"]
            body = {"model": "tiny", "prompt": "hi", "max_tokens": 9}
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                while (await client.get("/ready")).status_code != 200:
                    continue
                running = asyncio.create_task(client.post("/v1/completions", json=body, timeout=20))
                await worker.held.wait()
                process.terminate()
                await line_with(process, "draining")
                assert (await client.get("/ready")).status_code == 503
                refused = await client.post("/v1/completions", json=body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                worker.resumed.set()
                assert (await running).json()["usage"]["completion_tokens"] == 9
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_what_the_drain_time_cuts_off_ends_in_an_error(start, model_dir):
    stack = await start("d", hold_after=4)
    worker = stack["d"]
    settings = {"model_dir": str(model_dir), "workers": f"['{worker.address}']", "port": "0", "drain_timeout_s": "0.1"}
    process = await launch(**settings)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            port = (await line_with(process, "serving"))["port"]
            body = {"model": "tiny", "prompt": "hi", "max_tokens": 9}
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                while (await client.get("/ready")).status_code != 200:
                    continue
                asked = [client.post("/v1/completions", json=body | {"stream": streams}) for streams in (True, False)]
                running = [asyncio.create_task(answer) for answer in asked]
                await worker.held.wait()
                process.terminate()
                streamed, whole = await asyncio.gather(*running)
            assert (whole.status_code, whole.json()["error"]["code"]) == (503, "draining")
            last = streamed.text.strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
            assert await process.wait() == 0
            assert b"Traceback" not in await process.stderr.read()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_who_connected_before_the_end_is_answered(model_dir):
    process = await launch(model_dir=str(model_dir), workers="127.0.0.1:1", port="0")
    try:
        async with asyncio.timeout(30):
            port = (await line_with(process, "serving"))["port"]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            process.terminate()
            await line_with(process, "draining")
            body = b'{"model": "tiny", "prompt": "hi"}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert b" 503 " in await reader.readline()
            writer.close()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"model_dir": "/nowhere", "workers": "w:1"}, 1, "tokenizer.json"),
        ({}, 2, "OMNI_PROXY_MODEL_DIR"),
        ({"polcy": "x"}, 2, "OMNI_PROXY_POLICY"),
        ({"model_dir": "/nowhere"}, 2, "set OMNI_PROXY_KVSTORE or OMNI_PROXY_WORKERS"),
    ],
)
async def test_wrong_settings_are_named(settings, code, named):
    process = await launch(**settings)
    async with asyncio.timeout(30):
        _, errors = await process.communicate()
    assert process.returncode == code
    assert named in errors.decode() and "Traceback" not in errors.decode()


def test_help_lists_the_settings_without_any_being_set(monkeypatch, capsys):
    monkeypatch.delenv("OMNI_PROXY_MODEL_DIR", raising=False)
    monkeypatch.setattr("sys.argv", ["omni-proxy", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "OMNI_PROXY_PORT=8000" in shown and "OMNI_PROXY_MODEL_DIR (required)" in shown


@pytest.mark.parametrize("setting", ["KVSTORE", "WORKERS"])
@pytest.mark.parametrize("address", ["kv", "kv:", ":9001", "http://kv:9001", "kv:0", "kv:70000", "::1:9001", "a:1,kv"])
def test_an_address_without_host_or_port_is_refused_by_name(tmp_path, setting, address):
    environ = {"OMNI_PROXY_MODEL_DIR": str(tmp_path), f"OMNI_PROXY_{setting}": address}
    with pytest.raises(InvalidRequest, match=f"OMNI_PROXY_{setting}.*host:port"):
        Settings.load(environ)


@pytest.mark.parametrize(
    ("given", "addresses"),
    [
        ("kv-0.kv:9001", ("kv-0.kv:9001",)),
        ("a:1, 10.0.0.2:2", ("a:1", "10.0.0.2:2")),
        ("[a:1, b:2]", ("a:1", "b:2")),
        ("[::1]:9001,[fe80::1%eth0]:9002", ("[::1]:9001", "[fe80::1%eth0]:9002")),
        ("['[::1]:9001']", ("[::1]:9001",)),
    ],
)
def test_addresses_are_names_ipv4_or_ipv6_in_brackets(tmp_path, given, addresses):
    environ = {"OMNI_PROXY_MODEL_DIR": str(tmp_path), "OMNI_PROXY_WORKERS": given}
    assert Settings.load(environ).workers == addresses
