"""The Python face: `pw.plan`, `pw.fit`, `pw.load`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import families
from pennyweight.config import BudgetConfig, DemandConfig, FitConfig, WorkloadConfig
from pennyweight.disk import hub
from pennyweight.disk.opened import open_config, open_vocabulary
from pennyweight.disk.writer import Writer
from pennyweight.prices import planning
from pennyweight.prices.machine import Machine
from pennyweight.runs.events import Listener

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Result:
    """A finished fit: an ordinary transformers model and tokenizer, the report as data, and the folder of both."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]
    folder: Path


def plan(
    model: str | Path,
    budget: BudgetConfig | None = None,
    *,
    workload: WorkloadConfig | None = None,
    also: Sequence[DemandConfig] = (),
    machine: str = "this",
    axes: tuple[str, ...] = FitConfig().axes,
) -> planning.Plan:
    """What a model needs and whether it can be made to fit, from its config.json alone; times are computed, for this
    computer unless another `machine` is named. `model`: a folder, a config.json, a GGUF file or a hub's name, of which
    no more is fetched.

    Raises FileNotFoundError or ValueError for what cannot be planned, hub.Unfetched for a name that cannot be fetched
    now.
    """
    from pennyweight.prices import measure

    config = open_config(hub.find(model, only_config=True))
    parent_bytes = planning.stored_bytes(families.shapes(config), 16)
    bounds = (budget or BudgetConfig()).resolve(parent_bytes=parent_bytes)
    device = measure.machine() if machine == "this" else Machine.load(machine)
    further = [demand.resolve(parent_bytes=parent_bytes) for demand in also]
    return planning.plan(config, (workload or WorkloadConfig()).resolve(), device, bounds, axes, further)


def fit(
    model: str | Path | PreTrainedModel,
    budget: BudgetConfig,
    *,
    out: str | Path,
    config: FitConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: str | Path | None = None,
    listen: Listener | None = None,
) -> Result:
    """Make the model that fits `budget` best, write it to folder `out`, return it.

    `model` is a folder, a GGUF file, a hub's name, or a live transformers model with its `tokenizer`; a live one is
    first written to the run folder, in bfloat16, and worked on from there, so that it need not stay in memory twice.
    `config` says the rest; its budget is replaced by `budget`. A stopped call goes on where it was when made again.

    Raises ValueError or FileNotFoundError for wrong input, hub.Unfetched for a name that cannot be fetched now,
    search.Infeasible if the budget cannot be met, runs.lock.Held if another process works on the run folder, OSError
    (ENOSPC) if the disk is full, after which the same call goes on, checks.VerificationFailed if the result is not what
    was promised.
    """
    from pennyweight.job import outputs
    from pennyweight.job.job import open_job
    from pennyweight.job.run import run_job
    from pennyweight.runs.lock import Lock

    out = Path(out)
    folder = outputs.run_folder(out, None if run is None else Path(run))
    wanted = (config or FitConfig()).model_copy(update={"budget": budget})
    wanted.check()
    lock = None
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise ValueError("a live model needs its tokenizer: fit(model, budget, tokenizer=...)")
        outputs.is_run_folder(folder)
        lock = Lock(folder)
        model = _written(model, tokenizer, folder / outputs.LIVE)
    with open_job(hub.find(model), out, wanted, run=folder, listen=listen, lock=lock) as job:
        report = run_job(job)
    found, own_tokenizer = load(out)
    return Result(found, own_tokenizer, report, out)


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """The live model as a folder; the same weights give the same bytes, so a repeated call finds its run again."""
    import torch

    writer = Writer(folder, joins=families.joined(model.config.to_dict()))
    for name, parameter in model.named_parameters():
        writer.add(name, parameter.detach().to(torch.bfloat16))
    files = {}
    if model.generation_config is not None:
        files["generation_config.json"] = json.loads(model.generation_config.to_json_string())
    writer.finish({**model.config.to_dict(), "dtype": "bfloat16"}, files=files)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a folder made by `fit`, or of any supported model, as of `fit`: heterogeneous layers built,
    packed matrices dequantised, in bfloat16 where the processor has it, else float32. Raises ValueError if the folder
    is not complete."""
    from pennyweight.live.load import load_model

    place = hub.find(folder)
    return load_model(place), open_vocabulary(place).tokenizer
