"""Zigzag products in Triton, for NVIDIA and AMD GPUs; with TRITON_INTERPRET=1 on any processor, slowly, as a test.

Nothing waits for the device, so a product can be recorded in a CUDA graph. Not yet measured on a GPU: what is known
(docs/log.md) is that the results are right under Triton's interpreter, and what the compiler makes of the kernels.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from pennyweight.formats import zigzag
from pennyweight.kernels.zigzag import reference

_BLOCK = 1024  # columns that a program of count and scatter looks at
_WORDS = 64  # of 8 rows in a band: 256 contiguous bytes of every column
_COLUMNS = 16  # that a program has in flight
_ROWS, _SLICES = 64, 32  # what a program of reduce adds at a time
_PROGRAMS_PER_CORE = 4


def why_not() -> str | None:
    """The reason why nothing can be multiplied here, None if it can."""
    try:
        import triton.knobs
    except ImportError:
        return "triton is not installed: pip install 'pennyweight[gpu-triton]'"
    if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
        return "torch sees no GPU; with TRITON_INTERPRET=1 set before Python starts, Triton's interpreter is used"
    return None


class Matrix:
    """Weights that stay on a device, and the scratch of one product with them at a time."""

    def __init__(
        self,
        parts: Mapping[str, torch.Tensor],
        importance: torch.Tensor | None = None,
        *,
        device: torch.device | str = "cuda",
    ) -> None:
        """`parts`: what zigzag.pack made; `importance` (columns,) as in reference.collect, 1 if not given.

        `device`: a GPU; the processor under the interpreter. Raises ValueError if the tensors do not belong together.
        """
        self.device, self.spec = torch.device(device), zigzag.spec_of(parts)
        self.rows, self.columns = zigzag.shape_of(parts)
        order = parts.get("weight_order")
        self._order = None if order is None else order.to(self.device)
        if importance is not None:
            reference.check_input(importance, self.columns)
            importance = importance.to(self.device, torch.float32)
        self._importance = importance if order is None or importance is None else importance[self._order]
        self._packed = parts["weight_zigzag"].to(self.device, copy=True)
        words = self.spec.height // 8
        self._words = min(_WORDS, 1 << (words - 1).bit_length())
        row_scale = parts.get("weight_row_scale")
        self._row_scale = None if row_scale is None else row_scale.to(self.device)
        self._tiles, self._bands = -(-self.rows // self.spec.height), -(-words // self._words)
        cores = torch.cuda.get_device_properties(self.device).multi_processor_count if self.device.type == "cuda" else 1
        programs = -(-_PROGRAMS_PER_CORE * cores // (self._tiles * self._bands))
        self._slices = max(1, min(programs, self.columns // _COLUMNS))

        def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self._counts = scratch(-(-self.columns // _BLOCK), dtype=torch.int32)
        self._total = scratch(1, dtype=torch.int32)
        self._index = scratch(self.columns, dtype=torch.int32)
        self._value = scratch(self.columns, dtype=torch.float32)
        self._partial = scratch(self._slices, self._tiles * self.spec.height, dtype=torch.float32)

    def times(self, x: torch.Tensor, threshold: float = -1.0, out: torch.Tensor | None = None) -> torch.Tensor:
        """y (rows,) float32 as reference.times defines it, within 1e-5 relative (L2), on the device.

        x (columns,) float, on the device. The same bits on every call on the same GPU. `out`: where to put y. Raises
        ValueError if x has another length.
        """
        kernels: Any = import_module("pennyweight.kernels.zigzag._triton_kernels")
        reference.check_input(x, self.columns)
        out = torch.empty(self.rows, dtype=torch.float32, device=self.device) if out is None else out
        blocks, padded_rows = len(self._counts), self._partial.shape[1]
        x = x.contiguous() if self._order is None else x[self._order]
        given = (x, self._importance, float(threshold), self.columns, self._counts)
        listed = (self._total, self._index, self._value)
        packed = (self._packed.view(torch.int32), self._packed.view(torch.float16))
        summed = (self._total, self._partial, self.columns, padded_rows)
        fused = {"enable_fp_fusion": True}  # as on the processor; Triton warns that its default is to change
        kernels.count[(blocks,)](*given, BLOCK=_BLOCK, **fused)
        kernels.scatter[(blocks,)](*given, *listed, BLOCK=_BLOCK, BLOCKS=1 << (blocks - 1).bit_length(), **fused)
        kernels.multiply[(self._tiles * self._bands, self._slices)](
            *packed,
            self._index,
            self._value,
            *summed,
            TILE_ROWS=self.spec.height,
            GROUP=self.spec.group,
            SCALES=zigzag.SCALES.index(self.spec.scales),
            CHUNK=self.spec.chunk_bytes,
            WORDS=self._words,
            COLUMNS=_COLUMNS,
            **fused,
        )
        reduced = (self._partial, out, self.rows, padded_rows, self._slices)
        kernels.reduce[(-(-self.rows // _ROWS),)](*reduced, ROWS=_ROWS, SLICES=_SLICES, **fused)
        return out if self._row_scale is None else out.mul_(self._row_scale)

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last product kept, as reference.collect gives it; waits for the device."""
        found = int(self._total)
        return reference.in_order(self._index[:found].long(), self._value[:found], self._order)
