"""`docker compose up` answers a chat. Builds images: minutes the first time."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from project import Project, docker

pytestmark = [pytest.mark.compose, pytest.mark.timeout(2400)]

SERVICES = ("kvstore", "placement", "prefill", "decode", "proxy")
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": True}


def streamed_chat(project: Project, **body: Any) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed chat completion."""
    model = httpx.get(f"{project.url}/v1/models", timeout=10).json()["data"][0]["id"]
    request = {"model": model, "max_tokens": 24, "temperature": 0, **QUESTION, **body}
    with httpx.stream("POST", f"{project.url}/v1/chat/completions", json=request, timeout=120) as response:
        assert response.status_code == 200, response.read().decode()
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    yield from (json.loads(event) for event in events[:-1])


def text_of(chunks: Iterator[dict[str, Any]]) -> tuple[str, str | None]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, next((c["finish_reason"] for c in choices if c["finish_reason"]), None)


def metric(project: Project, service: str, name: str) -> float:
    """Sum of a metric's samples, read inside the service's container."""
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
    text = docker("exec", project.container(service)["Id"], "python", "-c", code)
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


def test_streamed_chat_through_the_published_port(stack: Project) -> None:
    text, finish = text_of(streamed_chat(stack))
    assert text.strip()
    assert finish in ("stop", "length")


def test_blocks_are_pulled_from_the_prefill_container(stack: Project) -> None:
    """A prompt of several blocks, so that there is something to pull over the containers' network."""
    before = metric(stack, "decode", "omni_worker_pulls_total")
    content = "Tell me about the capital of France. " * 60
    text_of(streamed_chat(stack, messages=[{"role": "user", "content": content}]))
    assert metric(stack, "decode", "omni_worker_pulls_total") > before
    assert metric(stack, "decode", "omni_worker_fallbacks_total") == 0


@pytest.mark.parametrize("service", ("redis", *SERVICES))
def test_container_is_confined(stack: Project, service: str) -> None:
    found = stack.container(service)
    host = found["HostConfig"]
    assert found["Config"]["User"] not in ("", "0", "root")
    assert not host["Privileged"]
    assert host["CapDrop"] == ["ALL"]
    assert host["ReadonlyRootfs"]
    assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
    if service in SERVICES:
        assert docker("exec", found["Id"], "id", "-u").strip() == "10001"


def test_only_the_proxy_is_published(stack: Project) -> None:
    published = {s: stack.container(s)["HostConfig"]["PortBindings"] for s in ("redis", *SERVICES)}
    assert [service for service, bindings in published.items() if bindings] == ["proxy"]


@pytest.mark.parametrize("service", ("proxy", "kvstore", "placement"))
@pytest.mark.parametrize("module", ("torch", "vllm"))
def test_light_images_are_light(stack: Project, service: str, module: str) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is not None)"
    docker("exec", stack.container(service)["Id"], "python", "-c", code)


def test_placement_state_outlives_its_container(stack: Project) -> None:
    path = "/var/lib/omni/written-by-test"
    docker("exec", stack.container("placement")["Id"], "python", "-c", f"open({path!r}, 'w').close()")
    stack.run("up", "-d", "--no-build", "--no-deps", "--force-recreate", "placement")
    docker("exec", stack.container("placement")["Id"], "python", "-c", f"open({path!r}).close()")


def test_simulated_engines_answer(simulated: Project) -> None:
    text, finish = text_of(streamed_chat(simulated, max_tokens=8))
    assert text
    assert finish == "length"
