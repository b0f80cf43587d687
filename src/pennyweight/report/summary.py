"""A few lines for the terminal when a job is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.report import _facts
from pennyweight.units import show_bytes, show_seconds


def render(report: Mapping[str, Any]) -> str:
    """What came of the budget, and what it cost."""
    quality, speed = report["verified"]["quality"], report["verified"]["speed"]
    parent, child = (_facts.bits_per_byte(quality[name]) for name in ("parent", "child"))
    agreement = quality["agreement"]
    size, whole = report["file_bytes"], report["parent"]["bytes"]
    lines = [f"budget     {p.asked}: {p.came} ({p.how})" for p in _facts.promises(report)]
    if (scored := report.get("scored")) and scored["told_early"]:
        lines.append(f"scored     {scored['choices']} choices{_facts.early(report)}")
    lines += [
        f"size       {show_bytes(size)}, {size / whole:.1%} of the parent's {show_bytes(whole)}",
        f"quality    {child:.4f} bits per byte on held-out text, parent {parent:.4f} ({child / parent - 1:+.2%})",
        f"agreement  KL {agreement['kl']:.4f} nats per token, same first choice {agreement['top1']:.1%}",
    ]
    if speed is not None:
        before, after = speed["parent"]["tpot"], speed["child"]["tpot"]
        ratio = _facts.busier(report) or f"{before / after:.2f} x as fast"
        together = report["workload"]["concurrency"]
        how = "median in the native engine" + (f", {together} texts at once" if together > 1 else "")
        lines.append(f"speed      {show_seconds(after)} per token, parent {show_seconds(before)} ({ratio}; {how})")
    lines.append(f"checks     {_facts.tally(report['verified']['checks'])}")
    return "\n".join(lines)
