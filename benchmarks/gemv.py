"""One matrix times one token: our dense and sparse kernels beside llama.cpp's, on the same cores.

Protocol: all variants in turn, 80 MB read before every sample so that weights come from memory as they do in decoding,
one product a sample, inputs quantised inside the measured time. Threads of both sides are awake when it begins, as they
are in the middle of a model's step: a little work of theirs goes before. p05 is what the machine can do, p50 what it
did beside whatever else ran. Ratios are of p05 within one run, of products with 4.5 bits a weight on both sides; of
llama.cpp's q4_0 and q4_K, and of our formats for sparse reading, the faster one counts. Every product is checked before
it is timed. Activations are normal with a few channels twelve times larger; a sparse product leaves out the share of
columns with the smallest |x|.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

import _bench
import _llama
from pennyweight import _native
from pennyweight.formats import packed_int, zigzag

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # rows (outputs), columns (inputs)
KINDS = ("q4_0", "q4_K")  # llama.cpp's types of 4.5 bits
LEVELS = (0.0, 0.25, 0.4, 0.5, 0.7)
FLUSH_BYTES = 80 << 20
READ_BYTES = 33 << 20
_CHECKED = 128  # rows of every product


@dataclass
class Variant:
    """Something to time: `run` returns seconds, `wake` comes before. `bits` per weight."""

    name: str
    bits: float
    wake: Callable[[], None]
    run: Callable[[], float]
    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))


def activations(columns: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(columns).astype(np.float32)
    x[rng.random(columns) < 0.004] *= 12
    return x


@dataclass(frozen=True)
class Made:
    """A matrix for the engine, and its first rows as they are meant (_CHECKED, columns)."""

    linear: _native.Linear
    first: np.ndarray


def rows_matrix(rows: int, columns: int, group: int, rng: np.random.Generator) -> Made:
    codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    parts = {
        packed_int.MARK: torch.from_numpy(codes.view(np.int32)),
        "weight_scale": torch.from_numpy((0.01 + 0.01 * rng.random((rows, columns // group))).astype(np.float16)),
        "weight_shape": torch.tensor([rows, columns]),
    }
    first = packed_int.unpack(packed_int.slice_rows(parts, _CHECKED))
    return Made(linear(packed_int.native("weight", parts, in_place=False)), first.float().numpy())


def zigzag_matrix(
    rows: int,
    columns: int,
    threshold: float,
    rng: np.random.Generator,
    scales: zigzag.Scales = "symmetric",
    group: int = 64,
    order: np.ndarray | None = None,
) -> Made:
    """One tile as tall as the matrix. Random bytes, with scales that are numbers."""
    spec = zigzag.Spec(group, scales, rows, ordered=order is not None)
    chunks = rng.integers(0, 256, (columns, spec.chunk_bytes), dtype=np.uint8)
    if scales == "super":  # factors in 4 bytes of 16, then scales of 6 bits
        halves = (1e-3 + 1e-3 * rng.random((columns, rows // 256, 2))).astype(np.float16)
        chunks[:, : spec.scale_bytes].reshape(columns, -1, 16)[..., :4] = halves.view(np.uint8)
    else:
        halves = (0.01 + 0.01 * rng.random((columns, spec.scale_bytes // 2))).astype(np.float16)
        chunks[:, : spec.scale_bytes] = halves.view(np.uint8)
    parts = {
        zigzag.MARK: torch.from_numpy(chunks.reshape(-1)),
        "weight_shape": torch.tensor([rows, columns]),
        "weight_layout": torch.tensor([spec.group, zigzag.SCALES.index(scales), rows]),
    }
    if order is not None:
        parts["weight_order"] = torch.from_numpy(order)
    made = zigzag.native("weight", parts, in_place=False)
    made.threshold = threshold
    return Made(linear(made), zigzag.unpack(parts)[:_CHECKED].numpy())


def linear(matrix: _native.Matrix) -> _native.Linear:
    made = _native.Linear()
    made.add(matrix)
    return made


def own(
    name: str, bits: float, made: Made, x: np.ndarray, rows: int, threads: int, *, threshold: float | None = None
) -> Variant:
    """`threshold`: what |x| must be above to count. Raises RuntimeError if the product is not what it should be."""
    product, y = _native.Product(made.linear, threads), np.empty((1, rows), np.float32)
    product.run(x[None], y, threshold is not None)
    _check(name, y[0, :_CHECKED], made.first @ (x if threshold is None else x * (np.abs(x) > threshold)), 0.03)
    return Variant(name, bits, product.wake, lambda: product.run(x[None], y, threshold is not None))


def _check(name: str, found: np.ndarray, wanted: np.ndarray, most: float) -> None:
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    if not error < most:
        raise RuntimeError(f"the product of {name} is off by {error:.3f}: it was not set up as it should be")


def theirs(ggml: _llama.Ggml, kind: str, rows: int, columns: int, x: np.ndarray, threads: int) -> Variant:
    few = np.random.default_rng(3).normal(0, 0.02, (64, columns)).astype(np.float32)
    product = _llama.GgmlProduct(ggml, kind, np.tile(few, (rows // 64, 1)))
    product.set(x)
    product.run()
    _check(f"llama.cpp {kind}", product.get()[:64], few @ x, 0.2)
    small = _llama.GgmlProduct(ggml, kind, few[:, :256])
    small.set(x[:256])

    def wake() -> None:
        ggml.threads(threads)
        small.run()

    def run() -> float:
        started = time.perf_counter()
        product.run()
        return time.perf_counter() - started

    return Variant(f"llama.cpp {kind}", 4.5, wake, run)


def measure(rows: int, columns: int, threads: int, samples: int, ggml: _llama.Ggml | None) -> dict[str, Variant]:
    rng = np.random.default_rng(0)
    x = activations(columns, rng)
    reader, flush = _native.Reader(READ_BYTES, threads), _native.Reader(FLUSH_BYTES, 1)
    read = READ_BYTES // 256 * 256
    variants = [
        Variant("read, 1 stream", 0, reader.wake, lambda: reader.run(0, read, 1)),
        Variant("read, 4 streams", 0, reader.wake, lambda: reader.run(0, read, 4)),
        own("dense g32", 4.5, rows_matrix(rows, columns, 32, rng), x, rows, threads),
        own("dense g64", 4.25, rows_matrix(rows, columns, 64, rng), x, rows, threads),
    ]
    if ggml is not None:
        variants += [theirs(ggml, kind, rows, columns, x, threads) for kind in KINDS]
    for level in LEVELS:
        threshold = float(np.quantile(np.abs(x), level)) if level else -1.0
        made = zigzag_matrix(rows, columns, threshold, rng)
        left_out = threshold if level else None
        variants.append(own(f"sparse {level:.0%}", 4.25, made, x, rows, threads, threshold=left_out))
    half = float(np.quantile(np.abs(x), 0.5))
    kinds: tuple[tuple[str, zigzag.Scales], ...] = (("sparse g32", "symmetric"), ("super", "super"))
    for name, scales in kinds:
        for level, threshold in ((0.0, -1.0), (0.5, half)):
            made = zigzag_matrix(rows, columns, threshold, rng, scales, group=32)
            left_out = threshold if level else None
            variants.append(own(f"{name} {level:.0%}", 4.5, made, x, rows, threads, threshold=left_out))
    # Channels of different size, as in models: then the columns that are read can be neighbours.
    sizes = np.exp(rng.standard_normal(columns)).astype(np.float32)
    uneven = x * sizes
    for name, order in (("as they are", None), ("ordered", np.argsort(-sizes).astype(np.int32))):
        middle = float(np.quantile(np.abs(uneven), 0.5))
        made = zigzag_matrix(rows, columns, middle, rng, order=order)
        variants.append(own(f"uneven 50% {name}", 4.25, made, uneven, rows, threads, threshold=middle))
    for variant in variants:
        variant.run()
    for _ in range(samples):
        for variant in variants:
            flush.run(0, FLUSH_BYTES)
            variant.wake()
            variant.seconds.append(variant.run())
    return {variant.name: variant for variant in variants}


def main() -> int:
    arguments = _bench.parser(__doc__).parse_args()
    ggml = _llama.Ggml() if _llama.folder() is not None else None
    if ggml is None:
        print(_llama.MISSING, file=sys.stderr)
    samples = 40 if arguments.quick else 200
    threads = sorted({1, min(2, os.cpu_count() or 1)})
    rows_out, bars = [], []
    for rows, columns in SHAPES:
        for count in threads:
            found = measure(rows, columns, count, samples, ggml)
            rates = [READ_BYTES / found[f"read, {n}"].quantile(0.05) for n in ("1 stream", "4 streams")]
            read = max(rates)
            told = " and ".join(f"{rate / 1e9:.1f}" for rate in rates)
            title = f"{rows} x {columns}, {count} thread{'s' * (count > 1)}"
            print(f"\n{title}; reads {told} GB/s (1 and 4 streams)", flush=True)
            dense = found["dense g32"].quantile(0.05)
            for variant in found.values():
                p05, p50 = variant.quantile(0.05), variant.quantile(0.5)
                rate = rows * columns * variant.bits / 8 / p05
                if variant.bits:
                    print(
                        f"  {variant.name:22} {variant.bits} bits  p05 {p05 * 1e6:7.1f} us  p50 {p50 * 1e6:7.1f} us  "
                        f"{rate / 1e9:6.1f} GB/s of all its bytes, {rate / read:4.0%} of reading"
                    )
                rows_out.append(
                    {
                        "rows": rows,
                        "columns": columns,
                        "threads": count,
                        "variant": variant.name,
                        "p05": p05,
                        "p50": p50,
                    }
                )
            shape = f"{rows}x{columns} {count}t"
            rate = rows * columns * 4.5 / 8 / dense
            bars.append(_bench.bar(f"{shape}: dense bytes/s over reading", rate / read, ">=", 0.85))
            half = min(found[f"{name} 50%"].quantile(0.05) for name in ("sparse g32", "super"))
            tall = (rows, columns) != SHAPES[0]
            if tall:
                bars.append(_bench.bar(f"{shape}: 50 % over own dense", dense / half, ">=", 1.6))
            if ggml is not None:
                theirs_best = min(found[f"llama.cpp {kind}"].quantile(0.05) for kind in KINDS)
                bars.append(_bench.bar(f"{shape}: dense over llama.cpp", theirs_best / dense, ">=", 1.35))
                if tall:
                    bars.append(_bench.bar(f"{shape}: 50 % over llama.cpp", theirs_best / half, ">=", 2.3))
    if ggml is None:
        return _bench.finish(
            "gemv", arguments.quick, {"times": rows_out, "skipped": f"comparison: {_llama.MISSING}"}, bars
        )
    return _bench.finish("gemv", arguments.quick, {"times": rows_out}, bars)


if __name__ == "__main__":
    raise SystemExit(main())
