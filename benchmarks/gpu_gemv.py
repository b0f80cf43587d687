"""Zigzag products on GPUs: Triton against torch's dense float16 product and against reading the same bytes; WGSL.

Triton is measured on a CUDA GPU only. Buffers are used in turn, far more than a cache holds, and calls are recorded in
one CUDA graph, since a launch takes longer than a small product. WGSL runs on every adapter wgpu finds, software ones
too; its times include submitting. Errors are relative (L2) to the reference in float64. No bars: numbers depend on the
device, whose name stands beside them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import _bench
from pennyweight.formats import Grid, zigzag
from pennyweight.formats.zigzag import Spec
from pennyweight.kernels.zigzag import reference, triton, wgsl

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
SPARSITIES = (0.0, 0.25, 0.5, 0.7)
ROTATED_BYTES = 512 * 2**20  # ten times the L2 of an H200
SPEC = Spec(group=64)

Parts = Mapping[str, torch.Tensor]


def random_parts(rows: int, columns: int) -> Parts:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    scale = 0.01 * (1 + torch.rand(rows // SPEC.group, columns, generator=random))
    return zigzag.pack(codes, Grid(scale.half()), SPEC.of(rows))


def activations(columns: int, sparsity: float) -> tuple[torch.Tensor, float]:
    """Normal values, and the threshold that leaves out exactly this share of them."""
    x = torch.randn(columns, generator=torch.Generator().manual_seed(1))
    left_out = round(sparsity * columns)
    return x, float(x.abs().kthvalue(left_out).values) if left_out else -1.0


def error(found: torch.Tensor, parts: Parts, x: torch.Tensor, threshold: float) -> float:
    wanted = reference.times(parts, x.double(), threshold)
    return float((found.cpu() - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------------------------- CUDA


def graph_seconds(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Median time of one of the calls, which are made one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and allocates outside the graph
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copies_of(nbytes: int) -> int:
    return -(-ROTATED_BYTES // nbytes)


def in_triton(quick: bool) -> list[dict[str, Any]]:
    """One entry per shape and sparsity, seconds and what they are compared with."""
    repeats = 20 if quick else 200
    large = torch.ones(2**27, device="cuda")
    bandwidth = large.nbytes / graph_seconds([large.sum], repeats)
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s (sum of {large.nbytes >> 20} MiB)")
    found = []
    for rows, columns in SHAPES[: 1 if quick else None]:
        parts = random_parts(rows, columns)
        nbytes = parts["weight_zigzag"].numel()
        half = torch.randn(rows, columns, dtype=torch.float16, device="cuda")
        wide = [half.clone() for _ in range(copies_of(half.nbytes))]
        vector = torch.randn(columns, dtype=torch.float16, device="cuda")
        dense = graph_seconds([partial(torch.mv, one, vector) for one in wide], repeats)
        del wide
        matrices = [triton.Matrix(parts) for _ in range(copies_of(nbytes))]
        raw = [parts["weight_zigzag"].cuda().view(torch.float32) for _ in matrices]
        read = graph_seconds([one.sum for one in raw], repeats)
        del raw
        for sparsity in SPARSITIES:
            x, threshold = activations(columns, sparsity)
            here = x.cuda()
            wrong = error(matrices[0].times(here, threshold), parts, x, threshold)
            seconds = graph_seconds([partial(one.times, here, threshold) for one in matrices], repeats)
            found.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "sparsity": sparsity,
                    "seconds": seconds,
                    "dense_float16_seconds": dense,
                    "read_of_all_bytes_seconds": read,
                    "bytes_over_bandwidth_seconds": nbytes * (1 - sparsity) / bandwidth,
                    "error": wrong,
                }
            )
            others = f"dense float16 {1e6 * dense:.1f}, reading all zigzag bytes {1e6 * read:.1f}"
            took = f"{1e6 * seconds:.1f} us; {others}; error {wrong:.1e}"
            print(f"{rows} x {columns}, {sparsity:.0%} left out: {took}", flush=True)
    return found


# ------------------------------------------------------------------------------------------------------------- WGSL


def in_wgsl(adapter: Any, quick: bool) -> list[dict[str, Any]]:
    """One entry per shape and sparsity; as many matrices in turn as make ROTATED_BYTES, on a processor two."""
    kernels = wgsl.kernels(adapter)
    software = adapter.info["adapter_type"] == "CPU"
    found = []
    for rows, columns in SHAPES[: 1 if quick else None]:
        parts = random_parts(rows, columns)
        nbytes = parts["weight_zigzag"].numel()
        matrices = [wgsl.Matrix(kernels, parts) for _ in range(2 if software else copies_of(nbytes))]
        for sparsity in SPARSITIES:
            x, threshold = activations(columns, sparsity)
            wrong = max(error(one.times(x, threshold), parts, x, threshold) for one in matrices[:2])
            for one in matrices:
                one.load(x, threshold)
            times = []
            for _ in range(3 if quick else 10):
                started = time.perf_counter()
                for one in matrices:
                    one.run()
                matrices[-1].kept()  # waits
                times.append((time.perf_counter() - started) / len(matrices))
            seconds = statistics.median(times)
            found.append({"rows": rows, "columns": columns, "sparsity": sparsity, "seconds": seconds, "error": wrong})
            took = f"{1e3 * seconds:.2f} ms, error {wrong:.1e}"
            print(f"{kernels.adapter}: {rows} x {columns}, {sparsity:.0%} left out: {took}", flush=True)
    return found


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    no_triton = triton.why_not() or (None if torch.cuda.is_available() else "torch sees no CUDA GPU")
    no_wgsl = wgsl.why_not()
    if no_triton and no_wgsl:
        return _bench.skip("gpu_gemv", quick, f"Triton: {no_triton}; WGSL: {no_wgsl}")
    keys: dict[str, Any] = {}
    # Triton first: its library does not survive being loaded after Mesa's.
    keys["triton"] = {"skipped": no_triton} if no_triton else {torch.cuda.get_device_name(): in_triton(quick)}
    if no_triton:
        print(f"Triton was not measured: {no_triton}")
    if no_wgsl:
        print(f"WGSL was not measured: {no_wgsl}")
        keys["wgsl"] = {"skipped": no_wgsl}
    else:
        keys["wgsl"] = {one.summary: in_wgsl(one, quick) for one in wgsl.adapters()}
    return _bench.finish("gpu_gemv", quick, keys, [])


if __name__ == "__main__":
    sys.exit(main())
