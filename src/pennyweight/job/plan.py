"""What the model is, what each slot may become, whether the budget can be met, and what the job takes on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pennyweight import units, variants
from pennyweight.heal.schedule import JUDGES
from pennyweight.job import hours
from pennyweight.job.gather import parts_of, rows_of, singles, wanted_of
from pennyweight.job.job import Job
from pennyweight.job.library import learns
from pennyweight.judge import codes, score, shortened
from pennyweight.live import magnitudes
from pennyweight.model.demand import batches
from pennyweight.model.slots import Slot
from pennyweight.prices import offers, planning
from pennyweight.prices.cost import Seconds, computed, model_figures
from pennyweight.prices.machine import Machine
from pennyweight.runs import space


def plan(job: Job) -> dict[str, Any]:
    """Check that the budget can be met and say what the job will do; `parent` is what the parent costs, by how many
    sequences run at once. Raises Infeasible before any work, ValueError if the run folder's disk, or --max-disk, is too
    small, OSError (ENOSPC) if others have taken too much of the disk."""
    seconds, how = prices(job)
    job.listen.begin("plan", total=1)
    config = job.config
    found = planning.prospect(
        job.blocks, config.axes, job.budget, job.workload, seconds, job.also, scored_tokens=job.row_tokens
    )
    found.hold_against(job.budget)
    needs = disk(job)
    left = space.free_bytes(job.run) + space.used_bytes(job.run)
    if needs.bytes > left:
        wanted, there = units.show_bytes(needs.bytes), units.show_bytes(left)
        if needs.bytes > space.whole_bytes(job.run):
            raise ValueError(f"the run folder {job.run} needs up to {wanted}, more than its disk; choose another --run")
        told = f"the run folder {job.run} needs up to {wanted}, {there} are left for it"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), told)
    job.listen.advance(1)
    bounds = f"; a share of the weights is one of {units.show_bytes(job.parent_bytes)}, the parent in 16 bits"
    shares = "%" in (config.budget.weights or "")
    told = f"the run folder takes up to {units.show_bytes(needs.bytes)}{bounds if shares else ''}"
    first, choices = first_share(job), sum(map(len, singles(job).values()))
    if first < 1:
        told += f"; {choices} choices are scored on {first:.0%} of the text, those that may be chosen on the rest"
    takes = hours.seconds(config, job.checkpoint.config, job.listen)
    told += f"; about {units.show_seconds(sum(takes.values()))} on this machine"
    if job.in_time is not None and job.in_time.left_out:
        told += f"; {job.in_time.left_out}"
    job.listen.end(told)
    return {
        "disk_bytes": needs.bytes,
        "parent_bytes": job.parent_bytes,
        "parent": {str(batch.concurrency): model_figures(job.shapes, batch, seconds) for batch in found.offered},
        "parent_also": [model_figures(job.shapes, demand.workload, seconds) for demand in job.also],
        "prices": how,
        "choices": choices,
        "first_share": round(first, 4),
        "seconds": takes,
        "left_out": "" if job.in_time is None else job.in_time.left_out,
        "slots": len(job.shapes),
        "dtype": str(job.dtype),
    }


def first_share(job: Job) -> float:
    """The share of the text that all choices are scored on, whatever comes of it; 1 if none are told early that they
    will not be chosen."""
    rows, parts = rows_of(job), parts_of(job)
    return sum(rows[chunk] for chunk in parts[0]) / sum(rows[chunk] for part in parts for chunk in part)


@dataclass(frozen=True)
class Disk:
    """The most that the run folder comes to hold. `thrifty`: what can be made again is dropped as soon as its stage is
    over; otherwise it stays until the child is finished, in case the next call wants another budget."""

    bytes: int
    thrifty: bool


def disk(job: Job) -> Disk:
    """Raises ValueError if --max-disk is not enough."""
    most, everything, least = job.config.max_disk, _disk_bytes(job, thrifty=False), _disk_bytes(job, thrifty=True)
    if most is None or everything <= units.parse_bytes(most):
        return Disk(everything, thrifty=False)
    if least > units.parse_bytes(most):
        raise ValueError(
            f"--max-disk {most} is too little: the run folder needs up to {units.show_bytes(least)}; fewer axes, a "
            "smaller --max-pending, less text or --heal-tokens 0 need less"
        )
    return Disk(least, thrifty=True)


def _disk_bytes(job: Job, *, thrifty: bool) -> int:
    """An upper bound of what the run folder holds in any of its stages."""
    config, layers, offered = job.config, job.checkpoint.config["num_hidden_layers"], singles(job)
    rows, hidden = config.data, 4 * job.row_tokens * job.checkpoint.config["hidden_size"]
    whole = {slot: _stats_bytes(job, slot, ()) for slot in job.shapes}
    layer = max(sum(size for slot, size in whole.items() if slot.layer == index) for index in range(layers))
    gathering = (-(-rows.calibration_rows // rows.rows_per_chunk) + 3) * layer + 2 * rows.calibration_rows * hidden
    chunk = rows.rows_per_chunk * hidden
    most = max(units.parse_bytes(config.max_pending), *(len(own) * chunk for own in offered.values()), 0)
    pending = min(most, sum(len(own) * chunk for own in offered.values())) + chunk
    short = 0
    if shortened.shortens(job.shapes[Slot("head")], job.shapes[job.walk.logits_slot]):
        short = job.row_tokens * 8 * (shortened.TOP + shortened.DRAWN) + hidden
    scoring = rows.score_rows * (hidden * (layers + 1) + short) + pending
    compared = 24 * rows.score_rows * -(-job.row_tokens // score.STRETCH) * sum(map(len, offered.values()))
    again = sum(_stats_bytes(job, slot, codes.spent(shape, config.axes)) for slot, shape in job.shapes.items())
    for slot, own in offered.items():
        again += sum(weight.nbytes for weight, _ in codes.wanted(job.shapes[slot], own).values())
    again += _library_bytes(job)
    learning = 2 * hidden * (JUDGES - (-config.heal.library_tokens // job.row_tokens)) if job.library else 0
    child = job.parent_bytes
    heals = any(not variants.stores(axis) for axis in config.axes)
    local, fitted, all_of_it = (
        child * (heals and n > 0) for n in (config.heal.local_tokens, config.heal.fitted, config.heal.whole_tokens)
    )
    shipped = min(child, job.budget.weight_bytes or child) + offers.FILE_OVERHEAD
    kept = 0 if thrifty else again
    stages = (
        again + max(gathering, learning, scoring),
        again + child,
        # Slots healed by themselves and the child of them, the same of those that are fitted; the child and Adam's two
        # moments in float32, twice while they are replaced, and the child at last.
        kept + child + 2 * local + 2 * fitted + 13 * all_of_it,
        kept + child + (0 if thrifty else local + fitted) + 2 * shipped + 2 * rows.calibration_rows * hidden,
    )
    return max(stages) + compared + _SMALL


_SMALL = 2**24
"""For the database and headers of files."""


def _library_bytes(job: Job) -> int:
    """Of variants that are trained before they are scored."""
    if job.library is None:
        return 0
    learning = {slot: [c for choice in own if (c := learns(choice))] for slot, own in singles(job).items()}
    return sum(variants.reshape(job.shapes[slot], choice).nbytes for slot, own in learning.items() for choice in own)


def _stats_bytes(job: Job, slot: Slot, spent: Collection[str]) -> int:
    """Of a slot's statistics, with the diagonal of the moments in `spent`."""
    shape, found = job.shapes[slot], 0
    widths = {"input_moment": shape.hidden_size, "cross_moment": shape.hidden_size, "inner_moment": shape.inner_size}
    for name in wanted_of(job, slot):
        if name in widths:
            found += 4 * widths[name] ** (1 if name in spent else 2)
        else:
            found += 4 * max(shape.inner_size, 4 * magnitudes.BINS)
    return found


