"""What is run: the proxy or a reference at several counts of streams, and latency at a low load."""

import json
import os
import pstats
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidebyside.ports import free_port
from tokenizers import Tokenizer

from proxyload.caches import line_ns
from proxyload.processes import HOST, Broken, Cores, Marks, Started, converse, started, wait_ready

PROMPT = "Tell me about the weather in the mountains. " * 6
# Never complete, but their first characters come up in the text, so that the matcher has to hold some of it back.
STOPS = ("\n\nUser:", "</answer>")
# Not begun by any character of the text: what is held back would look like a longer gap.
LOW_LOAD_STOPS = ("\N{SNOWMAN}\N{SNOWMAN}",)
LOW_LOAD_STREAMS = 8
LOW_LOAD_STEP_MS = 20.0
LOW_LOAD_TOKENS = 32
# So that requests do not come together, which sequences that end in one frame otherwise cause.
LOW_LOAD_THINK_S = 0.2
GAPS_MS = (1, 3, 10, 30, 100)
"""Means of the time between an answer and the next request."""
LINE_READS = 20
PROFILED_STREAMS = 64
_START_S = 0.003
"""More warming up for each stream: all of them open at once and have to have begun."""
WAYS = {"direct": "worker asked directly", "relay": "through the thinnest relay", "proxy": "through the proxy"}
REFERENCES = {"asgi": "raw ASGI route, same HTTP server", "protocol": "bare asyncio.Protocol"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What to measure, for how long, where."""

    streams: Sequence[int]
    repeats: int
    warm_s: float
    measure_s: float
    max_tokens: int
    short_tokens: int
    model_dir: Path
    cores: Cores
    logs: Path
    log: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Point:
    """One window. CPU in seconds; shares of one core, `foreign` of the whole machine."""

    tokens_per_s: float
    server_us_per_token: float
    tokens_per_event: float
    server_share: float
    worker_share: float
    client_share: float
    foreign_share: float
    answers: int
    wrong_answers: int
    connect_max_ms: float
    ttft_ms: Mapping[str, float]
    itl_ms: Mapping[str, float]


@dataclass(slots=True)
class Results:
    """Windows by row name and streams, by fleet and way, by gap and way; the profile as (function, calls, seconds)."""

    load: dict[tuple[str, int], list[Point]] = field(default_factory=dict)
    short: list[Point] = field(default_factory=list)
    latency: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    gaps: dict[int, dict[str, list[Point]]] = field(default_factory=dict)
    line_ns: dict[int, list[float]] = field(default_factory=dict)
    """Of a cache line that is read again after a gap in ms, on the proxy's core."""
    profile: list[tuple[str, float, float]] = field(default_factory=list)
    profiled_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Text:
    """The tokens every sequence gets, and their text."""

    tokenizer: Tokenizer
    token_ids: Sequence[int]

    @classmethod
    def of(cls, model_dir: Path, size: int) -> "Text":
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        story = Path(__file__).parents[1] / "README.md"
        ids = tokenizer.encode(story.read_text(), add_special_tokens=False).ids
        return cls(tokenizer, [ids[i % len(ids)] for i in range(size)])

    def first(self, count: int) -> str:
        return str(self.tokenizer.decode(list(self.token_ids[:count])))


class Bench:
    """Runs windows and keeps what they showed."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._text = Text.of(wishes.model_dir, wishes.max_tokens)
        self.results = Results()

    def load(self) -> None:
        """Saturation: the worker sends as fast as the proxy acknowledges. References take turns with the proxy."""
        wishes = self._wishes
        with ExitStack() as stack:
            proxy = stack.enter_context(self._proxy({"both": 0.0}))
            references = {name: stack.enter_context(self._reference(name)) for name in REFERENCES}
            for repeat in range(wishes.repeats):
                for count in wishes.streams:
                    point = self._window("proxyload.client", proxy, count, wishes.max_tokens)
                    self.results.load.setdefault(("proxy", count), []).append(point)
                    wishes.log(f"round {repeat + 1}: {count} streams: {point.tokens_per_s:,.0f} tokens/s")
                    if count != PROFILED_STREAMS:
                        continue
                    self.results.short.append(self._window("proxyload.client", proxy, count, wishes.short_tokens))
                    for name, server in references.items():
                        point = self._window("proxyload.client", server, count, wishes.max_tokens)
                        self.results.load.setdefault((name, count), []).append(point)

    def latency(self) -> None:
        """Few streams and a step every 20 ms; the ways take turns."""
        for name, roles in (("one worker", ("both",)), ("prefill apart", ("prefill", "decode"))):
            taken: dict[str, list[Point]] = {way: [] for way in WAYS}
            with self._proxy(dict.fromkeys(roles, LOW_LOAD_STEP_MS)) as proxy, self._relay(proxy) as relay:
                for _ in range(self._wishes.repeats):
                    for way, points in taken.items():
                        served = relay if way == "relay" else proxy
                        points.append(self._answers(way, served, LOW_LOAD_STREAMS, LOW_LOAD_TOKENS, LOW_LOAD_THINK_S))
            self.results.latency[name] = taken

    def gaps(self) -> None:
        """One stream of one-token answers, by the time between two of them: what it takes to come back to."""
        core, lines = self._wishes.cores.server, self.results.line_ns
        with self._proxy({"both": LOW_LOAD_STEP_MS}) as proxy, self._relay(proxy) as relay:
            for _ in range(self._wishes.repeats):
                for gap_ms in (0, *GAPS_MS):
                    lines.setdefault(gap_ms, []).append(line_ns(core, gap_ms, LINE_READS))
                for gap_ms in GAPS_MS:
                    for way in WAYS:
                        point = self._answers(way, relay if way == "relay" else proxy, 1, 1, 2 * gap_ms / 1e3)
                        self.results.gaps.setdefault(gap_ms, {}).setdefault(way, []).append(point)

    def _answers(self, way: str, served: "_Served", streams: int, tokens: int, think_s: float) -> Point:
        module = "proxyload.direct" if way == "direct" else "proxyload.client"
        return self._window(module, served, streams, tokens, think_s)

    def profile(self) -> None:
        """The proxy under cProfile, by functions' own time."""
        path = self._wishes.logs / "proxy.prof"
        with self._proxy({"both": 0.0}, profile=path) as proxy:
            point = self._window("proxyload.client", proxy, PROFILED_STREAMS, self._wishes.max_tokens)
            give_up = time.monotonic() + 10
            while not path.exists():
                if time.monotonic() > give_up:
                    raise Broken("the profile was not written")
                time.sleep(0.05)
        stats: Any = pstats.Stats(str(path))
        rows = [(_where(key), value[1], value[2]) for key, value in stats.stats.items()]
        self.results.profile = sorted(rows, key=lambda row: -row[2])[:20]
        self.results.profiled_tokens = point.tokens_per_s * self._wishes.measure_s

    @contextmanager
    def _proxy(self, workers: Mapping[str, float], profile: Path | None = None) -> "Iterator[_Served]":
        """A proxy and its workers: step times in ms by role."""
        wishes, model = self._wishes, self._wishes.model_dir.name
        with ExitStack() as stack:
            addresses, processes = {}, []
            for role, step_ms in workers.items():
                port = free_port()
                addresses[role] = f"{HOST}:{port}"
                arguments = (role, str(port), model, str(step_ms))
                log = wishes.logs / f"{role}.log"
                worker = started(f"worker {role}", "proxyload.worker", arguments, wishes.cores.worker, log)
                processes.append(stack.enter_context(worker))
                processes[-1].tell(list(self._text.token_ids))
            port = free_port()
            environment = {
                "OMNI_PROXY_MODEL_DIR": str(wishes.model_dir),
                "OMNI_PROXY_WORKERS": json.dumps(list(addresses.values())),
                "OMNI_PROXY_PORT": str(port),
                "OMNI_PROXY_MAX_INFLIGHT": "4096",
            }
            module = "sidebyside.profiled" if profile else "omni_proxy"
            file = ["omni_proxy", str(profile)] if profile else []
            log = wishes.logs / "proxy.log"
            server = stack.enter_context(
                started("proxy", module, file, wishes.cores.server, log, environment=environment)
            )
            wait_ready(port, [server, *processes])
            yield _Served(server, port, processes, addresses, profile is not None)

    @contextmanager
    def _reference(self, kind: str) -> "Iterator[_Served]":
        wishes, port = self._wishes, free_port()
        log = wishes.logs / f"{kind}.log"
        with started("proxy", "proxyload.reference", (kind, str(port)), wishes.cores.server, log) as server:
            texts = [self._text.tokenizer.decode([token_id]) for token_id in self._text.token_ids]
            server.tell({"model": wishes.model_dir.name, "texts": texts})
            wait_ready(port, [server])
            yield _Served(server, port, [], {}, False)

    @contextmanager
    def _relay(self, proxy: "_Served") -> "Iterator[_Served]":
        """The thinnest relay, before the proxy's workers."""
        wishes, port = self._wishes, free_port()
        log = wishes.logs / "relay.log"
        with started("proxy", "proxyload.relay", (str(port),), wishes.cores.server, log) as server:
            server.tell({"model_dir": str(wishes.model_dir), **_legs(proxy.addresses)})
            wait_ready(port, [server])
            yield _Served(server, port, proxy.workers, proxy.addresses, False)

    def _window(self, module: str, served: "_Served", streams: int, max_tokens: int, think_s: float = 0.0) -> Point:
        wishes = self._wishes
        duties = {
            "host": HOST,
            "port": served.port,
            "model": wishes.model_dir.name,
            "prompt": PROMPT,
            "prompt_ids": self._text.tokenizer.encode(PROMPT).ids,
            "stop": LOW_LOAD_STOPS if think_s else STOPS,
            "max_tokens": max_tokens,
            "text": self._text.first(max_tokens),
            "streams": streams,
            "think_s": think_s,
            "desynchronise": served.addresses != {},
            "warm_s": wishes.warm_s + streams * _START_S,
            "measure_s": wishes.measure_s,
            **_legs(served.addresses),
        }
        log = wishes.logs / "client.log"
        with started("client", module, (), wishes.cores.client, log, talks=True) as client:
            begin, end, seen = converse(client, duties, [served.server, *served.workers], served.signal)
        if seen["wrong_answers"]:
            raise Broken(f"{seen['wrong_answers']} of {seen['answers']} answers were not as expected")
        if not seen["tokens"]:
            raise Broken(f"no token arrived at {streams} streams")
        return point_of(begin, end, seen)


@dataclass(frozen=True, slots=True)
class _Served:
    """A running server, and the workers behind it."""

    server: Started
    port: int
    workers: Sequence[Started]
    addresses: Mapping[str, str]
    is_profiled: bool

    def signal(self, mark: str) -> None:
        if self.is_profiled:
            self.server.popen.send_signal(signal.SIGUSR1 if mark == "begin" else signal.SIGUSR2)


def _legs(addresses: Mapping[str, str]) -> dict[str, str | None]:
    """Who decodes and, where that is another worker, who prefills."""
    return {"decode": addresses.get("decode", addresses.get("both")), "prefill": addresses.get("prefill")}


def point_of(begin: Marks, end: Marks, seen: Mapping[str, Any]) -> Point:
    """Figures of one window from its two marks and what the client saw."""
    wall_s = end.at_s - begin.at_s
    used = {name: end.cpu_s[name] - begin.cpu_s[name] for name in end.cpu_s}
    server_s, client_s = used.pop("proxy"), used.pop("client")
    worker_s = sum(used.values())
    own_s = server_s + client_s + worker_s
    return Point(
        tokens_per_s=seen["tokens"] / seen["window_s"],
        server_us_per_token=server_s / seen["tokens"] * 1e6,
        tokens_per_event=seen["tokens_per_event"],
        server_share=server_s / wall_s,
        worker_share=worker_s / wall_s,
        client_share=seen["client_cpu_s"] / seen["window_s"],
        foreign_share=max(0.0, end.machine_s - begin.machine_s - own_s) / wall_s / (os.cpu_count() or 1),
        answers=seen["answers"],
        wrong_answers=seen["wrong_answers"],
        connect_max_ms=seen["connect_ms"]["max"],
        ttft_ms=seen["ttft_ms"],
        itl_ms=seen["itl_ms"],
    )


def _where(key: tuple[str, int, str]) -> str:
    """`package/module.py:function` without the path before it."""
    path, _, function = key
    return function if path == "~" else f"{'/'.join(Path(path).parts[-2:])}:{function}"
