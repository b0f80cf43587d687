"""Zigzag: the bytes are where the format says, and products leave out exactly what they are told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.formats import Grid, zigzag
from pennyweight.formats.zigzag import Spec
from pennyweight.kernels.zigzag import reference

specs = st.one_of(
    st.builds(
        Spec,
        group=st.sampled_from(zigzag.GROUPS),
        scales=st.sampled_from(["symmetric", "affine"]),
        tile_rows=st.sampled_from([128, 256, 384, 2048, 4096]),
    ),
    st.builds(Spec, group=st.just(32), scales=st.just("super"), tile_rows=st.sampled_from([256, 768, 2048, 4096])),
)
TENSORS = ("scale", "minimum", "factors", "sixes")


def random_parts(rows: int, columns: int, spec: Spec, seed: int = 0) -> tuple[torch.Tensor, Grid]:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    groups = -(-rows // spec.group)
    if spec.scales == "super":
        factors = (1e-3 + 1e-3 * torch.rand(2, -(-groups // 8), columns, generator=random)).half()
        return codes, Grid.of_super(
            factors, torch.randint(0, 64, (2, groups, columns), generator=random, dtype=torch.uint8)
        )
    scale = (0.01 + 0.01 * torch.rand(groups, columns, generator=random)).half()
    minimum = -(0.1 + 0.05 * torch.rand(groups, columns, generator=random)).half()
    return codes, Grid(scale, minimum if spec.scales == "affine" else None)


def packed_from(parts: tuple[torch.Tensor, Grid], spec: Spec):
    return zigzag.pack(*parts, spec)


@settings(max_examples=60, deadline=None)
@given(spec=specs, rows=st.sampled_from([1, 63, 128, 200, 2049]), columns=st.sampled_from([1, 3, 4, 15, 17]))
def test_packing_loses_nothing(spec, rows, columns):
    parts = random_parts(rows, columns, spec)
    packed = packed_from(parts, spec)
    assert packed["weight_zigzag"].numel() == spec.tensors(rows, columns)["weight_zigzag"][1][0]
    assert zigzag.spec_of(packed) == spec
    codes, grid = zigzag.codes_of(packed)
    assert torch.equal(codes, parts[0])
    for name in TENSORS:
        found, part = getattr(grid, name), getattr(parts[1], name)
        assert found is part is None or torch.equal(found, part)
    matrix, fewer = zigzag.unpack(packed), -(-rows // 3)
    assert torch.equal(zigzag.unpack(zigzag.slice_rows(packed, fewer)), matrix[:fewer])


@settings(max_examples=30)
@given(spec=specs, rows=st.sampled_from([63, 200, 513]), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_an_order_moves_chunks_and_changes_nothing_else(spec, rows, columns, seed):
    parts = random_parts(rows, columns, spec)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).int()
    plain, ordered = zigzag.pack(*parts, spec), zigzag.pack(*parts, spec, order=order)
    chunks = [each["weight_zigzag"].view(-1, columns, spec.chunk_bytes) for each in (plain, ordered)]
    assert torch.equal(chunks[1], chunks[0][:, order.long()])
    assert torch.equal(zigzag.unpack(ordered), zigzag.unpack(plain))
    assert torch.equal(zigzag.unpack(zigzag.slice_rows(ordered, 40)), zigzag.unpack(plain)[:40])
    tall = zigzag.pack(*random_parts(spec.whole, columns, spec), spec, order=order)
    stacked = zigzag.stack([tall, ordered])
    assert torch.equal(zigzag.unpack(stacked), torch.cat([zigzag.unpack(tall), zigzag.unpack(plain)]))
    assert zigzag.can_stack([tall, plain]) == torch.equal(order, torch.arange(columns, dtype=torch.int32))


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_an_order_that_is_none_is_refused(order):
    parts, wrong = random_parts(128, 3, Spec()), torch.tensor(order, dtype=torch.int32)
    with pytest.raises(ValueError, match="order"):
        zigzag.pack(*parts, Spec(), order=wrong)
    with pytest.raises(ValueError, match="order"):
        zigzag.unpack(zigzag.pack(*parts, Spec()) | {"weight_order": wrong})


@settings(max_examples=30)
@given(spec=specs, last=st.sampled_from([1, 128, 200]), scaled=st.booleans())
def test_stacked_matrices_are_the_matrices(spec, last, scaled):
    matrices = []
    for i, rows in enumerate((256, 2304, last)):
        scale = torch.linspace(0.5, 2, rows) if scaled and i != 1 else None
        matrices.append(zigzag.pack(*random_parts(rows, 5, spec, i), spec, scale))
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
    spec, rows, columns = Spec(group=32, scales="affine", tile_rows=256), 500, 3
    codes, grid = random_parts(rows, columns, spec)
    scale, minimum = grid.scale, grid.minimum
    assert minimum is not None
    chunks = zigzag.pack(codes, grid, spec)["weight_zigzag"].view(2, columns, spec.chunk_bytes).numpy()
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
    [
        (Spec(64, "symmetric", 2048), 4.25),
        (Spec(64, "affine", 2048), 4.5),
        (Spec(32, "symmetric", 4096), 4.5),
        (Spec(128), 4.125),
        (Spec(32, "super", 2048), 4.5),
    ],
)
def test_bits_per_weight(spec, bits):
    assert 8 * spec.tensors(4096, 100)["weight_zigzag"][1][0] / 4096 / 100 == bits


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the group is one of"):
        Spec(group=48)
    with pytest.raises(ValueError, match="multiple of 128"):
        Spec(tile_rows=100)
    for wrong in ((64, "super", 512), (32, "super", 384), (64, "other", 128)):
        with pytest.raises(ValueError, match="the group is one of"):
            Spec(*wrong)
    codes, grid = random_parts(128, 4, Spec())
    for scales in ("affine", "super"):
        with pytest.raises(ValueError, match="minimum"):
            zigzag.pack(codes, Grid(grid.scale[[0, 0, 1, 1]]), Spec(32, scales))
    with pytest.raises(ValueError, match="4 bits hold"):
        zigzag.pack(codes + 9, grid, Spec())
    packed = zigzag.pack(codes, grid, Spec())
    with pytest.raises(ValueError, match="bytes"):
        zigzag.unpack(packed | {"weight_zigzag": torch.zeros(64, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="scales of kind 3"):
        zigzag.unpack(packed | {"weight_layout": torch.tensor([64, 3, 128])})


def test_a_block_of_super_scales_is_ggmls_q4_k_with_its_rows_down_the_column():
    """Headers byte for byte; nibbles in ggml's order, and then ggml's own reading of them (SpQt, section on layout)."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    spec, rows, columns = Spec(32, "super", 512), 1000, 3
    codes, grid = random_parts(rows, columns, spec)
    packed = zigzag.pack(codes, grid, spec)
    chunks = packed["weight_zigzag"].view(2, columns, spec.chunk_bytes).numpy()
    full = torch.nn.functional.pad(codes, (0, 0, 0, 24)).view(4, 256, columns).permute(0, 2, 1)
    pairs = full.reshape(4, columns, 4, 2, 32)  # of 64 weights the first 32 are low nibbles, the others high ones
    nibbles = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(4, columns, 128).numpy()
    headers = chunks[:, :, :32].reshape(2, columns, 2, 16).transpose(0, 2, 1, 3).reshape(4, columns, 16)
    blocks = np.concatenate([headers, nibbles], axis=2)
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)  # (band, column, row of the band)
    matrix = torch.from_numpy(found).permute(0, 2, 1).reshape(1024, columns)[:rows]
    torch.testing.assert_close(zigzag.unpack(packed), matrix, rtol=1e-6, atol=1e-7)


