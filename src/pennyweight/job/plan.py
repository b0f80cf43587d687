"""What the model is, what each slot may become, and whether the budget can be met at all."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pennyweight import units, variants
from pennyweight.job.job import Job
from pennyweight.prices import offers, planning
from pennyweight.prices.cost import Seconds, computed, figures, total, workspace_bytes
from pennyweight.prices.machine import Machine


def plan(job: Job) -> dict[str, Any]:
    """Check that the budget can be met and say what the job will do. Raises Infeasible before any work."""
    context = job.row_tokens
    seconds, how = prices(job)
    found = planning.prospect(job.blocks, job.config.axes, job.workload, seconds, scored_tokens=context)
    found.hold_against(job.budget, job.shapes, job.workload)
    parent = figures(total(job.shapes, job.workload, seconds), job.workload, workspace_bytes(job.shapes, job.workload))
    disk = _disk_bytes(job, context)
    if disk > job.store.free_bytes():
        raise ValueError(
            f"the run folder {job.store.folder} needs about {units.show_bytes(disk)}, its disk has "
            f"{units.show_bytes(job.store.free_bytes())} left; free some or choose another --run"
        )
    return {
        "disk_bytes": disk,
        "parent": parent,
        "prices": how,
        "choices": found.choices,
        "slots": len(job.shapes),
        "dtype": str(job.dtype),
    }


def _disk_bytes(job: Job, context: int) -> int:
    """About what the run folder grows to: statistics (twice while they are merged), cached states, child folders."""
    moments = 0
    for shape in job.shapes.values():
        wanted = variants.wanted(shape, job.config.axes)
        moments += sum(name in wanted for name in ("input_moment", "cross_moment")) * shape.hidden_size**2
        moments += ("inner_moment" in wanted) * shape.inner_size**2
    rows = job.config.data.score_rows + job.config.data.calibration_rows
    states = rows * context * job.checkpoint.config["hidden_size"] * (job.checkpoint.config["num_hidden_layers"] + 1)
    return 4 * (2 * moments + states) + 3 * job.checkpoint.weight_bytes


def prices(job: Job) -> tuple[Seconds, str]:
    """Seconds per slot, and in words where they come from."""
    config = job.config
    if config.machine != "this":
        machine = Machine.load(config.machine)
        return computed(machine), f"computed for {machine.name}: {machine.source}"
    known = job.store.get("machine")
    if known is None:
        from pennyweight.prices import measure

        known = asdict(measure.machine(listen=job.listen))
        job.store.put("machine", known)
    machine = Machine(**known)
    if config.prices == "computed":
        return computed(machine), f"computed from this machine's bandwidth and arithmetic ({machine.name})"
    return measured_prices(job), f"measured on this machine ({machine.name}) in the native engine, block by block"


def measured_prices(job: Job) -> Seconds:
    """Block times of this machine; each shape is measured once per machine and workload and remembered."""
    from pennyweight.prices import measure

    wanted = offers.all_shapes(job.shapes, job.config.axes, scored_tokens=job.config.data.context)
    cache = measure.cache_folder() / "latencies.json"
    models = measure.Models(job.checkpoint.config, job.shapes, job.workload, cache=cache)
    return models.latencies(wanted, listen=job.listen).seconds()
