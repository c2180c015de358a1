"""Loops of the prefix index, compiled by numba over plain arrays.

Integers that take part in unsigned arithmetic are wrapped in `np.uint64` throughout: numba turns a mix of signed and
unsigned 64-bit operands into floats.
"""

# mypy: disable-error-code="assignment,arg-type,return-value,no-any-return"
# Scalars are annotated `int`; to mypy, what comes out of an array or a cast is something else.

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omni_common.compiled import kernel

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

SET, POSITION, STAMP, HITS = 4, 5, 6, 7
"""Columns of `Rows.fields`; the first four are the key."""
PLANES = 5
HBM, EXPECTED = 0, 1
COUNT, LIMIT, SHIFT, EDGE, END, PLACED, EVICTED, SINK = range(8)
"""Entries of `Rows.meta`: rows in use; at which count to grow; bits that the hash is shifted right by to give a slot;
slots still to be spread by growth; slots that may be in use; rows ever placed; rows ever evicted; a place to write what
must be computed."""
NEVER = np.uint64(2**64 - 1)
"""An age no row reaches."""
NOWHERE = np.uint32(2**32 - 1)
"""In `pooled`: pools have held every block so far."""
_AHEAD = 32
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Rows(NamedTuple):
    """Open-addressing table: linear probing without wrap-around, deletion by shifting back. A row with set 0 is free.

    A slot's number is the top bits of the hash, so the table grows in place, from its high end downwards: while that
    lasts, rows whose slot by the former size is below EDGE are still found by the former size. But for growth, rows
    move towards lower slots, except for one slot up each time a row is placed.
    """

    words: U64
    """slots x 4; the first two are the key. As many as the table may ever have, though only END are touched."""
    fields: U32
    """slots x 8, over the same memory."""
    meta: I64


class Sets(NamedTuple):
    """Holder sets, interned: equal sets have one id. Set 0 is empty."""

    bits: U64
    """ids x words of member bits x `PLANES`."""
    refs: U32
    """Rows that name the set."""
    hashes: U64
    """Exclusive or over the set's bits, so a change of one bit is a change of one term."""
    by_hash: U32
    """Open-addressing table of ids by hash, a power of two; 0 is free."""
    free: U32
    """Stack of unused ids."""
    meta: I64
    """[0]: height of that stack."""
    draft: U64
    """One set under construction."""


@kernel
def _mixed(value: np.uint64) -> np.uint64:
    value = (value + _GOLDEN) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@kernel
def _lowest_bit(word: np.uint64) -> int:
    """Number of the lowest bit set; `word` is not 0."""
    number = 0
    for step in (32, 16, 8, 4, 2, 1):
        if word & ((_ONE << np.uint64(step)) - _ONE) == _ZERO:
            word >>= np.uint64(step)
            number += step
    return number


@kernel
def _home(rows: Rows, first: np.uint64) -> int:
    slot = np.int64((first * _GOLDEN) >> np.uint64(rows.meta[SHIFT]))
    if slot >> 1 < rows.meta[EDGE]:
        slot >>= 1
    return slot & ~1  # two rows fill a cache line: begin with the first of them


@kernel
def _fetch(rows: Rows, keys: U64, salt: np.uint64, start: int) -> None:
    """Touch the rows of the next few keys together: on a big table each is a cache miss of its own."""
    touched = _ZERO
    for i in range(start, min(start + _AHEAD, len(keys))):
        touched += rows.words[_home(rows, keys[i, 0] ^ salt), 0]
    rows.meta[SINK] = np.int64(touched)


@kernel
def _find(rows: Rows, first: np.uint64, second: np.uint64) -> int:
    """Slot of the key, or -1 - slot where it would go."""
    slot = _home(rows, first)
    while rows.fields[slot, SET] != 0:
        if rows.words[slot, 0] == first and rows.words[slot, 1] == second:
            return slot
        slot += 1
    return -1 - slot


