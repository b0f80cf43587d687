"""All stages in order, each only if the run folder does not hold its result yet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pennyweight import report
from pennyweight.disk import places
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.job import checks as verify
from pennyweight.job.children import build, heal, measure_unhealed
from pennyweight.job.gather import gather_stats, score_choices
from pennyweight.job.job import Job
from pennyweight.job.outputs import intact
from pennyweight.job.pack import pack
from pennyweight.job.parent import hold_parent
from pennyweight.job.plan import plan
from pennyweight.job.reporting import card, facts
from pennyweight.job.solve import solve_all
from pennyweight.job.verify import verify_child
from pennyweight.live.walk import Walk
from pennyweight.runs import allocator
from pennyweight.runs.events import waiting
from pennyweight.variants import layout_from_json


def run_job(job: Job) -> dict[str, Any]:
    """Run every stage that is not done yet; returns the report (also written to out/report.json).

    Raises Infeasible before any work if the budget cannot be met, VerificationFailed if the result is not what was
    promised; then the folder is kept as `<out>.rejected` for inspection.
    """
    timings = job.store.get("timings") or {}

    def stage(name: str, work: Any) -> Any:
        started = time.perf_counter()
        if not job.fits_whole:
            allocator.give_back_freed_memory()  # what the last stage held; the next one needs its room
        result = work()
        timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - started, 2)
        job.store.put("timings", timings)
        return result

    if job.store.get("plan") is None:
        job.store.put("plan", stage("plan", lambda: plan(job)))
    if job.store.get("parent") is None:
        job.store.put("parent", stage("parent", lambda: hold_parent(job)).to_json())
    stage("stats", lambda: gather_stats(job))
    stage("score", lambda: score_choices(job))
    if job.store.get("chosen") is None:
        job.store.put("chosen", stage("solve", lambda: solve_all(job)))
    chosen = job.store.get("chosen")
    layout = layout_from_json(chosen["solutions"][0]["layout"])
    if job.store.get("unhealed") is None:
        job.store.put("unhealed", stage("measure child", lambda: measure_unhealed(job, layout)))
    folders = job.store.folder
    built = _kept(job, "built", folders / "built", lambda to: stage("build", lambda: build(job, layout, to)))
    healed = job.store.get("healed")
    if healed is None or not Path(healed).exists():
        healed = str(stage("heal", lambda: heal(job, layout, built, folders / "healed")))
        job.store.put("healed", healed)
    candidate = folders / "candidate"
    child = Walk(Checkpoint(Path(healed)), dtype=job.dtype)
    if not intact(candidate, job.store, job.listen):
        calibration = torch.from_numpy(job.text.calibration.ids[:, :-1])
        stage(
            "pack",
            lambda: pack(
                child,
                layout,
                calibration,
                candidate,
                files={"penny.json": card(job, chosen)},
                store=job.store,
                listen=job.listen,
            ),
        )
        job.store.put("packed", places.hashes(candidate))
    if job.store.get("verified") is None:
        job.store.put("verified", stage("verify", lambda: verify_child(job, layout, chosen, Path(healed), candidate)))
    verified = job.store.get("verified")
    checks = [verify.Check(**check) for check in verified["checks"]]
    if any(check.failed for check in checks):
        places.publish(places.beside(job.out)["rejected"], candidate, job.store.get("packed"), {})
        raise verify.VerificationFailed(checks)
    with waiting(job.listen, "report"):  # solves for the margins of the budget too; not timed, it tells the times
        told = facts(job, chosen, verified, timings)
        report.write(told, candidate, job.store.get("packed"), job.out)
    return told


def _kept(job: Job, key: str, folder: Path, make: Any) -> Path:
    """A folder that is made once; its name appears in the store only when it is complete."""
    if job.store.get(key) is None or not folder.exists():
        make(folder)
        job.store.put(key, folder.name)
    return folder
