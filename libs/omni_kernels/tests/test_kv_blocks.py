"""Writing tokens to caches; whole blocks out of one cache and into another, plain and packed to int8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels.ops.kv_blocks import kv_gather, kv_gather_int8, kv_scatter, kv_scatter_int8, kv_write

EXAMPLES = settings(deadline=None, max_examples=40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cache(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 4, 2, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EXAMPLES
@given(slots=st.lists(st.integers(0, 23), unique=True, max_size=12), skipped=st.sets(st.integers(0, 11)))
def test_a_token_lies_in_its_slot_and_nothing_else_changes(slots: list[int], skipped: set[int]) -> None:
    where = [-1 if i in skipped else slot for i, slot in enumerate(slots)]
    keys, values = _cache(0), _cache(1, shape=(6, 4, 2, 5))
    wanted = keys.clone(), values.clone()
    key, value = _cache(2, shape=(len(where), 2, 8)), _cache(3, shape=(len(where), 2, 5))
    for i, slot in enumerate(where):
        if slot >= 0:
            wanted[0][slot // 4, slot % 4], wanted[1][slot // 4, slot % 4] = key[i], value[i]
    kv_write(key, value, keys, values, torch.tensor(where, dtype=torch.int64))
    assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])


def test_writing_through_views_reaches_the_cache_behind_them() -> None:
    """A cache by head, keys beside values, as vLLM's CPU engine holds it."""
    both = torch.zeros(6, 2, 4, 16)
    keys, values = both.transpose(1, 2).split(8, -1)
    kv_write(_cache(0, shape=(1, 2, 8)), _cache(1, shape=(1, 2, 8)), keys, values, torch.tensor([9]))
    assert torch.equal(both[2, :, 1], torch.cat((_cache(0, shape=(1, 2, 8)), _cache(1, shape=(1, 2, 8))), -1)[0])
    assert both.count_nonzero() == 32


