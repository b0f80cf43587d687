"""The reference model, scored once and shared by the scripts that ask what searches and healing make of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import yaml

import _bench
from pennyweight import texts
from pennyweight.config import FitConfig, merged
from pennyweight.job.gather import gather_stats, score_choices, scores
from pennyweight.job.job import Job, open_job
from pennyweight.model.choices import Layout
from pennyweight.model.demand import Budget
from pennyweight.model.slots import Slot
from pennyweight.prices import offers
from pennyweight.prices.cost import computed
from pennyweight.prices.machine import Machine
from pennyweight.prices.offers import Offer
from pennyweight.runs.progress import Terminal
from pennyweight.search import Problem

MODEL = _bench.REPOSITORY / "src" / "pennyweight" / "data" / "reference-dense"
RECIPE = _bench.REPOSITORY / "recipes" / "reference-dense.yaml"
STRUCTURAL = ("noop", "linear", "kv_heads", "ffn_width", "window")
ALL = (*STRUCTURAL, "bits")


def parser(description: str | None) -> argparse.ArgumentParser:
    """--quick and --model."""
    made = _bench.parser(description)
    made.add_argument("--model", type=Path, default=MODEL, help="a model folder (default: the shipped model)")
    return made


def scored(model: Path, *, score_rows: int = 8) -> Job:
    """A job on the model whose statistics and scores (all axes) exist; made once per version of package and model."""
    config = merged(
        FitConfig(),
        {"data": {"score_rows": score_rows, "rows_per_chunk": 2}, "budget": {"weights": "100%"}, "machine": "m2-max"},
    )
    version = hashlib.sha256(f"{_bench.package_hash()} {model.resolve()} {score_rows}".encode()).hexdigest()[:12]
    folder = _bench.work_folder("scored") / version
    made = open_job(model, folder / "out", config, run=folder / "run", listen=Terminal())
    gather_stats(made)
    score_choices(made)
    return made


def opened(model: Path) -> Job:
    """A job on the model whose text is chosen and nothing is computed."""
    config = merged(FitConfig(), {"budget": {"weights": "100%"}, "machine": "m2-max"})
    folder = _bench.work_folder("opened")
    return open_job(model, folder / "out", config, run=folder / _bench.package_hash()[:12], listen=Terminal())


def held_out(job: Job, rows: int) -> texts.Rows:
    """Rows that neither training nor calibration saw: half code, half books where the data folder has them."""
    code = job_rows(job, list(texts.stdlib(held_out=True)))
    data = _bench.data_folder()
    if data is None:
        return code.take(rows)
    books = job_rows(job, _books(data, "held_out"))
    halves = (code.take(rows // 2), books.take(rows - rows // 2))
    return texts.Rows(*(np.concatenate(parts) for parts in zip(*(vars(h).values() for h in halves), strict=True)))


def training_text(folder: Path, characters: int) -> Path:
    """A folder of text of the kinds the model learned, `characters` of each: standard library, and books where the
    data folder has them. Every document is cut to one size, so that no book crowds out the others."""
    data = _bench.data_folder()
    kinds_of_text = {"code": list(texts.stdlib(held_out=False))}
    if data is not None:
        kinds_of_text["books"] = _books(data, "train")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for kind, documents in kinds_of_text.items():
        each = characters // len(documents)
        spare = characters - sum(min(len(document.text), each) for document in documents)
        longer = [document for document in documents if len(document.text) > each]
        each += spare // max(1, len(longer))
        cut = [json.dumps({"text": document.text[:each]}) for document in documents]
        (folder / f"{kind}.jsonl").write_text("\n".join(cut))
    return folder


def _books(data: Path, split: str) -> list[texts.Document]:
    """The recipe's books of this split."""
    found = []
    for book in yaml.safe_load(RECIPE.read_text())["books"]:
        if book["split"] == split:
            raw = lzma.decompress((data / "text" / "gutenberg" / f"{book['title']}.txt.xz").read_bytes())
            found.append(texts.Document(book["title"], texts.strip_gutenberg(raw.decode())))
    return found


def job_rows(job: Job, documents: list[texts.Document]) -> texts.Rows:
    """The documents as rows of the job's context."""
    return texts.rows(documents, job.tokenizer, job.text.score.ids.shape[1] - 1)


def budget_problem(job: Job, axes: tuple[str, ...], share: float) -> tuple[Problem, dict[Slot, list[Offer]]]:
    """The search problem of a bound on file bytes, `share` of the parent's, over some of the scored axes."""
    seconds = computed(Machine.load("m2-max"))
    kl = {
        slot: {key: values["kl"] for key, values in found.items() if next(iter(json.loads(key)), None) in axes}
        for slot, found in scores(job).items()
    }
    table = {slot: offers.offers(block, kl.get(slot, {}), job.workload, seconds) for slot, block in job.blocks.items()}
    budget = Budget(weight_bytes=int(share * job.checkpoint.weight_bytes))
    return offers.problem(table, budget, job.workload), table


def layout(table: dict[Slot, list[Offer]], choice: tuple[int, ...]) -> Layout:
    """A search's answer as a layout."""
    picked = {slot: row[v].choice for (slot, row), v in zip(table.items(), choice, strict=True)}
    return {slot: chosen for slot, chosen in picked.items() if chosen}
