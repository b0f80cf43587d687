"""How long a job takes on this machine, stage by stage, and what it does less of to be done in time.

Operations are counted (products of matrices, tokens times layers) and divided by what this machine multiplies in a
second (prices/measure.py: two seconds of measuring, remembered). `_SHARE` of that rate is what whole stages reach, by
fits on two cores (docs/log.md); other work on the machine is not foreseen.

Where that is longer than asked, a job does less, of one thing after another down to its least: tokens of healing, rows
of scored text, tokens of the library, rows of calibration. What was decided is kept with the run, so that the next call
of the same job goes on with it, however busy the machine is by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight import families, variants
from pennyweight.config import FitConfig, merged
from pennyweight.job import text
from pennyweight.judge import codes, score
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Shape, Shapes
from pennyweight.model.slots import Slot
from pennyweight.prices import measure, offers
from pennyweight.runs.events import Listener
from pennyweight.units import show_seconds

_SHARE = 0.5  # of the measured rate
_TRAINED = 4  # passes of a trained token: the parent's, the child's, and its gradients' two
_FITTED = 3  # passes of a token that is fitted to: the parent's, and the child's before and after
_CONTENDING = 0.35  # of the scoring that is left after the first part, where choices are raced
_APPLY = 0.02  # seconds to make a choice of a slot, for each chunk
_STEADY = 20.0  # seconds of what does not grow with text: reading, checking, packing

LEAST = {
    ("heal", "whole_tokens"): 20_000,
    ("heal", "local_tokens"): 5_000,
    ("data", "score_rows"): 2,
    ("heal", "library_tokens"): 5_000,
    ("data", "calibration_rows"): 4,
}
"""What a job can do less of, in this order, and how far."""
_TOGETHER = (tuple(list(LEAST)[:2]), *((key,) for key in list(LEAST)[2:]))
_STEPS = 20  # in which they go from what was asked down to the least
_WORDS = {
    ("heal", "whole_tokens"): "tokens of healing the whole",
    ("heal", "local_tokens"): "tokens of healing a block",
    ("data", "score_rows"): "rows of scored text",
    ("heal", "library_tokens"): "tokens for a variant of the library",
    ("data", "calibration_rows"): "rows of calibration",
}


class TooShort(ValueError):
    """Not even the least can be done in the hours that were asked."""


@dataclass(frozen=True)
class Work:
    """Operations of a model and of what it is offered. By token: `layers`, all of them; `logits`, with what is done
    with them; `moments`; `scored`, all choices, and `whole`, of those that bring their own logits; `blocks`, those that
    can be healed; `learning`, variants that can be trained. Once: `codes`."""

    choices: int
    layers: float
    logits: float
    moments: float
    scored: float
    codes: float
    blocks: float
    learning: float

    @staticmethod
    def of(shapes: Shapes, singles: Mapping[Slot, list[Choice]]) -> Work:
        layer = sum(shape.flops for slot, shape in shapes.items() if slot.layer == 0)
        structural = [slot for slot, own in singles.items() if any(variants.structural(choice) for choice in own)]
        found = {slot: codes.wanted(shapes[slot], own).values() for slot, own in singles.items()}
        return Work(
            choices=sum(map(len, singles.values())),
            layers=sum(shape.flops for slot, shape in shapes.items() if slot.layer is not None),
            logits=layer * score.logit_passes(next(s for s, shape in shapes.items() if shape.makes_logits), shapes),
            moments=sum(2.0 * _squares(shape) for slot, shape in shapes.items() if slot.layer is not None),
            scored=layer * sum(score.passes(slot, shapes) * len(own) for slot, own in singles.items()),
            codes=sum(2.0 * weight.shape[-2] * weight.shape[-1] ** 2 for own in found.values() for weight, _ in own),
            blocks=sum(shapes[slot].flops for slot in structural),
            learning=sum(
                shapes[slot].flops
                for slot, own in singles.items()
                for choice in own
                if any(variants.trains(axis) for axis, _ in choice.specs)
            ),
        )

    def seconds(self, config: FitConfig, tokens: int, rate: float) -> dict[str, float]:
        """Of every stage that takes long. `tokens`: of a row; `rate`: operations a second that a machine reaches."""
        data, heal, judged = config.data, config.heal, config.uniform is None
        parts = text.score_parts(config, tokens)
        rows, chunks = float(data.score_rows), float(sum(map(len, parts)))
        raced = config.race and config.metric == "kl" and len(parts) > 1
        if raced:
            rows, chunks = (
                first + _CONTENDING * (whole - first)
                for first, whole in ((sum(parts[0]), rows), (len(parts[0]), chunks))
            )
        own = rows if judged and config.metric != "error" else 0.0
        passed = data.calibration_rows * tokens
        heals, whole = self.blocks > 0, self.layers + self.logits
        counted = {
            "stats": judged * (passed * (self.layers + self.moments) + 4 * self.codes),
            "library": heal.library_tokens * self.learning * _TRAINED,
            "score": own * tokens * self.scored + rows * tokens * self.layers,
            "heal": heals
            * (
                _TRAINED * (heal.local_tokens * self.blocks + heal.whole_tokens * whole)
                + heal.fitted * (_FITTED * self.layers + self.moments)
            ),
            "pack": passed * 2 * (self.layers + self.moments),
            "verify": 2 * data.held_out_rows * tokens * whole,
        }
        found = {stage: operations / (rate * _SHARE) for stage, operations in counted.items()}
        found["score"] += _APPLY * self.choices * chunks * (own > 0)
        found["verify"] += _STEADY
        return {stage: round(seconds, 1) for stage, seconds in found.items()}


def _squares(shape: Shape) -> float:
    return float(shape.hidden_size**2 + (shape.inner_size or 0) ** 2)


def within(config: FitConfig, seconds: Callable[[FitConfig], Mapping[str, float]]) -> tuple[FitConfig, str]:
    """The config with less of what takes long, so that it is done in `config.hours`, and in a line what it leaves out
    (nothing if that is nothing). `seconds`: what a config takes, by stage.

    Raises TooShort, with the least number of hours, if the least takes longer.
    """
    assert config.hours is not None
    limit, found = 3600 * config.hours, config
    for keys in _TOGETHER:
        asked = {key: _value(found, key) for key in keys}
        for step in range(_STEPS + 1):
            less = {key: _between(asked[key], LEAST[key], step / _STEPS) for key in keys}
            found = _having(found, less)
            if sum(seconds(found).values()) <= limit:
                return found, _left_out(config, found)
    least = sum(seconds(found).values())
    raise TooShort(
        f"--hours {config.hours:g} is too little: the least that is worth doing takes about {show_seconds(least)} on "
        f"this machine; give at least --hours {-(-least * 100 // 3600) / 100:g}"
    )


def _value(config: FitConfig, key: tuple[str, str]) -> int:
    return getattr(getattr(config, key[0]), key[1])


def _between(asked: int, least: int, share: float) -> int:
    """What was asked, less a share of what is above the least; never more than was asked."""
    return asked if asked <= least else round(asked - share * (asked - least))


def _having(config: FitConfig, values: Mapping[tuple[str, str], int]) -> FitConfig:
    changes: dict[str, Any] = {}
    for (section, name), value in values.items():
        changes.setdefault(section, {})[name] = value
    return merged(config, changes)


def _left_out(asked: FitConfig, found: FitConfig) -> str:
    less = [
        f"{_value(found, key):,} instead of {_value(asked, key):,} {_WORDS[key]}"
        for key in LEAST
        if _value(found, key) < _value(asked, key)
    ]
    return f"to be done in {asked.hours:g} h: {', '.join(less)}" if less else ""


@dataclass(frozen=True)
class InTime:
    """What a job was asked for and does instead, to be done in time, and what it leaves out, in words. `asked`: the
    hours and the sections `data` and `heal`; `found`: those sections."""

    asked: dict[str, Any]
    found: dict[str, Any]
    left_out: str

    def applied(self, config: FitConfig) -> FitConfig:
        return merged(config, self.found)


def in_time(config: FitConfig, model: Mapping[str, Any], kept: Any, listen: Listener) -> InTime:
    """What to do in `config.hours`; `kept` is what an earlier call decided, which stays if it was asked the same.
    Raises TooShort."""
    asked = config.model_dump(mode="json", include={"hours", "data", "heal"})
    if kept is not None and kept["asked"] == asked:
        return InTime(**kept)
    found, left_out = within(config, lambda changed: seconds(changed, model, listen))
    return InTime(asked, found.model_dump(mode="json", include={"data", "heal"}), left_out)


def seconds(config: FitConfig, model: Mapping[str, Any], listen: Listener) -> dict[str, float]:
    """Of every stage that takes long, on this machine."""
    shapes, tokens = families.shapes(dict(model)), text.row_tokens(model, config)
    singles = {slot: offers.single_choices(shape, config.axes, scored_tokens=tokens) for slot, shape in shapes.items()}
    machine = measure.machine(listen=listen)
    return Work.of(shapes, singles).seconds(config, tokens, machine.flops * machine.flops_share)
