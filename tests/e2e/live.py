"""A whole stack for tests, run as a user runs it: `omni up` in the foreground, supervised, torn down at the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp_wire
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_stubs

from omni_cli.machine import free_ports

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "models" / "tiny-moe"
OMNI = Path(sys.executable).parent / "omni"
START_TIMEOUT_S = 300.0
# Engines load in half the time without torch.compile, and these tests load many.
EAGER = {f"OMNI_{role}_VLLM__ENFORCE_EAGER": "true" for role in ("PREFILL", "DECODE")}
POLL_S = 0.1


def free_port() -> int:
    """One that no outgoing connection takes before it is bound, which may be half a minute later."""
    return next(free_ports())


def eventually(what: str, check: Callable[[], Any], timeout_s: float) -> Any:
    """The first true answer of `check`; fails with the last false one after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if answer := check():
                return answer
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(POLL_S)


class OtlpReceiver(otlp_stubs.TraceServiceServicer):
    """A real OTLP trace receiver; `spans` holds what arrived as (service name, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        otlp_stubs.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]
        return otlp_wire.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(0).wait(5)


class LiveStack:
    """`omni up` and what it started."""

    def __init__(
        self, home: Path, *arguments: str, model: Path = MODEL_DIR, environ: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.name = f"test-{self.port}"
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = model.name
        self._home = home
        self._environ = os.environ | EAGER | (environ or {})
        self._log = (home / "up.log").open("wb")
        command = [str(OMNI), "up", "--name", self.name, "--port", str(self.port), "--home", str(home), "--no-ask"]
        self._up = subprocess.Popen(
            [*command, "--model", str(model), *arguments],
            cwd=ROOT,
            env=self._environ,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until `omni up` says so, which from then on restarts what dies, and `omni status` finds nothing wrong."""

        def healthy() -> bool:
            told = (self._home / "up.log").read_text()
            assert self._up.poll() is None, f"omni up ended: {told[-3000:]}"
            return f"{self.name} is healthy" in told and self.omni("status", "--json", check=False).returncode == 0

        eventually("the stack is healthy", healthy, timeout_s)

    def omni(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(OMNI), *arguments, "--name", self.name, "--home", str(self._home)]
        return subprocess.run(
            command, cwd=ROOT, env=self._environ, capture_output=True, text=True, timeout=60, check=check
        )

    def processes(self) -> dict[str, dict[str, Any]]:
        """Name -> record of state.json: pid, address."""
        state = json.loads((self._home / self.name / "state.json").read_text())
        return {record["name"]: record for record in state["processes"]}

    def is_serving(self, name: str) -> bool:
        """The health service's word for one process."""
        with grpc.insecure_channel(self.processes()[name]["address"]) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def pid(self, name: str) -> int:
        pid: int = self.processes()[name]["pid"]
        return pid

    def kill(self, name: str) -> int:
        """SIGKILL, as a crash; the supervisor starts it again. Returns the pid that died."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    @contextlib.contextmanager
    def stopped(self, *names: str) -> Iterator[None]:
        """Services that stand still, so that what they are asked for is not over before it can be looked at."""
        pids = [self.pid(name) for name in names]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s)

    def log(self, name: str) -> str:
        return (self._home / self.name / "logs" / f"{name}.log").read_text()

    def last_words(self) -> str:
        """The ends of all logs, for a test that fails; the proxy's first."""
        logs = sorted((self._home / self.name / "logs").glob("*.log"), key=lambda log: log.name != "proxy.log")
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1000:]}" for log in [self._home / "up.log", *logs])

    def close(self) -> None:
        """At once: engines take seconds to take leave, and nothing here waits for what they would still say."""
        self._up.kill()
        self._up.wait()
        self.omni("down", "--timeout-s", "0", check=False)
        self._log.close()


@contextlib.contextmanager
def live_stack(home: Path, *arguments: str, **options: Any) -> Iterator[LiveStack]:
    stack = LiveStack(home, *arguments, **options)
    try:
        stack.wait_healthy()
        yield stack
    except BaseException:
        print(stack.last_words())
        raise
    finally:
        stack.close()
