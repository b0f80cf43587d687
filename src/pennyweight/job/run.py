"""All stages in order, each only if the run folder does not hold its result, made from what it would be made from now.

A stage is checked against what it reads itself: parts of the config, and the layout that was chosen. What every stage
stands on (model, tokenizer, text, versions, arithmetic) is the run's origin, which cannot change: runs/store.py refuses
that. So another budget is solved from the scores there are, and a layout that comes out the same is not built again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pennyweight import report
from pennyweight.disk import places
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.job import checks as verify
from pennyweight.job import race
from pennyweight.job.children import build, heal, measure_unhealed
from pennyweight.job.gather import choices_of, gather_stats, score_choices
from pennyweight.job.job import Job
from pennyweight.job.library import course_of, forget_other_courses, train_library
from pennyweight.job.pack import pack
from pennyweight.job.parent import hold_parent
from pennyweight.job.plan import described, disk, plan
from pennyweight.job.reporting import card, facts
from pennyweight.job.solve import solve_all
from pennyweight.job.verify import verify_child
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice, layout_to_json
from pennyweight.model.slots import Slot
from pennyweight.runs import allocator
from pennyweight.runs.events import waiting
from pennyweight.runs.space import full_disk_is_one_error
from pennyweight.variants import layout_from_json, rounded, structural


@full_disk_is_one_error()
def run_job(job: Job) -> dict[str, Any]:
    """Run every stage that is not done yet; returns the report (also written to out/report.json).

    Raises Infeasible before any work, and before the run folder is made, if the budget cannot be met; OSError (ENOSPC)
    if the disk is full, and the same call goes on; VerificationFailed if the result is not what was promised: then the
    folder is kept as `<out>.rejected` for inspection.
    """
    if job.unopened:
        job.planned = plan(job)
    return _Run(job).report()


_HEALED = ("healed", "healed-blocks", "healed-fitted")  # folders
_FITTED = ("heal/fitted/", "heal/fitted-loss/")


class _Run:
    """The stages of one job, each asking for those that it stands on."""

    def __init__(self, job: Job) -> None:
        self.job, self.store, self.folder = job, job.store, job.store.folder
        if job.config.machine == "this" and self.store.get("machine") is None:
            self.store.put("machine", asdict(described(job)))
        self.timings: dict[str, float] = self.store.get("timings", dict[str, float]) or {}
        self._told_seconds = 0.0  # of stages that this process has timed
        self.thrifty = disk(job).thrifty

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """What a stage's work gives; its time is added to `timings`, less that of stages it waited for."""
        started, told = time.perf_counter(), self._told_seconds
        if not self.job.fits_whole:
            allocator.give_back_freed_memory()  # what the last stage held; the next one needs its room
        result = work()
        own = time.perf_counter() - started - (self._told_seconds - told)
        self._told_seconds += own
        self.timings[stage] = round(self.timings.get(stage, 0.0) + own, 2)
        self.store.put("timings", self.timings)
        return result

    def _made_from(self, stage: str, inputs: Mapping[str, Any], *results: str) -> None:
        if not self.store.made_from(stage, inputs, *results):
            self.timings.pop(stage, None)

    def _kept(self, key: str, stage: str, inputs: Mapping[str, Any], work: Callable[[], Any], kind: Any) -> Any:
        """A small result, as a `kind`."""
        self._made_from(stage, inputs, key)
        if self.store.get(key) is None:
            self.store.put(key, self._timed(stage, work))
        return self.store.get(key, kind)

    def _asked(self, *keys: str) -> dict[str, Any]:
        return self.job.config.model_dump(mode="json", include=set(keys))

    @cached_property
    def _machine(self) -> dict[str, Any]:
        return {**self._asked("machine", "prices"), "described": asdict(described(self.job))}

    @cached_property
    def planned(self) -> dict[str, Any]:
        inputs = self._asked(
            "also", "axes", "budget", "heal", "max_disk", "max_pending", "metric", "uniform", "workload"
        )
        inputs |= self._machine
        return self._kept("plan", "plan", inputs, lambda: self.job.planned or plan(self.job), dict[str, Any])

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """The solutions, from scores that are made if they are not there."""
        job = self.job
        _ = self.planned
        self._kept("parent", "parent", {}, lambda: hold_parent(job).to_json(), dict[str, Any])
        inputs = self._asked(
            "axes", "budget", "metric", "min_different", "race", "search", "solutions", "sweep", "uniform"
        )
        inputs |= self._asked("also", "workload")
        inputs |= self._machine | self._library | {"seed": job.config.drawn_by}
        self._made_from("solve", inputs, "chosen")
        while True:
            if job.config.uniform is None:
                forget_other_courses(job)
                self._score()
            chosen = self._kept("chosen", "solve", inputs, lambda: solve_all(job), dict[str, list[dict[str, Any]]])
            left = [] if job.config.uniform is not None else race.unproven(job, chosen)
            if not left:
                return chosen
            self.store.drop("chosen")
            race.write_down(job, left)

    def _score(self) -> None:
        """Round after round; where solutions are kept, only what has been begun or lost."""
        job = self.job
        while True:
            left = race.begun(job)
            if not left and self.store.get("chosen") is None:
                left = self._timed("solve", lambda: race.next_round(job))
            if not left:
                return
            wanted = choices_of(job, left)
            self._timed("stats", lambda: gather_stats(job, wanted))  # noqa: B023
            self._timed("library", lambda: train_library(job, wanted))  # noqa: B023
            self._timed("score", lambda: score_choices(job, left))  # noqa: B023

    @cached_property
    def layout(self) -> dict[Slot, Choice]:
        return layout_from_json(self.chosen["solutions"][0]["layout"])

    @cached_property
    def _library(self) -> dict[str, Any]:
        """How variants were trained that scores are of and the child starts from; nothing if they were not."""
        course = course_of(self.job)
        return {} if course is None else {"library": asdict(course)}

    @cached_property
    def _whole_layout(self) -> dict[str, Any]:
        return {"layout": layout_to_json(self.layout)}

    @cached_property
    def _structure(self) -> dict[str, Any]:
        """What the child in 16 bits is made from."""
        structure = layout_to_json({slot: structural(choice) for slot, choice in self.layout.items()})
        return {"structure": structure} | self._library

    @cached_property
    def _healing(self) -> dict[str, Any]:
        return self._structure | self._asked("heal")

    def unhealed(self) -> None:
        def measured() -> dict[str, float]:
            if self.job.config.uniform is not None:  # no moments to fit codes to; those of pack have to do better
                return measure_unhealed(self.job, {slot: rounded(choice) for slot, choice in self.layout.items()})
            chosen = {slot: [choice] for slot, choice in self.layout.items() if choice}
            gather_stats(self.job, chosen)
            train_library(self.job, chosen)
            return measure_unhealed(self.job, self.layout)

        inputs = self._whole_layout | self._library | self._asked("uniform")
        self._kept("unhealed", "measure child", inputs, measured, dict[str, float])

    def built(self) -> Path:
        def build_it(folder: Path) -> None:
            structure = {slot: structural(choice) for slot, choice in self.layout.items() if structural(choice)}
            gather_stats(self.job, {slot: [choice] for slot, choice in structure.items()})
            train_library(self.job, {slot: [choice] for slot, choice in structure.items()})
            build(self.job, self.layout, folder)

        self._made_from("build", self._structure, "folder/built")
        folder = self._folder("built", "build", build_it)
        if self.thrifty:
            self._forget_gathered()
        return folder

    def healed(self) -> Path:
        """The folder of the child in 16 bits, healed if that was asked for."""
        self._made_from("heal", self._healing, "healed", *_FITTED, "heal/whole/")
        name = self.store.get("healed", str)
        if name is None or self.store.folder_digests(f"folder/{name}", self.folder / name) is None:
            built, folder = self.built(), self.folder / "healed"
            self._drop_folder(*_HEALED)
            made = self._timed("heal", lambda: heal(self.job, self.layout, built, folder))
            name = made.name
            if made != built:
                self.store.put_folder(f"folder/{name}", made)
            self.store.put("healed", name)
        self.store.drop("heal/whole/checkpoint")
        self._drop_folder(*({"built", *_HEALED} - {name}))
        return self.folder / name

    def candidate(self) -> Path:
        """The folder that will be shipped, and a child of it that was verified."""
        job, written = self.job, card(self.job, self.chosen)
        self._made_from("pack", self._whole_layout | self._healing, "pack/")
        self._made_from("candidate", self._whole_layout | self._healing | {"card": written}, "folder/candidate")

        def pack_it(folder: Path) -> None:
            child = Walk(Checkpoint(self.healed()), dtype=job.dtype)
            calibration = torch.from_numpy(job.text.calibration.ids[:, :-1])
            pack(
                child,
                self.layout,
                calibration,
                folder,
                files={"penny.json": written},
                store=self.store,
                listen=job.listen,
                codes=None if self.thrifty else job.found_codes,
            )

        return self._folder("candidate", "pack", pack_it)

    def verified(self) -> dict[str, Any]:
        job, candidate = self.job, self.candidate()
        inputs = (
            self._whole_layout
            | self._healing
            | {
                "workload": self.chosen["solutions"][0]["workload"],
                **self._asked("also"),
                "candidate": self.store.get("folder/candidate"),
                "held_out_rows": job.config.data.held_out_rows,
                "weight_bytes": job.budget.weight_bytes,
                "whole": job.fits_whole,
                "speed": job.config.prices if job.config.machine == "this" else None,
                "memory": job.budget.memory_bytes is not None,
            }
        )

        def verify_it() -> dict[str, Any]:
            return verify_child(job, self.layout, self.chosen, self.healed(), candidate)

        return self._kept("verified", "verify", inputs, verify_it, dict[str, Any])

    def report(self) -> dict[str, Any]:
        job = self.job
        _ = self.chosen
        self.unhealed()
        verified, candidate = self.verified(), self.folder / "candidate"
        checks = [verify.Check(**check) for check in verified["checks"]]
        known = self.store.folder_digests("folder/candidate", candidate)
        if known is None:
            raise RuntimeError(f"{candidate} has changed since it was checked; the same command makes it again")
        if any(check.failed for check in checks):
            places.publish(places.beside(job.out)["rejected"], candidate, known, {})
            raise verify.VerificationFailed(checks)
        with waiting(job.listen, "report"):  # solves for the margins of the budget too; not timed, it tells the times
            told = facts(job, self.chosen, verified, self.timings)
            report.write(told, candidate, known, job.out)
        self._drop_codes()
        if self.thrifty:
            self._forget_gathered()
            self._drop_folder("built", *_HEALED)
            for prefix in ("pack/", "heal/local/", *_FITTED):
                self.store.drop(prefix)
        return told

    def _folder(self, name: str, stage: str, make: Callable[[Path], None]) -> Path:
        """A folder that is made if it is not there as it was written."""
        folder, key = self.folder / name, f"folder/{name}"
        if self.store.folder_digests(key, folder) is None:
            self._drop_folder(name)
            self._timed(stage, lambda: make(folder))
            self.store.put_folder(key, folder)
        return folder

    def _drop_folder(self, *names: str) -> None:
        for name in names:
            self.store.drop(f"folder/{name}")
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _drop_codes(self) -> None:
        """They take most of the room, and are found again if another budget wants them."""
        self.store.drop("codes/")
        shutil.rmtree(self.job.codes, ignore_errors=True)
        self.job.codes_seen.clear()

    def _forget_gathered(self) -> None:
        self._drop_codes()
        for prefix in ("stats/", "gathered/", "library/"):
            self.store.drop(prefix)
        shutil.rmtree(self.job.run / "library", ignore_errors=True)
