"""What the page and the card both say of a run, worked out from its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.units import show_bytes, show_seconds

METRICS = {
    "kl": "KL to the parent in nats per token",
    "lm": "increase of the loss in nats per token",
    "cosine": "cosine distance of the final hidden states",
    "nmse": "normalised squared error of the final hidden states",
    "error": "squared error of what the slot adds, as a share of the residual stream, by second moments",
    "none": "not judged",
}

BOUNDS = {
    "weight_bytes": ("weights", "weight files"),
    "memory_bytes": ("memory", "memory"),
    "ttft_seconds": ("ttft", "time to first token"),
    "tpot_seconds": ("tpot", "time per output token"),
    "tokens_per_second": ("throughput", "throughput"),
}
"""Bound -> its name in the configuration, and in words."""

SMALL_BYTES = 200_000_000  # 100 M parameters in 16 bits

UNPACKED = (
    "Loading in transformers unpacks quantised matrices to 16 bits: there, fewer bits save disk, "
    "but neither memory nor time."
)
SMALL = (
    "The parent has fewer than 100 M parameters. A reference model of this size shows that the implementation works; "
    "it does not reproduce the numbers of any paper."
)


@dataclass(frozen=True)
class Promise:
    """One bound of the budget beside what came of it. `how`: in words, whether that was measured."""

    name: str
    asked: str
    limit: str
    came: str
    kept: bool
    how: str


def unhealed_metric(report: Mapping[str, Any]) -> str:
    """What children in memory were measured by: the metric of the scores, or KL where these are of no child."""
    return "kl" if report["metric"] in ("error", "none") else report["metric"]


def early(report: Mapping[str, Any]) -> str:
    """What of the scoring was left out, after the number of choices; nothing if nothing was."""
    scored = report.get("scored")
    if not scored or not scored["told_early"]:
        return ""
    how = f"{scored['in_full']} on all of the text, {scored['told_early']} early out of the question"
    return f", {how} ({scored['share_of_work']:.0%} of the work)"


def promises(report: Mapping[str, Any]) -> list[Promise]:
    """Every bound that was asked for, of the budget and of each further demand. Only file bytes are held against a
    measurement: times differ from run to run."""
    written = {"weight_bytes": report["file_bytes"]}
    asked, verified, reached = report["config"]["budget"], report["verified"], {**best(report)["predicted"], **written}
    together = report["workload"]["concurrency"]
    found = [
        _promise(bound, limit, asked, reached, _how(bound, verified["speed"], verified.get("memory"), together))
        for bound, limit in report["budget"].items()
    ]
    for number, demand in enumerate(report.get("also", ())):
        asked, speed = report["config"]["also"][number]["budget"], verified["also"][number]["speed"]
        found += [
            _promise(bound, limit, asked, demand["predicted"] | written, _how(bound, speed), f", {demand['told']}")
            for bound, limit in demand["budget"].items()
        ]
    return found


def _promise(
    bound: str, limit: float, asked: Mapping[str, str], reached: Mapping[str, float], how: str, told: str = ""
) -> Promise:
    """`asked`: bounds as they were typed, by their names in the configuration. `told`: whose bound it is."""
    (key, name), came, at_least = BOUNDS[bound], reached[bound], bound == "tokens_per_second"
    slack = 1e-9 * limit  # the rounding of sums over slots
    kept, sign = (came >= limit - slack, "≥") if at_least else (came <= limit + slack, "≤")
    words = f"{key} {sign} {asked[key]}" + (" of the parent's" if asked[key].endswith("%") else "")
    return Promise(name + told, words + told, f"{sign} {show(bound, limit)}", show(bound, came), kept, how)


def _how(
    bound: str, speed: Mapping[str, Any] | None, memory: Mapping[str, Any] | None = None, together: int = 1
) -> str:
    """Where a number comes from, beside what the native engine was measured to take."""
    if bound == "weight_bytes":
        return "measured on the written files"
    if bound == "memory_bytes":
        if memory is None:
            return "computed, not measured"
        return f"computed; {show(bound, memory['child'])} at most were resident while it served"
    told = "predicted" + (f" for {together} texts at once" if bound == "tokens_per_second" and together > 1 else "")
    if speed is None:
        return f"{told}, not measured"
    return f"{told}; {show(bound, speed['child'][bound.removesuffix('_seconds')])} measured in the native engine"


_BUSIER = 1.15
"""A machine takes so many times as long before anything is said of it: what prices are allowed to be wrong by."""


def busier(report: Mapping[str, Any]) -> str | None:
    """What to say of a machine that has become busier since prices were made; None if it has not."""
    slowdown = report["verified"].get("slowdown")
    if slowdown is None or slowdown < _BUSIER:
        return None
    return f"the machine is busier than when prices were made: the same work takes {slowdown:.2f} x as long now"


def kept(report: Mapping[str, Any]) -> bool:
    """Whether every bound holds and no check failed."""
    return all(p.kept for p in promises(report)) and not any(map(failed, report["verified"]["checks"]))


def failed(check: Mapping[str, Any]) -> bool:
    """Whether a check was made and not passed."""
    return not check["ok"] and check.get("not_run") is None


def tally(checks: Sequence[Mapping[str, Any]]) -> str:
    """How many of the checks that were made passed, and why others were not made."""
    reasons = [check["not_run"] for check in checks if check.get("not_run") is not None]
    said = f"{sum(check['ok'] for check in checks)} of {len(checks) - len(reasons)} passed"
    return f"{said}, {len(reasons)} not run: {'; '.join(reasons)}" if reasons else said


def best(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The solution that was built."""
    return report["chosen"]["solutions"][0]


def small(report: Mapping[str, Any]) -> bool:
    """Whether the parent is too small to say anything about models that people deploy."""
    return report["parent"]["bytes"] < SMALL_BYTES


def bits_per_byte(loss: Mapping[str, float]) -> float:
    """Of summed nats over UTF-8 bytes of text."""
    return loss["nats"] / math.log(2) / loss["nbytes"]


def perplexity(loss: Mapping[str, float]) -> float:
    """Per token."""
    return math.exp(loss["nats"] / loss["tokens"])


def show(bound: str, value: float) -> str:
    """A figure in the unit its name carries."""
    if bound.endswith("bytes"):
        return show_bytes(value)
    if bound.endswith("seconds"):
        return show_seconds(value)
    return f"{value:,.0f} tok/s"


def times_note(report: Mapping[str, Any]) -> str:
    """Where predicted times come from and what they can be compared with."""
    note = f"Predicted times are {report['plan']['prices']}."
    if report["config"]["prices"] == "computed":
        note += (
            " They are a roofline: weights and cache over bandwidth, or arithmetic over peak, whichever takes longer."
            " What lies between the matrices, and caches that hold a small model whole, are left out."
        )
    return note
