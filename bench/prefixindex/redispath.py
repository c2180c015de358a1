"""Lookups through Redis: kvstore's own store, and one command per block beside it, on one real server."""

import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from omni_common.blocks import KEY_BYTES
from omni_kvstore.blocks import Action, Batch, BlockEvent, pack_positions
from omni_kvstore.client import RedisClient, connect
from omni_kvstore.membership import Worker
from omni_kvstore.metrics import Metrics
from omni_kvstore.store import Limits, RedisStore
from prefixindex.baselines import PerBlock, fill_per_block
from prefixindex.population import BLOCK_TOKENS, HBM, MODEL, Population, Prompt, Run, populate
from prefixindex.redisserver import Reading, RedisServer, redis_server
from prefixindex.timing import latency_of

CLUSTER = "bench"
_EPOCH = 1
_BASELINE_SHARE = 5
_CHECKED = 50
_TIMEOUT_S = 60.0
_MILLION = 1_000_000
# The stream of events is bounded on its own; kept this short it does not count as memory of entries.
_LIMITS = Limits(
    lease_ms=3_600_000,
    block_ttl_ms=86_400_000,
    max_events=1,
    max_blocks_per_worker=100 * _MILLION,
    max_entries=1000 * _MILLION,
)
AskRedis = Callable[[bytes], Awaitable[dict[str, int]]]


class Wrong(Exception):
    """Redis gave another answer than the population's."""


@dataclass(frozen=True, slots=True)
class RedisDuties:
    """`spread` has the workers that hold each of the widely held prompts."""

    blocks: int
    workers: int
    seed: int
    prompt_blocks: int
    spread: Sequence[int]
    lengths: Sequence[int]
    samples: int
    budget_s: float


