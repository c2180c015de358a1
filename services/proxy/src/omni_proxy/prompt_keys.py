"""Block keys of prompts for the served model; a prompt that begins like an earlier one costs only its tail."""

from collections.abc import Sequence

from omni_common.blocks import root_key
from omni_common.key_cache import KeyCache
from omni_proxy.metrics import PrefixMetrics


class PromptKeys:
    def __init__(self, model: str, cache: KeyCache, metrics: PrefixMetrics) -> None:
        self._model = model
        self._root = root_key(model)
        self._cache = cache
        self._metrics = metrics

    def of(self, prompt: Sequence[int], block_size: int, salt: str = "", adapter: str = "") -> bytes:
        """Keys of the prompt's full blocks; none where the worker has no blocks (`block_size` 0).

        Prompts of different salts or adapters share none.
        """
        if block_size == 0:
            return b""
        hashed, reused = self._cache.hashed_blocks, self._cache.reused_blocks
        root = root_key(self._model, adapter, salt) if salt or adapter else self._root
        keys = self._cache.keys(prompt, block_size, root)
        self._metrics.keys.labels("hashed").inc(self._cache.hashed_blocks - hashed)
        self._metrics.keys.labels("reused").inc(self._cache.reused_blocks - reused)
        return keys