@kernel
def _place(rows: Rows, slot: int, first: np.uint64, second: np.uint64) -> int:
    """Make a row for the key, given the free slot that `_find` told, and return its slot; -1: the table ends here.

    Rows that want a higher slot make way, so that late rows are no further from home than early ones. The row's
    fields are still to be written.
    """
    if slot == rows.meta[END] - 1:
        return -1
    home = _home(rows, first)
    while slot > home and _home(rows, rows.words[slot - 1, 0]) > home:
        for word in range(4):
            rows.words[slot, word] = rows.words[slot - 1, word]
        slot -= 1
    rows.words[slot, 0] = first
    rows.words[slot, 1] = second
    rows.fields[slot, HITS] = 0
    rows.meta[COUNT] += 1
    rows.meta[PLACED] += 1
    return slot


@kernel
def _vacate(rows: Rows, slot: int) -> None:
    after = slot + 1
    while rows.fields[after, SET] != 0:
        if _home(rows, rows.words[after, 0]) <= slot:
            for word in range(4):
                rows.words[slot, word] = rows.words[after, word]
            slot = after
        after += 1
    rows.fields[slot, SET] = 0
    rows.meta[COUNT] -= 1


@kernel
def spread(rows: Rows, num_slots: int) -> None:
    """Go on growing: move at least this many slots' rows to where the new size wants them."""
    top = edge = rows.meta[EDGE]
    while rows.fields[top, SET] != 0:
        top += 1
    edge = max(edge - num_slots, 0) & ~1  # rows of one home stay together
    moved = np.empty((top - edge, 4), np.uint64)
    count = 0
    for slot in range(edge, top):
        if rows.fields[slot, SET] != 0:
            for word in range(4):
                moved[count, word] = rows.words[slot, word]
            rows.fields[slot, SET] = 0
            count += 1
    rows.meta[EDGE] = edge
    rows.meta[COUNT] -= count
    for i in range(count):
        slot = _place(rows, -1 - _find(rows, moved[i, 0], moved[i, 1]), moved[i, 0], moved[i, 1])
        if slot >= 0:
            rows.words[slot, 2] = moved[i, 2]
            rows.words[slot, 3] = moved[i, 3]


@kernel
def _unindex(sets: Sets, number: int) -> None:
    mask = len(sets.by_hash) - 1
    hole = np.int64(sets.hashes[number]) & mask
    while sets.by_hash[hole] != number:
        hole = (hole + 1) & mask
    after = (hole + 1) & mask
    while sets.by_hash[after] != 0:
        home = np.int64(sets.hashes[sets.by_hash[after]]) & mask
        if ((after - home) & mask) >= ((after - hole) & mask):
            sets.by_hash[hole] = sets.by_hash[after]
            hole = after
        after = (after + 1) & mask
    sets.by_hash[hole] = 0


@kernel
def _release(sets: Sets, number: int) -> None:
    """One row fewer names the set."""
    sets.refs[number] -= 1
    if sets.refs[number] == 0:
        _unindex(sets, number)
        sets.free[sets.meta[0]] = number
        sets.meta[0] += 1


@kernel
def _interned(sets: Sets, hashed: np.uint64) -> int:
    """Id of the drafted set. Needs a free id."""
    words = len(sets.draft)
    something = _ZERO
    for word in range(words):
        for plane in range(PLANES):
            something |= sets.draft[word, plane]
    if something == _ZERO:
        return 0
    mask = len(sets.by_hash) - 1
    at = np.int64(hashed) & mask
    while sets.by_hash[at] != 0:
        number = np.int64(sets.by_hash[at])
        same = sets.hashes[number] == hashed
        if same:
            for word in range(words):
                for plane in range(PLANES):
                    same &= sets.bits[number, word, plane] == sets.draft[word, plane]
        if same:
            return number
        at = (at + 1) & mask
    sets.meta[0] -= 1
    number = np.int64(sets.free[sets.meta[0]])
    for word in range(words):
        for plane in range(PLANES):
            sets.bits[number, word, plane] = sets.draft[word, plane]
    sets.refs[number] = 0
    sets.hashes[number] = hashed
    sets.by_hash[at] = number
    return number


