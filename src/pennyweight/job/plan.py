"""What the model is, what each slot may become, and whether the budget can be met at all."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pennyweight import kinds, units
from pennyweight.job.job import Job
from pennyweight.model.shapes import Attention, GatedMLP
from pennyweight.prices import offers
from pennyweight.prices.cost import Seconds, computed, figures, total, workspace_bytes
from pennyweight.prices.machine import Machine
from pennyweight.search import Infeasible


def plan(job: Job) -> dict[str, Any]:
    """Check that the budget can be met and say what the job will do. Raises Infeasible before any work."""
    context = job.row_tokens
    singles = {
        slot: offers.single_choices(shape, job.config.axes, scored_tokens=context) for slot, shape in job.shapes.items()
    }
    seconds, how = prices(job)
    free = {slot: {choice.key(): 0.0 for choice in found} for slot, found in singles.items()}
    offered = {
        slot: offers.undominated(offers.offers(slot, shape, free[slot], job.workload, seconds))
        for slot, shape in job.shapes.items()
    }
    try:
        kinds.load("search", "mip").solve(offers.problem(offered, job.shapes, job.budget, job.workload))
    except Infeasible as err:
        raise offers.in_users_words(err, job.shapes, job.budget, job.workload) from None
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
        "choices": sum(len(found) for found in singles.values()),
        "slots": len(job.shapes),
        "dtype": str(job.dtype),
    }


def _disk_bytes(job: Job, context: int) -> int:
    """About what the run folder grows to: statistics (twice while they are merged), cached states, child folders."""
    wanted = {name for axis in job.config.axes for name in kinds.load("variants", axis).STATS}
    moments = 0
    for shape in job.shapes.values():
        if isinstance(shape, Attention):
            moments += 2 * shape.hidden_size**2 + (shape.num_heads * shape.head_dim) ** 2
        elif isinstance(shape, GatedMLP):
            moments += 2 * shape.hidden_size**2 + (shape.intermediate_size**2 if "down_moment" in wanted else 0)
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
