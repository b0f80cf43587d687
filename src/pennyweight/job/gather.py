"""Stages stats and score: the calibration pass over the parent, then what each choice alone costs in quality.

Under the metric "error" the pass is all there is: where a layer's moments are at hand, so are the errors of its choices
(judge/moments.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight import texts, units, variants
from pennyweight.config import UniformConfig
from pennyweight.job import text as _text
from pennyweight.job.job import Job
from pennyweight.judge import codes, moments, partial, score, stats
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.prices import offers
from pennyweight.runs import executor, scratch

Choices = Mapping[Slot, Collection[Choice]]
Round = list[str]
"""Keys of scores that are made together."""


def singles(job: Job) -> dict[Slot, list[Choice]]:
    """Every choice that is scored; of a job that treats all alike the one of each slot. Raises ValueError for uniform
    bits that a slot is not offered."""
    found = {
        slot: offers.single_choices(shape, job.config.axes, scored_tokens=job.row_tokens)
        for slot, shape in job.shapes.items()
    }
    found = {slot: offered for slot, offered in found.items() if offered}
    if job.config.uniform is None:
        return found
    if not found:
        sizes = f"hidden size {job.checkpoint.config['hidden_size']}"
        raise ValueError(f"no matrix of {job.model} can be kept in fewer bits: {sizes} is not a multiple of 32")
    return {slot: [_alike(slot, offered, job.config.uniform)] for slot, offered in found.items()}


def _alike(slot: Slot, offered: Collection[Choice], wanted: UniformConfig) -> Choice:
    """The choice that stores all matrices of a slot as `wanted` says."""
    asked = wanted.bits if slot.layer is not None else wanted.embedding_bits
    ways = {choice: getattr(spec, "stored", None) for choice in offered for _, spec in choice.specs}
    one = {choice: (way.bits, way.group) for choice, way in ways.items() if way is not None}
    bits = sorted({bits for bits, _ in one.values()})
    if asked > bits[-1]:
        raise ValueError(f"{slot} can be kept in {', '.join(map(str, bits))} bits, not in {asked} or more")
    nearest = next(each for each in bits if each >= asked)
    groups = sorted(group for each, group in one.values() if each == nearest)
    widest = max((group for group in groups if group <= wanted.group), default=groups[0])
    return next(choice for choice, way in one.items() if way == (nearest, widest))


def parts_of(job: Job) -> list[list[int]]:
    """Numbers of the chunks of the scored text, by the parts that choices are raced over; errors are not of any text,
    and what is not raced is scored in one go."""
    if job.config.metric == "error":
        return [[0]]
    sizes = _text.score_parts(job.config, job.row_tokens)
    ends = list(accumulate(map(len, sizes)))
    parts = [list(range(end - len(own), end)) for own, end in zip(sizes, ends, strict=True)]
    raced = job.config.race and job.config.metric == "kl" and job.config.uniform is None
    return parts if raced else [[chunk for part in parts for chunk in part]]


def chunk_count(job: Job) -> int:
    """Chunks of the scored text."""
    return sum(map(len, parts_of(job)))


def rows_of(job: Job) -> list[int]:
    """Rows of every chunk of the scored text; errors are not of any text."""
    if _kind(job) == "error":
        return [1]
    return [rows for part in _text.score_parts(job.config, job.row_tokens) for rows in part]


def _kind(job: Job) -> str:
    return "error" if job.config.metric == "error" else "score"


def key_of(job: Job, chunk: int, slot: Slot, choice: Choice) -> str:
    return f"{_kind(job)}/{chunk}/{slot}/{choice.key()}"


def scored_keys(job: Job) -> set[str]:
    """Of the scores that there are."""
    return set(_known(job))


def _known(job: Job) -> dict[str, Any]:
    return job.store.values(f"{_kind(job)}/", dict[str, float] if _kind(job) == "error" else score.Sums)


def unscored(job: Job, wanted: Collection[str] | None = None) -> list[dict[Slot, list[Choice]]]:
    """By chunk, the choices that have no score yet; only those of some keys, if they are given."""
    known, every, missing = scored_keys(job), singles(job), []
    asked = None if wanted is None else set(wanted)
    for chunk in range(chunk_count(job)):
        left: dict[Slot, list[Choice]] = {}
        for slot, offered in every.items():
            keys = {choice: key_of(job, chunk, slot, choice) for choice in offered}
            left[slot] = [c for c, key in keys.items() if key not in known and (asked is None or key in asked)]
        missing.append({slot: offered for slot, offered in left.items() if offered})
    return missing


def choices_of(job: Job, wanted: Collection[str]) -> dict[Slot, list[Choice]]:
    """The choices whose scores have these keys."""
    asked, chunks = set(wanted), range(chunk_count(job))
    found = {
        slot: [choice for choice in own if any(key_of(job, chunk, slot, choice) in asked for chunk in chunks)]
        for slot, own in singles(job).items()
    }
    return {slot: own for slot, own in found.items() if own}


def passes_of(job: Job) -> dict[str, float]:
    """The work of every score, by key, in passes of a row through a layer."""
    work, rows = {slot: score.passes(slot, job.shapes) for slot in job.shapes}, rows_of(job)
    return {
        key_of(job, chunk, slot, choice): rows[chunk] * work[slot]
        for slot, own in singles(job).items()
        for choice in own
        for chunk in range(chunk_count(job))
    }


def wanted_of(job: Job, slot: Slot) -> tuple[str, ...]:
    """Names of the statistics that are gathered of a slot."""
    found = variants.wanted(job.shapes[slot], job.config.axes)
    return (*found, moments.STAT) if found and job.config.metric == "error" else found


def gather_stats(job: Job, choices: Choices | None = None) -> None:
    """See that there is what applying `choices` reads (all that are not scored yet, if none are given): statistics, a
    file per layer in the store, and codes. What there is already is not made again."""
    if choices is None:
        choices = {slot: offered for missing in unscored(job) for slot, offered in missing.items()}
    _Gathering(job, choices).run()


class _Gathering:
    """One calibration pass, as far through the model as something is missing.

    A layer's moments are gathered, its codes found, and then those moments dropped that nothing else reads; so the run
    folder holds those of one layer, not of all.
    """

    def __init__(self, job: Job, choices: Choices) -> None:
        self.job = job
        self.known = scored_keys(job) if job.config.metric == "error" else set[str]()
        self.layers: dict[int | None, dict[Slot, Collection[Choice]]] = {}
        for slot, offered in choices.items():
            self.layers.setdefault(slot.layer, {})[slot] = offered

    def run(self) -> None:
        lacking = {layer for layer in self.layers if not (self._codes_are_there(layer) and self._is_judged(layer))}
        passed = {layer for layer in self.layers if layer is not None and not self._stats_are_there(layer, lacking)}
        lacking |= passed
        if not lacking:
            return
        chunks = _chunks(self.job.text.calibration, self._sizes()) if passed else []
        first = self._first(passed, len(chunks))
        through = range(first, max(passed, default=-1) + 1)
        matrices = {layer: sum(len(self._wanted(slot)) for slot in self.layers[layer]) for layer in lacking}
        job, done = self.job, 0.0
        job.listen.begin("stats", total=len(through) * len(chunks) + sum(matrices.values()), unit="steps")

        def heard(steps: float) -> None:
            nonlocal done
            done += steps
            job.listen.advance(round(done))

        self._heard = heard
        for layer in sorted((layer for layer in lacking - passed), key=lambda layer: -1 if layer is None else layer):
            self._find(layer, job.store.path(f"stats/{layer}"))
            self._judge(layer, job.store.path(f"stats/{layer}"))
        if passed and first == 0:
            ids = {number: chunk.ids[:, :-1] for number, chunk in enumerate(chunks)}
            list(executor.run(stats.embed, [(job.model, ids, job.scratch, job.dtype)], job.where))
        for layer in through:
            self._pass(layer, chunks, gather=layer in passed)
        for number in range(len(chunks)):
            stats.hidden_path(job.scratch, number, through.stop).unlink(missing_ok=True)
        job.listen.end()

    def _sizes(self) -> list[int]:
        """Rows of the chunks of calibration."""
        data = self.job.config.data
        starts = range(0, data.calibration_rows, data.rows_per_chunk)
        return [min(data.rows_per_chunk, data.calibration_rows - start) for start in starts]

    def _wanted(self, slot: Slot) -> dict[str, object]:
        return codes.wanted(self.job.shapes[slot], self.layers[slot.layer][slot])  # type: ignore[return-value]

    def _codes_are_there(self, layer: int | None) -> bool:
        """Whether every matrix that has to be kept is, and as it was written."""
        known = self.job.store.get(f"codes/{layer}", dict[str, list[str]]) or {}
        needed = [f"{slot} {name}" for slot in self.layers[layer] for name in self._wanted(slot)]
        if not all(name in known for name in needed):
            return False
        files = {Path(file).name for name in needed for file in known[name]} - self.job.codes_seen
        if any(scratch.kept(self.job.codes / file) is None for file in files):
            self.job.store.drop(f"codes/{layer}")
            return False
        self.job.codes_seen |= files
        return True

    def _is_judged(self, layer: int | None) -> bool:
        """Whether nothing is to be judged while its moments are at hand, or it has been."""
        job, own = self.job, self.layers[layer]
        every = (key_of(job, 0, slot, choice) for slot, offered in own.items() for choice in offered)
        return job.config.metric != "error" or all(key in self.known for key in every)

    def _stats_are_there(self, layer: int, lacking: Collection[int | None]) -> bool:
        """Whether the layer's file has what the slots' axes read, whole where codes have yet to be found."""
        job, kept = self.job, self.job.store.path(f"stats/{layer}")
        told = job.store.get(f"gathered/{layer}", dict[str, dict[str, list[str]]])
        if kept is None or told is None:
            return False
        for slot in self.layers[layer]:
            own, shape = told.get(str(slot), {"names": [], "spent": []}), job.shapes[slot]
            spent = set() if layer in lacking else codes.spent(shape, job.config.axes)
            if not set(wanted_of(job, slot)) <= set(own["names"]) or not set(own["spent"]) <= spent:
                return False
        return True

    def _first(self, passed: Collection[int], chunks: int) -> int:
        """The layer to begin with: the last one before what is missing whose entering states an earlier call kept."""
        for layer in range(min(passed, default=0), 0, -1):
            if all(scratch.kept(stats.hidden_path(self.job.scratch, c, layer)) is not None for c in range(chunks)):
                return layer
        return 0

    def _pass(self, layer: int, chunks: list[texts.Rows], *, gather: bool) -> None:
        job = self.job
        slots = [slot for slot in job.shapes if slot.layer == layer]
        wanted = {slot: wanted_of(job, slot) for slot in slots} if gather else {}
        every = list(range(len(chunks)))
        parts = [every] if job.where == "local" else [[chunk] for chunk in every]
        tasks = [(job.model, layer, part, wanted, job.scratch, job.dtype) for part in parts]
        list(executor.run(stats.calibrate, tasks, job.where, on_tick=self._heard))
        if gather:
            whole, tokens = job.scratch / f"stats-{layer}.safetensors", sum(chunk.ids[:, :-1].size for chunk in chunks)
            scratch.keep(whole, stats.merge(job.scratch, len(chunks), layer, tokens))
            self._find(layer, whole)
            self._judge(layer, whole)
            tensors = scratch.needed(whole)
            told: dict[str, dict[str, list[str]]] = {}
            for slot in slots:
                spent = codes.spent(job.shapes[slot], job.config.axes) & set(wanted[slot])
                told[str(slot)] = {"names": list(wanted[slot]), "spent": sorted(spent)}
                for name in (f"{slot.kind}.{each}" for each in spent):
                    tensors[name] = tensors[name].diagonal().clone()
            job.store.put_tensors(f"stats/{layer}", tensors)
            job.store.put(f"gathered/{layer}", told)
            whole.unlink()
        for chunk in every:
            stats.hidden_path(job.scratch, chunk, layer).unlink(missing_ok=True)
            stats.sums_path(job.scratch, chunk, layer).unlink(missing_ok=True)

    def _find(self, layer: int | None, tensors: Path | None) -> None:
        job, here = self.job, {slot: tuple(own) for slot, own in self.layers[layer].items() if self._wanted(slot)}
        if not here:
            return
        task = (job.model, here, tensors, job.codes, job.dtype)
        (found,) = executor.run(codes.find, [task], job.where, on_tick=self._heard)
        known = job.store.get(f"codes/{layer}", dict[str, list[str]]) or {}
        job.store.put(f"codes/{layer}", {**known, **found})
        job.codes_seen |= {file for files in found.values() for file in files}

    def _judge(self, layer: int | None, tensors: Path | None) -> None:
        """Errors of the layer's choices, under the metric that they are."""
        job, here = self.job, {slot: tuple(own) for slot, own in self.layers.get(layer, {}).items()}
        if job.config.metric == "error" and here:
            task = (job.model, here, tensors, job.codes, job.dtype)
            (found,) = executor.run(moments.errors, [task], job.where)
            keys = {(slot, choice): key_of(job, 0, slot, choice) for slot, own in here.items() for choice in own}
            job.store.put_all({key: {"error": found[str(s)][choice.key()]} for (s, choice), key in keys.items()})


