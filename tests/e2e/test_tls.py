"""Mutual TLS between all services and HTTPS in front of them; who may not come in, and what is said to whom.

Engines are simulated; processes, sockets and certificates are real.
"""

import contextlib
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority, environment
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live import MODEL_DIR, ROOT, LiveStack, eventually, live_stack

from omni_common.rpc import Server, channel
from omni_common.rpc_errors import why
from omni_common.settings import TlsSettings

pytestmark = [pytest.mark.stack, pytest.mark.timeout(120)]

HOSTS = ("127.0.0.1", "localhost")
SERVICES = ("kvstore", "placement", "prefill-0", "decode-0")
PROMPT = "The lighthouse keeper counted the ships again, wrote their names down, and lit the lamp. " * 4
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Secured:
    """A stack, what its services are set to, and an authority that they do not know."""

    stack: LiveStack
    tls: TlsSettings
    strangers: Authority
    authority: Authority

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.stack.port}"

    def client(self) -> httpx.Client:
        trusted = ssl.create_default_context(cafile=str(self.authority.path))
        return httpx.Client(base_url=self.url, verify=trusted, timeout=DEADLINE_S)

    def address(self, name: str) -> str:
        return str(self.stack.processes()[name]["address"])


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority, strangers = Authority(folder, "authority"), Authority(folder, "strangers")
    tls = authority.issue("service", HOSTS)
    environ = environment(tls) | {"OMNI_PROXY_POLICY": "least_uncached_tokens"}
    with live_stack(folder, "--engine", "sim", "--expert-ranks", "2", environ=environ) as stack:
        yield Secured(stack, tls, strangers, authority)


