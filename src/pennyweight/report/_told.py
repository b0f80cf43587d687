"""What the pages look at in a report, as types: a report.json is drawn only if it fits them.

Dictionaries, not models, because the report of a job that has just ended is one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, StringConstraints
from typing_extensions import TypedDict

from pennyweight.disk.reading import checked, json_file
from pennyweight.model.demand import Cache
from pennyweight.report._facts import BOUNDS, unhealed_metric

_MOST = 1e15  # of anything: no chart and no sum overflows
Real = Annotated[float, Field(ge=-_MOST, le=_MOST)]
Amount = Annotated[float, Field(ge=0, le=_MOST)]
Positive = Annotated[float, Field(gt=0, le=_MOST)]
Count = Annotated[int, Field(gt=0, le=int(_MOST))]
Pair = Annotated[list[Real], Field(min_length=2, max_length=2)]
Bound = Literal["weight_bytes", "memory_bytes", "ttft_seconds", "tpot_seconds", "tokens_per_second"]
SlotName = Annotated[str, StringConstraints(pattern=r"^(embed|norm|head|[0-9]{1,4}\.(mixer|ffn))$")]


class Told(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]


class Figures(Told):
    memory_bytes: Amount
    ttft_seconds: Amount
    tpot_seconds: Amount
    tokens_per_second: Amount
    weight_bytes: Amount


class Predicted(Figures):
    file_bytes: Amount
    score: Real


class Workload(Told):
    prompt: Count
    new: Count
    concurrency: Count
    context: Count
    cache: NotRequired[Cache]


class Solution(Told):
    predicted: Predicted
    optimal: bool
    workload: Workload


class Swept(Told):
    """A budget of a sweep: solved, or why it cannot be."""

    budget: Annotated[dict[str, str], Field(min_length=1)]
    infeasible: NotRequired[str]
    predicted: NotRequired[Predicted]


class Chosen(Told):
    solutions: Annotated[list[Solution], Field(min_length=1)]
    sweep: list[Swept]


class SlotChoice(Told):
    slot: SlotName
    choice: str
    axes: dict[str, dict[str, Any]]
    score: Real
    bytes: Amount
    parent_bytes: Amount
    runners_up: list[str]


class Check(Told):
    name: str
    ok: bool
    expected: Any
    found: Any
    not_run: NotRequired[str | None]


class Loss(Told):
    nats: Positive
    tokens: Count
    nbytes: Count


class Agreement(Told):
    kl: Real
    top1: Annotated[float, Field(ge=0, le=1)]
    tokens: Count


class Quality(Told):
    parent: Loss
    child: Loss
    agreement: Agreement


class Samples(Told, total=False):
    prompts: list[str]
    parent: list[str]
    child: list[str]


class Speed(Told):
    ttft: Positive
    tpot: Positive
    tokens_per_second: Positive


class Speeds(Told):
    parent: Speed
    child: Speed


class Memory(Told):
    parent: Positive
    child: Positive


class Measured(Told):
    """Of a further demand."""

    speed: Speeds | None
    speed_how: str


class Further(Told):
    """A demand beside the first workload's."""

    told: str
    workload: Workload
    budget: Annotated[dict[Bound, Positive], Field(min_length=1)]
    predicted: Figures
    parent: Figures


class Verified(Told):
    checks: list[Check]
    whole: bool
    quality: Quality
    samples: Samples
    speed: Speeds | None
    speed_how: str
    slowdown: NotRequired[Positive | None]
    memory: NotRequired[Memory | None]
    also: NotRequired[list[Measured]]


class Parent(Told):
    bytes: Positive
    figures: Figures


class Plan(Told):
    prices: str
    choices: int
    slots: int


class Scored(Told):
    choices: int
    in_full: int
    told_early: int
    share_of_work: Amount


class Data(Told):
    text: str


class Heal(Told):
    library_tokens: NotRequired[int]
    local_tokens: int
    fit_tokens: NotRequired[int | None]
    whole_tokens: int


