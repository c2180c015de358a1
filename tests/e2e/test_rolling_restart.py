"""Services restart in turn and workers change their role while clients stream: not one answer fails or is cut off."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from live import MODEL_DIR, LiveStack, eventually, free_port, live_stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

CLIENTS = 8
PROMPTS = 16
TOKENS = 60
WORKERS = 4
RETURN_TIMEOUT_S = 60.0
# Answers of half a second or more.
SLOW = {f"OMNI_{role}_SIM__TIMING__STEP_BASE_MS": "8" for role in ("PREFILL", "DECODE")}


def body(model: str, number: int) -> dict[str, object]:
    return {
        "model": model, "prompt": f"Once upon a time number {number} " * 30, "max_tokens": TOKENS,
        "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip


class Refused(Exception):
    """The proxy took nothing of the request: no connection, or an answer that it is draining."""


def ask(url: str, model: str, number: int) -> str:
    """The text of a whole answer, or what is wrong with it in angle brackets. Raises Refused."""
    text, finish, is_done = "", None, False
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body(model, number), timeout=60) as answer:
            if answer.status_code != 200:
                error = json.loads(answer.read())["error"]
                if error.get("code") == "draining":
                    raise Refused
                return f"<{answer.status_code} {error['message']}>"
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"<error after {len(text)} characters: {event['error']['message']}>"
                    for choice in event["choices"]:
                        text += choice["text"]
                        finish = choice["finish_reason"] or finish
    except httpx.ConnectError:
        raise Refused from None
    except httpx.TransportError as error:
        return f"<{type(error).__name__} after {len(text)} characters>"
    return text if is_done and finish == "length" else f"<cut off after {len(text)} characters>"


class Clients:
    """Streams that start again as they end, over the proxies that take requests, compared with `expected`."""

    def __init__(self, urls: Sequence[str], model: str, expected: Sequence[str]) -> None:
        self._urls = urls
        self._model = model
        self._expected = expected
        self._resting: set[str] = set()
        self.wrong: list[str] = []
        self.complete: Counter[str] = Counter()
        self.stop = threading.Event()

    def run(self, index: int) -> None:
        number = index
        while not self.stop.is_set():
            number += 1
            url, answer = self._ask(number)
            if answer == self._expected[number % PROMPTS]:
                self.complete[url] += 1
            else:
                self.wrong.append(answer)

    def _ask(self, number: int) -> tuple[str, str]:
        """Another proxy is tried after a refusal, and never after a broken answer."""
        for turn in range(len(self._urls)):
            url = self._urls[(number + turn) % len(self._urls)]
            if url in self._resting and not _is_ready(url):
                continue
            self._resting.discard(url)
            with contextlib.suppress(Refused):
                return url, ask(url, self._model, number % PROMPTS)
            self._resting.add(url)
        return "", "<no proxy took the request>"


@contextlib.contextmanager
def streaming(urls: Sequence[str], model: str, expected: Sequence[str]) -> Iterator[Clients]:
    """Clients that run while the block does. Afterwards none of their answers may have been wrong."""
    clients = Clients(urls, model, expected)
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(clients.run, index) for index in range(CLIENTS)]
        try:
            yield clients
        finally:
            clients.stop.set()
    for client in running:
        client.result()
    print(f"\n{clients.complete.total()} answers, {len(clients.wrong)} wrong")
    assert clients.wrong == []


def more(clients: Clients, answers: int = 2 * CLIENTS) -> None:
    """Until so many further answers have come."""
    before = clients.complete.total()
    eventually("answers come", lambda: clients.wrong or clients.complete.total() >= before + answers, RETURN_TIMEOUT_S)


@pytest.fixture(scope="module")
def sim_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    home = tmp_path_factory.mktemp("rolling")
    fleet = ("--engine", "sim", "--prefill", "2", "--decode", "2")
    with live_stack(home, *fleet, environ=SLOW) as running:
        yield running


@pytest.fixture(scope="module")
def expected(sim_stack: LiveStack) -> list[str]:
    """What each prompt is answered while nothing happens."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda number: ask(sim_stack.url, sim_stack.model, number), range(PROMPTS)))
    assert len(set(answers)) == PROMPTS
    assert not any(answer.startswith("<") for answer in answers)
    return answers


