"""One kvstore process over Redis: block events in through gRPC, out through watches, and what that costs.

Publishers, watchers, kvstore and Redis are processes of their own. The clock runs from the first batch sent until every
watch has seen the last batch of every worker.
"""

import os
import pstats
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from sidebyside.child import BENCH, Broken, Child, terminate
from sidebyside.ports import free_port

from prefixindex.publisher import PublisherDuties
from prefixindex.redisserver import RedisServer, redis_server
from prefixindex.timing import latency_of

_START_S, _STOP_S = 60.0, 20.0
_PROFILED_FUNCTIONS = 12


@dataclass(frozen=True, slots=True)
class Load:
    """`interval_s` 0 sends as fast as kvstore takes them."""

    name: str
    shape: str
    workers: int
    batches: int
    watches: int
    interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """Share of kvstore's own time by module, its costliest functions, and Redis's microseconds per command name."""

    modules: Mapping[str, float]
    functions: Mapping[str, float]


@contextmanager
def child(module: str, first_line: Mapping[str, Any]) -> Iterator[Child]:
    started = Child(module, is_heard=True)
    try:
        started.tell(first_line)
        yield started
    finally:
        started.end()


@dataclass(frozen=True, slots=True)
class KvStore:
    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def kvstore(redis_url: str, profile: Path | None = None) -> Iterator[KvStore]:
    """`python -m omni_kvstore`, or with `profile` under a profiler that `recording` switches on."""
    with TemporaryDirectory(prefix="omni-bench-kvstore-") as folder:
        log_path, port = Path(folder) / "log", free_port()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OMNI_")}
        environment = clean | {
            "OMNI_KVSTORE_REDIS_URL": redis_url,
            "OMNI_KVSTORE_PORT": str(port),
            "OMNI_KVSTORE_LEASE_S": "600",
        }
        how = ["-m", "sidebyside.profiled", "omni_kvstore", str(profile)] if profile else ["-m", "omni_kvstore"]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *how],
                cwd=BENCH,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _await_serving(process, log_path)
            yield KvStore(port, psutil.Process(process.pid))
        finally:
            terminate(process, _STOP_S)


def _await_serving(process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    end_s = time.monotonic() + _START_S
    while '"serving"' not in (log := log_path.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > end_s:
            raise Broken("kvstore did not serve\n" + "\n".join(log.splitlines()[-15:]))
        time.sleep(0.05)


def measure_process(load: Load, seed: int, profile: bool = False) -> dict[str, Any]:
    """One load on a fresh kvstore and a fresh Redis.

    Raises:
        Broken: a process ended early, or kvstore lost a batch.
    """
    with TemporaryDirectory(prefix="omni-bench-profile-") as folder, redis_server() as redis:
        profile_file = Path(folder) / "profile" if profile else None
        with kvstore(redis.url, profile_file) as service:
            figures = _run(load, seed, redis, service, profile_file)
        if profile_file:
            figures["profile"] = asdict(read_profile(profile_file))
    return figures


@contextmanager
def recording(service: KvStore, profile: Path | None) -> Iterator[None]:
    """The profiler runs within the block, and the file is there after it."""
    if profile is None:
        yield
        return
    service.process.send_signal(signal.SIGUSR1)
    yield
    service.process.send_signal(signal.SIGUSR2)
    end_s = time.monotonic() + _STOP_S
    while not profile.exists():
        if time.monotonic() > end_s:
            raise Broken("kvstore wrote no profile")
        time.sleep(0.05)


def _run(load: Load, seed: int, redis: RedisServer, service: KvStore, profile: Path | None) -> dict[str, Any]:
    duties = PublisherDuties(service.port, load.shape, load.workers, load.batches, seed, load.interval_s)
    with ExitStack() as stack:
        publisher = stack.enter_context(child("prefixindex.publisher", asdict(duties)))
        made = publisher.hear()
        watcher = stack.enter_context(child("prefixindex.watcher", {"port": service.port, "watches": load.watches}))
        watcher.hear()
        watcher.tell(made["marks"])
        with recording(service, profile):
            redis_before, cpu_before = redis.read(), service.cpu_s()
            publisher.tell("go")
            published, watched = publisher.hear(), watcher.hear()
            redis_spent, cpu_s = redis.read().since(redis_before), service.cpu_s() - cpu_before
    return _figures(load, made["blocks"], published, watched, redis_spent, cpu_s)


def _figures(
    load: Load, blocks: int, published: dict[str, Any], watched: dict[str, Any], redis: Any, kvstore_cpu_s: float
) -> dict[str, Any]:
    """Rates in block events; CPU in microseconds per block event; shares of one core."""
    start_s = published["start_s"]
    window_s = max(watch["end_s"] for watch in watched["watches"]) - start_s
    cpu_s = {
        "kvstore": kvstore_cpu_s,
        "redis": redis.cpu_s,
        "publishers": published["cpu_s"],
        "watchers": watched["cpu_s"],
    }
    delays = (
        [at - published["sent"][mark] for watch in watched["watches"] for mark, at in watch["marks"].items()]
        if published["sent"]
        else []
    )
    return asdict(load) | {
        "blocks": blocks,
        "window_s": window_s,
        "events_per_s": blocks / window_s,
        "accepted_per_s": blocks / (published["end_s"] - start_s),
        "cpu_us": {name: seconds / blocks * 1e6 for name, seconds in cpu_s.items()},
        "core_share": {name: seconds / window_s for name, seconds in cpu_s.items()},
        "redis_us_by_command": {name: us / blocks for name, us in redis.micros.items()},
        "redis_calls_by_command": {name: calls / blocks for name, calls in redis.calls.items()},
        "resyncs": sum(watch["snapshots"] for watch in watched["watches"]),
        "told_share": sum(watch["blocks"] for watch in watched["watches"]) / blocks / load.watches,
        "delay": asdict(latency_of(delays)) if delays else None,
    }


def read_profile(path: Path) -> Profile:
    """Own time by module and by function, as shares of all time but waiting."""
    stats: Any = pstats.Stats(str(path))
    own: dict[str, float] = {}
    functions: dict[str, float] = {}
    for (file, _, name), (_, _, seconds, _, _) in stats.stats.items():
        if _is_waiting(file, name):
            continue
        module = _module(file, name)
        own[module] = own.get(module, 0.0) + seconds
        functions[f"{module}:{name}"] = functions.get(f"{module}:{name}", 0.0) + seconds
    total = sum(own.values()) or 1.0
    return Profile(_largest(own, total), _largest(functions, total))


def _largest(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:_PROFILED_FUNCTIONS]
    return {name: share / total for name, share in ranked}


def _is_waiting(file: str, name: str) -> bool:
    """The event loop's own frame holds the time spent asleep, and what runs below Python."""
    return "run_until_complete" in name or name in ("exec", "<module>") or ("lock" in name and "acquire" in name)


def _module(file: str, name: str) -> str:
    """`site-packages/redis/asyncio/client.py` is redis; code without a file goes by its object."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if "src" in parts:
        return ".".join(parts[parts.index("src") + 1 :]).removesuffix(".py")
    if file == "~":
        return name.strip("<>").split(" of ")[-1].removeprefix("'").split("'")[0].split(".")[0].split(" ")[-1]
    return Path(file).parent.name + "." + Path(file).stem