class Uniform(Told):
    bits: Count
    group: Count
    embedding_bits: NotRequired[Count]


class Asked(Told):
    budget: dict[str, str | None]


class Config(Told):
    budget: dict[str, str | None]
    also: NotRequired[list[Asked]]
    data: Data
    heal: Heal
    axes: list[str]
    search: str
    uniform: NotRequired[Uniform | None]
    prices: Literal["computed", "measured"]


class Identity(Told):
    model: str
    text: str
    threads: int
    compute: str


Margin = TypedDict(
    "Margin", {"5% tighter": NotRequired[Real | None], "as asked": Real | None, "5% looser": NotRequired[Real | None]}
)


class Report(Told):
    model: str
    budget: dict[Bound, Positive]
    workload: Workload
    also: NotRequired[list[Further]]
    plan: Plan
    parent: Parent
    chosen: Chosen
    slots: Annotated[list[SlotChoice], Field(min_length=1)]
    metric: Literal["kl", "lm", "cosine", "nmse", "error", "none"]
    scored: NotRequired[Scored | None]
    margins: dict[Bound, Margin]
    unhealed: NotRequired[dict[str, Real] | None]
    verified: Verified
    local_heal: dict[SlotName, Pair]
    fitted: NotRequired[dict[SlotName, Pair]]
    whole_heal: list[Real]
    whole_heal_judged: NotRequired[Pair | None]
    file_bytes: Positive
    timings: dict[str, Amount]
    config: Config
    identity: Identity
    versions: dict[str, str]


def read(path: Path) -> dict[str, Any]:
    """A report.json, as it is. Raises FileNotFoundError, or ValueError in one line if no page can be drawn from it."""
    raw = json_file(path, dict[str, Any])
    checked(path, raw, Report)
    wrong = _contradiction(raw)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}; it is not a report as penny fit writes it")
    return raw


def _contradiction(report: Any) -> str | None:
    """What no type says: parts that do not fit each other."""
    named = [slot["slot"] for slot in report["slots"]]
    layers = {name.split(".")[0] for name in named if "." in name}
    whole = {f"{layer}.{kind}" for layer in range(len(layers)) for kind in ("mixer", "ffn")}
    if len(set(named)) < len(named) or {name for name in named if "." in name} != whole:
        return "slots are not two of every layer"
    others = len(report["chosen"]["solutions"]) - 1
    if any(len(slot["runners_up"]) != others for slot in report["slots"]):
        return f"slots do not name {others} runners-up"
    if any(report["config"]["budget"].get(BOUNDS[bound][0]) is None for bound in report["budget"]):
        return "budget has a bound that config.budget does not ask for"
    also = report.get("also", [])
    if not len(also) == len(report["verified"].get("also", [])) == len(report["config"].get("also", [])):
        return "further demands are not as many as were asked for and verified"
    pairs = zip(also, report["config"].get("also", []), strict=True)
    if any(asked["budget"].get(BOUNDS[bound][0]) is None for each, asked in pairs for bound in each["budget"]):
        return "a further demand has a bound that config.also does not ask for"
    if any(("predicted" in entry) == ("infeasible" in entry) for entry in report["chosen"]["sweep"]):
        return "a budget of the sweep is neither solved nor infeasible"
    samples = report["verified"]["samples"]
    if len({len(samples.get(name, ())) for name in ("prompts", "parent", "child")}) > 1:
        return "samples are not as many as prompts"
    if report["whole_heal"] and report.get("whole_heal_judged") is None:
        return "whole_heal was not judged"
    if report.get("unhealed") is not None and unhealed_metric(report) not in report["unhealed"]:
        return f"unhealed has no {unhealed_metric(report)}"
    quality = report["verified"]["quality"]
    if any(quality[name]["nats"] / quality[name]["tokens"] > math.log(_MOST) for name in ("parent", "child")):
        return "a loss per token is beyond any model's"
    return None
