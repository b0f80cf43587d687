"""What the bytes of ggml's tensor types mean, and how they become rows of the native engine.

A row of a quantised tensor is a chain of blocks of 32 or 256 columns. Whatever the type, a block comes down to
integers, a scale for every 32 columns (16 in Q6_K) and, in the affine types, a minimum: w = scale * code + minimum.
`rows` starts from there. The `gguf` package knows names, numbers and sizes of the types, and its `dequantize`, which is
the definition, what a tensor is in float32; the integers and scales that it multiplies it does not give out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type


@dataclass(frozen=True)
class Parts:
    """codes (rows, columns) int8; scale and minimum (rows, groups) float32, over equal groups of columns."""

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None = None


@dataclass(frozen=True)
class Kind:
    """A tensor type. Floats have no `split`. `bits` is what the engine keeps a code in; `loss` says what that costs, ""
    for nothing."""

    type: Type
    split: Callable[[np.ndarray], Parts] | None = None
    bits: int = 16
    loss: str = ""

    @property
    def name(self) -> str:
        return self.type.name

    @property
    def columns(self) -> int:
        """Of a block."""
        return GGML_QUANT_SIZES[self.type][0]

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return GGML_QUANT_SIZES[self.type][1]


@dataclass(frozen=True)
class Rows:
    """A matrix for native/pack.h: codes packed by rows as it tells; float16 scales and minima as their bits."""

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None

    GROUP = 32


def rows(kind: Kind, raw: np.ndarray) -> Rows:
    """raw (rows, bytes) uint8 of a quantised type -> what the engine multiplies by.

    Nothing is rounded for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0. The scales of Q4_K and Q5_K are products of a float16 and
    6 bits; rounded to float16 they move a weight by at most 2**-11 (31 |scale| + |minimum|), with 15 for 31 in Q4_K.
    Q6_K's two groups of 16 columns become one of 32 in 8 bits: see `_merged`. Raises ValueError for scales that float16
    cannot hold.
    """
    assert kind.split is not None, f"{kind.name} is not quantised"
    parts = kind.split(_blocks(kind, raw))
    if parts.codes.shape[1] != Rows.GROUP * parts.scale.shape[1]:
        parts = _merged(parts)
    offset = 0 if parts.minimum is not None else 1 << (kind.bits - 1)
    codes = (parts.codes.astype(np.int16) + offset).astype(np.uint8)
    if kind.bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    elif kind.bits < 8:
        codes = _planes(codes, kind.bits)
    minima = None if parts.minimum is None else _float16(parts.minimum)
    return Rows(np.ascontiguousarray(codes), _float16(parts.scale), minima)


def _planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words of 32 columns, one for each bit of their codes, as bytes of a row."""
    planes = [np.packbits(codes >> bit & 1, axis=-1, bitorder="little") for bit in range(bits)]
    return np.stack([plane.reshape(len(codes), -1, 4) for plane in planes], axis=2).reshape(len(codes), -1)


def _float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    bad = np.argwhere(~np.isfinite(halves))
    if len(bad):
        row, group = bad[0]
        raise ValueError(f"row {row} has the scale {values[row, group]} over the {group + 1}. group of columns")
    return halves.view(np.uint16)


def _merged(parts: Parts) -> Parts:
    """Codes of 6 bits with a scale per 16 columns as codes of 8 bits with a scale per 32.

    A quarter of the larger scale is the step, so that its half of the columns is kept as it is (4 * code fits 8 bits)
    and the other half is rounded to it: no weight moves by more than half a step, or a whole one at the very end of the
    range, besides the step's own rounding to float16 (2**-11).
    """
    rows, groups = parts.scale.shape
    pairs = parts.scale.reshape(rows, groups // 2, 2)
    first = np.abs(pairs[..., :1]) >= np.abs(pairs[..., 1:])
    step = np.where(first, pairs[..., :1], pairs[..., 1:]) / 4
    ratio = np.divide(pairs, step, out=np.zeros_like(pairs), where=step != 0)
    codes = np.rint(parts.codes.reshape(rows, groups // 2, 2, -1) * ratio[..., None])
    return Parts(np.clip(codes, -128, 127).astype(np.int8).reshape(rows, -1), step[..., 0])


def _blocks(kind: Kind, raw: np.ndarray) -> np.ndarray:
    return raw.reshape(len(raw), -1, kind.nbytes)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 (rows, blocks)."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """(..., n) -> (..., 2 n): all low nibbles, then all high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _flat(codes: np.ndarray, less: int = 0) -> np.ndarray:
    return (codes.astype(np.int8) - np.int8(less)).reshape(len(codes), -1)


def _split_q4_0(blocks: np.ndarray) -> Parts:
    return Parts(_flat(_nibbles(blocks[..., 2:]), 8), _half(blocks, 0))


def _split_q4_1(blocks: np.ndarray) -> Parts:
    return Parts(_flat(_nibbles(blocks[..., 4:])), _half(blocks, 0), _half(blocks, 2))


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """(..., 4) -> (..., 32): bit j belongs to column j; moved to where a fifth bit stands."""
    return np.unpackbits(data, axis=-1, bitorder="little") << 4


def _split_q5_0(blocks: np.ndarray) -> Parts:
    return Parts(_flat(_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), 16), _half(blocks, 0))


def _split_q5_1(blocks: np.ndarray) -> Parts:
    codes = _flat(_nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]))
    return Parts(codes, _half(blocks, 0), _half(blocks, 2))


