# type: ignore
"""The four steps as Triton kernels; triton.py launches them, and its docstring says what is known of them."""

# Not checked for types: the bodies are Triton's dialect, and triton may not be installed.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _kept(x, importance, threshold, columns, BLOCK: tl.constexpr):
    """Of this program's block: the columns, x there, and whether they are kept."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    here = tl.load(x + column, mask=inside, other=0).to(tl.float32)
    size = tl.abs(here)
    if importance is not None:
        size = size * tl.load(importance + column, mask=inside, other=0)
    return column, here, inside & (size > threshold)


@triton.jit
def count(x, importance, threshold, columns, counts, BLOCK: tl.constexpr):
    """counts[block] = how many columns it keeps."""
    _, _, keep = _kept(x, importance, threshold, columns, BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(keep.to(tl.int32), axis=0))


@triton.jit
def scatter(x, importance, threshold, columns, counts, total, index, value, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """index and value of the kept columns, ascending; total[0] = how many. BLOCKS >= the number of blocks."""
    block, others = tl.program_id(0), tl.arange(0, BLOCKS)
    before = tl.sum(tl.load(counts + others, mask=others < block, other=0), axis=0)
    column, here, keep = _kept(x, importance, threshold, columns, BLOCK)
    rank = before + tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(index + rank, column, mask=keep)
    tl.store(value + rank, here, mask=keep)
    if block == tl.num_programs(0) - 1:
        tl.store(total, before + tl.sum(keep.to(tl.int32), axis=0))


@triton.jit
def _code(packed, NIBBLE: tl.constexpr, OFFSET: tl.constexpr):
    """code - OFFSET of one nibble of each word, in float32.

    As the mantissa of 2**23 a code is a float without a conversion, which GPUs do at a fraction of their rate.
    """
    return ((packed >> (4 * NIBBLE)) & 15 | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + OFFSET)


@triton.jit
def _six(word, both, group):
    """A group's scale or minimum of super scales: of groups 0 to 3 of a block 6 bits of `word`, of 4 to 7 low 4 bits of
    `both` and the 2 bits that are left of `word`."""
    shift = group % 4 * 8
    later = (both >> shift) & 15 | ((word >> (shift + 6)) & 3) << 4
    return tl.where(group % 8 < 4, (word >> shift) & 63, later).to(tl.float32)


@triton.jit
def multiply(
    words,  # the packed bytes as int32
    halves,  # the same as float16
    index,
    value,
    total,
    partial,
    columns,
    padded_rows,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial[slice, band's rows] = the sum over the slice of the kept columns, COLUMNS of them at a time."""
    BANDS: tl.constexpr = (TILE_ROWS // 8 + WORDS - 1) // WORDS
    GROUPS: tl.constexpr = TILE_ROWS // GROUP
    NIBBLES: tl.constexpr = (4 if SCALES == 1 else 2) * GROUPS  # where they begin in a chunk
    BETWEEN: tl.constexpr = NIBBLES % 4 == 2  # an odd number of scales leaves the nibbles between two words
    OFFSET: tl.constexpr = 8 if SCALES == 0 else 0

    tile, part = tl.program_id(0) // BANDS, tl.program_id(1)
    word = tl.program_id(0) % BANDS * WORDS + tl.arange(0, WORDS)
    inside = word < TILE_ROWS // 8
    row = word // 16 * 128 + word % 4 * 32 + word % 16 // 4 * 4
    group = row // GROUP

    found = tl.load(total)
    first, last = found * part // tl.num_programs(1), found * (part + 1) // tl.num_programs(1)
    zero = tl.zeros((COLUMNS, WORDS), tl.float32)
    # One sum per nibble: as a third dimension the compiler would spread them over threads, through shared memory.
    s0, s1, s2, s3, s4, s5, s6, s7, bias = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in tl.range(first, last, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        some = at < last
        x = tl.load(value + at, mask=some, other=0)
        chunk = tile.to(tl.int64) * columns + tl.load(index + at, mask=some, other=0)
        # What the mask leaves out is not read, not even of column 0: its scales may be anything.
        mask = some[:, None] & inside[None, :]
        in_words = words + (chunk * (CHUNK // 4) + NIBBLES // 4)[:, None] + word[None, :]
        in_halves = halves + (chunk * (CHUNK // 2))[:, None] + (group // 8 * 8 if SCALES == 2 else group)[None, :]
        packed = tl.load(in_words, mask=mask, other=0)
        if BETWEEN:
            packed = (packed >> 16 & 0xFFFF) | tl.load(in_words + 1, mask=mask, other=0) << 16
        scale = tl.load(in_halves, mask=mask, other=0).to(tl.float32)
        if SCALES == 2:
            in_block = words + (chunk * (CHUNK // 4))[:, None] + (group // 8 * 4)[None, :]
            both = tl.load(in_block + 3, mask=mask, other=0)
            scale *= _six(tl.load(in_block + 1, mask=mask, other=0), both, group[None, :])
        folded = x[:, None] * scale
        s0 += folded * _code(packed, 0, OFFSET)
        s1 += folded * _code(packed, 1, OFFSET)
        s2 += folded * _code(packed, 2, OFFSET)
        s3 += folded * _code(packed, 3, OFFSET)
        s4 += folded * _code(packed, 4, OFFSET)
        s5 += folded * _code(packed, 5, OFFSET)
        s6 += folded * _code(packed, 6, OFFSET)
        s7 += folded * _code(packed, 7, OFFSET)
        if SCALES == 1:
            bias += x[:, None] * tl.load(in_halves + GROUPS, mask=mask, other=0).to(tl.float32)
        if SCALES == 2:
            minimum = _six(tl.load(in_block + 2, mask=mask, other=0), both >> 4, group[None, :])
            bias -= x[:, None] * minimum * tl.load(in_halves + 1, mask=mask, other=0).to(tl.float32)
    out = partial + part * padded_rows + tile * TILE_ROWS + row
    sums = (s0, s1, s2, s3, s4, s5, s6, s7)
    for nibble in tl.static_range(8):
        done = tl.sum(sums[nibble] + bias, axis=0)
        tl.store(out + nibble // 2 + nibble % 2 * 16, done, mask=inside)


@triton.jit
def reduce(partial, y, rows, padded_rows, slices, ROWS: tl.constexpr, SLICES: tl.constexpr):
    """y[row] = the sum of its slices, SLICES of them at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((SLICES, ROWS), tl.float32)
    for first in range(0, slices, SLICES):
        part = first + tl.arange(0, SLICES)
        mask = (part < slices)[:, None] & (row < rows)[None, :]
        sums += tl.load(partial + part[:, None] * padded_rows + row[None, :], mask=mask, other=0)
    tl.store(y + row, tl.sum(sums, axis=0), mask=row < rows)
