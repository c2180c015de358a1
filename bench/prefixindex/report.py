"""The figures as tables, and the goals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidebyside.tables import Block

from prefixindex.goals import goals_of


def blocks_of(results: Mapping[str, Any]) -> list[Block]:
    """Tables of the sections that were run, in a fixed order."""
    return [block for section, make in _BLOCKS.items() if section in results for block in make(results[section])]


def last_lines(results: Mapping[str, Any], foreign: Mapping[str, float]) -> list[str]:
    """The goals; `foreign` has what other programs used while a section ran."""
    shares = ", ".join(f"{section} {share:.0%}" for section, share in foreign.items())
    return [*map(str, goals_of(results)), f"other programs used of the machine during: {shares}"]


def _tokens(blocks: int) -> str:
    tokens = blocks * 16
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _pair(row: Mapping[str, float], unit_us: float = 1.0) -> str:
    return f"{_number(row['p50_us'] / unit_us)} / {_number(row['p99_us'] / unit_us)}"


def _replica(cells: Sequence[Mapping[str, Any]]) -> list[Block]:
    lengths = sorted({row["blocks"] for row in cells[0]["lookups"]})
    return [_lookup_block(cells, lengths), _ingest_block(cells)]


def _lookup_block(cells: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> Block:
    longest = lengths[-1]
    rows = []
    for cell in cells:
        by = {(r["kind"], r["blocks"], r["system"], r["caches"]): r for r in cell["lookups"]}
        for kind in ("spread", "own"):
            ours = [by[kind, blocks, "ours", "cold"] for blocks in lengths]
            theirs = [by[kind, blocks, "dict", "cold"] for blocks in lengths]
            rows.append(
                (
                    f"{cell['blocks']:,}",
                    str(cell["workers"]),
                    kind,
                    *map(_pair, ours),
                    _pair(by[kind, longest, "ours, all workers read", "cold"]),
                    _pair(by[kind, longest, "ours", "warm"]),
                    *(_number(row["p50_us"]) for row in theirs),
                    f"x{theirs[-1]['p50_us'] / ours[-1]['p50_us']:.0f}",
                )
            )
    head = (
        *("blocks", "workers", "prompts"),
        *(f"{_tokens(blocks)} tokens" for blocks in lengths),
        *(f"{_tokens(longest)}, all workers read", f"{_tokens(longest)}, warm"),
        *(f"dict {_tokens(blocks)}, p50" for blocks in lengths),
        f"dict / ours, {_tokens(longest)}",
    )
    count = max(row["count"] for row in cells[0]["lookups"])
    fewest = min(row["count"] for cell in cells for row in cell["lookups"] if row["system"] == "dict")
    notes = (
        "p50 / p99 of single lookups; ours and the dict in turns, in one process",
        "spread: on all workers, to a depth of its own on each; own: on two workers",
        "between two lookups 64 MiB of other memory are read, so that the processor's caches are cold; not for 'warm'",
        f"up to {count} lookups per figure of ours; the dict at least {fewest}, too few for a p99",
    )
    return Block("Replica: lookup, microseconds", head, rows, names=3, notes=notes)


def _ingest_block(cells: Sequence[Mapping[str, Any]]) -> Block:
    sizes = list(cells[0]["ours"]["events_per_s"])
    rows = []
    for cell in cells:
        ours, theirs = cell["ours"], cell["dict"]
        rows.append(
            (
                f"{cell['blocks']:,}",
                str(cell["workers"]),
                _number(cell["entries"] / cell["blocks"]),
                _number(ours["bytes"] / cell["blocks"]),
                _number(ours["bytes"] / cell["entries"]),
                _number(ours["rss_bytes"] / cell["entries"]),
                _number(theirs["rss_bytes"] / cell["entries"]),
                *(_rates(ours["events_per_s"][size], theirs["events_per_s"][size]) for size in sizes),
            )
        )
    head = (
        *("blocks", "workers", "entries per block", "bytes per block", "bytes per entry", "RSS per entry"),
        "dict: RSS per entry",
        *(f"{size} per message" for size in sizes),
    )
    notes = (
        "an entry is a pair of block and worker; bytes are those the index accounts for, RSS what the process grew by",
        "per message: thousand block events/s of ours (of the dict), runs of so many blocks stored and removed",
    )
    return Block("Replica: memory and ingest", head, rows, names=2, notes=notes)


def _rates(ours: float, theirs: float) -> str:
    return f"{ours / 1000:,.0f} ({theirs / 1000:,.0f})"


def _memory(figures: Mapping[str, Any]) -> list[Block]:
    kinds = ("one holder", "three holders at random")
    rows = [
        (
            kind,
            f"{figures[kind]['blocks']:,}",
            f"{figures[kind]['holder_sets']:,}",
            _number(figures[kind]["bytes_per_block"]),
            _number(figures[kind]["bytes_per_entry"]),
            _number(figures[kind]["worst_bytes_per_entry"]),
        )
        for kind in kinds
    ]
    head = ("every block has", "blocks", "holder sets", "bytes per block", "bytes per entry", "worst while growing")
    note = (
        f"{figures['workers']} workers. Holders drawn anew for every block are what no engine does: "
        "it is the worst that sharing of holder sets can meet"
    )
    return [Block("Replica: memory under other sharing", head, rows, notes=(note,))]


def _redis(cells: Sequence[Mapping[str, Any]]) -> list[Block]:
    lookups, fills = [], []
    for cell in cells:
        pairs: dict[tuple[int, int], dict[str, Any]] = {}
        for row in cell["lookups"]:
            pairs.setdefault((row["holders"], row["blocks"]), {})[row["system"]] = row
        for (holders, blocks), by in sorted(pairs.items()):
            ours, theirs = by["ours"], by["per block"]
            lookups.append(
                (
                    f"{cell['blocks']:,}",
                    str(holders),
                    _tokens(blocks),
                    _pair(ours, 1000.0),
                    _pair(theirs, 1000.0),
                    f"x{theirs['p50_us'] / ours['p50_us']:.1f}",
                    f"{ours['commands']:.0f}",
                    f"{theirs['commands']:.0f}",
                    f"x{theirs['commands'] / ours['commands']:.0f}",
                    f"{ours['redis_us'] / 1000:.2f}",
                    f"{theirs['redis_us'] / 1000:.2f}",
                )
            )
        fills.append(
            (
                f"{cell['blocks']:,}",
                *(_number(cell[system]["bytes_per_entry"]) for system in ("ours", "per block")),
                *(_number(cell[system]["bytes_per_block"]) for system in ("ours", "per block")),
                f"{cell['ours']['fill_per_s'] / 1000:,.0f}",
                f"{cell['ours']['fill_redis_us']:.2f}",
            )
        )
    head = (
        *("blocks", "holders", "tokens", "ours, ms", "per block, ms", "ratio of p50"),
        *("commands", "per block", "ratio", "Redis CPU, ms", "per block"),
    )
    notes = (
        f"Redis {cells[0]['redis_version']} on this machine; p50 / p99 as the Python client sees them; holders: the "
        "workers that have the prompt",
        "ours: kvstore's own store, one script call per lookup. Commands are those Redis runs, inside the script, too; "
        "the client sends one",
        "per block: a hash per block with a field per worker and one HKEYS per block, in one pipeline, as llm-d's "
        "Redis index does. Its client is Go, here both have the same Python client: Redis CPU compares them best",
    )
    fill_head = (
        *("blocks", "bytes per entry", "per block: same", "bytes per block", "per block: same"),
        *("thousand entries/s in", "Redis CPU per entry, us"),
    )
    fill_notes = (
        "prompts on two workers, about 1.5 entries per block, in runs of up to 1,024 blocks; used_memory of Redis, the "
        "event stream left out. Ours also keeps the reverse: what each worker holds",
    )
    return [
        Block("Through Redis: lookup", head, lookups, names=3, notes=notes),
        Block("Redis: memory and ingest of the store", fill_head, fills, notes=fill_notes),
    ]


def _process(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    lines, notes = [], []
    for row in rows:
        middle = row["median"]
        rates = [run["events_per_s"] for run in row["runs"]]
        lines.append(
            (
                row["name"],
                f"{middle['events_per_s']:,.0f}",
                f"{min(rates):,.0f}-{max(rates):,.0f}",
                *(f"{middle['cpu_us'][name]:.2f}" for name in ("kvstore", "redis")),
                *(f"{middle['core_share'][name]:.0%}" for name in ("kvstore", "redis", "publishers", "watchers")),
                _pair(middle["delay"], 1000.0) if middle["delay"] else "",
                f"{middle['resyncs']:g}",
            )
        )
        if profile := row.get("profile"):
            for kind in ("modules", "functions"):
                shares = ", ".join(f"{name} {share:.0%}" for name, share in list(profile[kind].items())[:8])
                notes.append(f"profile of kvstore, {row['name']}, own time by {kind}: {shares}")
            commands = sorted(middle["redis_us_by_command"].items(), key=lambda item: -item[1])[:6]
            text = ", ".join(f"{name} {micros:.2f}" for name, micros in commands)
            notes.append(f"Redis, {row['name']}, us per block event by command (evalsha holds the others): {text}")
    head = (
        *("load", "block events/s", "of runs", "kvstore CPU, us/event", "Redis CPU, us/event"),
        *("kvstore, core", "Redis, core", "publishers, core", "watchers, core", "delay, ms", "resyncs"),
    )
    about = (
        "8 workers publish to one kvstore over one Redis, until every watch has seen the last batch; medians of runs",
        "a block event is one block stored or removed. prefill: runs of 256 blocks, 1,024 events per batch; decode: "
        "single blocks, 64 events per batch; paced: a prefill batch per worker each 0.2 s, delay from sending to watch",
    )
    return [Block("kvstore process: ingest and watches", head, lines, notes=(*about, *notes))]


def _keys(figures: Mapping[str, Any]) -> list[Block]:
    rows = [
        (
            kind,
            _pair(figures[kind]["second turn"], 1000.0),
            _pair(figures[kind]["full hashing"], 1000.0),
            f"x{figures[kind]['full hashing']['p50_us'] / figures[kind]['second turn']['p50_us']:.1f}",
            f"{figures[kind]['hashed_blocks']:.0f}",
        )
        for kind in ("list", "array")
    ]
    head = ("tokens as", "second turn, ms", "full hashing, ms", "ratio of p50", "blocks hashed")
    note = f"{figures['prompt_tokens']:,} tokens, all but the last {figures['turn_tokens']:,} seen before; p50 / p99"
    return [Block("Block keys of a next turn", head, rows, notes=(note,))]


_BLOCKS: Mapping[str, Callable[[Any], list[Block]]] = {
    "replica": _replica,
    "memory": _memory,
    "redis": _redis,
    "process": _process,
    "keys": _keys,
}
