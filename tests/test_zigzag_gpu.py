"""Zigzag products on other devices: each backend against the reference, wherever it can run.

WGSL runs on whatever adapter wgpu finds, Triton in its interpreter (conftest.py). Neither is a GPU in an ordinary
run; what is seen here is that the results are right and that Triton's compiler takes the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

# Before wgpu looks for adapters: libtriton does not survive being loaded after the LLVM of Mesa's software adapter.
with suppress(ImportError):
    import triton  # noqa: F401

from pennyweight.formats import Grid, zigzag
from pennyweight.formats.zigzag import Spec
from pennyweight.kernels.zigzag import reference, wgsl
from pennyweight.kernels.zigzag import triton as in_triton

MATRICES = [
    (1, 1, Spec(128, "symmetric", 128)),
    (63, 3, Spec(32, "affine", 128)),
    (200, 17, Spec(64, "symmetric", 256)),
    (700, 17, Spec(64, "affine", 256)),  # the last of three tiles is not full
    (513, 1000, Spec(128, "symmetric", 384)),  # an odd number of scales, nibbles between words
    (300, 1000, Spec(32, "symmetric", 384)),
    (2100, 130, Spec(128, "affine", 2048)),  # several bands in a tile
    (300, 17, Spec(32, "super", 256)),
    (1100, 130, Spec(32, "super", 768)),
    (1100, 64, Spec(64, "symmetric", 1152)),  # the last band not full
]
NAN = float("nan")
Make = Callable[..., Any]


def skip_if(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shaders() -> wgsl.Kernels:
    skip_if(wgsl.why_not())
    return wgsl.kernels()


@pytest.fixture(params=["wgsl", "triton"])
def make(request: pytest.FixtureRequest) -> Make:
    """make(parts, importance) -> a matrix whose scratch and result are full of NaN."""
    if request.param == "triton":
        skip_if(in_triton.why_not())
        return in_triton_with_nan
    shaders = request.getfixturevalue("shaders")
    return lambda parts, importance=None, **more: in_wgsl_with_nan(shaders, parts, importance, **more)


def in_triton_with_nan(parts, importance=None) -> in_triton.Matrix:
    matrix = in_triton.Matrix(parts, importance, device="cuda" if torch.cuda.is_available() else "cpu")
    for scratch in (matrix._partial, matrix._value):
        scratch.fill_(NAN)
    return matrix


def in_wgsl_with_nan(shaders: wgsl.Kernels, parts, importance=None, **more) -> wgsl.Matrix:
    matrix = wgsl.Matrix(shaders, parts, importance, **more)
    for scratch in (matrix._partial, matrix._kept, matrix._y):
        shaders.device.queue.write_buffer(scratch, 0, torch.full((scratch.size // 4,), NAN).numpy())
    return matrix


def times(matrix: Any, x: torch.Tensor, threshold: float) -> torch.Tensor:
    if isinstance(matrix, wgsl.Matrix):
        return matrix.times(x, threshold)
    out = torch.full((matrix.rows,), NAN, device=matrix.device)
    return matrix.times(x.to(matrix.device), threshold, out).cpu()


def kept(matrix: Any) -> tuple[torch.Tensor, torch.Tensor]:
    index, value = matrix.kept()
    return index.cpu(), value.cpu()


def random_parts(rows: int, columns: int, spec: Spec, without: torch.Tensor | None = None, scale: float = 0.01):
    """Packed; every scale and minimum of the columns in `without` is NaN."""
    random = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    shape = (-(-rows // spec.group), columns)
    if spec.scales == "super":
        factors = scale / 32 * (1 + torch.rand(2, -(-shape[0] // 8), columns, generator=random))
        if without is not None:
            factors[..., without] = NAN
        sixes = torch.randint(0, 64, (2, *shape), generator=random, dtype=torch.uint8)
        return zigzag.pack(codes, Grid.of_super(factors.half(), sixes), spec)
    scales = scale * (1 + torch.rand(shape, generator=random))
    minima = -scale * (10 + 5 * torch.rand(shape, generator=random)) if spec.scales == "affine" else None
    if without is not None:
        scales[:, without] = NAN
        if minima is not None:
            minima[:, without] = NAN
    return zigzag.pack(codes, Grid(scales.half(), None if minima is None else minima.half()), spec)


def reordered(parts):
    """The same matrix, its columns lying in another order."""
    codes, grid = zigzag.codes_of(parts)
    order = torch.randperm(codes.shape[1], generator=torch.Generator().manual_seed(1)).int()
    return zigzag.pack(codes, grid, zigzag.spec_of(parts), order=order)


def activations(columns: int) -> torch.Tensor:
    """Normal, every 50th twelve times as large, every seventh zero."""
    x = torch.randn(columns, generator=torch.Generator().manual_seed(columns))
    x[::50] *= 12
    x[6::7] = 0
    return x


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 error over L2 norm; 0 if both are 0."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("rows", "columns", "spec"), MATRICES)
def test_products_equal_the_reference(make, rows, columns, spec):
    parts, x = random_parts(rows, columns, spec), activations(columns)
    matrix = make(parts)
    for threshold in (-1.0, 0.6, float("inf")):
        found, wanted = times(matrix, x, threshold), reference.times(parts, x.double(), threshold)
        assert found.dtype == torch.float32
        assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("weighed", [False, True])
def test_columns_may_lie_in_any_order(make, weighed):
    x, importance = activations(130), torch.linspace(0.5, 2, 130) if weighed else None
    parts = random_parts(700, 130, Spec(64, "affine", 256))
    matrix = make(reordered(parts), importance)
    for threshold in (-1.0, 0.6):
        found = times(matrix, x, threshold)
        assert relative(found, reference.times(parts, x.double(), threshold, importance)) < 1e-5
        for mine, wanted in zip(kept(matrix), reference.collect(x, threshold, importance), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("scales", zigzag.SCALES)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 100])
def test_no_column_is_dropped_and_none_too_many_read(make, count, scales):
    """However many are kept; the scales and minima of all others are NaN."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(count))
    x = torch.zeros(100)
    x[order[:count]] = 1.0 + torch.arange(count)
    parts = random_parts(200, 100, Spec(32, scales, 256), without=order[count:])
    found = times(make(parts), x, 0.0)
    dense = torch.nan_to_num(zigzag.unpack(parts)).double()
    assert relative(found, dense @ x.double()) < 1e-5


