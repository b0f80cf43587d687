"""Sizes, counts and times as people write them: 3GiB, 8k, 40ms, 500tok/s, 22%."""

from __future__ import annotations

import re

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_COUNTS = {"": 1, "k": 1024, "m": 1024**2}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "": 1.0}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%/]*)\s*")


def _parse(text: str, units: dict[str, float], what: str, example: str) -> float:
    match = _NUMBER.fullmatch(text)
    if not match or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not a {what}; write it like {example}")
    return float(match[1]) * units[match[2].lower()]


def parse_bytes(text: str, *, whole: int | None = None) -> int:
    """'3GiB' -> 3221225472; '22%' is a share of `whole` where one is given. Raises ValueError otherwise."""
    if text.strip().endswith("%"):
        if whole is None:
            raise ValueError(f"{text!r}: a share needs something to be a share of; write bytes, like 3GiB")
        return round(whole * _parse(text, {"%": 0.01}, "share", "22%"))
    return round(_parse(text, {k: float(v) for k, v in _BYTES.items()}, "size", "3GiB, 700MB or 12000000"))


def parse_count(text: str) -> int:
    """'8k' -> 8192 tokens; '100' -> 100."""
    return int(_parse(text, {k: float(v) for k, v in _COUNTS.items()}, "number of tokens", "8k or 512"))


def parse_seconds(text: str) -> float:
    """'40ms' -> 0.04."""
    return _parse(text, _SECONDS, "time", "40ms or 1.5s")


def parse_rate(text: str) -> float:
    """'500tok/s' -> 500.0 tokens per second."""
    return _parse(text, {"tok/s": 1.0, "": 1.0}, "rate", "500tok/s")


def show_bytes(count: float) -> str:
    """1536 -> '1.50 KiB': binary units, three figures."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < (1023.5 if unit == "B" else 1023.995):  # what would be shown as 1024 is one of the next unit
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def show_seconds(seconds: float) -> str:
    """0.0042 -> '4.20 ms'; 75 -> '1:15'."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.999995:  # what would be shown as 1000.00 ms is a second
        return f"{seconds * 1e3:.2f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
