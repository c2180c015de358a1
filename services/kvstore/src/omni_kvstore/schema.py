"""Names of everything kept in Redis, and the scripts that change it: schema 2.

Every key starts with `omni:{<cluster>}`; the hash tag keeps a cluster's keys in one slot, so scripts are atomic
on Redis Cluster too. A *namespace* numbers one (block size, model). A *run* numbers one stretch of a worker's block
knowledge: an epoch, cut again by every clear and snapshot. A prompt's blocks are filed by *spans* of 1,024
blocks, each named by the key of its first block, so that a prompt of 8,192 blocks is in 8 hashes.

| key | type | holds |
|---|---|---|
| `:schema` | string | 2; another number is refused |
| `:data` | hash | name of the data set, and the Redis process that wrote it: a restart may lose the last second |
| `:namespaces` | hash | `<block size>/<model>` -> number |
| `:worker:<id>` | hash | what it is: epoch, info (wire bytes), namespace, draining, ...; its run, sequence, gap |
| `:leases` | sorted set | worker -> end of its lease, milliseconds of Redis's clock |
| `:pools:<namespace>` | set | members that are pools |
| `:runs` | hash | live run -> worker |
| `:span:<namespace>:<key>` | hash, TTL | block key -> holders: 5 bytes each, run and a bit per medium |
| `:held:<run>` | sorted set, TTL | span + block key by position: the reverse of the above, deepest first to go |
| `:entries` | counter | members of all `:held:` |
| `:trash` | hash | retired run -> namespace: their entries are still to be removed |
| `:events` | stream, bounded | what changed, numbered without gaps |
| `:event`, `:run` | counters | last event, last run |
| `:reaped` | string | when leases were last looked at |
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

SCHEMA = 2
SCRIPTS = ("register", "leave", "publish", "lookup", "reap", "sweep", "load", "blocks", "want")


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

    @property
    def schema(self) -> str:
        return f"{self.prefix}:schema"

    @property
    def reaped(self) -> str:
        return f"{self.prefix}:reaped"


def namespace(model: str, block_size: int) -> str:
    """Field of `:namespaces`."""
    return f"{block_size}/{model}"


@cache
def script(name: str) -> str:
    """Source of one script, its shared functions included."""
    folder = resources.files("omni_kvstore") / "lua"
    return (folder / "common.lua").read_text() + "\n" + (folder / f"{name}.lua").read_text()