@pytest.mark.parametrize(
    ("columns", "weighed"), [(1, False), (255, True), (1024, False), (3001, False), (70_001, True)]
)
def test_what_is_kept_is_exact(make, columns, weighed):
    """Indices, order and values, over more blocks than one program counts; NaN is not kept, infinity is."""
    x = activations(columns) * (torch.arange(columns) % (1 + columns // 1000) == 0)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(1)) if weighed else None
    matrix = make(random_parts(1, columns, Spec(128, "symmetric", 128)), importance)
    if columns > 1000:
        x[[100, 800]] = torch.tensor([NAN, float("-inf")])
    for threshold in (0.0, 0.5, float(x[0].abs()), float("inf")):
        times(matrix, x, threshold)
        for found, wanted in zip(kept(matrix), reference.collect(x, threshold, importance), strict=True):
            assert torch.equal(found, wanted)


def test_a_negative_threshold_keeps_zeros(make):
    matrix, x = make(random_parts(1, 9, Spec(128, "symmetric", 128))), torch.zeros(9)
    times(matrix, x, -1.0)
    assert kept(matrix)[0].tolist() == list(range(9))


def test_a_scale_per_row_counts(make):
    parts = random_parts(200, 17, Spec(group=32)) | {"weight_row_scale": torch.linspace(0.5, 2, 200)}
    x = activations(17)
    torch.testing.assert_close(times(make(parts), x, 0.5), reference.times(parts, x, 0.5), rtol=1e-4, atol=1e-5)


def test_the_same_bits_every_time(make):
    parts, x = random_parts(700, 300, Spec(64, "affine", 256)), activations(300)
    matrix = make(parts)
    first = times(matrix, x, 0.3)
    times(matrix, 2 * x, 0.1)
    assert torch.equal(times(matrix, x, 0.3), first)
    assert torch.equal(times(make(parts), x, 0.3), first)


def test_scales_too_small_for_a_normal_float16(make):
    parts, x = random_parts(128, 20, Spec(64, "affine", 128), scale=1e-6), activations(20)
    assert relative(times(make(parts), x, 0.0), reference.times(parts, x.double(), 0.0)) < 1e-5


def test_what_does_not_fit_is_refused(make):
    parts = random_parts(128, 4, Spec(64, "symmetric", 128))
    with pytest.raises(ValueError, match=r"x has shape \(5,\)"):
        times(make(parts), torch.ones(5), 0.0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        make(parts, torch.ones(3))
    with pytest.raises(ValueError, match="bytes"):
        make(parts | {"weight_zigzag": torch.zeros(64, dtype=torch.uint8)})


def test_the_reference_is_the_dense_product_of_what_is_kept():
    parts, x = random_parts(200, 40, Spec(64, "affine", 128)), activations(40).double()
    importance = torch.rand(40, generator=torch.Generator().manual_seed(0))
    some = torch.where(x.abs() * importance > 0.2, x, 0)
    wanted = zigzag.unpack(parts).double() @ some
    torch.testing.assert_close(reference.times(parts, x, 0.2, importance), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="x has shape"):
        reference.times(parts, x[:3])


def test_weights_in_several_buffers(shaders):
    parts, x = random_parts(1100, 30, Spec(64, "symmetric", 256)), activations(30)
    tile_bytes = 30 * Spec(64, "symmetric", 256).chunk_bytes
    halves = in_wgsl_with_nan(shaders, parts, binding_bytes=2 * tile_bytes + 1)
    assert torch.equal(times(halves, x, 0.0), times(in_wgsl_with_nan(shaders, parts), x, 0.0))
    with pytest.raises(ValueError, match="pack with fewer tile_rows"):
        wgsl.Matrix(shaders, parts, binding_bytes=tile_bytes - 1)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pennyweight.formats.zigzag import Spec
from pennyweight.kernels.zigzag import _triton_kernels as kernels

listing = dict(x="*fp32", importance="*fp32", threshold="fp32", columns="i32", counts="*i32")
listed = dict(total="*i32", index="*i32", value="*fp32")
sums = dict(words="*i32", halves="*fp16", **listed, partial="*fp32", columns="i32", padded_rows="i32")
reduced = dict(partial="*fp32", y="*fp32", rows="i32", padded_rows="i32", slices="i32")
sources = [
    (kernels.count, listing, dict(BLOCK=1024)),
    (kernels.scatter, listing | listed, dict(BLOCK=1024, BLOCKS=16)),
    (kernels.reduce, reduced, dict(ROWS=64, SLICES=32)),
]
kinds = ("symmetric", "affine", "super")
for spec in (Spec(64, tile_rows=4096), Spec(64, "affine", 4096), Spec(32, "super", 4096), Spec(128, tile_rows=384)):
    sizes = dict(TILE_ROWS=spec.tile_rows, GROUP=spec.group, SCALES=kinds.index(spec.scales), CHUNK=spec.chunk_bytes)
    sizes["WORDS"] = 64
    sources.append((kernels.multiply, sums, sizes | dict(COLUMNS=16)))
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for function, types, sizes in sources:
        signature = types | dict.fromkeys(sizes, "constexpr")
        compile(ASTSource(function, signature, sizes), target=target, options=dict(enable_fp_fusion=True))
"""


def test_triton_compiles_for_gpus_that_are_not_here(tmp_path):
    """The interpreter takes more than the compiler: A100, H100/H200 and MI300 are compiled for, nothing is run."""
    pytest.importorskip("triton", reason=str(in_triton.why_not()))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