@kernel
def _changed(sets: Sets, number: int, bit: int, gained: int, lost: int) -> int:
    """The set after member `bit` gained and lost these planes (bit masks)."""
    home, mask = bit >> 6, _ONE << np.uint64(bit & 63)
    hashed = sets.hashes[number]
    flipped = 0
    for plane in range(PLANES):
        held = sets.bits[number, home, plane] & mask != _ZERO
        if ((lost if held else gained) >> plane) & 1:
            flipped |= 1 << plane
            hashed ^= _mixed(np.uint64((plane << 32) | bit))
    if flipped == 0:
        return number
    for word in range(len(sets.draft)):
        for plane in range(PLANES):
            sets.draft[word, plane] = sets.bits[number, word, plane]
    for plane in range(PLANES):
        if (flipped >> plane) & 1:
            sets.draft[home, plane] ^= mask
    return _interned(sets, hashed)


@kernel
def _without(sets: Sets, number: int, dead: U64) -> int:
    """The set after all members in `dead` lost everything."""
    hashed = sets.hashes[number]
    flipped = False
    for word in range(len(dead)):
        if dead[word] == _ZERO:
            continue
        for plane in range(PLANES):
            gone = sets.bits[number, word, plane] & dead[word]
            flipped |= gone != _ZERO
            while gone != _ZERO:
                hashed ^= _mixed(np.uint64((plane << 32) | ((word << 6) + _lowest_bit(gone))))
                gone &= gone - _ONE
    if not flipped:
        return number
    for word in range(len(dead)):
        for plane in range(PLANES):
            sets.draft[word, plane] = sets.bits[number, word, plane] & ~dead[word]
    return _interned(sets, hashed)


@kernel
def _assign(rows: Rows, sets: Sets, slot: int, old: int, new: int) -> bool:
    """Let the row name another set; a row without holders goes. True: the old set is no more, its id free again."""
    if new == old:
        return False
    if new == 0:
        _vacate(rows, slot)
    else:
        rows.fields[slot, SET] = new
        sets.refs[new] += 1
    if old == 0:
        return False
    _release(sets, old)
    return sets.refs[old] == 0


@kernel
def _forget(marks: Rows, first: np.uint64, second: np.uint64, salt: np.uint64) -> None:
    slot = _find(marks, first ^ salt, second)
    if slot >= 0:
        _vacate(marks, slot)


@kernel
def update(
    rows: Rows, sets: Sets, marks: Rows, keys: U64, positions: U32, start: int, bit: int, salt: int,
    gained: int, lost: int, stamp: int,
) -> int:  # fmt: skip
    """Let member `bit` gain and lose planes on keys[start:]; blocks are added where something is gained.

    Returns how many keys are done: fewer than all when the table or the sets have to grow first.
    """
    from_set, to_set = -1, -1
    for i in range(start, len(keys)):
        if sets.meta[0] == 0 or rows.meta[COUNT] >= rows.meta[LIMIT]:
            return i
        if (i - start) % _AHEAD == 0:
            _fetch(rows, keys, _ZERO, i)
        first, second = keys[i, 0], keys[i, 1]
        slot = _find(rows, first, second)
        old = 0
        if slot >= 0:
            old = np.int64(rows.fields[slot, SET])
        elif gained == 0:
            continue
        else:
            slot = _place(rows, -1 - slot, first, second)
            if slot < 0:
                continue
            rows.fields[slot, POSITION] = positions[i] if len(positions) > 1 else positions[0] + i
        if gained != 0:
            rows.fields[slot, STAMP] = stamp
        if (lost >> EXPECTED) & 1 and sets.bits[old, bit >> 6, EXPECTED] & (_ONE << np.uint64(bit & 63)) != _ZERO:
            _forget(marks, first, second, np.uint64(salt))
        if old != from_set:
            from_set, to_set = old, _changed(sets, old, bit, gained, lost)
        if _assign(rows, sets, slot, old, to_set):
            from_set = -1
    return len(keys)