def score_choices(job: Job, wanted: Collection[str] | None = None) -> None:
    """Replace-1-block scores, `score/<chunk>/<slot>/<choice key>` in the store: sums of every metric. All of them, or
    those of some keys; what there is already is not made again."""
    missing = unscored(job, wanted)
    if not any(missing):
        return
    rows, layers = rows_of(job), job.checkpoint.config["num_hidden_layers"]
    chunks = _chunks(job.text.score, rows)
    needed = [chunk for chunk, left in enumerate(missing) if left]
    job.listen.begin("score parent", total=len(needed), unit="chunks")
    parents = [(job.model, chunks[c].ids, chunks[c].scored, job.scratch, c, job.dtype) for c in needed]
    for number, _ in enumerate(executor.run(score.parent_chunk, parents, job.where), 1):
        job.listen.advance(number)
    job.listen.end()
    row_bytes = 4 * job.row_tokens * job.checkpoint.config["hidden_size"]
    most = units.parse_bytes(job.config.max_pending)
    todo = [(c, group) for c in needed for group in score.groups(missing[c], rows[c] * row_bytes, most)]
    # In passes of a row through a layer, so that a choice counts for as long as it takes.
    work = {slot: score.passes(slot, job.shapes) for slot in job.shapes}
    sizes = [rows[c] * sum(work[slot] * len(offered) for slot, offered in group.slots) for c, group in todo]
    before = [rows[c] * score.passes_done(job.scratch, c, group, job.shapes) for c, group in todo]
    known, every = scored_keys(job), passes_of(job)
    total = sum(sizes) + sum(size for key, size in every.items() if key in known)
    done = total - sum(sizes) + sum(before)
    job.listen.begin("score", total=round(total), done=int(done), unit="passes")
    at = 0

    def heard(steps: float) -> None:
        nonlocal done
        done += rows[todo[at][0]] * steps
        job.listen.advance(round(done))

    files = {layer: job.store.path(f"stats/{layer}") for layer in range(layers)}
    tasks = [
        (job.model, chunks[c].ids, chunks[c].scored, job.scratch, c, group, files, job.codes, job.dtype, job.library)
        for c, group in todo
    ]
    ran = executor.run(score.score_chunk, tasks, job.where, on_tick=heard)
    ended = total - sum(sizes) + sum(before)
    for (c, group), size, found, result in zip(todo, sizes, before, ran, strict=True):
        kept = {(slot, choice): result[str(slot)][choice.key()] for slot, offered in group.slots for choice in offered}
        job.store.put_all({key_of(job, c, slot, choice): sums for (slot, choice), sums in kept.items()})
        score.forget(job.scratch, c, group)
        ended += size - found
        done = ended  # where tasks run elsewhere nobody has heard their steps
        job.listen.advance(round(done))
        at += 1
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.listen.end()


