"""vLLM's own cache manager with layers under a budget: what is held, given back, found again. Needs vLLM, no engine."""

from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

BLOCK, POOL = 4, 64
SINK, RECENT = 1, 2


def cache(num_blocks: int = POOL, with_full: bool = True) -> Any:
    """One group of full attention, if any, and one of one sink and two recent blocks."""
    import torch
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from omni_kernels.vllm.omni_attn.kv_blocks import SinkRecentSpec

    init_none_hash(sha256)
    shape: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    groups = [
        KVCacheGroupSpec(["full"], FullAttentionSpec(**shape)),
        KVCacheGroupSpec(["sparse"], SinkRecentSpec(**shape, sink_blocks=SINK, recent_blocks=RECENT)),
    ]
    config = KVCacheConfig(num_blocks, [], groups if with_full else groups[1:])
    return KVCacheManager(config, 256, BLOCK, BLOCK)


def request(name: str, tokens: list[int]) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    return Request(
        name, tokens, SamplingParams(max_tokens=99), None, block_hasher=get_request_block_hasher(BLOCK, sha256)
    )


def held(manager: Any, asked: Any) -> list[list[int]]:
    """Numbers of the blocks a request holds, by group."""
    groups = manager.coordinator.get_blocks(asked.request_id)
    return [[n for n, block in enumerate(group) if not block.is_null] for group in groups]


def step(manager: Any, asked: Any, count: int, token: int | None = None) -> None:
    """Compute `count` tokens, then append one that was generated."""
    assert manager.allocate_slots(asked, count) is not None
    asked.num_computed_tokens += count
    if token is not None:
        asked.append_output_token_ids(token)


def prefill(manager: Any, asked: Any) -> int:
    """Tokens found in the cache."""
    blocks, hit, *_ = manager.get_computed_blocks(asked)
    rest = asked.num_prompt_tokens - hit
    assert manager.allocate_slots(asked, rest, hit, blocks) is not None
    asked.num_computed_tokens = asked.num_prompt_tokens
    return int(hit)


