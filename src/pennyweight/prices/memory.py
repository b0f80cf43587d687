"""Bytes of memory that the native engine takes for a model and a workload, beside the interpreter it runs in.

Counted as the engine allocates: matrices in the order of their kernels (`resident_bytes` of a shape), a cache of whole
blocks of positions for every sequence, windows with room for the step that moves them on, rotary tables in pieces, and
one work space, that of a step, however many sequences take turns in it. What is left out is small: what threads keep to
themselves, and the pages of 4 KiB that are begun and not filled.
"""

from __future__ import annotations

from collections.abc import Collection

from pennyweight.model.demand import Workload
from pennyweight.model.shapes import Attention, Shape

STEP_ROWS = 512  # most tokens of a step: native/products.h, kMaxRows
_BLOCK = 16  # positions of a cache that lie together: native/cache.h
_PAD = 128  # floats that rows of activations are filled up to: native/products.cpp
_TABLE_ROWS = 1024  # positions by which rotary tables grow: runtime/lower.py
_CODED = 1 + 3 * 4 / 32  # bytes of an activation in 8 bits: its code, and three numbers for 32 of them
_VALUE_BYTES = {"float16": 2, "int8": 1, "float32": 4}


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def cached_bytes(shape: Shape, cache: str) -> int:
    """Of the keys and values of one position; in 8 bits every head of each has a scale of 2 bytes."""
    if not isinstance(shape, Attention):
        return 0
    scale, value = 2 * (cache == "int8"), _VALUE_BYTES[cache]
    key_and_value = shape.head_dim + _up(shape.head_dim, _BLOCK)
    return shape.num_kv_heads * (value * key_and_value + 2 * scale)


def sequence_bytes(shape: Shape, workload: Workload) -> int:
    """What one sequence of up to `context` tokens takes: a window its own positions and those of a step."""
    context = workload.context
    places = context if shape.window is None else min(context, shape.window + STEP_ROWS)
    return _up(places, _BLOCK) * cached_bytes(shape, workload.cache)


def seen_bytes(shape: Shape, workload: Workload, length: int) -> int:
    """Keys and values that a token after `length` others looks at."""
    return (length if shape.window is None else min(length, shape.window)) * cached_bytes(shape, workload.cache)


def work_bytes(shapes: Collection[Shape], rows: int) -> int:
    """Activations of a step of so many tokens in float32: the residual stream and what is added to it, the widest that
    blocks make of their normed input, and the widest that their last matrices read. Inputs of matrices by rows in fewer
    bits are rounded to 8."""
    hidden = max((shape.hidden_size for shape in shapes), default=0)
    inner = max((shape.inner_size for shape in shapes), default=0)
    made = max((shape.made_size for shape in shapes), default=0)
    coded = [
        (columns, _filled(columns, stored.group))
        for stored, columns in {(w.stored, w.shape[-1]) for s in shapes for w in s.weights() if w.is_matrix}
        if stored.bits < 16 and not stored.down
    ]
    most = max((_up(filled, _PAD) for _, filled in coded), default=0)
    copied = max((_up(filled, _PAD) for columns, filled in coded if filled > columns), default=0)
    widths = _up(hidden, 16) + _up(hidden, _PAD) + _PAD  # the stream, and what is added to it
    widths += _up(max(made, hidden), _PAD) + _PAD + max(_up(max(inner, hidden), _PAD), most)
    widths += max(_up(hidden, _PAD), copied)  # normed, or padded
    return rows * (4 * widths + round(_CODED * most))


def _filled(columns: int, group: int) -> int:
    """Columns of a matrix by rows as they lie in memory, groups filled up to whole 32."""
    return columns // group * _up(group, 32)


def workspace_bytes(shapes: Collection[Shape], workload: Workload) -> int:
    """What all sequences share: the widest step's activations, the logits of a token of each in float32, and rotary
    tables. `shapes`: of a model, or several that a slot may get; then the most that any of them needs."""
    rows = min(workload.prompt * workload.concurrency, STEP_ROWS)
    vocabulary = max((w.shape[0] for shape in shapes if shape.makes_logits for w in shape.weights()), default=0)
    turning = {(s.rotary.of, s.head_dim) for s in shapes if isinstance(s, Attention) and s.rotary is not None}
    positions = 2 * _up(workload.context, _TABLE_ROWS) - _TABLE_ROWS  # what tables outgrow stays with the allocator
    tables = sum(2 * 4 * (head_dim // 2) for _, head_dim in turning) * positions
    return work_bytes(shapes, rows) + 4 * workload.concurrency * vocabulary + tables