def _chunks(rows: texts.Rows, sizes: Collection[int]) -> list[texts.Rows]:
    ends = list(accumulate(sizes))
    starts = (end - size for size, end in zip(sizes, ends, strict=True))
    return [rows.pick(np.arange(start, end)) for start, end in zip(starts, ends, strict=True)]


def scores(job: Job) -> dict[Slot, dict[str, dict[str, float]]]:
    """{slot: {choice key: {metric: mean}}} over the chunks that were scored, summed in a fixed order; empty where
    nothing is judged. The KL of a choice that was scored on a part of the text is that of the whole, as estimated."""
    if job.config.uniform is not None:
        return {}
    known, carried = _known(job), {} if _kind(job) == "error" else estimated(job)
    found: dict[Slot, dict[str, dict[str, float]]] = {}
    for slot, offered in singles(job).items():
        for choice in offered:
            sums = _in_order(job, known, slot, choice)
            names = [name for name in sums[0] if name != "kl_by_stretch"]
            total: Any = {name: float(sum(each[name] for each in sums)) for name in names}
            if _kind(job) == "score":
                total = score.mean(total)
                if len(sums) < chunk_count(job):
                    total["kl"] = carried[slot][choice.key()].mean
            found.setdefault(slot, {})[choice.key()] = total
    return found


def estimated(job: Job) -> dict[Slot, dict[str, partial.Estimate]]:
    """The KL of every choice over the whole scored text, and how sure it is (judge/partial.py)."""
    known, every = _known(job), singles(job)
    sums = {
        slot: {
            choice.key(): np.array([kl for each in _in_order(job, known, slot, choice) for kl in each["kl_by_stretch"]])
            for choice in own
        }
        for slot, own in every.items()
    }
    tokens = {int(key.split("/")[1]): int(found["tokens"]) for key, found in known.items()}
    stretches: list[int] = []
    for chunk, rows in enumerate(rows_of(job)):
        whole, rest = divmod(tokens.get(chunk, rows * job.row_tokens), score.STRETCH)  # or as many as there may be
        stretches += [score.STRETCH] * whole + [rest] * (rest > 0)
    return partial.estimates(sums, stretches)


def _in_order(job: Job, known: Mapping[str, Any], slot: Slot, choice: Choice) -> list[Any]:
    """A choice's scores, of the first chunks on. Raises KeyError if it has none."""
    found = [known[key_of(job, 0, slot, choice)]]
    for chunk in range(1, chunk_count(job)):
        key = key_of(job, chunk, slot, choice)
        if key not in known:
            break
        found.append(known[key])
    return found
