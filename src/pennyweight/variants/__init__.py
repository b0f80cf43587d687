"""The axes: one file for each thing that may be changed in a slot; specs are applied one after another.

An axis is a file with

    Spec               what is wished: a frozen dataclass of JSON values that words itself
    PLACE              when it is applied: what removes a block first, what stores it last
    STATS              statistics (judge/stats.py) that `apply` reads of the slots that it offers something for
    options(shape)     specs that a shape may be given
    reshape(shape, spec), apply(parts, spec, stats)    the same change to a shape, and to live modules
    STORES             True if it says how matrices are kept and read, and leaves what they compute nearly as it was;
                       its specs then have a `method` that finds codes (quantize/)
    TRAINS             True if its variants may learn by themselves before they are judged (heal/library.py)
    DEFAULT            False if it is searched only where it is asked for
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pennyweight import kinds
from pennyweight.model.choices import PARENT, Choice, Layout
from pennyweight.model.shapes import Shape, Shapes
from pennyweight.model.slots import Slot

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts


def order() -> tuple[str, ...]:
    """All axes, in the order in which their specs are applied."""
    return tuple(sorted(kinds.names("variants"), key=lambda axis: kinds.load("variants", axis).PLACE))


def default() -> tuple[str, ...]:
    """Those that are searched unless others are asked for."""
    return tuple(axis for axis in order() if getattr(kinds.load("variants", axis), "DEFAULT", True))


def stores(axis: str) -> bool:
    """Whether an axis only says how matrices are kept and read."""
    return getattr(kinds.load("variants", axis), "STORES", False)


def only_quantises(axis: str) -> bool:
    """Whether an axis does nothing but keep the same matrices in fewer bits: what it costs is the error of these."""
    module = kinds.load("variants", axis)
    return stores(axis) and set(module.STATS) <= {"input_moment", "inner_moment"}


def storing(choice: Choice) -> tuple[str, Any] | None:
    """(axis, spec) that says how a slot's matrices are kept, if any does."""
    return next((item for item in choice.specs if stores(item[0])), None)


def wanted(shape: Shape, axes: Iterable[str]) -> tuple[str, ...]:
    """Names of the statistics that the axes read of a slot."""
    found = (kinds.load("variants", axis) for axis in axes)
    return tuple(sorted({name for axis in found if axis.options(shape) for name in axis.STATS}))


def reshape(shape: Shape, choice: Choice) -> Shape:
    """The shape that a choice leaves in a slot. Raises ValueError if a spec does not fit the shape."""
    for axis, spec in choice.specs:
        shape = kinds.load("variants", axis).reshape(shape, spec)
    return shape


def reshape_all(shapes: Shapes, layout: Layout) -> dict[Slot, Shape]:
    """The shapes of a whole child."""
    return {slot: reshape(shape, layout.get(slot, PARENT)) for slot, shape in shapes.items()}


def apply(parts: Parts, choice: Choice, stats: SlotStats) -> Parts:
    """Make a slot's modules what the choice says, in float32 arithmetic: with the weights that a variant was trained
    to, where it was. The parent's choice changes nothing."""
    import torch

    with torch.autocast("cpu", enabled=False):
        for axis, spec in choice.specs:
            parts = kinds.load("variants", axis).apply(parts, spec, stats)
            stats = stats if parts.inner is None else stats.having_inner(parts.inner)
            if trains(axis) and (weights := stats.trained(Choice(((axis, spec),)))) is not None:
                parts.fill(weights)
    return parts


def trains(axis: str) -> bool:
    """Whether an axis' variants may learn by themselves before they are judged."""
    return getattr(kinds.load("variants", axis), "TRAINS", False)


def structural(choice: Choice) -> Choice:
    """Without what only says how weights are kept and read: what changes the architecture."""
    return Choice(tuple(item for item in choice.specs if not stores(item[0])))


def unstructural(choice: Choice) -> Choice:
    """What `structural` leaves out."""
    return Choice(tuple(item for item in choice.specs if stores(item[0])))


def rounded(choice: Choice) -> Choice:
    """With codes that are rounded to nearest, however they were to be found."""
    specs = ((axis, replace(spec, method="rtn") if stores(axis) else spec) for axis, spec in choice.specs)
    return Choice(tuple(specs))


def choice_from_json(data: Mapping[str, Mapping[str, Any]]) -> Choice:
    """Raises ValueError for an unknown axis, TypeError for unknown fields of its spec."""
    return Choice(tuple((axis, kinds.load("variants", axis).Spec(**fields)) for axis, fields in data.items()))


def layout_from_json(data: Mapping[str, Any]) -> dict[Slot, Choice]:
    return {Slot.parse(slot): choice_from_json(choice) for slot, choice in data.items()}
