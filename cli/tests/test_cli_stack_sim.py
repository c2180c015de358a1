"""The whole stack with simulated engines, through the command line only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_cli import machine

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "127.0.0.1:1"


def omni(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from omni_cli.main import main; main()", *arguments, "--home", str(home)]
    environ = os.environ | {"OMNI_PROXY_WORKERS": NOBODY}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=150, check=False)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    home = tmp_path_factory.mktemp("omni")
    port = next(machine.free_ports())
    up = omni("up", "--engine", "sim", "--decode", "2", "--port", str(port), "--name", "sim", "--detach", home=home)
    assert up.returncode == 0, up.stdout + up.stderr
    yield home, up.stdout
    down = omni("down", "--name", "sim", home=home)
    assert down.returncode == 0, down.stdout + down.stderr
    assert "killed" not in down.stdout
    assert omni("status", home=home).returncode == 4


def test_it_comes_up_with_a_first_answer(stack):
    _, shown = stack
    assert "sim is healthy" in shown
    assert "first token after" in shown


def test_status_sees_every_service_and_worker(stack):
    home, _ = stack
    content = json.loads(omni("status", "--json", home=home).stdout)["stacks"][0]
    assert {service["name"] for service in content["services"]} == {
        "kvstore", "placement", "prefill-0", "decode-0", "decode-1", "proxy",
    }  # fmt: skip
    assert len(content["workers"]) == 3


def test_status_shows_a_worker_of_the_proxys_settings_that_does_not_answer(stack):
    home, _ = stack
    [unmet] = json.loads(omni("status", "--json", home=home).stdout)["stacks"][0]["unreachable"]
    assert unmet["address"] == NOBODY and unmet["state"].startswith("unreachable")
    shown = omni("status", home=home)
    assert "workers the proxy sees: 3 of 3" in shown.stdout
    assert f"worker at {NOBODY}: unreachable" in shown.stdout
    assert shown.returncode == 5 and "degraded" in shown.stdout.splitlines()[0]


def test_chat_answers(stack):
    home, _ = stack
    chat = omni("chat", "Hello", "--max-tokens", "8", home=home)
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()


def test_logs_are_readable(stack):
    home, _ = stack
    logs = omni("logs", "kvstore", "--name", "sim", home=home)
    assert "serving" in logs.stdout