def test_blocks_between_are_given_back_when_the_prompt_is_done_and_while_it_grows() -> None:
    manager = cache()
    asked = request("r", list(range(30)))
    free = manager.block_pool.get_num_free_blocks()
    step(manager, asked, 16)
    step(manager, asked, 14, token=100)
    assert held(manager, asked) == [list(range(8)), list(range(8))], "the prompt attends to everything"
    step(manager, asked, 1, token=101)
    assert held(manager, asked) == [list(range(8)), [0, 6, 7]]
    assert manager.block_pool.get_num_free_blocks() == free - 8 - 3
    for n in range(12):
        step(manager, asked, 1, token=102 + n)
        last = asked.num_computed_tokens - 1
        sparse = set(held(manager, asked)[1])
        assert {0, last // BLOCK, last // BLOCK - 1} <= sparse
        assert len(sparse) <= SINK + RECENT + 1
    manager.free(asked)
    assert manager.block_pool.get_num_free_blocks() == free


def test_a_given_back_block_still_serves_a_prefix_until_it_is_taken() -> None:
    manager = cache()
    first = request("a", list(range(30)))
    assert prefill(manager, first) == 0
    first.append_output_token_ids(100)
    step(manager, first, 1)
    assert len(held(manager, first)[1]) == 3
    second = request("b", list(range(30)))
    assert prefill(manager, second) == 28
    second.append_output_token_ids(100)
    step(manager, second, 1)
    assert held(manager, second) == [list(range(8)), [0, 6, 7]]
    third = request("c", [*range(20), 7, 7, 7, 7, 7])
    assert prefill(manager, third) == 20
    assert held(manager, third)[1] == list(range(7)), "tokens of the prompt are left, which attend to everything"


def test_a_hit_ends_where_one_group_has_lost_its_block() -> None:
    manager = cache(num_blocks=24)
    first = request("a", list(range(30)))
    prefill(manager, first)
    first.append_output_token_ids(100)
    step(manager, first, 1)
    assert prefill(manager, request("b", [5] * 22)) == 0, "takes all that is free"
    assert manager.get_computed_blocks(request("c", list(range(30))))[1] == SINK * BLOCK


def test_blocks_with_generated_tokens_are_no_prefix() -> None:
    manager = cache()
    first = request("a", list(range(10)))
    prefill(manager, first)
    for n in range(12):
        first.append_output_token_ids(200 + n)
        step(manager, first, 1)
    turn = request("b", [*range(10), *range(200, 212), 300])
    assert manager.get_computed_blocks(turn)[1] == 8


@pytest.mark.parametrize("length", [3, 8, 9, 12, 13, 30, 32, 33])
def test_room_for_a_pulled_prompt_is_what_decode_reads(length: int) -> None:
    """And exactly the blocks that a finished prefill of it keeps, whether its first token comes along or not."""
    from omni_kernels.vllm.omni_attn.kv_blocks import SinkRecentSpec

    holder = cache()
    done = request("p", list(range(length)))
    prefill(holder, done)
    holder.remove_skipped_blocks("p", length, length)
    kept = held(holder, done)[1]
    spec = holder.kv_cache_config.kv_cache_groups[1].kv_cache_spec
    assert isinstance(spec, SinkRecentSpec)
    assert [n for n in range(-(-length // BLOCK)) if spec.keeps(n, length)] == kept

    manager = cache()
    free = manager.block_pool.get_num_free_blocks()
    with_first = length % BLOCK != 0
    asked = request("d", [*range(length), *([99] if with_first else [])])
    tokens = asked.num_prompt_tokens
    assert manager.allocate_slots(asked, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True) is not None
    assert held(manager, asked)[1] == kept
    assert manager.block_pool.get_num_free_blocks() == free - sum(map(len, held(manager, asked)))
    asked.num_computed_tokens = tokens - 1
    step(manager, asked, 1)
    assert set(held(manager, asked)[1]) <= set(kept)


def test_part_of_a_prompt_from_elsewhere_gets_all_of_its_blocks() -> None:
    """The rest of the prompt is computed here and attends to everything."""
    manager = cache()
    asked = request("d", list(range(40)))
    assert manager.allocate_slots(asked, 16, num_external_computed_tokens=24) is not None
    assert held(manager, asked) == [list(range(10)), list(range(10))]


def test_all_layers_may_be_under_one_budget() -> None:
    manager = cache(with_full=False)
    asked = request("r", list(range(30)))
    assert prefill(manager, asked) == 0
    asked.append_output_token_ids(100)
    step(manager, asked, 1)
    assert held(manager, asked) == [[0, 6, 7]]
    assert manager.get_computed_blocks(request("again", list(range(30))))[1] == 28


def test_layers_of_different_budgets_share_no_block_table() -> None:
    import torch
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    from omni_kernels.vllm.omni_attn.kv_blocks import SinkRecentSpec

    shape: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = [SinkRecentSpec(**shape, sink_blocks=sink, recent_blocks=2) for sink in (0, 1, 1)]
    assert UniformTypeKVCacheSpecs.from_specs({"a": specs[0], "b": specs[1]}) is None
    assert UniformTypeKVCacheSpecs.from_specs({"a": specs[2], "b": specs[1]}) is not None


def test_a_preempted_request_starts_over_with_all_blocks() -> None:
    manager = cache()
    asked = request("r", list(range(30)))
    step(manager, asked, 30, token=100)
    for n in range(6):
        step(manager, asked, 1, token=101 + n)
    manager.free(asked)
    manager.reset_prefix_cache()
    asked.num_computed_tokens = 0
    step(manager, asked, 20)
    assert held(manager, asked)[1] == list(range(5))
    step(manager, asked, 16)
    assert held(manager, asked)[1] == list(range(9))
    step(manager, asked, 1)
    assert len(held(manager, asked)[1]) <= SINK + RECENT + 1
