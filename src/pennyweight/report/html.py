"""report.html: one page on what was asked, what came and what it cost. It reaches for nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pennyweight.report import _facts, charts
from pennyweight.report._facts import best
from pennyweight.report.charts import Axis, Bar, Point, Series
from pennyweight.units import show_bytes, show_seconds


def render(report: dict[str, Any]) -> str:
    """The page, from what report.json holds. Text of models and users is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bytes": show_bytes, "seconds": show_seconds, "number": _number}
    quality = report["verified"]["quality"]
    before, after = (_facts.bits_per_byte(quality[name]) for name in ("parent", "child"))
    return environment.get_template("page.html.j2").render(
        report=report,
        facts=_facts,
        best=best(report),
        kept=_facts.kept(report),
        promises=_facts.promises(report),
        before=before,
        after=after,
        metric=_facts.METRICS[report["metric"]],
        cells=_cells(report),
        depth=_depth(report),
        front=_front(report),
        margins=_margins(report),
        comparison=_comparison(report),
        runners_up=_runners_up(report),
        whole=_whole_heal(report["whole_heal"]),
        local=_local_heal(report["local_heal"]),
        samples=_samples(report["verified"]["samples"]),
        timings=charts.bars([Bar(name, seconds, show_seconds(seconds)) for name, seconds in report["timings"].items()]),
        config=yaml.safe_dump(report["config"], sort_keys=False),
    )


def _number(value: float) -> str:
    """Three figures, as scores need."""
    return f"{value:.3g}"