class Counting:
    """A Redis client that counts what it sends: every call awaits its answer, so it is one round trip."""

    def __init__(self, inner: RedisClient) -> None:
        self._inner = inner
        self.round_trips = 0

    async def evalsha(self, sha: str, key: str, *arguments: Any) -> Any:
        self.round_trips += 1
        return await self._inner.evalsha(sha, key, *arguments)

    async def eval(self, text: str, key: str, *arguments: Any) -> Any:
        self.round_trips += 1
        return await self._inner.eval(text, key, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def measure_redis(duties: RedisDuties) -> dict[str, Any]:
    """Figures of one index size."""
    spread = list(duties.spread)
    population = populate(duties.blocks, duties.workers, duties.seed, spread=spread, prompt_blocks=duties.prompt_blocks)
    with redis_server() as server:
        client = Counting(connect(server.url, is_cluster=False, timeout_s=_TIMEOUT_S, connections=4))
        store = RedisStore(client, CLUSTER, _LIMITS, Metrics(CollectorRegistry()))
        plain = Redis(port=server.port, protocol=2, socket_timeout=_TIMEOUT_S)
        baseline = PerBlock(plain)
        try:
            filled = await _fill(server, store, population)
            lookups = await _lookups(duties, server, client, store, baseline, population)
        finally:
            await store.close()
            await plain.aclose()
    return {
        "redis_version": server.version,
        "blocks": population.num_blocks,
        "entries": population.num_entries,
        **filled,
        "lookups": lookups,
    }


async def _fill(server: RedisServer, store: RedisStore, population: Population) -> dict[str, dict[str, float]]:
    """Memory is read while only the prompts with two holders are in: many holders make an entry look small."""
    own = replace(population, spread=())
    for name in population.workers:
        await store.register(Worker(name, _EPOCH, MODEL, BLOCK_TOKENS, name.encode()))
    sequences = dict.fromkeys(population.workers, 0)
    before, start_s = server.read(), time.perf_counter()
    await publish_all(store, own, sequences)
    seconds, ours = time.perf_counter() - start_s, server.read().since(before)
    between = server.read()
    await fill_per_block(server.port, own.prompts)
    theirs = server.read().since(between)
    await publish_all(store, replace(population, own=()), sequences)
    await fill_per_block(server.port, population.spread)
    entries, blocks = own.num_entries, own.num_blocks
    return {
        "ours": {
            "bytes_per_entry": ours.used_bytes / entries,
            "bytes_per_block": ours.used_bytes / blocks,
            "fill_per_s": entries / seconds,
            "fill_redis_us": ours.cpu_s / entries * 1e6,
        },
        "per block": {
            "bytes_per_entry": theirs.used_bytes / entries,
            "bytes_per_block": theirs.used_bytes / blocks,
        },
    }


async def publish_all(store: RedisStore, population: Population, sequences: dict[str, int]) -> None:
    """What every worker holds, in batches of one span's part; `sequences` are the last ones used."""
    for run in population.runs():
        sequences[run.worker] += 1
        published = await store.publish(_batch(run, sequences[run.worker]))
        if published.gap:
            raise Wrong(f"the store sees a gap in batch {sequences[run.worker]} of {run.worker}")


def _batch(run: Run, sequence: int) -> Batch:
    event = BlockEvent(Action.STORED, HBM, run.keys, run.span, pack_positions([run.first]))
    return Batch(run.worker, _EPOCH, sequence, False, (event,))


async def _lookups(
    duties: RedisDuties,
    server: RedisServer,
    client: Counting,
    store: RedisStore,
    baseline: PerBlock,
    population: Population,
) -> list[dict[str, Any]]:
    async def ask_store(keys: bytes) -> dict[str, int]:
        depths: dict[str, int] = {}
        for match in await store.lookup(MODEL, BLOCK_TOKENS, keys):
            depths[match.worker_id] = max(match.num_blocks, depths.get(match.worker_id, 0))
        return depths

    rows: list[dict[str, Any]] = []
    kinds: list[tuple[int, Sequence[Prompt]]] = [(len(p.depths), [p]) for p in population.spread]
    kinds.append((len(population.own[0].depths), population.own))
    for (holders, prompts), blocks in itertools.product(kinds, duties.lengths):
        for prompt in prompts[:_CHECKED]:  # this also makes the scripts known to the server
            await _check(ask_store, prompt, blocks)
        await _check(baseline.lookup, prompts[0], blocks)
        asked = [prompt.keys[: blocks * KEY_BYTES] for prompt in prompts]
        client.round_trips = 0
        ours = await _ask(server, ask_store, asked, duties.samples, duties.budget_s)
        ours["round_trips"] = client.round_trips / ours["count"]
        most = max(3, duties.samples // _BASELINE_SHARE)
        theirs = await _ask(server, baseline.lookup, asked, most, duties.budget_s)
        theirs["round_trips"] = 1.0  # it is one pipeline by construction
        about = {"holders": holders, "blocks": blocks}
        rows += [{"system": "ours"} | about | ours, {"system": "per block"} | about | theirs]
    return rows


async def _check(ask: AskRedis, prompt: Prompt, blocks: int) -> None:
    if await ask(prompt.keys[: blocks * KEY_BYTES]) != prompt.expected(blocks):
        raise Wrong(f"a prompt of {blocks} blocks: the workers, or their blocks, are not as stored")


async def _ask(
    server: RedisServer, ask: AskRedis, asked: Sequence[bytes], most: int, budget_s: float
) -> dict[str, Any]:
    """Latency, and per lookup the commands Redis ran and its CPU time; scripts' own commands count, too."""
    seconds: list[float] = []
    before = server.read()
    end_s = time.perf_counter() + budget_s
    for keys in itertools.cycle(asked):
        start_s = time.perf_counter()
        await ask(keys)
        now_s = time.perf_counter()
        seconds.append(now_s - start_s)
        if len(seconds) == most or (len(seconds) >= 3 and now_s > end_s):
            break
    spent = server.read().since(before)
    return asdict(latency_of(seconds)) | _per_lookup(spent, len(seconds))


def _per_lookup(spent: Reading, lookups: int) -> dict[str, Any]:
    return {
        "commands": sum(spent.calls.values()) / lookups,
        "commands_by_name": {name: count / lookups for name, count in spent.calls.items()},
        "redis_us": spent.cpu_s / lookups * 1e6,
    }