_native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")


def product(parts, spec: Spec, x: np.ndarray, threshold: float = -1.0, kernels: str = "best") -> np.ndarray:
    return multiplied(linear_of(parts, spec, threshold), 1, x, len(parts[0]), kernels=kernels)


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
@pytest.mark.parametrize("scales", zigzag.SCALES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 17), (200, 63), (2049, 257)])
def test_products_are_within_one_percent(kernels, scales, rows, columns):
    spec = Spec(32 if scales == "super" else 64, scales).of(rows)
    parts, x = random_parts(rows, columns, spec), activations(3, columns)
    dense = zigzag.dequantize(*parts, spec).double().numpy()
    for threshold in (-1.0, 0.0, 0.5):
        kept = np.where(np.abs(x) > threshold, x, 0)
        assert relative(product(parts, spec, x, threshold, kernels), kept, dense) < 0.01


def test_no_column_is_dropped_and_none_too_many_read():
    """Each column alone, whatever its place in steps of 16: scales of all others are NaN."""
    spec = Spec(tile_rows=128)
    for kept in (1, 3, 4, 15, 16, 17, 31, 33):
        codes, grid = random_parts(128, 40, spec)
        x = np.zeros((1, 40), np.float32)
        chosen = np.random.default_rng(kept).permutation(40)[:kept]
        x[0, chosen] = 1 + np.arange(kept)
        dense = zigzag.dequantize(codes, grid, spec).numpy()
        grid.scale[:, np.setdiff1d(np.arange(40), chosen)] = torch.nan
        found = product((codes, grid), spec, x, 0.0)
        assert relative(found, x, dense) < 0.01


