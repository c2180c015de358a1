"""Pages about the replica of the prefix index. They name blocks by key; prompts are neither kept nor repeated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import orjson
from fastapi import Request, Response

from omni_common.errors import InvalidRequest
from omni_proxy.bodies import HttpLimits, parsed, query_limit
from omni_proxy.fleet import Fleet
from omni_proxy.openai_requests import Served
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.prompt_requests import PrefixRequest, parse_prefix
from omni_proxy.text import ModelText

_DEFAULT_LIMIT = 20


@dataclass(frozen=True, slots=True)
class KvPages:
    fleet: Fleet
    keys: PromptKeys
    text: ModelText
    served: Served
    limits: HttpLimits

    async def summary(self, request: Request) -> Response:
        """What the replica holds and how current it is."""
        replica = self.fleet.replica
        position = replica.position
        return _json(
            {
                "model": self.served.model,
                "block_sizes": self.fleet.block_sizes,
                "age_s": replica.age_s,
                "degraded": replica.is_degraded,
                "position": None if position is None else position._asdict(),
                "snapshots": replica.snapshots,
                "resumes": replica.resumes,
                **asdict(replica.observe()),
                "members": [
                    {"id": holder.id, "epoch": holder.epoch, "pool": holder.cost, "reported": is_reported}
                    for holder, is_reported in replica.holders()
                ],
            }
        )

    async def hottest(self, request: Request) -> Response:
        """The prefixes most lookups ended at. Reads the whole index."""
        found = self.fleet.replica.index.hottest(query_limit(request, _DEFAULT_LIMIT))
        prefixes = [
            {"block_key": hot.key.hex(), "blocks": hot.blocks, "hits": hot.hits, "members": hot.members}
            for hot in found
        ]
        return _json({"prefixes": prefixes})

    async def prefix(self, request: Request) -> Response:
        """How many leading blocks of a prompt each member has, tier by tier; each tier counts those before it."""
        asked = await parsed(request, self.limits, partial(parse_prefix, served=self.served))
        tokens = await self._tokens(asked)
        size = asked.block_size or self._block_size()
        keys, replica = self.keys.of(tokens, size, asked.cache_salt, asked.adapter), self.fleet.replica
        prefixes = replica.index.lookup(keys)
        return _json(
            {
                "tokens": len(tokens),
                "block_size": size,
                "blocks": prefixes.num_blocks,
                "block_keys": keys.hex(),
                "tiers": [tier.name for tier in prefixes.tiers],
                "members": {h.id: prefixes.of(h.id) for h, _ in replica.holders() if h.cost is None},
            }
        )

    async def _tokens(self, asked: PrefixRequest) -> Sequence[int]:
        prompt = asked.prompt
        if prompt is None:
            prompt = await self.text.rendered(asked.messages, tools=asked.tools or None, **asked.template)
        if not isinstance(prompt, str):
            return prompt
        return await self.text.encode(prompt, add_special_tokens=asked.add_special_tokens)

    def _block_size(self) -> int:
        sizes = self.fleet.block_sizes
        if len(sizes) == 1:
            return sizes[0]
        message = f"block_size: is required, the workers have {list(sizes)}"
        raise InvalidRequest(message, field="block_size", reason="missing_parameter")


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
