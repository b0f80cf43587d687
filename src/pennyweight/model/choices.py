"""What was picked for each slot: specs of axes, in the order in which they are applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.model.slots import Slot


@dataclass(frozen=True)
class Choice:
    """What was picked for one slot: at most one spec per axis, in the order they are applied. Empty: the parent's."""

    specs: tuple[tuple[str, Any], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.specs)

    def __contains__(self, axis: str) -> bool:
        return any(name == axis for name, _ in self.specs)

    def __getitem__(self, axis: str) -> Any:
        return dict(self.specs)[axis]

    def __str__(self) -> str:
        return " + ".join(str(spec) for _, spec in self.specs) or "parent"

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {axis: dict(vars(spec)) for axis, spec in self.specs}  # they hold numbers and names: nothing to copy

    def key(self) -> str:
        """Canonical text: equal choices give equal keys."""
        return json.dumps(self.to_json(), sort_keys=True)


PARENT = Choice()
Layout = Mapping[Slot, Choice]
"""The choice of every slot; slots left out keep the parent's."""


def layout_to_json(layout: Layout) -> dict[str, Any]:
    return {str(slot): choice.to_json() for slot, choice in layout.items() if choice}