def prices(job: Job) -> tuple[Seconds, str]:
    """Seconds per slot, and in words where they come from."""
    config, machine = job.config, described(job)
    if config.machine != "this":
        return computed(machine), f"computed for {machine.name}: {machine.source}"
    if config.prices == "computed":
        return computed(machine), f"computed from this machine's bandwidth and arithmetic ({machine.name})"
    return measured_prices(job), f"measured on this machine ({machine.name}) in the native engine, block by block"


def described(job: Job) -> Machine:
    """The machine that times are told for: a description, or this one as it was when the run was begun."""
    if job.config.machine != "this":
        return Machine.load(job.config.machine)
    known = None if job.unopened else job.store.get("machine", Machine)
    if known is None:
        from pennyweight.prices import measure

        known = measure.machine(listen=job.listen)
    return known


def measured_prices(job: Job) -> Seconds:
    """Block times of this machine; each shape is measured once per machine and workload, batches that a bound on
    throughput leaves open and further demands included, and remembered."""
    from pennyweight.prices import measure

    wanted = offers.all_shapes(job.shapes, job.config.axes, scored_tokens=job.row_tokens)
    cache = measure.cache_folder() / "latencies.json"
    budgets = (job.budget, *(job.swept(bounds) for bounds in job.config.sweep))
    workloads = dict.fromkeys(batch for budget in budgets for batch in batches(budget, job.workload))
    workloads |= dict.fromkeys(demand.workload for demand in job.also)
    config = job.checkpoint.config
    return measure.prices(config, job.shapes, list(workloads), wanted, cache=cache, listen=job.listen)
