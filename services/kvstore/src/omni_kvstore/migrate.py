"""`omni-kvstore migrate`: bring the keys of an older schema to this one.

Schema 1 differs in how blocks are filed and cannot be read by schema 2. Nothing of it is worth carrying over: workers
register and publish all they hold within one lease. Its keys are removed, and only where no kvstore still serves it.
"""

import time
from typing import Any

from omni_common.errors import FailedPrecondition
from omni_kvstore.schema import SCHEMA, Keys

_PAGE_KEYS = 1000


async def migrate(client: Any, cluster: str, lease_s: float) -> str:
    """Returns what was done, for people. `client` is a client of the one server that holds the cluster's keys.

    Raises:
        FailedPrecondition: the keys are of a later schema, or a kvstore of the old one has looked at leases lately.
    """
    keys = Keys(cluster)
    found = await client.get(keys.schema)
    if found is not None and int(found) > SCHEMA:
        message = f"Redis holds schema {int(found)}, later than {SCHEMA}; a newer omni-kvstore is needed"
        raise FailedPrecondition(message, reason="schema")
    if found is not None and int(found) == SCHEMA:
        return f"cluster {cluster!r} is at schema {SCHEMA}; nothing to do"
    reaped = int(await client.get(keys.reaped) or 0) / 1000
    if time.time() - reaped < lease_s:
        message = f"a kvstore of the old schema serves cluster {cluster!r}; stop all of them first"
        raise FailedPrecondition(message, reason="schema_in_use")
    removed = 0
    async for page in _pages(client, keys):
        removed += await client.unlink(*page)
    return f"removed {removed} keys of schema 1 of cluster {cluster!r}; workers publish theirs anew"


async def _pages(client: Any, keys: Keys) -> Any:
    page: list[bytes] = []
    async for key in client.scan_iter(match=f"{keys.prefix}:*", count=_PAGE_KEYS):
        page.append(key)
        if len(page) == _PAGE_KEYS:
            yield page
            page = []
    if page:
        yield page
