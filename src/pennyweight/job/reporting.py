"""What a job has to tell: penny.json for whoever opens the folder later, and the data of the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import transformers

from pennyweight.disk.opened import name_of
from pennyweight.job import checks as verify
from pennyweight.job import race
from pennyweight.job.gather import scores
from pennyweight.job.job import Job
from pennyweight.job.solve import margins
from pennyweight.model.choices import PARENT, Choice
from pennyweight.prices import offers
from pennyweight.variants import layout_from_json, reshape_all


def card(job: Job, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """penny.json: what was chosen and from what, for whoever opens the folder later."""
    return {
        "pennyweight": version("pennyweight"),
        "layout": chosen["solutions"][0]["layout"],
        "predicted": chosen["solutions"][0]["predicted"],
        "parent": {
            "sha256": job.origin["model"],
            "name": name_of(job.model),
            "config": job.checkpoint.config,
        },
        "text_sha256": job.origin["text"].get("sha256"),
        "config": job.config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def facts(
    job: Job, chosen: Mapping[str, Any], verified: Mapping[str, Any], timings: Mapping[str, float]
) -> dict[str, Any]:
    """Everything worth knowing about the run, as data; report/ turns it into pages."""
    layouts = [layout_from_json(solution["layout"]) for solution in chosen["solutions"]]
    layout, scored, shapes = layouts[0], scores(job), reshape_all(job.shapes, layouts[0])
    workload = chosen["solutions"][0]["workload"]  # of the batch that was chosen
    return {
        "model": name_of(job.model),
        "out": str(job.out),
        "budget": {k: v for k, v in asdict(job.budget).items() if v is not None},
        "workload": workload,
        "also": [
            {
                "told": str(demand),
                "workload": asdict(demand.workload),
                "budget": demand.budget.bounds(),
                "predicted": predicted,
                "parent": parent,
            }
            for demand, predicted, parent in zip(
                job.also, chosen["solutions"][0]["also"], job.store.get("plan")["parent_also"], strict=True
            )
        ],
        "plan": job.store.get("plan"),
        # In 16 bits, which is what a share of a budget is of.
        "parent": {
            "bytes": job.parent_bytes,
            "stored_bytes": job.checkpoint.weight_bytes,
            "figures": job.store.get("plan")["parent"][str(workload["concurrency"])],
        },
        "chosen": chosen,
        "slots": [
            {
                "slot": str(slot),
                "choice": str(layout.get(slot, PARENT)),
                "axes": layout.get(slot, PARENT).to_json(),
                "score": sum(
                    scored[slot][Choice((spec,)).key()][job.config.metric]
                    for spec in layout.get(slot, PARENT).specs
                    if slot in scored
                ),
                "bytes": offers.file_bytes(block.having(shapes[slot])),
                "parent_bytes": offers.file_bytes(block),
                "runners_up": [str(other.get(slot, PARENT)) for other in layouts[1:]],
            }
            for slot, block in job.blocks.items()
        ],
        "scored": None if job.config.uniform is not None else race.told(job),
        "metric": "none" if job.config.uniform is not None else job.config.metric,
        "margins": margins(job),
        "unhealed": job.store.get("unhealed"),
        "verified": verified,
        "local_heal": {
            str(slot): losses
            for slot in layout
            if (losses := job.store.get(f"heal/local-loss/{slot}", list[float])) is not None
        },
        "fitted": {
            str(slot): errors
            for slot in job.shapes
            if (errors := job.store.get(f"heal/fitted-loss/{slot}", list[float])) is not None
        },
        "whole_heal": job.store.get("heal/whole/losses", list[float]) or [],
        "whole_heal_judged": job.store.get("heal/whole/judged"),
        "file_bytes": verify.safetensors_bytes(job.store.folder / "candidate"),
        "timings": dict(timings),
        "config": job.config.model_dump(mode="json"),
        "identity": {
            "model": job.origin["model"],
            "text": job.origin["text"].get("sha256", "sampled from the parent"),
            "compute": job.origin["arithmetic"]["dtype"],
            "threads": job.origin["arithmetic"]["threads"],
        },
        "origin": dict(job.origin),
        "versions": {
            "pennyweight": version("pennyweight"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
