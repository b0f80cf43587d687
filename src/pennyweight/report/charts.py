"""Charts as SVG text: crisp at any size, no library, colours left to the style sheet of the page.

Every chart is drawn 480 units wide, so that its 13-unit type stays readable on a phone. CSS classes: `grid`, `tick`,
`axis`, `mark`, `line`, `bar`, and the `look` that a series or bar names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 480


@dataclass(frozen=True)
class Point:
    """`title` is shown on hover, `label` always, at the point's upper right or lower left (`below`)."""

    x: float
    y: float
    title: str = ""
    label: str = ""
    below: bool = False


@dataclass(frozen=True)
class Series:
    """Points drawn as marks, a line, or both; `look` is a CSS class."""

    points: Sequence[Point]
    look: str
    line: bool = False
    marks: bool = True


@dataclass(frozen=True)
class Axis:
    """`log` holds only while every value is above 0; `whole` allows ticks at integers alone."""

    label: str
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Bar:
    """`value` None draws no bar, only the text."""

    label: str
    value: float | None
    text: str
    look: str = ""


class _Scale:
    """Values to units between `start` and `end`, with 8 % of air on both sides, where labels find room."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        self.log = axis.log and min(values) > 0
        low, high = (self._flat(value) for value in (min(values), max(values)))
        air = 0.08 * (high - low) or max(0.5, 1e-3 * abs(high))
        self.low, self.high = low - air, high + air

    def _flat(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._flat(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the scale, about five."""
        if self.log:
            exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
            mantissas = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            found = [m * 10.0**e for e in exponents for m in mantissas]
            return [tick for tick in found if self.low <= math.log10(tick) <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
        step = max(1.0, step) if self.axis.whole else step
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def plot(series: Sequence[Series], x: Axis, y: Axis, *, height: int = 300) -> str:
    """Series over two axes. The y label stands above its axis, where it reads without turning the head."""
    left, right, top, bottom = 54, WIDTH - 12, 34, height - 46
    points = [point for one in series for point in one.points]
    across = _Scale(x, [point.x for point in points], left, right)
    up = _Scale(y, [point.y for point in points], bottom, top)
    parts = [f'<text class="axis" x="0" y="14">{escape(y.label)}</text>']
    parts.append(f'<text class="axis end" x="{right}" y="{height - 6}">{escape(x.label)}</text>')
    for tick in up.ticks():
        at = up(tick)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{left - 8}" y="{at + 4:.1f}">{tick:g}</text>')
    for tick in across.ticks():
        parts.append(f'<text class="tick mid" x="{across(tick):.1f}" y="{bottom + 19}">{tick:g}</text>')
    parts.append(f'<path class="base" d="M{left} {bottom}H{right}"/>')
    for one in series:
        parts.append(f'<g class="{one.look}">{_drawn(one, across, up)}</g>')
    return _svg(height, f"{y.label} over {x.label}", parts)


def _drawn(series: Series, across: _Scale, up: _Scale) -> str:
    parts = []
    placed = [(across(point.x), up(point.y), point) for point in series.points]
    if series.line and len(placed) > 1:
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline class="line" points="{corners}"/>')
    for x, y, point in placed if series.marks or len(placed) == 1 else ():
        parts.append(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(point.title)}</title></circle>'
        )
        if point.label:
            before = point.below or x > 0.8 * WIDTH
            side, dx, dy = ("end", -8 if point.below else 5, 17 if point.below else -11) if before else ("", 8, -7)
            parts.append(f'<text class="label {side}" x="{x + dx:.1f}" y="{y + dy:.1f}">{escape(point.label)}</text>')
    return "".join(parts)


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars from 0, label before and text behind each."""
    left, longest, step = 112, 220, 30
    top = max((row.value for row in rows if row.value is not None), default=0.0)
    parts = []
    for index, row in enumerate(rows):
        middle = index * step + step / 2
        length = longest * max(0.0, row.value) / top if row.value is not None and top > 0 else 0.0
        parts.append(f'<text class="tick end" x="{left - 10}" y="{middle + 4.5}">{escape(row.label)}</text>')
        if row.value is not None:
            place = f'x="{left}" y="{middle - 9}" width="{max(2.0, length):.1f}" height="18" rx="3"'
            parts.append(f'<rect class="bar {row.look}" {place}/>')
        parts.append(f'<text class="label" x="{left + length + 9:.1f}" y="{middle + 4.5}">{escape(row.text)}</text>')
    return _svg(step * len(rows), "; ".join(f"{row.label}: {row.text}" for row in rows), parts)


def _svg(height: int, description: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description)}">'
    return head + "".join(parts) + "</svg>"
