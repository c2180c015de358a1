"""State files, and telling a process from another that got its pid."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from omni_cli.errors import InvalidOptions, NoSuchStack
from omni_cli.processes import own_record, stop
from omni_cli.restarts import RestartPolicy
from omni_cli.state import ProcessRecord, StackState, StateFiles

OWN_ADDRESS = "127.0.0.1:21000"


@pytest.fixture
def files(tmp_path):
    return StateFiles(tmp_path)


def state_of(*records: ProcessRecord) -> StackState:
    return StackState("p8000", "http://127.0.0.1:8000", 2, records)


def test_round_trip(files):
    record = replace(own_record(), service="proxy", address=OWN_ADDRESS, probe="http", metrics_port=21001, cores="0-1")
    state = replace(state_of(record), supervisor=own_record())
    files.save(state)
    assert files.load("p8000") == state
    assert list(files.all()) == [state]
    assert files.reserved_ports() == {21000, 21001}


def test_ports_of_dead_processes_are_not_reserved(files):
    files.save(state_of(replace(own_record(), started_at=1.0, address=OWN_ADDRESS)))
    assert files.reserved_ports() == set()


def test_removed_state_keeps_logs(files):
    files.save(state_of())
    files.logs("p8000").mkdir()
    files.remove("p8000")
    assert files.logs("p8000").is_dir()
    with pytest.raises(NoSuchStack, match="no stack named 'p8000'"):
        files.load("p8000")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"name": "p8000"}', '{"processes": [{"pid": 1}], "supervisor": null}']
)
def test_damaged_state_is_named_and_skipped(files, content):
    files.directory("p8000").mkdir()
    (files.directory("p8000") / "state.json").write_text(content)
    assert list(files.all()) == []
    with pytest.raises(NoSuchStack, match="cannot be read"):
        files.load("p8000")


@pytest.mark.parametrize("name", ["", "../x", "A", "-x", "a" * 41, "a/b"])
def test_names_that_are_no_folder_names_are_refused(files, name):
    with pytest.raises(InvalidOptions):
        files.directory(name)


def test_record_means_the_process_that_was_started():
    record = own_record()
    assert record.process() is not None
    assert replace(record, started_at=record.started_at - 3600).process() is None


PAUSE = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
PARENT = f"""
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {PAUSE!r}], start_new_session=True, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
signal.pause()
"""


@contextmanager
def started(code: str) -> Iterator[tuple[ProcessRecord, str]]:
    """A process as a recorded decode service, and the first line it printed."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        line = popen.stdout.readline().strip()
        try:
            yield recorded(popen.pid), line
        finally:
            popen.kill()


def recorded(pid: int) -> ProcessRecord:
    return ProcessRecord("decode-0", pid, float(psutil.Process(pid).create_time()), service="decode")


async def test_recycled_pid_is_never_signalled():
    with started(PAUSE) as (bystander, _):
        recycled = replace(bystander, started_at=bystander.started_at - 3600)
        assert await stop([recycled], timeout_s=0) == []
        assert bystander.process() is not None


async def test_process_that_ignores_sigterm_is_killed():
    with started(STUBBORN) as (record, _):
        assert await stop([record], timeout_s=0.2) == ["decode-0"]
        assert record.process() is None


async def test_children_do_not_outlive_their_service():
    with started(PARENT) as (record, line):
        child = recorded(int(line))
        assert await stop([record], timeout_s=5) == []
        assert child.process() is None


@pytest.mark.parametrize(
    ("deaths", "now", "delay"),
    [
        pytest.param([100.0], 100.0, 1.0, id="first"),
        pytest.param([90.0, 100.0], 100.0, 2.0, id="second"),
        pytest.param([70.0, 80.0, 90.0, 95.0, 100.0], 100.0, 16.0, id="fifth"),
        pytest.param([60.0, 70.0, 80.0, 90.0, 95.0, 100.0], 100.0, None, id="too often"),
        pytest.param([0.0, 1.0, 2.0, 3.0, 4.0, 700.0], 700.0, 1.0, id="old deaths are forgotten"),
    ],
)
def test_restart_delays(deaths, now, delay):
    assert RestartPolicy().delay_s(deaths, now) == delay
