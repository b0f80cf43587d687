"""Trellis codes: the code as it is written down, the nearest sequence, what comes back from disk and in the engine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")

from pennyweight import formats  # noqa: E402
from pennyweight.formats import packed_int, planes, trellis  # noqa: E402
from pennyweight.quantize import _trellis, gptq, rtn  # noqa: E402

CODES = {2: (10, 2827, 9), 3: (9, 45627, 9), 4: (10, 2827, 13), 5: (9, 27533, 13), 6: (10, 6171, 13)}
"""Window, multiplier and power of each number of bits: files hold what these make of them, so they never change."""

ERRORS = {2: 0.077, 3: 0.0212, 4: 0.0059, 5: 0.0021, 6: 0.0010}
"""Of normally distributed weights; rounding to the best 2, 3 and 4 bits leaves 0.119, 0.037 and 0.0115 (Max, 1960)."""


def value(bits: int, state: int) -> int:
    """trellis.h in Python."""
    window, multiplier, power = CODES[bits]
    rounded = lambda a, b: (a * b + 0x4000) >> 15  # noqa: E731
    t = ((state << (16 - window)) * multiplier + (1 << (15 - window))) & 0xFFFF
    t = t - 0x10000 if t >= 0x8000 else t
    four = rounded(rounded(t, t), rounded(t, t))
    even = rounded(four, four)
    if power == 13:
        even = rounded(even, four)
    return rounded(t, (even + 32768) >> 1)


def sequence(bits: int, symbols) -> list[int]:
    """Values of a stream, symbol by symbol."""
    window, state, made = CODES[bits][0], 0, []
    for symbol in symbols:
        state = state >> bits | int(symbol) << (window - bits)
        made.append(value(bits, state))
    return made


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_values_are_those_of_the_code(bits):
    assert trellis.values(bits).tolist() == [value(bits, state) for state in range(1 << CODES[bits][0])]


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_new_bits_choose_from_values_spread_over_the_range(bits):
    """Whatever the older bits are: both ends can be had, and no value twice."""
    window = CODES[bits][0]
    older = np.arange(1 << (window - bits))
    choices = np.sort([trellis.values(bits)[older + (new << (window - bits))] for new in range(1 << bits)], axis=0)
    assert (choices[0] < -3000).all() and (choices[-1] > 3000).all()
    assert (np.diff(choices, axis=0) > 0).all()


@pytest.mark.parametrize(("bits", "rows"), [(2, 5), (3, 3), (4, 2), (6, 2)])
def test_the_nearest_sequence_is_found(bits, rows):
    generator = torch.Generator().manual_seed(bits)
    x, weight = 9000 * torch.randn(4, rows, generator=generator), torch.rand(4, rows, generator=generator) + 0.1
    symbols, made = _trellis.nearest(x, weight, bits)
    every = [(s, sequence(bits, s)) for s in itertools.product(range(1 << bits), repeat=rows)]
    for column in range(4):
        assert made[column].tolist() == sequence(bits, symbols[column])
        error = lambda v, c=column: float((weight[c] * (torch.tensor(v) - x[c]).square()).sum())  # noqa: E731
        assert error(made[column].tolist()) <= min(error(v) for _, v in every) * (1 + 1e-4)


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_the_error_is_that_of_the_code(bits):
    normal = torch.randn(16, trellis.RESTART, generator=torch.Generator().manual_seed(3))
    unit, errors = float(trellis.values(bits).std()), []
    for scale in (1.0, 0.95, 0.9, 0.85):
        x = normal * (unit * scale)
        errors.append((_trellis.nearest(x, torch.ones_like(x), bits)[1] - x).square().mean() / x.square().mean())
    assert min(errors) < ERRORS[bits]


@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_streams_begin_anew_and_come_back(bits):
    """From symbols to bytes, to floats, and row by row out of the engine; 1100 rows are two streams."""
    weight = torch.randn(1100, 64, generator=torch.Generator().manual_seed(0))
    spec = trellis.Spec(bits, 32)
    symbols, grid = rtn.quantize(weight, None, spec)
    parts = trellis.pack(symbols, grid.scale, spec)
    by_hand = [
        sequence(bits, symbols[: trellis.RESTART, c]) + sequence(bits, symbols[trellis.RESTART :, c]) for c in (0, 63)
    ]
    matrix = trellis.unpack(parts)
    wanted = torch.tensor(by_hand, dtype=torch.float32).T * grid.scale
    assert torch.equal(matrix[:, [0, 63]], wanted)
    made, out = formats.native("x", parts), np.empty(64, np.float32)
    for row in (0, 1, 63, 64, 1023, 1024, 1099):
        made.row(row, out)
        assert np.array_equal(out, matrix[row].numpy())


def test_large_matrices_are_made_in_parts():
    weight = torch.randn(2100, 32, generator=torch.Generator().manual_seed(0))
    spec = trellis.Spec(3, 32)
    whole = trellis.encode(weight, spec, lambda w, s: rtn.quantize(w, None, s), None)
    parts = [trellis.encode(part, spec, lambda w, s: rtn.quantize(w, None, s), None) for part in weight.split(1024)]
    joined = formats.joined(parts)
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_outliers_do_not_take_the_scale_from_everybody_or_fall_beyond_it():
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[7, 9] = 1.0
    parts = trellis.encode(weight, trellis.Spec(4, 64), lambda w, s: rtn.quantize(w, None, s), None)
    error = (trellis.unpack(parts) - weight).abs()
    assert error[7, 9] < 0.1
    assert error[20:].square().mean() < 0.008 * weight[20:].square().mean()


def test_fewer_bytes_than_rounded_codes_and_less_error():
    """What the format is for, with GPTQ on correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    weight, moment = torch.randn(256, 192, generator=generator), x.T @ x / len(x)
    prepared = gptq.prepare(moment)

    def of(spec):
        parts = formats.of(spec).encode(weight, spec, lambda w, s: gptq.quantize(w, prepared, s), None)
        off = formats.unpack(parts).float() - weight
        return spec.nbytes(*weight.shape), float(((off @ moment) * off).sum())

    for coded, plain in ((trellis.Spec(3, 64), planes.Spec(3, 32)), (trellis.Spec(4, 64), packed_int.Spec(4, 32))):
        (small, error), (large, other) = of(coded), of(plain)
        assert small < 0.94 * large and error < 0.75 * other


@pytest.mark.parametrize(
    "damage", [{"weight_shape": torch.tensor([96, 64, 7])}, {"weight_shape": torch.tensor([96, 64])}]
)
def test_what_is_no_code_is_refused(damage):
    parts = trellis.random(96, 64, trellis.Spec(2, 32), torch.Generator().manual_seed(0), 64)
    with pytest.raises(ValueError, match=r"bits|sizes"):
        trellis.unpack(parts | damage)
    with pytest.raises(ValueError, match="NaN or infinite"):
        formats.native("x", parts | {"weight_factor": torch.full((96,), torch.nan, dtype=torch.bfloat16)})
