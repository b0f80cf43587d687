"""README.md of a finished folder: a model card that says what it is, what it lost, and what nobody knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from pennyweight import variants
from pennyweight.report import _facts
from pennyweight.report._facts import best
from pennyweight.units import show_bytes, show_seconds

_TEXTS = {
    "builtin": "Python's standard library and its documentation",
    "parent": "text sampled from the parent itself",
}


def render(report: dict[str, Any]) -> str:
    """The card, in Markdown with the YAML header that model hubs read."""
    packed = any(variants.stores(axis) for slot in report["slots"] for axis in slot["axes"])
    header = {
        "base_model": report["model"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pennyweight", *(["compressed-tensors"] if packed else [])],
    }
    slots = "\n".join(f"| {slot['slot']} | {slot['choice']} | {slot['score']:.3g} |" for slot in report["slots"])
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---

# {report["model"]}, {"quantised" if report["metric"] == "none" else "fitted to a budget"}

{report["model"]} made smaller by pennyweight: {_said(report)}

{_budget(report)}

{_table(report)}

{_note(report)}

## Use

Load it with pennyweight; transformers alone does not build layers that differ in shape.

```python
import pennyweight as pw

model, tokenizer = pw.load("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

`report.html` shows the whole run, `report.json` holds it as data, `penny.json` the choice of every slot.

## How it was made

{_history(report)}

## Limits

{_limits(report, packed)}

## Slots

Scores are {_facts.METRICS[report["metric"]]}, of each choice alone, before healing.

| slot | choice | score |
|---|---|--:|
{slots}
"""


def _said(report: Mapping[str, Any]) -> str:
    if (uniform := report["config"].get("uniform")) is not None:
        ends = uniform.get("embedding_bits", uniform["bits"])
        apart = "" if ends == uniform["bits"] else f", embedding and head in {ends}"
        kept = f"every matrix is kept in {uniform['bits']} bits{apart}"
        return f"{kept}, or in the fewest above them that its slot is offered."
    return (
        "for every attention, every FFN and the embedding, one variant was chosen, so that together they lose least "
        "within the budget."
    )


def _budget(report: Mapping[str, Any]) -> str:
    if report["metric"] == "none":
        return "No budget was asked for."
    lines = [f"The budget was {'kept' if _facts.kept(report) else '**not kept**'}:", ""]
    for promise in _facts.promises(report):
        lines.append(f"- {promise.asked}: {promise.came} ({promise.how}{'' if promise.kept else '; **not kept**'})")
    return "\n".join(lines)


def _table(report: Mapping[str, Any]) -> str:
    """Parent beside child, measured; predicted where a prediction was made."""
    parent, child, agreement = (report["verified"]["quality"][name] for name in ("parent", "child", "agreement"))
    before, after = _facts.bits_per_byte(parent), _facts.bits_per_byte(child)
    predicted, speed, memory = best(report)["predicted"], report["verified"]["speed"], report["verified"].get("memory")
    taken = [show_bytes(memory[who]) for who in ("parent", "child")] if memory else ["", ""]
    whole, size = report["parent"]["bytes"], report["file_bytes"]
    score = f"{predicted['score']:.3g}" if report["metric"] == "kl" else ""
    rows = [
        ["file size", show_bytes(whole), show_bytes(size), f"at most {show_bytes(predicted['file_bytes'])}"],
        ["share of the parent's bytes", "100 %", f"{100 * size / whole:.1f} %", ""],
        ["bits per byte", f"{before:.4f}", f"{after:.4f} ({100 * (after / before - 1):+.2f} %)", ""],
        ["perplexity per token", f"{_facts.perplexity(parent):.2f}", f"{_facts.perplexity(child):.2f}", ""],
        ["KL to the parent, nats per token", "0", f"{agreement['kl']:.3g}", score],
        ["same first choice as the parent", "100 %", f"{100 * agreement['top1']:.1f} %", ""],
        ["memory", *taken, show_bytes(predicted["memory_bytes"])],
    ]
    for name, key in (("time to first token", "ttft"), ("time per output token", "tpot")):
        measured = [show_seconds(speed[who][key]) for who in ("parent", "child")] if speed else ["", ""]
        rows.append([name, *measured, show_seconds(predicted[f"{key}_seconds"])])
    lines = ["| | parent | this model | predicted |", "|---|--:|--:|--:|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _note(report: Mapping[str, Any]) -> str:
    data, agreement = report["config"]["data"], report["verified"]["quality"]["agreement"]
    return (
        f"Measured on the folder as it is, opened again, over {agreement['tokens']:,} held-out tokens of "
        f"{_source(data)}. The predicted KL is the sum of what each choice costs alone, before healing."
    )


def _source(data: Mapping[str, Any]) -> str:
    """The text in words; a path stays on the machine where it means something."""
    return _TEXTS.get(data["text"], "the text its maker supplied")


def _history(report: Mapping[str, Any]) -> str:
    config = report["config"]
    proven = "proven optimal" if best(report)["optimal"] else "not proven optimal"
    before, local, whole = (
        f"{config['heal'].get(key, 0):,} tokens" for key in ("library_tokens", "local_tokens", "whole_tokens")
    )
    steps = ["All slots are kept in the same bits; nothing was searched."]
    if report["metric"] != "none":
        steps = [
            f"{report['plan']['choices']} choices (axes: {', '.join(config['axes'])}) were scored, each alone in its "
            f"slot, by {_facts.METRICS[report['metric']]}{_facts.early(report)}.",
            f"The combination of least summed score within the budget was found by `{config['search']}`, {proven}.",
        ]
    if config["heal"].get("library_tokens"):
        steps.insert(0, f"Every variant that can learn was distilled against the parent's block, on up to {before}.")
    if report["local_heal"]:
        steps.append(f"Every block whose shape changed was distilled against the parent's, on {local} each.")
    if fitted := report.get("fitted"):
        steps.append(
            f"The matrices that {len(fitted)} blocks write with were fitted to the parent's residual stream, one after "
            "the other."
        )
    if report["whole_heal"]:
        steps.append(f"The whole model was distilled against the parent, on {whole}.")
    if not report["local_heal"] and not report["whole_heal"]:
        steps.append("Nothing was trained afterwards.")
    steps.append(f"The written folder was opened again and checked: {_facts.tally(report['verified']['checks'])}.")
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _limits(report: Mapping[str, Any], packed: bool) -> str:
    limits = [
        "Quality was measured on one kind of text, by loss and agreement alone: no tasks, no other languages, no long "
        "contexts, no safety. Evaluate it on your own use before relying on it.",
        "It inherits the parent's licence, biases and errors.",
        _facts.times_note(report),
    ]
    if packed:
        limits.append(_facts.UNPACKED)
    if _facts.small(report):
        limits.append(_facts.SMALL)
    return "\n".join(f"- {limit}" for limit in limits)
