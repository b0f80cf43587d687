"""Stages stats and score: the calibration pass over the parent, then what each choice alone costs in quality."""

from __future__ import annotations

import shutil

import numpy as np

from pennyweight import texts, units, variants
from pennyweight.job.job import Job
from pennyweight.judge import score, stats
from pennyweight.model.slots import Slot
from pennyweight.prices import offers
from pennyweight.runs import executor


def gather_stats(job: Job) -> None:
    """One calibration pass; one file of statistics per layer in the store."""
    layers = job.checkpoint.config["num_hidden_layers"]
    if all(job.store.get(f"stats/{layer}") for layer in range(layers)):
        return
    wanted = {slot: variants.wanted(shape, job.config.axes) for slot, shape in job.shapes.items()}
    chunks = _chunks(job, job.text.calibration)
    tasks = [
        (job.model, chunk.ids[:, :-1], wanted, job.scratch, index, job.dtype) for index, chunk in enumerate(chunks)
    ]
    job.listen.begin("stats", total=len(tasks) * layers, unit="layers")
    tokens = done = 0
    ran = executor.run(stats.calibrate_chunk, tasks, job.where, on_tick=lambda n: job.listen.advance(done + n))
    for count in ran:
        tokens, done = tokens + count, done + layers
        job.listen.advance(done)
    for layer in range(layers):
        if not job.store.get(f"stats/{layer}"):
            job.store.put_tensors(f"stats/{layer}", stats.merge(job.scratch, len(tasks), layer, tokens))
        for index in range(len(tasks)):
            stats.partial_path(job.scratch, index, layer).unlink(missing_ok=True)
    job.listen.end()


def score_choices(job: Job) -> None:
    """All replace-1-block scores, `score/<chunk>/<group>` in the store: {slot: {choice key: sums}}."""
    context = job.row_tokens
    singles = {
        slot: offers.single_choices(shape, job.config.axes, scored_tokens=context) for slot, shape in job.shapes.items()
    }
    hidden_bytes = 4 * job.config.data.rows_per_chunk * context * job.checkpoint.config["hidden_size"]
    groups = score.groups(
        {slot: found for slot, found in singles.items() if found},
        hidden_bytes,
        units.parse_bytes(job.config.max_pending),
    )
    chunk_count = -(-job.config.data.score_rows // job.config.data.rows_per_chunk)
    every = [(c, g) for c in range(chunk_count) for g in range(len(groups))]
    todo = [(c, g) for c, g in every if job.store.get(f"score/{c}/{g}") is None]
    if not todo:
        return
    chunks = _chunks(job, job.text.score)
    needed = sorted({c for c, _ in todo})
    job.listen.begin("score parent", total=len(needed), unit="chunks")
    parents = [(job.model, chunks[c].ids, job.scratch, c, job.dtype) for c in needed]
    for number, _ in enumerate(executor.run(score.parent_chunk, parents, job.where), 1):
        job.listen.advance(number)
    job.listen.end()
    files = {layer: job.store.path(f"stats/{layer}") for layer in range(job.checkpoint.config["num_hidden_layers"])}
    tasks = [(job.model, chunks[c].ids, chunks[c].scored, job.scratch, c, groups[g], files, job.dtype) for c, g in todo]
    sizes = [sum(len(found) for _, found in group.slots) for group in groups]
    choices = [sizes[g] for _, g in todo]
    total = chunk_count * sum(sizes)
    done = total - sum(choices)
    job.listen.begin("score", total=total, done=done, unit="variants")
    ran = executor.run(score.score_chunk, tasks, job.where, on_tick=lambda n: job.listen.advance(done + n))
    for (c, g), count, result in zip(todo, choices, ran, strict=True):
        job.store.put(f"score/{c}/{g}", result)
        done += count
        job.listen.advance(done)
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.listen.end()


def _chunks(job: Job, rows: texts.Rows) -> list[texts.Rows]:
    size = job.config.data.rows_per_chunk
    return [rows.pick(np.arange(start, min(start + size, len(rows.ids)))) for start in range(0, len(rows.ids), size)]


def scores(job: Job) -> dict[Slot, dict[str, dict[str, float]]]:
    """{slot: {choice key: {metric: mean}}} over all chunks, summed in a fixed order."""
    sums: dict[Slot, dict[str, dict[str, float]]] = {}
    for key in sorted(job.store.keys("score/"), key=lambda k: tuple(int(n) for n in k.split("/")[1:])):
        for slot, found in job.store.get(key).items():
            for choice, values in found.items():
                into = sums.setdefault(Slot.parse(slot), {}).setdefault(choice, dict.fromkeys(values, 0.0))
                for name, value in values.items():
                    into[name] += value
    return {slot: {choice: score.mean(values) for choice, values in found.items()} for slot, found in sums.items()}
