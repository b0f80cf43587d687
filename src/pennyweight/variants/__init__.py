"""The axes: one file for each thing that may be changed in a slot; specs are applied one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pennyweight import kinds
from pennyweight.model.choices import PARENT, Choice, Layout
from pennyweight.model.shapes import Shape, Shapes
from pennyweight.model.slots import Slot

if TYPE_CHECKING:
    from pennyweight.live.parts import Parts

ORDER = ("noop", "linear", "kv_heads", "ffn_width", "window", "bits", "sparsity")
"""Axes in the order their specs are applied: what removes a block first, what stores it last."""

STORING = ("bits", "sparsity")
"""Axes that say how a slot's matrices are kept and read, and leave what they compute nearly as it was."""


def reshape(shape: Shape, choice: Choice) -> Shape:
    """The shape that a choice leaves in a slot. Raises ValueError if a spec does not fit the shape."""
    for axis, spec in choice.specs:
        shape = kinds.load("variants", axis).reshape(shape, spec)
    return shape


def reshape_all(shapes: Shapes, layout: Layout) -> dict[Slot, Shape]:
    """The shapes of a whole child."""
    return {slot: reshape(shape, layout.get(slot, PARENT)) for slot, shape in shapes.items()}


def apply(parts: Parts, choice: Choice, stats: dict[str, Any]) -> Parts:
    """Make a slot's modules what the choice says, in float32 arithmetic. The parent's choice changes nothing."""
    import torch

    with torch.autocast("cpu", enabled=False):
        for axis, spec in choice.specs:
            parts = kinds.load("variants", axis).apply(parts, spec, stats)
    return parts


def structural(choice: Choice) -> Choice:
    """Without what only says how weights are kept and read: what changes the architecture."""
    return Choice(tuple(item for item in choice.specs if item[0] not in STORING))


def choice_from_json(data: Mapping[str, Mapping[str, Any]]) -> Choice:
    """Raises ValueError for an unknown axis, TypeError for unknown fields of its spec."""
    return Choice(tuple((axis, kinds.load("variants", axis).Spec(**fields)) for axis, fields in data.items()))


def layout_from_json(data: Mapping[str, Any]) -> dict[Slot, Choice]:
    return {Slot.parse(slot): choice_from_json(choice) for slot, choice in data.items()}
