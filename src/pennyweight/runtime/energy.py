"""Joules that the processor has used, where it counts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def energy_meter(root: Path = Path("/sys/class/powercap")) -> tuple[Callable[[], float] | None, str]:
    """A function that tells joules used since now by the processor packages, and its source; or None and why not. Their
    counters begin anew after some minutes to hours; it has to be called at least once in between."""
    try:
        packages = [
            path
            for path in sorted(root.glob("*-rapl:*"))
            if path.name.count(":") == 1 and (path / "name").read_text().startswith("package")
        ]
        counters = [_Counter(path) for path in packages]
    except PermissionError:
        return None, f"the RAPL counters in {root} may be read by root alone"
    if not counters:
        return None, "this machine has no RAPL counters"
    return lambda: sum(counter.joules() for counter in counters), f"RAPL, {len(counters)} processor packages"


class _Counter:
    """One domain of RAPL: microjoules that start again at 0 after max_energy_range_uj."""

    def __init__(self, folder: Path) -> None:
        self._path, self._range = folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = int(self._path.read_text()), 0

    def joules(self) -> float:
        now = int(self._path.read_text())
        self._total += now - self._last if now >= self._last else self._range - self._last + now
        self._last = now
        return self._total / 1e6
