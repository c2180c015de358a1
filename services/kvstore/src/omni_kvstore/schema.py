"""Names of everything kept in Redis, and the scripts that change it.

Every key starts with `omni:{<cluster>}`; the hash tag keeps a cluster's keys in one slot, so scripts are atomic
on Redis Cluster too. `<run>` numbers one span of a worker's block knowledge: an epoch, cut again by every clear and
snapshot. A holder is the integer `run * 8 + medium`, so a block's holders are an intset.

| key | type | holds |
|---|---|---|
| `:worker:<id>` | hash | epoch, info (wire bytes), model, block_size, draining, run, sequence, gap, complete_ms |
| `:leases` | sorted set | worker -> end of its lease, milliseconds of Redis's clock |
| `:runs` | hash | live run -> worker |
| `:block:<16 bytes>` | set of integers, TTL | holders of the block |
| `:held:<holder>` | set, TTL | blocks of the holder: the reverse of the above |
| `:trash` | set | retired runs whose entries are still to be removed |
| `:events` | stream, bounded | what changed, numbered without gaps |
| `:event`, `:run` | counters | last event, last run |
| `:reaped` | string | when leases were last looked at |
| `:dataset` | string | random name; a changed one shows that Redis lost its data |
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

SCRIPTS = ("register", "leave", "publish", "lookup", "reap", "sweep", "load")
HOLDER_MEDIA = range(8)


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one cluster."""

    cluster: str

    @property
    def prefix(self) -> str:
        return f"omni:{{{self.cluster}}}"

    @property
    def events(self) -> str:
        return f"{self.prefix}:events"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}:worker:{worker_id}"

    def held(self, run: int, medium: int) -> str:
        return f"{self.prefix}:held:{run * 8 + medium}"


@cache
def script(name: str) -> str:
    """Source of one script, its shared functions included."""
    folder = resources.files("omni_kvstore") / "lua"
    return (folder / "common.lua").read_text() + "\n" + (folder / f"{name}.lua").read_text()