@EXAMPLES
@given(
    blocks=st.lists(st.integers(0, 5), unique=True, max_size=6),
    shape=st.sampled_from([(6, 4), (6, 4, 9), (6, 4, 2, 8)]),
    dtype=st.sampled_from([*DTYPES, torch.int8, torch.uint8]),
)
def test_blocks_travel_between_caches_unchanged(blocks: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source, target = (_cache(0, shape=shape) * 50).to(dtype), torch.zeros(shape, dtype=dtype)
    elsewhere = torch.tensor([5 - block for block in blocks], dtype=torch.int64)
    data = kv_gather(source, torch.tensor(blocks, dtype=torch.int64))
    assert data.is_contiguous()
    kv_scatter(target, elsewhere, data)
    assert torch.equal(target[elsewhere], source[blocks])
    untouched = [block for block in range(6) if 5 - block not in blocks]
    assert not target[untouched].any()


@EXAMPLES
@given(seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), magnitude=st.sampled_from([1e-4, 1.0, 300.0]))
def test_a_packed_number_is_off_by_half_a_step_at_most(seed: int, dtype: torch.dtype, magnitude: float) -> None:
    """And by the rounding of the dtype it comes back in."""
    source = (_cache(seed) * magnitude).to(dtype)
    blocks = torch.tensor([3, 0, 5])
    data, scale = kv_gather_int8(source, blocks)
    largest = source[blocks].float().abs().amax(-1)
    torch.testing.assert_close(scale, largest / 127, rtol=1e-6, atol=0)
    target = torch.zeros_like(source)
    kv_scatter_int8(target, blocks, data, scale)
    off = (target[blocks].float() - source[blocks].float()).abs()
    assert (off <= (scale * 0.5001 + largest * torch.finfo(dtype).eps / 2).unsqueeze(-1)).all()
    assert (data.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_packed_once_is_packed_alike_again(dtype: torch.dtype) -> None:
    """A block passed on from cache to cache does not decay: int8 times a power of two is exact in every dtype."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(-127, 128, (3, 4, 2, 8), generator=generator, dtype=torch.int8)
    data[..., 0] = 127
    scale = torch.exp2(torch.randint(-6, 3, (3, 4, 2), generator=generator).float())
    cache, blocks = torch.zeros(6, 4, 2, 8, dtype=dtype), torch.tensor([4, 1, 2])
    kv_scatter_int8(cache, blocks, data, scale)
    again = kv_gather_int8(cache, blocks)
    assert torch.equal(again[0], data) and torch.equal(again[1], scale)


def test_in_float32_any_packed_block_comes_out_of_a_cache_as_it_went_in() -> None:
    data, scale = kv_gather_int8(_cache(0), torch.arange(6))
    cache = torch.zeros(6, 4, 2, 8)
    kv_scatter_int8(cache, torch.arange(6), data, scale)
    again = kv_gather_int8(cache, torch.arange(6))
    assert torch.equal(again[0], data)
    torch.testing.assert_close(again[1], scale, rtol=3e-7, atol=0)


def test_zeros_are_packed_to_zeros() -> None:
    cache = torch.zeros(2, 4, 2, 8)
    data, scale = kv_gather_int8(cache, torch.tensor([1]))
    assert not data.any() and not scale.any()
    cache.fill_(7)
    kv_scatter_int8(cache, torch.tensor([1]), data, scale)
    assert not cache[1].any()


def test_blocks_nobody_asked_for_are_not_read() -> None:
    cache = _cache(0)
    cache[[0, 2]] = float("nan")
    data, scale = kv_gather_int8(cache, torch.tensor([1, 3]))
    assert not kv_gather(cache, torch.tensor([1, 3])).isnan().any() and not scale.isnan().any()
    assert (data.abs().amax(-1) == 127).all()


BLOCKS, DATA, SCALE = torch.tensor([1, 3]), torch.ones(2, 4, 2, 8), torch.ones(2, 4, 2)
KEY, SLOTS = torch.ones(3, 2, 8), torch.tensor([0, 1, -1])
WRONG = {
    "a key of another size": (kv_write, "key", (torch.ones(3, 2, 7), KEY, _cache(0), _cache(0), SLOTS)),
    "fewer values than keys": (kv_write, "value", (KEY, KEY[:2], _cache(0), _cache(0), SLOTS)),
    "a value in another dtype": (kv_write, "value", (KEY, KEY.bfloat16(), _cache(0), _cache(0), SLOTS)),
    "values in other blocks": (kv_write, "value_cache", (KEY, KEY, _cache(0), _cache(0, shape=(5, 4, 2, 8)), SLOTS)),
    "a slot beyond the cache": (kv_write, "slots", (KEY, KEY, _cache(0), _cache(0), torch.tensor([0, 24, 1]))),
    "a slot below -1": (kv_write, "slots", (KEY, KEY, _cache(0), _cache(0), torch.tensor([0, -2, 1]))),
    "slots in int32": (kv_write, "slots", (KEY, KEY, _cache(0), _cache(0), SLOTS.int())),
    "fewer slots than keys": (kv_write, "slots", (KEY, KEY, _cache(0), _cache(0), SLOTS[:2])),
    "a block beyond the cache": (kv_gather, "blocks", (_cache(0), torch.tensor([6]))),
    "a block of -1": (kv_gather, "blocks", (_cache(0), torch.tensor([-1]))),
    "blocks in int32": (kv_gather, "blocks", (_cache(0), BLOCKS.int())),
    "data for other blocks": (kv_scatter, "data", (_cache(0), BLOCKS, DATA[:1])),
    "data in another dtype": (kv_scatter, "data", (_cache(0), BLOCKS, DATA.bfloat16())),
    "a cache of integers packed": (kv_gather_int8, "cache", (_cache(0).int(), BLOCKS)),
    "a cache without rows packed": (kv_gather_int8, "cache", (torch.ones(6, 4), BLOCKS)),
    "packed data in int32": (kv_scatter_int8, "data", (_cache(0), BLOCKS, DATA.int(), SCALE)),
    "a scale for each block only": (kv_scatter_int8, "scale", (_cache(0), BLOCKS, DATA.to(torch.int8), SCALE[:, 0])),
    "scales in bfloat16": (kv_scatter_int8, "scale", (_cache(0), BLOCKS, DATA.to(torch.int8), SCALE.bfloat16())),
}


@pytest.mark.parametrize(("op", "named", "arguments"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_by_name(op: object, named: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        op(*arguments)  # type: ignore[operator]