def _split_q8_0(blocks: np.ndarray) -> Parts:
    return Parts(_flat(blocks[..., 2:].view(np.int8)), _half(blocks, 0))


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of 6 bits that Q4_K and Q5_K keep in 12 bytes after two float16: (rows, 8 blocks) each.

    Bytes 0 to 3 and 4 to 7 hold the first four of each in their low 6 bits; bytes 8 to 11 hold the low 4 bits of the
    last four, scale below minimum, whose high 2 bits are the ones the first eight bytes had left.
    """
    low, middle, high = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    minimum = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    scale, minimum = _half(blocks, 0)[..., None] * scale, -_half(blocks, 2)[..., None] * minimum
    return scale.reshape(len(blocks), -1), minimum.reshape(len(blocks), -1)


def _split_q4_k(blocks: np.ndarray) -> Parts:
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return Parts(_flat(codes), *_scales_and_minima(blocks))


def _split_q5_k(blocks: np.ndarray) -> Parts:
    fifth = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit j of byte c: group j, column c
    codes = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(fifth.shape)
    return Parts(_flat(codes | fifth << 4), *_scales_and_minima(blocks))


def _split_q6_k(blocks: np.ndarray) -> Parts:
    low = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    scale = _half(blocks, 208)[..., None] * blocks[..., 192:208].view(np.int8)
    return Parts(_flat(low | high.reshape(low.shape) << 4, 32), scale.reshape(len(blocks), -1))


def q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows of Q4_0, (rows, bytes) uint8, of codes (rows, columns) from -8 to 7 and scales (rows, columns / 32)."""
    columns = (codes + 8).astype(np.uint8).reshape(*scale.shape, Rows.GROUP)
    low, high = np.split(columns, 2, axis=-1)
    return np.concatenate([_bytes(scale), low | high << 4], axis=-1).reshape(len(codes), -1)


def q5_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows of Q5_0, as `q4_0`, of codes from -16 to 15."""
    columns = (codes + 16).astype(np.uint8).reshape(*scale.shape, Rows.GROUP)
    low, high = np.split(columns & 15, 2, axis=-1)
    fifth = np.packbits(columns >> 4, axis=-1, bitorder="little")
    return np.concatenate([_bytes(scale), fifth, low | high << 4], axis=-1).reshape(len(codes), -1)


def q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows of Q8_0, as `q4_0`, of codes from -128 to 127."""
    columns = codes.astype(np.int8).view(np.uint8).reshape(*scale.shape, Rows.GROUP)
    return np.concatenate([_bytes(scale), columns], axis=-1).reshape(len(codes), -1)


def _bytes(scale: np.ndarray) -> np.ndarray:
    """(rows, blocks, 2) uint8: a float16 for each block."""
    return np.ascontiguousarray(scale.astype("<f2")[..., None]).view(np.uint8)


_ROUNDED = "scales and minima rounded to float16"

KINDS = {
    kind.type.value: kind
    for kind in (
        Kind(Type.F32),
        Kind(Type.F16),
        Kind(Type.BF16),
        Kind(Type.Q4_0, _split_q4_0, 4),
        Kind(Type.Q4_1, _split_q4_1, 4),
        Kind(Type.Q5_0, _split_q5_0, 5),
        Kind(Type.Q5_1, _split_q5_1, 5),
        Kind(Type.Q8_0, _split_q8_0, 8),
        Kind(Type.Q4_K, _split_q4_k, 4, _ROUNDED),
        Kind(Type.Q5_K, _split_q5_k, 5, _ROUNDED),
        Kind(Type.Q6_K, _split_q6_k, 8, "requantised to 8 bits in groups of 32 columns"),
    )
}
"""What is read, by its number in a file."""
