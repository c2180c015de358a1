"""NIXL's pull connector for engines with an attention pattern (`kv_connector_module_path`).

A finished prefill names only the blocks that decode will read. The decode side has room for exactly these (see
`kv_blocks`), and vLLM pairs both lists from their ends, so that a prefix it already has is left out.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector

from omni_kernels.vllm.omni_attn.kv_blocks import SinkRecentSpec

PATTERN = "omni_attention_pattern"
"""The pattern's digest: in the connector's extra configuration, and in what a prefill hands over."""


class SinkRecentNixlConnector(NixlConnector):  # type: ignore[misc]
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        kept = tuple(
            [block for n, block in enumerate(ids) if spec.keeps(n, request.num_computed_tokens)]
            if isinstance(spec, SinkRecentSpec)
            else ids
            for spec, ids in zip(specs, block_ids, strict=True)
        )
        is_held, params = super().request_finished_all_groups(request, kept)
        if params is not None:
            params[PATTERN] = self.kv_transfer_config.get_from_extra_config(PATTERN, None)
        return is_held, params
