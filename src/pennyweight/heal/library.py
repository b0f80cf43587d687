"""The library: variants learn to do what the parent's block did before they are judged (Puzzle, arXiv:2411.19146).

Every variant of an axis that TRAINS is distilled by itself, on what enters the parent's block (`local`), so none waits
for another one. It is scored as it is then, and the child starts from it. Tokens go where they can matter: a quarter of
them to every variant, the rest to those that no cheaper variant of their slot beats by then.

A variant's weights lie in a file of their own in the folder of the library, by name on disk, with the loss before
training and behind every stretch of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pennyweight.disk.opened import open_checkpoint
from pennyweight.heal import local, schedule
from pennyweight.judge.stats import of_slot, read, variant_path
from pennyweight.live.walk import Layer, Walk, autocast
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot
from pennyweight.runs import executor, scratch
from pennyweight.variants import apply, reshape

STRETCHES = (0.25, 0.75)
"""Shares of a variant's tokens; between them those that are beaten drop out."""
_FFN_TOKENS = 64
"""Of a row of an FFN's batches. Tokens do not meet in it, and many small steps bring more than few large ones."""
_SHARE_OF_LR = 0.5
"""Of the rate at which a child's blocks are healed: variants begin near the parent, by least squares, and step less."""
_BEATEN_BY = 1.25  # losses are of few rows, and the rest of the training may turn what is close


@dataclass(frozen=True)
class Course:
    """How a variant is trained: tokens in all, peak learning rate (None: by the model's width), rows of a batch."""

    tokens: int
    lr: float | None
    batch_rows: int


def losses(folder: Path, slot: Slot, choice: Choice) -> list[float] | None:
    """Before training and behind each stretch; None if the variant has not begun."""
    found = scratch.kept(variant_path(folder, slot, choice))
    return None if found is None else found["losses"].tolist()


@torch.no_grad()
def pass_on(model: Path, layer: int, entering: Path, leaving: Path, batch_rows: int, dtype: torch.dtype) -> None:
    """Task: what leaves a layer of the parent, from what enters it."""
    if scratch.kept(leaving) is None:
        walk = Walk(open_checkpoint(model), dtype=dtype)
        with autocast(dtype):
            hidden = walk.layer(layer).run(scratch.needed(entering)["hidden"], together=batch_rows)
        scratch.keep(leaving, {"hidden": hidden})


def train(
    model: Path,
    slot: Slot,
    choices: Sequence[Choice],
    entering: Path,
    stats: Path | None,
    folder: Path,
    course: Course,
    dtype: torch.dtype,
) -> None:
    """Task: train a slot's variants on rows that enter its layer in the parent, (rows, tokens, hidden_size) in the file
    `entering`; what `folder` has already is not trained again. stats: the file of the layer's statistics."""
    walk = Walk(open_checkpoint(model), dtype=dtype)
    rows = scratch.needed(entering)["hidden"]
    layer, hidden, target = _alone(walk.layer(slot.layer or 0), slot, rows, course.batch_rows, dtype)
    own = of_slot({} if stats is None else read(stats), slot.kind)
    judges = schedule.judges(len(rows)) * rows.shape[1] // hidden.shape[1]
    lr = _SHARE_OF_LR * schedule.local_lr(walk.config.hidden_size) if course.lr is None else course.lr
    steps = max(len(STRETCHES), course.tokens // (course.batch_rows * hidden.shape[1]))
    left, first = list(choices), 0
    for stretch, share in enumerate(STRETCHES):
        count = max(1, round(share * steps))
        for choice in left:
            file = variant_path(folder, slot, choice)
            kept = scratch.kept(file)
            if kept is None or len(kept["losses"]) < stretch + 2:
                pupil = layer.fork(slot)
                parts = pupil.parts[slot] = apply(pupil.parts[slot], choice, own)
                before: list[float] = []
                if kept is not None:
                    before = kept["losses"].tolist()
                    parts.fill(kept)
                found = local.train(
                    pupil, slot, hidden, target, count, lr, course.batch_rows, dtype, first=first, judges=judges
                )
                tensors = {name: parameter.detach().bfloat16() for name, parameter in parts.parameters()}
                told = torch.tensor([*(before or found[:1]), found[1]], dtype=torch.float64)
                scratch.keep(file, {**tensors, "losses": told})
            executor.tick(share)
        first += count
        shapes = [reshape(layer.parts[slot].shape, choice) for choice in left]
        lost = [(losses(folder, slot, choice) or [0.0])[-1] for choice in left]
        beaten = [any(_beats(shapes, lost, other, each) for other in range(len(left))) for each in range(len(left))]
        executor.tick(sum(beaten) * sum(STRETCHES[stretch + 1 :]))
        left = [choice for choice, out in zip(left, beaten, strict=True) if not out]


def _beats(shapes: Sequence[Shape], lost: Sequence[float], one: int, other: int) -> bool:
    """Whether a variant costs no more than another one and is better by far."""
    costs = [(shape.nbytes, shape.cached_values, shape.flops) for shape in (shapes[one], shapes[other])]
    return all(a <= b for a, b in zip(*costs, strict=True)) and _BEATEN_BY * lost[one] < lost[other]


@torch.no_grad()
def _alone(
    layer: Layer, slot: Slot, hidden: torch.Tensor, batch_rows: int, dtype: torch.dtype
) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    """The layer, what enters and what leaves it. An FFN stands behind its mixer, which need not run again in every
    step: its layer is one without, on what the mixer left."""
    with autocast(dtype):
        if slot.kind == "ffn":
            mixer = Slot("mixer", slot.layer)
            without = local.without(layer, slot)
            hidden = without.run(hidden, together=batch_rows)
            layer = local.without(layer, mixer)
            tokens = next(n for n in range(min(_FFN_TOKENS, hidden.shape[1]), 0, -1) if hidden.shape[1] % n == 0)
            hidden = hidden.reshape(-1, tokens, hidden.shape[2])
        return layer, hidden, layer.run(hidden, together=batch_rows)
