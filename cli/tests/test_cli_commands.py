"""The command line: help that teaches, exit codes, doctor's checks, readable logs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omni_cli import doctor, logfiles, main
from omni_cli.errors import InvalidOptions, NoSuchStack
from omni_cli.facts import Facts, read_constraints
from omni_cli.main import app
from omni_cli.options import adapter_folders
from omni_cli.probes import Phase
from omni_cli.state import StackState, StateFiles
from omni_cli.status import ServiceStatus, StackStatus

GIB = 1024**3
WELL = Facts(
    python=(3, 11, 7),
    constraints={"grpcio": "1.85.1", "torch": "2.13.0"},
    installed={"grpcio": "1.85.1", "torch": "2.13.0+cpu"},
    cores=8,
    cpu_flags=frozenset({"avx2", "avx512f", "amx_tile"}),
    available_bytes=20 * GIB,
    total_bytes=24 * GIB,
    disk_free_bytes=50 * GIB,
    port=8000,
    port_holder=None,
    redis_url=None,
    redis_error=None,
    redis_binary="/opt/redis-server",
    torch_version="2.13.0+cpu",
    torch_cuda=None,
    vllm_version="0.32.0",
    vllm_error=None,
    model_dir=Path("/models/tiny-moe"),
    model_files=frozenset({"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}),
    docker_version="26.1",
)


def run(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("command", ["up", "down", "status", "chat", "doctor", "logs", "config check", "kv verify"])
def test_help_has_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"omni {command}" in result.output.partition("Examples:")[2]


def test_help_is_wrapped_at_the_terminals_width_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("up", "--help").output
    assert "until Ctrl-C. A service that dies meanwhile is started again." in shown


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("up", "down", "status", "chat", "doctor", "logs"))


def test_status_of_nothing(tmp_path):
    result = run("status", "--json", "--home", str(tmp_path))
    assert result.exit_code == NoSuchStack.exit_code
    assert json.loads(result.output) == {"stacks": []}


def test_status_of_a_stack_that_is_gone_is_unhealthy(tmp_path):
    StateFiles(tmp_path).save(StackState("p1", "http://127.0.0.1:1", 2))
    result = run("status", "--json", "--home", str(tmp_path))
    assert result.exit_code == 3
    assert json.loads(result.output)["stacks"][0]["is_healthy"] is False


WORKER = {"id": "d0", "takes_work": True, "refusal": None}
NOBODY = {"address": "far:9", "state": "unreachable: no answer yet"}


@pytest.mark.parametrize(
    ("phase", "workers", "unreachable", "condition", "says"),
    [
        pytest.param("ready", [WORKER], [], "healthy", "1 of 1", id="all is well"),
        pytest.param("ready", None, [], "healthy", "cannot be asked", id="a proxy that asks for a key"),
        pytest.param("ready", [WORKER], [NOBODY], "degraded", "worker at far:9: unreachable", id="settings, nobody"),
        pytest.param(
            "ready", [WORKER | {"takes_work": False, "refusal": "draining"}], [], "degraded",
            "worker d0 takes no work: draining", id="drained",
        ),
        pytest.param("ready", [], [NOBODY], "not healthy", "0 of 1", id="a worker of its own is missing"),
        pytest.param("loading", [WORKER], [], "not healthy", "1 of 1", id="a service is not ready"),
    ],
)  # fmt: skip
def test_a_stack_is_healthy_degraded_or_neither(monkeypatch, tmp_path, phase, workers, unreachable, condition, says):
    service = ServiceStatus("proxy", 1, Phase(phase), "127.0.0.1:1", None, None)
    seen = None if workers is None else tuple(workers)
    stack = StackStatus("p1", "http://127.0.0.1:1", False, 1, (service,), seen, tuple(unreachable))

    async def stacks(states: object) -> list[StackStatus]:
        return [stack]

    monkeypatch.setattr(main, "read_all", stacks)
    shown = run("status", "--home", str(tmp_path))
    assert shown.exit_code == {"healthy": 0, "degraded": 5, "not healthy": 3}[condition]
    assert f"http://127.0.0.1:1 {condition}\n" in shown.output and says in shown.output
    told = json.loads(run("status", "--json", "--home", str(tmp_path)).output)["stacks"][0]
    assert (told["condition"], told["is_healthy"]) == (condition, condition == "healthy")


def test_down_without_a_choice_names_the_stacks(tmp_path):
    for name in ("p1", "p2"):
        StateFiles(tmp_path).save(StackState(name, f"http://127.0.0.1:{name[1:]}", 2))
    assert "p1, p2" in str(run("down", "--home", str(tmp_path)).exception)
    assert run("down", "--all", "--home", str(tmp_path)).exit_code == 0
    assert list(StateFiles(tmp_path).all()) == []


def test_a_port_without_a_stack_is_said(tmp_path):
    assert "no stack is recorded" in str(run("down", "--home", str(tmp_path)).exception)
    StateFiles(tmp_path).save(StackState("p1", "http://127.0.0.1:1", 2))
    assert "no stack on port 9 (known: p1)" in str(run("down", "--port", "9", "--home", str(tmp_path)).exception)


def test_a_model_whose_files_cannot_be_read_is_named(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    arguments = ("up", "--engine", "sim", "--model", str(model), "--home", str(tmp_path / "home"))
    assert "has no tokenizer.json" in str(run(*arguments).exception)
    (model / "tokenizer.json").write_text("{}")
    (model / "config.json").write_text("{bad")
    assert "config.json is not JSON" in str(run(*arguments).exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(("up", "--host", "192.0.2.1"), "--host 192.0.2.1 --port 8000", id="another machine's address"),
        pytest.param(("up", "--kernels", "fast"), "--kernels 'fast'", id="kernels"),
        pytest.param(("kv", "workers", "--kvstore", "cache"), "--kvstore 'cache': write host:port", id="no port"),
        pytest.param(("kv", "workers", "--kvstore", "http://kv:1"), "without http://", id="a scheme"),
        pytest.param(("kv", "workers", "--kvstore", "kv:70000"), "from 1 to 65535", id="no such port"),
        pytest.param(("workers", "--url", "http://proxy:x"), "--url 'http://proxy:x': write", id="a URL's port"),
        pytest.param(("chat", "hi", "--url", "proxy:70000"), "--url 'proxy:70000': write", id="a URL's port range"),
        pytest.param(("kv", "hottest", "--url", "ftp://proxy"), "--url 'ftp://proxy': write", id="a URL's scheme"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, arguments, says):
    refused = run(*arguments, "--home", str(tmp_path)).exception
    assert isinstance(refused, InvalidOptions) and says in str(refused), refused
    assert StateFiles(tmp_path).logged() == []


def test_well_machine_passes_every_check():
    checks = doctor.examine(WELL)
    assert {name: check.verdict for name, check in checks.items()} == dict.fromkeys(checks, doctor.Verdict.OK)
    assert not doctor.has_failed(checks)


@pytest.mark.parametrize(
    ("name", "changes", "verdict", "says"),
    [
        pytest.param("python", {"python": (3, 10, 1)}, "fail", "3.11", id="old python"),
        pytest.param("python", {"python": (3, 14, 0)}, "fail", "3.13", id="new python"),
        pytest.param("packages", {"constraints": None}, "warn", "checkout", id="no constraints"),
        pytest.param("packages", {"installed": {"torch": "2.13.0+cpu"}}, "warn", "make setup", id="missing package"),
        pytest.param("cores", {"cores": 1}, "warn", "share", id="one core"),
        pytest.param("cpu features", {"cpu_flags": frozenset({"sse2"})}, "fail", "sim", id="old cpu"),
        pytest.param("cpu features", {"cpu_flags": frozenset({"avx2"})}, "warn", "slow", id="no avx512"),
        pytest.param("cpu features", {"cpu_flags": frozenset()}, "warn", "Linux", id="unknown cpu"),
        pytest.param("memory", {"available_bytes": 2 * GIB}, "fail", "sim", id="no memory"),
        pytest.param("memory", {"available_bytes": 6 * GIB}, "warn", "kv-cache", id="little memory"),
        pytest.param("disk", {"disk_free_bytes": GIB // 2}, "fail", "free", id="no disk"),
        pytest.param("disk", {"disk_free_bytes": 2 * GIB}, "warn", "4 GiB", id="little disk"),
        pytest.param("port", {"port_holder": "nginx (pid 7)"}, "warn", "--port", id="port taken"),
        pytest.param("redis", {"redis_binary": None}, "fail", "--redis", id="no redis"),
        pytest.param("redis", {"redis_url": "redis://r", "redis_error": "refused"}, "fail", "--redis", id="redis away"),
        pytest.param("torch", {"torch_version": None}, "fail", "make setup", id="no torch"),
        pytest.param("torch", {"torch_cuda": "13.0"}, "warn", "make clean", id="cuda torch"),
        pytest.param("vllm", {"vllm_version": None, "vllm_error": "boom"}, "fail", "sim", id="no vllm"),
        pytest.param("model", {"model_files": frozenset({"config.json"})}, "fail", "--model", id="no tokenizer"),
        pytest.param("model", {"model_files": frozenset(doctor.MODEL_FILES)}, "warn", "sim", id="no weights"),
        pytest.param("containers", {"docker_version": None}, "warn", "compose", id="no docker"),
    ],
)
def test_check_says_how_to_mend(name, changes, verdict, says):
    checks = doctor.examine(replace(WELL, **changes))
    assert checks[name].verdict == verdict
    assert says in checks[name].mend
    assert doctor.has_failed(checks) == (verdict == "fail")


def test_constraints_are_read_by_canonical_name(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pinned\nPyYAML==6.0.3\njaraco.text==1.0 ; python_version < '3.12'\n")
    assert read_constraints(pins) == {"pyyaml": "6.0.3", "jaraco-text": "1.0"}
    assert read_constraints(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        pytest.param(
            '{"time": "2026-01-01T10:20:30.123+00:00", "level": "info", "message": "serving", "port": 1}',
            "10:20:30.123 INFO    serving port=1",
            id="ours",
        ),
        pytest.param("INFO engine up", "INFO engine up", id="plain"),
        pytest.param("{broken", "{broken", id="broken"),
        pytest.param('{"a": 1}', '{"a": 1}', id="other json"),
    ],
)
def test_log_lines_are_made_readable(line, shown):
    assert logfiles.readable(line) == shown


def test_follower_gives_new_whole_lines(tmp_path):
    path = tmp_path / "x.log"
    path.write_text("old\n")
    follower = logfiles.Follower(path)
    with path.open("a") as log:
        log.write("new\nhal")
    assert list(follower.new_lines()) == ["new"]
    with path.open("a") as log:
        log.write("f\n")
    assert list(follower.new_lines()) == ["half"]
    assert logfiles.tail(path, 2) == ["new", "half"]


def test_logs_of_a_stopped_stack(tmp_path):
    assert "no stack has left logs" in str(run("logs", "--home", str(tmp_path)).exception)
    for name in ("p1", "p2"):
        logs = StateFiles(tmp_path).logs(name)
        logs.mkdir(parents=True)
        (logs / "proxy.log").write_text("bye\n")
        assert run("logs", "--name", name, "--home", str(tmp_path)).output.split() == ["proxy", "bye"]
        if name == "p1":
            assert run("logs", "--home", str(tmp_path)).output.split() == ["proxy", "bye"]
    for arguments in ((), ("--name", "p3")):
        refused = run("logs", *arguments, "--home", str(tmp_path)).exception
        assert isinstance(refused, NoSuchStack) and "p1, p2" in str(refused)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        pytest.param(["sql"], "write NAME=FOLDER", id="no folder"),
        pytest.param(["=adapters/sql"], "write NAME=FOLDER", id="no name"),
        pytest.param(["sql=a", "sql=b"], "given twice", id="twice"),
    ],
)
def test_adapters_are_names_and_folders(given, says):
    with pytest.raises(InvalidOptions, match=says):
        adapter_folders(given)


def test_an_adapter_without_its_configuration_is_refused_before_anything_starts(tmp_path):
    result = run("up", "--adapter", f"sql={tmp_path}", "--home", str(tmp_path))
    assert isinstance(result.exception, InvalidOptions)
    assert "--adapter sql" in str(result.exception) and "adapter_config.json" in str(result.exception)
    assert not list(StateFiles(tmp_path).all())
