"""Zigzag: the bytes are where the format says, and products leave out exactly what they are told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.formats import zigzag
from pennyweight.formats.zigzag import Spec

specs = st.builds(
    Spec,
    group=st.sampled_from(zigzag.GROUPS),
    affine=st.booleans(),
    tile_rows=st.sampled_from([128, 256, 384, 2048, 4096]),
)


def random_parts(rows: int, columns: int, spec: Spec, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    groups = -(-rows // spec.group)
    scale = (0.01 + 0.01 * torch.rand(groups, columns, generator=random)).half()
    minimum = -(0.1 + 0.05 * torch.rand(groups, columns, generator=random)).half() if spec.affine else None
    return codes, scale, minimum


def packed_from(parts, spec: Spec):
    codes, scale, minimum = parts
    return zigzag.pack(codes, scale, spec, minimum)


@settings(max_examples=60, deadline=None)
@given(spec=specs, rows=st.sampled_from([1, 63, 128, 200, 2049]), columns=st.sampled_from([1, 3, 4, 15, 17]))
def test_packing_loses_nothing(spec, rows, columns):
    parts = random_parts(rows, columns, spec)
    packed = packed_from(parts, spec)
    assert packed["weight_zigzag"].numel() == zigzag.nbytes(rows, columns, spec)
    assert zigzag.spec_of(packed) == spec
    for found, part in zip(zigzag.codes_of(packed), parts, strict=True):
        assert found is part is None or torch.equal(found, part)
    matrix, fewer = zigzag.unpack(packed), -(-rows // 3)
    assert torch.equal(zigzag.unpack(zigzag.slice_rows(packed, fewer)), matrix[:fewer])


@settings(max_examples=30)
@given(spec=specs, last=st.sampled_from([1, 128, 200]), scaled=st.booleans())
def test_stacked_matrices_are_the_matrices(spec, last, scaled):
    matrices = []
    for i, rows in enumerate((256, 2176, last)):
        scale = torch.linspace(0.5, 2, rows) if scaled and i != 1 else None
        matrices.append(
            zigzag.pack(*random_parts(rows, 5, spec, i)[:2], spec, random_parts(rows, 5, spec, i)[2], scale)
        )
    stacked = zigzag.stack(matrices)
    assert torch.equal(zigzag.unpack(stacked), torch.cat([zigzag.unpack(parts) for parts in matrices]))


def test_what_does_not_stack_is_refused():
    plain, narrow = Spec(group=32), Spec(group=32)
    uneven = packed_from(random_parts(200, 5, plain), plain)
    other = packed_from(random_parts(128, 4, narrow), narrow)
    for matrices in ([uneven, uneven], [packed_from(random_parts(128, 5, plain), plain), other]):
        assert not zigzag.can_stack(matrices)
        with pytest.raises(ValueError, match="do not stack"):
            zigzag.stack(matrices)


def test_every_nibble_is_where_the_format_says():
    spec, rows, columns = Spec(group=32, affine=True, tile_rows=256), 500, 3
    codes, scale, minimum = random_parts(rows, columns, spec)
    chunks = zigzag.pack(codes, scale, spec, minimum)["weight_zigzag"].view(2, columns, spec.chunk_bytes).numpy()
    halves = chunks[:, :, :32].copy().view(np.float16)
    for row in range(rows):
        tile, r = divmod(row, 256)
        u, high, lane, e = r % 128 // 32, r % 32 // 16, r % 16 // 4, r % 4
        for column in range(columns):
            byte = chunks[tile, column, 32 + r // 128 * 64 + 16 * lane + 4 * u + e]
            assert (byte >> 4 if high else byte & 15) == codes[row, column]
            assert halves[tile, column, r // 32] == scale[row // 32, column].numpy()
            assert halves[tile, column, 8 + r // 32] == minimum[row // 32, column].numpy()


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(Spec(64, False, 2048), 4.25), (Spec(64, True, 2048), 4.5), (Spec(32, False, 4096), 4.5), (Spec(128), 4.125)],
)
def test_bits_per_weight(spec, bits):
    assert 8 * zigzag.nbytes(4096, 100, spec) / 4096 / 100 == bits


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the group is one of"):
        Spec(group=48)
    with pytest.raises(ValueError, match="multiple of 128"):
        Spec(tile_rows=100)
    codes, scale, _ = random_parts(128, 4, Spec())
    with pytest.raises(ValueError, match="minimum"):
        zigzag.pack(codes, scale, Spec(affine=True))
    with pytest.raises(ValueError, match="4 bits hold"):
        zigzag.pack(codes + 9, scale, Spec())
    with pytest.raises(ValueError, match="bytes"):
        zigzag.unpack(zigzag.pack(codes, scale, Spec()) | {"weight_zigzag": torch.zeros(64, dtype=torch.uint8)})


_native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")


def product(parts, spec: Spec, x: np.ndarray, threshold: float = -1.0, kernels: str = "best") -> np.ndarray:
    rows, columns = parts[0].shape
    packed = packed_from(parts, spec)["weight_zigzag"].numpy()
    matrix = _native.Matrix.zigzag(packed, rows, columns, spec.tile_rows, spec.group, spec.affine)
    y = np.full((len(x), rows), np.nan, np.float32)
    matrix.times(x, y, kernels, threshold)
    return y


def activations(tokens: int, columns: int) -> np.ndarray:
    """Normal, with some channels twelve times as large and every seventh zero."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[:, rng.random(columns) < 0.01] *= 12
    x[:, ::7] = 0
    return x


def relative(found: np.ndarray, x: np.ndarray, dense: np.ndarray) -> float:
    """Error over the size of what was added up: with few columns a sum may cancel to nothing."""
    return float(np.linalg.norm(found - x @ dense.T) / np.sqrt((x.astype(float) ** 2 @ (dense.T**2)).sum()))


@pytest.mark.parametrize("kernels", _native.kernel_names())
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 17), (200, 63), (2049, 257)])
def test_products_are_within_one_percent(kernels, affine, rows, columns):
    spec = Spec(affine=affine).of(rows)
    parts, x = random_parts(rows, columns, spec), activations(3, columns)
    dense = zigzag.dequantize(*parts, spec).double().numpy()
    for threshold in (-1.0, 0.0, 0.5):
        kept = np.where(np.abs(x) > threshold, x, 0)
        assert relative(product(parts, spec, x, threshold, kernels), kept, dense) < 0.01


def test_no_column_is_dropped_and_none_too_many_read():
    """Each column alone, whatever its place in steps of 16: scales of all others are NaN."""
    spec = Spec(tile_rows=128)
    for kept in (1, 3, 4, 15, 16, 17, 31, 33):
        codes, scale, _ = random_parts(128, 40, spec)
        x = np.zeros((1, 40), np.float32)
        chosen = np.random.default_rng(kept).permutation(40)[:kept]
        x[0, chosen] = 1 + np.arange(kept)
        dense = zigzag.dequantize(codes, scale, None, spec).numpy()
        scale[:, np.setdiff1d(np.arange(40), chosen)] = torch.nan
        found = product((codes, scale, None), spec, x, 0.0)
        assert relative(found, x, dense) < 0.01


def test_everything_below_the_threshold_gives_zero():
    spec = Spec(affine=True, tile_rows=256)
    parts, x = random_parts(200, 33, spec), activations(1, 33)
    np.testing.assert_array_equal(product(parts, spec, x, np.inf), np.zeros((1, 200), np.float32))