@pytest.mark.parametrize("kernels", _native.kernel_names())
def test_normal_activations_cost_half_a_percent(kernels):
    spec = Spec(64, tile_rows=1024)
    parts, x = random_parts(1024, 1024, spec), np.random.default_rng(1).standard_normal((4, 1024)).astype(np.float32)
    found, wanted = product(parts, spec, x, kernels=kernels), x @ zigzag.dequantize(*parts, spec).double().numpy().T
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.005


def test_the_reference_is_float32():
    parts, x = zigzag.pack(*random_parts(500, 300, Spec()), Spec()), torch.from_numpy(activations(1, 300)[0])
    for threshold in (-1.0, 0.5):
        found, wanted = (reference.times(parts, each, threshold) for each in (x, x.double()))
        assert (found - wanted).norm() / wanted.norm() < 1e-6


def linear_of(parts, spec: Spec, threshold: float = -1.0, bias: np.ndarray | None = None):
    rows, columns = parts[0].shape
    packed = packed_from(parts, spec)["weight_zigzag"].numpy()
    matrix = _native.Matrix.zigzag(packed, rows, columns, spec.tile_rows, spec.group, _native.Scales[spec.scales])
    matrix.threshold = threshold
    linear = _native.Linear()
    linear.add(matrix)
    if bias is not None:
        linear.set_bias(bias)
    return linear


def multiplied(linear, threads: int, x: np.ndarray, rows: int, sparse: bool = True, kernels: str = "best"):
    y = np.full((len(x), rows), np.nan, np.float32)
    _native.Product(linear, threads, kernels).run(x, y, sparse)
    return y


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("columns", [2, 15, 16, 17, 33, 100, 530])
def test_threads_read_every_column_above_the_threshold_and_no_other(threads, columns):
    spec = Spec(64, tile_rows=256)
    parts, x = random_parts(200, columns, spec), activations(1, columns)
    dense = zigzag.dequantize(*parts, spec).double().numpy()
    for share in (0.1, 0.5, 0.9):
        threshold = float(np.quantile(np.abs(x), share))
        found = multiplied(linear_of(parts, spec, threshold), threads, x, 200)
        assert relative(found, np.where(np.abs(x) > threshold, x, 0), dense) < 0.01