def stop_gently(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def is_back(stack: LiveStack, part: str, victim: int, urls: Sequence[str]) -> bool:
    """Started again, and every proxy has all workers."""
    if stack.pid(part) == victim or (part != "proxy" and not stack.is_serving(part)):
        return False
    return all(_is_ready(url) and _all_take_work(url) for url in urls)


def test_workers_and_stores_restart_one_after_the_other(sim_stack: LiveStack, expected: list[str]) -> None:
    with streaming([sim_stack.url], sim_stack.model, expected) as clients:
        more(clients)
        for part in ("decode-0", "prefill-0", "kvstore", "decode-1", "placement", "prefill-1"):
            victim = sim_stack.pid(part)
            stop_gently(victim)
            eventually(
                f"{part} is back",
                lambda part=part, victim=victim: is_back(sim_stack, part, victim, [sim_stack.url]),
                RETURN_TIMEOUT_S,
            )
            more(clients)


def test_proxies_restart_one_after_the_other(sim_stack: LiveStack, expected: list[str], tmp_path: Path) -> None:
    with second_proxy(sim_stack, tmp_path) as second:
        urls = [sim_stack.url, second.url]
        with streaming(urls, sim_stack.model, expected) as clients:
            more(clients)
            victim = sim_stack.pid("proxy")
            stop_gently(victim)
            eventually("the first proxy is back", lambda: is_back(sim_stack, "proxy", victim, urls), RETURN_TIMEOUT_S)
            more(clients)
            second.restart()
            eventually("the second proxy is back", lambda: _all_take_work(second.url), RETURN_TIMEOUT_S)
            more(clients)
        assert all(clients.complete[url] for url in urls)


def test_workers_change_their_role(sim_stack: LiveStack, expected: list[str]) -> None:
    """From 2 + 2 to 3 prefill and 1 decode, to 1 and 3, and back."""
    with streaming([sim_stack.url], sim_stack.model, expected) as clients:
        for part, role, before in (
            ("decode-1", "prefill", "decode"),
            ("decode-1", "decode", "prefill"),
            ("prefill-0", "both", "prefill"),
            ("prefill-0", "decode", "both"),
            ("prefill-0", "prefill", "decode"),
        ):
            worker = f"{sim_stack.name}-{part}"
            said = sim_stack.omni("workers", "role", worker, role).stdout
            assert said.strip() == f"{worker}: {before} -> {role}"
            eventually(
                f"the proxy knows {part} as {role}",
                lambda worker=worker, role=role: _role(sim_stack.url, worker) == role,
                RETURN_TIMEOUT_S,
            )
            more(clients)
        drained = sim_stack.omni("workers", "drain", f"{sim_stack.name}-decode-0")
        assert "is empty" in drained.stdout
        more(clients)
        sim_stack.omni("workers", "drain", f"{sim_stack.name}-decode-0", "--resume")
        eventually("all take work", lambda: _all_take_work(sim_stack.url), RETURN_TIMEOUT_S)
        more(clients)
    listed = sim_stack.omni("workers").stdout
    assert all(f"{sim_stack.name}-{part}" in listed for part in ("prefill-0", "prefill-1", "decode-0", "decode-1"))


class SecondProxy:
    """One more proxy over the stack's kvstore, as its operator would run it."""

    def __init__(self, stack: LiveStack, folder: Path) -> None:
        self._log = folder / "proxy.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        own = {
            "OMNI_PROXY_PORT": str(port),
            "OMNI_PROXY_KVSTORE": stack.processes()["kvstore"]["address"],
            "OMNI_PROXY_MODEL_DIR": str(MODEL_DIR),
        }
        self._environ = os.environ | own
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "omni_proxy"], env=self._environ, stdout=log, stderr=subprocess.STDOUT
            )

    def restart(self) -> None:
        self._process.terminate()
        assert self._process.wait(RETURN_TIMEOUT_S) == 0, self._log.read_text()[-3000:]
        self._process = self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def second_proxy(stack: LiveStack, folder: Path) -> Iterator[SecondProxy]:
    proxy = SecondProxy(stack, folder)
    try:
        eventually("the second proxy sees the fleet", lambda: _all_take_work(proxy.url), RETURN_TIMEOUT_S)
        yield proxy
    finally:
        proxy.close()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _role(url: str, worker_id: str) -> str:
    workers = httpx.get(f"{url}/workers", timeout=5).json()["workers"]
    role: str = next(worker["role"] for worker in workers if worker["id"] == worker_id)
    return role


def _all_take_work(url: str) -> bool:
    workers = httpx.get(f"{url}/workers", timeout=5).json()["workers"]
    return len(workers) == WORKERS and all(worker["takes_work"] for worker in workers)