def test_an_answer_goes_through_tls_everywhere(secured: Secured) -> None:
    body = {"model": secured.stack.model, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
    with secured.client() as http:
        assert http.get("/ready").json()["parts"]["kvstore"]["state"] == "ok"
        whole = http.post("/v1/completions", json=body).raise_for_status().json()
        assert whole["usage"]["completion_tokens"] == 8
        streamed = http.post("/v1/completions", json=body | {"stream": True}).raise_for_status().text.split("\n\n")
        assert streamed[-2] == "data: [DONE]" and '"text"' in streamed[0]
        workers = http.get("/workers").json()["workers"]
        assert {worker["role"] for worker in workers if worker["in_flight"]["dispatched"]} == {"prefill", "decode"}

        def held() -> bool:
            page = http.post("/kv/prefix", json={"prompt": PROMPT}).raise_for_status().json()
            hbm = page["tiers"].index("hbm")
            return len(page["members"]) == 2 and all(
                depths[hbm] == page["blocks"] > 0 for depths in page["members"].values()
            )

        eventually("both workers told the proxy of the prompt's blocks, by way of the kvstore", held, DEADLINE_S)
    chat = ["chat", PROMPT, "--max-tokens", "4"]
    for command in (chat, ["kv", "verify"], ["kv", "prefix", PROMPT], ["workers"], ["explain"], ["placement", "show"]):
        secured.stack.omni(*command)


def test_health_checks_of_containers(secured: Secured) -> None:
    """As a service's own container runs them, at `localhost`."""
    proxy = {"OMNI_PROXY_PORT": str(secured.stack.port), "OMNI_PROXY_KVSTORE": secured.address("kvstore")}
    port = secured.address("kvstore").rpartition(":")[2]
    for environ, arguments in (
        ({"OMNI_KVSTORE_PORT": port}, ["kvstore"]),
        (proxy | {"OMNI_PROXY_MODEL_DIR": str(MODEL_DIR)}, ["proxy", "/ready"]),
    ):
        command = [sys.executable, str(ROOT / "deploy" / "health.py"), *arguments]
        checked = subprocess.run(
            command, env=os.environ | environment(secured.tls) | environ, capture_output=True, text=True, timeout=30
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


async def refusal(address: str, tls: TlsSettings) -> str:
    """Why a call is not answered."""
    async with channel(address, tls=tls) as connected:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(connected).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    return why(refused.value)


@pytest.mark.parametrize("shown", ["nothing", "no certificate", "a stranger's certificate"])
async def test_who_has_no_certificate_of_the_authority_is_refused(secured: Secured, shown: str) -> None:
    intruder = {
        "nothing": TlsSettings(),
        "no certificate": TlsSettings(ca_file=secured.authority.path),
        "a stranger's certificate": secured.strangers.issue("intruder", HOSTS, trusted=secured.authority),
    }[shown]
    for name in SERVICES:
        said = await refusal(secured.address(name), intruder)
        assert "OMNI_TLS__CA_FILE" in said and "client certificate" in said, name


@pytest.mark.parametrize(
    ("server", "said"),
    [
        pytest.param("without TLS", "it answers without TLS", id="without TLS"),
        pytest.param("a stranger", "not valid for the authority in OMNI_TLS__CA_FILE", id="of another authority"),
        pytest.param("elsewhere", "does not name the host", id="named otherwise"),
    ],
)
async def test_a_client_trusts_no_other_server(secured: Secured, server: str, said: str) -> None:
    tls = {
        "without TLS": TlsSettings(),
        "a stranger": secured.strangers.issue("stranger", HOSTS, trusted=secured.authority),
        "elsewhere": secured.authority.issue("elsewhere", ["elsewhere"]),
    }[server]
    other = Server([], tls)
    port = await other.start("127.0.0.1:0")
    assert said in await refusal(f"127.0.0.1:{port}", secured.tls)
    await other.stop(0)


def test_plain_http_is_not_answered_and_logged(secured: Secured) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{secured.stack.port}/ready", timeout=DEADLINE_S)
    log = eventually("the log tells", lambda: lines_of(secured, "TLS handshake failed"), DEADLINE_S)
    assert log[-1]["reason"] == "HTTP_REQUEST"


def lines_of(secured: Secured, message: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in secured.stack.log("proxy").splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == message]


def test_commands_without_the_variables_name_them(secured: Secured) -> None:
    url, kvstore = secured.url, secured.address("kvstore")
    for arguments in (["workers", "--url", url], ["kv", "workers", "--kvstore", kvstore]):
        command = [str(Path(sys.executable).parent / "omni"), *arguments]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
        assert refused.returncode == 1 and "OMNI_TLS__CA_FILE" in refused.stderr


@contextlib.contextmanager
def service(name: str, environ: dict[str, str]) -> Iterator[Iterator[dict[str, Any]]]:
    """A process of its own; yields the lines of its log."""
    values = {f"OMNI_{name.upper()}_{key}": value for key, value in environ.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", f"omni_{name}"], env=os.environ | values, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        yield (json.loads(line) for line in process.stderr if line.startswith("{"))
    finally:
        process.kill()
        process.communicate()


def test_a_proxy_with_the_wrong_authority_says_so(secured: Secured) -> None:
    """In its log and on its pages; it goes on answering over HTTPS."""
    decode = secured.address("decode-0")
    tls = secured.tls.model_copy(update={"ca_file": secured.strangers.path})
    environ = {name.removeprefix("OMNI_"): value for name, value in environment(tls).items()}
    environ |= {"PORT": "0", "MODEL_DIR": str(MODEL_DIR), "KVSTORE": secured.address("kvstore"), "WORKERS": decode}
    with service("proxy", environ) as log:
        lines = dict[str, dict[str, Any]]()
        while "serving" not in lines or "kvstore unreachable; what it told last stays" not in lines:
            line = next(log)
            lines[line["message"]] = line
        warned = lines["kvstore unreachable; what it told last stays"]
        assert "not valid for the authority in OMNI_TLS__CA_FILE" in warned["detail"]
        with secured.client() as http:

            def said() -> bool:
                page = http.get(f"https://127.0.0.1:{lines['serving']['port']}/ready")
                assert page.status_code == 503
                return "OMNI_TLS__CA_FILE" in page.json()["parts"]["workers"][decode]

            eventually("the page says why", said, DEADLINE_S)


def test_a_worker_with_the_wrong_authority_says_so(secured: Secured) -> None:
    tls = secured.tls.model_copy(update={"ca_file": secured.strangers.path})
    environ = {name.removeprefix("OMNI_"): value for name, value in environment(tls).items()}
    environ |= {"PORT": "0", "MODEL_DIR": str(MODEL_DIR), "ENGINE": "sim", "KVSTORE": secured.address("kvstore")}
    with service("decode", environ) as log:
        warned = next(line for line in log if line["message"] == "kvstore not reached; serving goes on")
    assert "not valid for the authority in OMNI_TLS__CA_FILE" in warned["detail"]