def _cells(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One cell of the choice map per slot. `heat` 0 to 1: square root of its share of the largest score, so that the
    many small scores stay apart; `lines` leave out how a choice was made, which `title` says."""
    total = sum(slot["score"] for slot in report["slots"])
    top = max(slot["score"] for slot in report["slots"])
    cells = {}
    for slot in report["slots"]:
        share = slot["score"] / total if total > 0 else 0.0
        cells[slot["slot"]] = {
            "lines": [" ".join(part.split()[:2]) for part in slot["choice"].split(" + ")],
            "title": f"{slot['slot']}: {slot['choice']}\nscore {_number(slot['score'])}, {share:.1%} of the sum\n"
            f"{show_bytes(slot['bytes'])} of {show_bytes(slot['parent_bytes'])}",
            "heat": (max(0.0, slot["score"]) / top) ** 0.5 if top > 0 else 0.0,
            "share": share,
            "untouched": not slot["axes"],
        }
    return cells


def _depth(report: Mapping[str, Any]) -> int:
    """Number of layers."""
    layers = [slot["slot"].split(".")[0] for slot in report["slots"]]
    return 1 + max((int(layer) for layer in layers if layer.isdecimal()), default=-1)


def _front(report: Mapping[str, Any]) -> str:
    """The sweep and the asked budget, size against predicted score; "" if nothing was swept. Budgets that lead to the
    same model share a mark; the line joins the models that no other one beats in both."""

    def place(solution: Mapping[str, Any]) -> tuple[float, float]:
        return 100 * solution["predicted"]["file_bytes"] / report["parent"]["bytes"], solution["predicted"]["score"]

    swept: dict[tuple[float, float], list[str]] = {}
    for entry in report["chosen"]["sweep"]:
        if "infeasible" not in entry:
            name, text = next(iter(entry["budget"].items()))
            swept.setdefault(place(entry), []).append(text if name == "weights" else f"{name} {text}")
    if not swept:
        return ""
    asked = place(best(report))
    edge: list[Point] = []
    for x, y in sorted({*swept, asked}):
        if not edge or y < edge[-1].y:
            edge.append(Point(x, y))
    crowded = 0.1 * (edge[-1].x - edge[0].x)
    marks = []
    for (x, y), names in swept.items():
        label = f"{names[0]}…{names[-1]}" if names[1:] else names[0]
        below = any(0 < other - x < crowded for other, _ in swept)  # leaves the room above to the next one's label
        marks.append(Point(x, y, f"{', '.join(names)}: {x:.1f}% of the bytes, score {_number(y)}", label, below))
    asked_title = f"asked: {asked[0]:.1f}% of the bytes, score {_number(asked[1])}"
    series = [
        Series(edge, "front", line=True, marks=False),
        Series(marks, "swept"),
        Series([Point(*asked, asked_title, "asked", below=True)], "asked"),
    ]
    if report["metric"] == "kl":
        kl = report["verified"]["quality"]["agreement"]["kl"]
        share = 100 * report["file_bytes"] / report["parent"]["bytes"]
        finished = Point(share, kl, f"measured on the finished model: KL {_number(kl)}", "measured")
        series.append(Series([finished], "measured"))
    score = Axis(f"score: {_facts.METRICS[report['metric']]}", log=True)
    return charts.plot(series, Axis("file bytes, % of the parent"), score)


def _margins(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per bound: bars of the score as asked and 5 % to either side; `binding`: whether moving it changes anything."""
    found = []
    for bound, scores in report["margins"].items():
        asked = scores["as asked"]
        rows = []
        for label, score in scores.items():
            text = "cannot be met" if score is None else _number(score)
            if score is not None and asked and score != asked:
                text += f" ({score / asked - 1:+.0%})"
            rows.append(Bar(label.replace("%", " %"), score, text, "asked" if label == "as asked" else ""))
        binding = len(set(scores.values())) > 1
        found.append({"name": _facts.BOUNDS[bound][1], "chart": charts.bars(rows), "binding": binding})
    return found


def _comparison(report: Mapping[str, Any]) -> list[list[str]]:
    """[what, parent predicted, child predicted, parent measured, child measured]; "" where there is no such number."""
    parent, child, agreement = (report["verified"]["quality"][name] for name in ("parent", "child", "agreement"))
    before, after = report["parent"]["figures"], best(report)["predicted"]
    speed, metric, score = report["verified"]["speed"], report["metric"], _number(after["score"])
    memory = report["verified"].get("memory")
    taken = [show_bytes(memory[who]) for who in ("parent", "child")] if memory else ["", ""]
    rows = [["File size", "", *map(show_bytes, (after["file_bytes"], report["parent"]["bytes"], report["file_bytes"]))]]
    unhealed = report.get("unhealed")
    if unhealed is not None:
        measured = _facts.unhealed_metric(report)
        name = f"Before healing, on the scored text: {_facts.METRICS[measured]}"
        name = f"{name}, rounded to nearest" if metric == "none" else name
        rows.append([name, "0", score if measured == metric else "", "0", _number(unhealed[measured])])
    if metric == "lm":
        added = (child["nats"] - parent["nats"]) / child["tokens"]
        rows.append(["Loss added, nats per token", "0", score, "0", _number(added)])
    elif metric not in ("kl", "none"):
        rows.append([f"Score: {_facts.METRICS[metric]}", "0", score, "", ""])
    rows += [
        ["KL, nats per token", *(["0", score] if metric == "kl" else ["", ""]), "0", _number(agreement["kl"])],
        ["Bits per byte", "", "", *(f"{_facts.bits_per_byte(loss):.4f}" for loss in (parent, child))],
        ["Perplexity per token", "", "", *(f"{_facts.perplexity(loss):.2f}" for loss in (parent, child))],
        ["Memory", *(show_bytes(model["memory_bytes"]) for model in (before, after)), *taken],
    ]
    for name, key in (("Time to first token", "ttft"), ("Time per output token", "tpot")):
        measured = [show_seconds(speed[who][key]) for who in ("parent", "child")] if speed else ["", ""]
        rows.append([name, *(show_seconds(model[f"{key}_seconds"]) for model in (before, after)), *measured])
    rate = "tokens_per_second"
    measured = [_facts.show(rate, speed[who][rate]) for who in ("parent", "child")] if speed else ["", ""]
    rows.append(["Throughput", *(_facts.show(rate, model[rate]) for model in (before, after)), *measured])
    return rows


def _runners_up(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Solutions after the best: what they predict, and what they choose where they choose differently."""
    return [
        {
            "predicted": other["predicted"],
            "differ": [
                f"{slot['slot']} {slot['runners_up'][number]}"
                for slot in report["slots"]
                if slot["runners_up"][number] != slot["choice"]
            ],
        }
        for number, other in enumerate(report["chosen"]["solutions"][1:])
    ]


def _whole_heal(losses: Sequence[float]) -> str:
    """Loss of whole-model distillation over steps, smoothed over a twentieth of them; "" if there was none."""
    if not losses:
        return ""
    width = max(1, len(losses) // 20)
    means = [sum(losses[max(0, end - width) : end]) / min(width, end) for end in range(1, len(losses) + 1)]
    curve = Series([Point(step, mean) for step, mean in enumerate(means, 1)], "child", line=True, marks=False)
    return charts.plot([curve], Axis("step", whole=True), Axis("distillation loss", log=True))


def _local_heal(losses: Mapping[str, Sequence[float]]) -> str:
    """First and last loss of every healed block over its layer, mixer left, FFN right; "" if there was none."""
    if not losses:
        return ""
    series = []
    for slot, (first, last) in losses.items():
        layer, _, kind = slot.partition(".")
        x = int(layer) + (0.12 if kind == "ffn" else -0.12)
        begun, ended = (Point(x, loss, f"{slot}: {_number(first)} → {_number(last)}") for loss in (first, last))
        series += [
            Series([begun, ended], kind, line=True, marks=False),
            Series([begun], f"{kind} first"),
            Series([ended], kind),
        ]
    return charts.plot(series, Axis("layer", whole=True), Axis("block loss (1: as bad as no block)", log=True))


def _samples(samples: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Prompt and both continuations; the child's is cut where it leaves the parent's."""
    rows = []
    for prompt, parent, child in zip(*(samples.get(name, ()) for name in ("prompts", "parent", "child")), strict=True):
        pairs = enumerate(zip(parent, child, strict=False))
        cut = next((at for at, (a, b) in pairs if a != b), min(len(parent), len(child)))
        rows.append({"prompt": prompt, "parent": parent, "same": child[:cut], "differs": child[cut:]})
    return rows