@pytest.mark.parametrize("scales", zigzag.SCALES)
@pytest.mark.parametrize(("rows", "tile_rows"), [(500, 512), (17000, 17152)])  # columns are split, and rows
def test_threads_do_not_change_a_product(scales, rows, tile_rows):
    """Where columns are split sums end in other last bits; where rows are, not even that. Every run gives the same."""
    spec, x = Spec(32 if scales == "super" else 64, scales, tile_rows), activations(1, 100)
    linear = linear_of(random_parts(rows, 100, spec), spec, 0.4)
    one = multiplied(linear, 1, x, rows)
    np.testing.assert_array_equal(one, multiplied(linear, 1, x, rows))
    for threads in (2, 3):
        found = multiplied(linear, threads, x, rows)
        np.testing.assert_array_equal(found, multiplied(linear, threads, x, rows))
        assert np.linalg.norm(found - one) / np.linalg.norm(one) < 1e-6
        if rows / threads > 4096:
            np.testing.assert_array_equal(found, one)


def test_tiles_taller_than_a_table_holds():
    """A vocabulary's worth of rows: 1,040 groups of 32, worked on in slices."""
    spec, x = Spec(32, tile_rows=33280), activations(2, 20)
    parts = random_parts(33280, 20, spec)
    dense = zigzag.dequantize(*parts, spec).double().numpy()
    for kernels in _native.kernel_names():
        assert relative(product(parts, spec, x, kernels=kernels), x, dense) < 0.01
    threaded = multiplied(linear_of(parts, spec), 2, x[:1], 33280)
    np.testing.assert_array_equal(threaded, product(parts, spec, x[:1]))


def test_with_everything_left_out_a_product_is_its_bias():
    spec, bias = Spec(scales="affine", tile_rows=256), np.linspace(-1, 1, 200, dtype=np.float32)
    linear = linear_of(random_parts(200, 33, spec), spec, np.inf, bias)
    for threads in (1, 2):
        np.testing.assert_array_equal(multiplied(linear, threads, activations(1, 33), 200)[0], bias)


@pytest.mark.parametrize("threads", [1, 2])
def test_products_with_an_order_are_products(threads):
    """Sums are added in another order: equal within rounding, with the same columns left out."""
    spec, columns = Spec(64, "affine", 512), 100
    parts, x = random_parts(500, columns, spec), activations(3, columns)
    importance = np.linspace(0.5, 2, columns, dtype=np.float32)
    found = {}
    for name, order in (("plain", None), ("ordered", np.random.default_rng(0).permutation(columns).astype(np.int32))):
        packed = zigzag.pack(*parts, spec, order=None if order is None else torch.from_numpy(order))
        matrix = _native.Matrix.zigzag(
            packed["weight_zigzag"].numpy(), 500, columns, spec.tile_rows, 64, _native.Scales.affine, None, order
        )
        matrix.threshold = 0.5
        matrix.set_importance(importance)
        linear = _native.Linear()
        linear.add(matrix)
        product = _native.Product(linear, threads)
        for sparse in (False, True):
            y = np.full((3, 500), np.nan, np.float32)
            product.run(x, y, sparse)
            found[name, sparse] = y, product.sparse
    for sparse in (False, True):
        (plain, kept), (ordered, also_kept) = found["plain", sparse], found["ordered", sparse]
        np.testing.assert_allclose(ordered, plain, atol=0.02 * np.abs(plain).max())
        assert kept == also_kept
    with pytest.raises(ValueError, match="every column once"):
        _native.Matrix.zigzag(
            np.zeros(128 // 2 * 2 + 128, np.uint8)[: 2 * 128],
            128,
            2,
            128,
            64,
            _native.Scales.symmetric,
            None,
            np.zeros(2, np.int32),
        )


def test_everything_below_the_threshold_gives_zero():
    spec = Spec(scales="affine", tile_rows=256)
    parts, x = random_parts(200, 33, spec), activations(1, 33)
    np.testing.assert_array_equal(product(parts, spec, x, np.inf), np.zeros((1, 200), np.float32))
