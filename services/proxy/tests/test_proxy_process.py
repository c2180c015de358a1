"""The proxy as a process: start, drain on SIGTERM, refuse bad settings."""

import asyncio
import json
import os
import sys
from typing import Any

import httpx
import pytest


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


async def test_who_connected_before_the_end_is_answered(model_dir):
    process = await launch(model_dir=str(model_dir), port="0")
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
    ("settings", "named"),
    [({"model_dir": "/nowhere"}, "tokenizer.json"), ({}, "model_dir"), ({"polcy": "x"}, "OMNI_PROXY_POLICY")],
)
async def test_wrong_settings_are_named(settings, named):
    process = await launch(**settings)
    async with asyncio.timeout(30):
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert named in errors.decode()