@kernel
def expect(
    rows: Rows, sets: Sets, marks: Rows, keys: U64, start: int, bit: int, salt: int,
    serial: int, stamp: int, marked: U64,
) -> int:  # fmt: skip
    """Mark keys[start:] as coming to member `bit`, except those it holds in hbm, and note the serial of each mark.

    marked[0, 0] counts the keys marked, which follow from marked[1]. Returns how many keys are done, as `update` does.
    """
    word, mask = bit >> 6, _ONE << np.uint64(bit & 63)
    from_set, to_set = -1, -1
    for i in range(start, len(keys)):
        if sets.meta[0] == 0 or rows.meta[COUNT] >= rows.meta[LIMIT] or marks.meta[COUNT] >= marks.meta[LIMIT]:
            return i
        if (i - start) % _AHEAD == 0:
            _fetch(rows, keys, _ZERO, i)
            _fetch(marks, keys, np.uint64(salt), i)
        first, second = keys[i, 0], keys[i, 1]
        slot = _find(rows, first, second)
        old = 0
        if slot >= 0:
            old = np.int64(rows.fields[slot, SET])
            rows.fields[slot, STAMP] = stamp
            if sets.bits[old, word, HBM] & mask != _ZERO:
                continue
        mark = _find(marks, first ^ np.uint64(salt), second)
        if mark < 0:
            mark = _place(marks, -1 - mark, first ^ np.uint64(salt), second)
            if mark < 0:
                continue
            marks.fields[mark, SET] = 1
        marks.fields[mark, STAMP] = serial
        if slot < 0:
            slot = _place(rows, -1 - slot, first, second)
            if slot < 0:
                continue
            rows.fields[slot, STAMP] = stamp
            rows.fields[slot, POSITION] = i
        if old != from_set:
            from_set, to_set = old, _changed(sets, old, bit, np.int64(1 << EXPECTED), np.int64(0))
        if _assign(rows, sets, slot, old, to_set):
            from_set = -1
        marked[0, 0] += _ONE
        at = np.int64(marked[0, 0])
        marked[at, 0] = first
        marked[at, 1] = second
    return len(keys)


@kernel
def expire(rows: Rows, sets: Sets, marks: Rows, keys: U64, start: int, bit: int, salt: int, serial: int) -> int:
    """End the marks of keys[start:] that no later `expect` refreshed. A negative `bit`: the member is gone."""
    from_set, to_set = -1, -1
    for i in range(start, len(keys)):
        if sets.meta[0] == 0:
            return i
        if (i - start) % _AHEAD == 0:
            _fetch(marks, keys, np.uint64(salt), i)
            _fetch(rows, keys, _ZERO, i)
        mark = _find(marks, keys[i, 0] ^ np.uint64(salt), keys[i, 1])
        if mark < 0 or marks.fields[mark, STAMP] != serial:
            continue
        _vacate(marks, mark)
        slot = _find(rows, keys[i, 0], keys[i, 1]) if bit >= 0 else -1
        if slot >= 0:
            old = np.int64(rows.fields[slot, SET])
            if old != from_set:
                from_set, to_set = old, _changed(sets, old, bit, np.int64(0), np.int64(1 << EXPECTED))
            if _assign(rows, sets, slot, old, to_set):
                from_set = -1
    return len(keys)


@kernel
def _pool_from(sets: Sets, number: int, tiers: I64) -> int:
    """First tier from which on a pool has the block; the number of tiers where none has."""
    for tier in range(len(tiers)):
        pool = tiers[tier, 1]
        if pool >= 0:
            for plane in range(PLANES):
                if sets.bits[number, pool >> 6, plane] >> np.uint64(pool & 63) & _ONE != _ZERO:
                    return tier
    return len(tiers)


