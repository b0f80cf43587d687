"""Zigzag products in WGSL through wgpu: Metal on Apple, Vulkan or Direct3D 12 elsewhere, Mesa's lavapipe without a GPU.

zigzag.wgsl keeps to what WebGPU grants everywhere. Weights larger than a device binds at once lie in several buffers
of whole tiles.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from pennyweight.formats import zigzag
from pennyweight.kernels.zigzag import reference

_BLOCK = 256  # columns that a program of count and scatter looks at
_BAND_ROWS = 512
_PROGRAMS = 512  # what a product is cut into: a few per core of the largest GPUs with this interface
_SLICE_COLUMNS = 16  # no slice of a dense product is thinner
_LIMITS = ("max-buffer-size", "max-storage-buffer-binding-size")  # bytes; what an adapter has above the default is used


def adapters() -> list[Any]:
    """Every wgpu.GPUAdapter here. Raises ImportError without wgpu."""
    import wgpu

    return wgpu.gpu.enumerate_adapters_sync()


def why_not() -> str | None:
    """The reason why nothing can be multiplied here, None if it can."""
    try:
        found = adapters()
    except ImportError:
        return "wgpu is not installed: pip install 'pennyweight[gpu-wgpu]'"
    return None if found else "wgpu finds no adapter; Debian's mesa-vulkan-drivers is one in software"


@dataclass(frozen=True)
class Kernels:
    """A wgpu.GPUDevice and the four steps compiled for it; `adapter` is its name."""

    adapter: str
    device: Any
    count: Any
    scatter: Any
    multiply: Any
    reduce: Any


def kernels(adapter: Any = None) -> Kernels:
    """Compile for a wgpu.GPUAdapter; None is the fastest that wgpu finds. Raises RuntimeError if there is none."""
    import wgpu

    adapter = adapter or wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    device = adapter.request_device_sync(required_limits={name: adapter.limits[name] for name in _LIMITS})
    code = (resources.files("pennyweight.kernels.zigzag") / "zigzag.wgsl").read_text(encoding="utf-8")
    module = device.create_shader_module(code=code)
    compiled = {
        name: device.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": name})
        for name in ("count", "scatter", "multiply", "reduce")
    }
    return Kernels(adapter=adapter.summary, device=device, **compiled)


class Matrix:
    """Weights that stay on a device, and the scratch of one product with them at a time."""

    def __init__(
        self,
        kernels: Kernels,
        parts: Mapping[str, torch.Tensor],
        importance: torch.Tensor | None = None,
        *,
        binding_bytes: int | None = None,
    ) -> None:
        """`parts`: what zigzag.pack made; `importance` (columns,) as in reference.collect, 1 if not given.

        `binding_bytes`: the most to bind at once, if it is to be less than the device can. Raises ValueError if the
        tensors do not belong together or one tile is more than can be bound.
        """
        (self.rows, self.columns), spec = zigzag.shape_of(parts), zigzag.spec_of(parts)
        weights = torch.ones(self.columns) if importance is None else importance.float().contiguous()
        reference.check_input(weights, self.columns)
        tile_bytes = self.columns * spec.chunk_bytes
        bound = binding_bytes or min(kernels.device.limits[name] for name in _LIMITS)
        if tile_bytes > bound:
            raise ValueError(
                f"a tile of {spec.height} rows and {self.columns} columns takes {tile_bytes} bytes, "
                f"{kernels.adapter} binds {bound}: pack with fewer tile_rows"
            )
        tiles, tiles_bound = -(-self.rows // spec.height), bound // tile_bytes
        padded_rows, bands = tiles * spec.height, -(-spec.height // _BAND_ROWS)
        slices = max(1, min(_PROGRAMS // (tiles * bands), self.columns // _SLICE_COLUMNS))
        blocks = -(-self.columns // _BLOCK)

        def shape(first_tile: int) -> Any:
            kind = zigzag.SCALES.index(spec.scales)
            numbers = (self.rows, self.columns, spec.height, spec.group, kind, spec.chunk_bytes // 4)
            return self._buffer(struct.pack("9I", *numbers, padded_rows, slices, first_tile), uniform=True)

        self._row_scale, self._order = parts.get("weight_row_scale"), parts.get("weight_order")
        weights = weights if self._order is None else weights[self._order]
        self._kernels = kernels
        self._passes: list[tuple[Any, Any, tuple[int, int]]] = []
        self._threshold = self._buffer(4, uniform=True)
        self._x, self._y = self._buffer(4 * self.columns), self._buffer(4 * self.rows)
        self._counts, self._kept = self._buffer(4 * blocks + 4), self._buffer(8 * self.columns)
        listing = {1: self._threshold, 2: self._x, 3: self._buffer(weights.numpy()), 4: self._counts}
        self._partial = self._buffer(4 * slices * padded_rows)
        self._append(kernels.count, {0: shape(0), **listing}, (blocks, 1))
        self._append(kernels.scatter, {0: shape(0), **listing, 5: self._kept}, (blocks, 1))
        for first in range(0, tiles, tiles_bound):
            here = min(tiles_bound, tiles - first)
            packed = parts["weight_zigzag"][first * tile_bytes :][: here * tile_bytes].contiguous().numpy()
            bound_tiles = {0: shape(first), 4: self._counts, 5: self._kept, 6: self._buffer(packed)}
            self._append(kernels.multiply, bound_tiles | {7: self._partial}, (here * bands, slices))
        self._append(kernels.reduce, {0: shape(0), 7: self._partial, 8: self._y}, (-(-self.rows // 64), 1))

    def _buffer(self, content: Any, *, uniform: bool = False) -> Any:
        """On the device: so many bytes, or a copy of an array."""
        from wgpu import BufferUsage as Usage

        usage = (Usage.UNIFORM if uniform else Usage.STORAGE) | Usage.COPY_SRC | Usage.COPY_DST
        if isinstance(content, int):
            return self._kernels.device.create_buffer(size=content, usage=usage)
        return self._kernels.device.create_buffer_with_data(data=content, usage=usage)

    def _append(self, pipeline: Any, bindings: dict[int, Any], programs: tuple[int, int]) -> None:
        """One more step of the product."""
        entries = [
            {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
            for i, buffer in bindings.items()
        ]
        layout = pipeline.get_bind_group_layout(0)
        group = self._kernels.device.create_bind_group(layout=layout, entries=entries)
        self._passes.append((pipeline, group, programs))

    def times(self, x: torch.Tensor, threshold: float = -1.0) -> torch.Tensor:
        """y (rows,) float32 as reference.times defines it, within 1e-5 relative (L2); waits for the device.

        x (columns,) float. The same bits on every call; float16 scales below 6.1e-5 may count as 0 on some devices.
        Raises ValueError if x has another length.
        """
        self.load(x, threshold)
        self.run()
        y = torch.frombuffer(self._kernels.device.queue.read_buffer(self._y), dtype=torch.float32)
        return y if self._row_scale is None else y * self._row_scale

    def load(self, x: torch.Tensor, threshold: float) -> None:
        """Send what the next products multiply by."""
        reference.check_input(x, self.columns)
        queue = self._kernels.device.queue
        bits = torch.tensor(abs(threshold), dtype=torch.float32).view(torch.int32)
        queue.write_buffer(self._threshold, 0, struct.pack("i", -1 if threshold < 0 else int(bits)))
        x = x if self._order is None else x[self._order]
        queue.write_buffer(self._x, 0, x.detach().float().contiguous().numpy())

    def run(self) -> None:
        """Have the device multiply by what was loaded; does not wait for it."""
        encoder = self._kernels.device.create_command_encoder()
        run = encoder.begin_compute_pass()
        for pipeline, group, (across, down) in self._passes:
            run.set_pipeline(pipeline)
            run.set_bind_group(0, group)
            run.dispatch_workgroups(across, down)
        run.end()
        self._kernels.device.queue.submit([encoder.finish()])

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last product kept, as reference.collect gives it."""
        read = self._kernels.device.queue.read_buffer
        found = int(torch.frombuffer(read(self._counts), dtype=torch.int32)[-1])
        pairs = torch.frombuffer(read(self._kept), dtype=torch.int32).view(-1, 2)[:found]
        return reference.in_order(pairs[:, 0].long(), pairs[:, 1].contiguous().view(torch.float32), self._order)
