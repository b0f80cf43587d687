"""Stage library: variants learn by themselves before they are scored (heal/library.py)."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict

from pennyweight import variants
from pennyweight.heal import library
from pennyweight.heal.schedule import JUDGES
from pennyweight.job.gather import unscored
from pennyweight.job.job import Job
from pennyweight.judge import stats
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs import executor


def train_library(job: Job, choices: Mapping[Slot, Collection[Choice]] | None = None) -> None:
    """See that every variant among `choices` that can learn has (of all that are not scored yet, if none are given).
    What has is not trained again."""
    forget_other_courses(job)
    course = course_of(job)
    if job.library is None or course is None:
        return
    if choices is None:
        choices = {slot: offered for missing in unscored(job) for slot, offered in missing.items()}
    wanted = {slot: [c for choice in offered if (c := learns(choice))] for slot, offered in choices.items()}
    missing = {slot: offered for slot, offered in wanted.items() if any(not _is_there(job, slot, c) for c in offered)}
    if not missing:
        return
    folder, layers = job.scratch / "library", sorted({slot.layer or 0 for slot in missing})
    folder.mkdir(parents=True, exist_ok=True)
    job.library.mkdir(exist_ok=True)
    total, done = sum(map(len, missing.values())), 0.0
    job.listen.begin("library", total=total, unit="variants")

    def heard(share: float) -> None:
        nonlocal done
        done += share
        job.listen.advance(int(done))

    rows = JUDGES + -(-course.tokens // job.row_tokens)
    ids = job.text.heal.ids[:rows, :-1]
    list(executor.run(stats.embed, [(job.model, {0: ids}, folder, job.dtype)], job.where))
    ended = 0
    for layer in range(layers[-1] + 1):
        entering, leaving = (stats.hidden_path(folder, 0, index) for index in (layer, layer + 1))
        here = {slot: offered for slot, offered in missing.items() if slot.layer == layer}
        gathered = job.store.path(f"stats/{layer}")
        tasks = [(job.model, s, own, entering, gathered, job.library, course, job.dtype) for s, own in here.items()]
        for (slot, own), _ in zip(
            here.items(), executor.run(library.train, tasks, job.where, on_tick=heard), strict=True
        ):
            told = {choice.key(): library.losses(job.library, slot, choice) for choice in own}
            job.store.put(f"library/{slot}", {**(_told(job, slot)), **told})
            ended += len(own)
            heard(ended - done)  # where tasks run elsewhere nobody has heard their steps
        if layer < layers[-1]:
            task = (job.model, layer, entering, leaving, course.batch_rows, job.dtype)
            list(executor.run(library.pass_on, [task], job.where))
        entering.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    job.listen.end()


def course_of(job: Job) -> library.Course | None:
    """How variants are trained; None if they are not."""
    heal = job.config.heal
    return library.Course(heal.library_tokens, heal.local_lr, heal.batch_rows) if heal.library_tokens else None


def learns(choice: Choice) -> Choice | None:
    """What of a choice learns by itself, if anything does."""
    return next((Choice((item,)) for item in choice.specs if variants.trains(item[0])), None)


def _told(job: Job, slot: Slot) -> dict[str, list[float]]:
    return job.store.get(f"library/{slot}", dict[str, list[float]]) or {}


def _is_there(job: Job, slot: Slot, choice: Choice) -> bool:
    """Whether a variant is through with its course, and its weights are as they were written."""
    assert job.library is not None
    return choice.key() in _told(job, slot) and library.losses(job.library, slot, choice) is not None


def forget_other_courses(job: Job) -> None:
    """Variants that took another course, or none, and what was scored with them."""
    course = course_of(job)
    if course is None and not job.store.knows_inputs("library"):
        return  # nothing was ever trained here; scores are of variants as they begin
    if not job.store.made_from("library", {} if course is None else asdict(course), "library/", "score/", "race/"):
        shutil.rmtree(job.run / "library", ignore_errors=True)