@kernel
def _narrow(sets: Sets, number: int, block: int, tiers: I64, standing: U64, pooled: U32, depths: U32) -> bool:
    """Drop who cannot have this block, tier by tier, noting how far they came. False: nobody is left."""
    covered = _pool_from(sets, number, tiers)
    for tier in range(covered):
        if pooled[tier] == NOWHERE:
            pooled[tier] = block
    left = pooled[len(tiers) - 1] == NOWHERE
    for word in range(len(standing)):
        have = _ZERO
        for tier in range(covered):
            if tiers[tier, 0] >= 0:
                have |= sets.bits[number, word, tiers[tier, 0]]
            gone = standing[word, tier] & ~have
            standing[word, tier] &= have
            while gone != _ZERO and block > 0:
                depths[(word << 6) + _lowest_bit(gone), tier] = block
                gone &= gone - _ONE
        left |= standing[word, len(tiers) - 1] != _ZERO
    return left


@kernel
def lookup(rows: Rows, sets: Sets, keys: U64, tiers: I64, standing: U64, pooled: U32, depths: U32, stamp: int) -> int:
    """Longest prefix of `keys` per member bit and tier.

    tiers: plane, or -1 and the bit of a pool. standing (words x tiers): the workers asked about, in every tier.
    pooled (tiers): NOWHERE; becomes what pools alone give. depths (bits x tiers): 0; becomes the answer.
    Returns the longest of all. Stamps the blocks of that prefix and counts a hit on its last.
    """
    last, previous, walked = -1, -1, 0
    for i in range(len(keys)):
        if i % _AHEAD == 0:
            _fetch(rows, keys, _ZERO, i)
        slot = _find(rows, keys[i, 0], keys[i, 1])
        if slot < 0:
            break
        number = np.int64(rows.fields[slot, SET])
        if number != previous:
            if not _narrow(sets, number, i, tiers, standing, pooled, depths):
                break
            previous = number
        if rows.fields[slot, STAMP] != stamp:
            rows.fields[slot, STAMP] = stamp
        last = slot
        walked = i + 1
    if last >= 0:
        rows.fields[last, HITS] += 1
    for tier in range(len(tiers)):
        if pooled[tier] == NOWHERE:
            pooled[tier] = walked
        for word in range(len(standing)):
            here = standing[word, tier]
            while here != _ZERO:
                depths[(word << 6) + _lowest_bit(here), tier] = walked
                here &= here - _ONE
    return walked


@kernel
def sweep(rows: Rows, sets: Sets, start: int, stop: int, dead: U64, oldest: np.uint64, stamp: int) -> int:
    """From slot `start` down to `stop`: evict rows of at least this age, take dead members out of the others.

    Returns the slot to go on from: `stop` - 1, or more when the sets have to grow first.
    """
    for slot in range(start, stop - 1, -1):
        old = np.int64(rows.fields[slot, SET])
        if old == 0:
            continue
        if sets.meta[0] == 0:
            return slot
        age = np.uint64(np.uint32(stamp - np.int64(rows.fields[slot, STAMP])))
        if (age << np.uint64(32)) | np.uint64(rows.fields[slot, POSITION]) >= oldest:
            _vacate(rows, slot)
            _release(sets, old)
            rows.meta[EVICTED] += 1
        else:
            _assign(rows, sets, slot, old, _without(sets, old, dead))
    return stop - 1


@kernel
def reindex(sets: Sets) -> None:
    """Fill an empty `by_hash` with the ids in use."""
    mask = len(sets.by_hash) - 1
    for number in range(1, len(sets.refs)):
        if sets.refs[number] != 0:
            at = np.int64(sets.hashes[number]) & mask
            while sets.by_hash[at] != 0:
                at = (at + 1) & mask
            sets.by_hash[at] = number
