"""Stages build and heal: the child in 16 bits, first as it was scored, then distilled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pennyweight import families, units
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.writer import Writer
from pennyweight.heal import in_sequence, local, whole
from pennyweight.heal.schedule import JUDGES
from pennyweight.job.job import Job
from pennyweight.judge import score, stats
from pennyweight.live.load import load_model
from pennyweight.live.walk import Walk, autocast
from pennyweight.model.choices import PARENT, Choice
from pennyweight.model.slots import Slot
from pennyweight.runs import allocator
from pennyweight.runs.events import waiting
from pennyweight.variants import apply, structural


@torch.no_grad()
def measure_unhealed(job: Job, layout: Mapping[Slot, Choice]) -> dict[str, float]:
    """What the scores predicted a sum of, measured together: the parent with every choice applied as it was when it
    was scored, on the same rows. {metric: mean}; all zero for the parent's layout."""
    rows = job.text.score
    job.listen.begin("measure child", total=job.walk.layers, unit="layers")
    ids, scored = torch.from_numpy(rows.ids), torch.from_numpy(rows.scored)
    walk, embed = job.walk, Slot("embed")
    with autocast(job.dtype):
        parent = walk.embed(ids[:, :-1])
        parts = walk.embedding()
        apply(parts, layout.get(embed, PARENT), stats.SlotStats({}, codes=job.found_codes))
        child = parts.root(ids[:, :-1]).float()
        del parts
        for layer in walk.each():
            parent = layer.run(parent, together=4)
            tensors = _stats(job, layer.index) if any(layout.get(slot) for slot in layer.parts) else {}
            for slot, own in layer.parts.items():
                of = stats.of_slot(tensors, slot.kind, codes=job.found_codes, owner=slot, library=job.library)
                apply(own, layout.get(slot, PARENT), of)
            child = layer.run(child, together=4)
            job.listen.advance(layer.index + 1)
            del layer, tensors  # moments and what was prepared from them: what follows needs the room
        if not job.fits_whole:
            allocator.give_back_freed_memory()  # logits take more room than layers
        last = walk.logits_slot
        pending = [(last, layout.get(last, PARENT), child)]
        sums = score.compare(walk, parent, pending, ids[:, 1:], scored, codes=job.found_codes)
    job.listen.end()
    return score.mean(next(iter(sums[str(last)].values())))


@torch.no_grad()
def build(job: Job, layout: Mapping[Slot, Choice], folder: Path) -> Path:
    """Write the child in 16 bits: every slot's structural choice applied, matrices not yet quantised."""
    walk = job.walk
    writer = Writer(folder, joins=families.joined(job.checkpoint.config))
    shapes = {**job.shapes}

    def add(slot: Slot) -> None:
        for name in walk.blocks[slot].tensors():
            writer.add(name, walk.matrix(slot).bfloat16())

    add(Slot("embed"))
    job.listen.begin("build", total=walk.layers, unit="layers")
    for layer in walk.each():
        chosen = {slot: structural(layout.get(slot, PARENT)) for slot in layer.parts}
        tensors = _stats(job, layer.index) if any(chosen.values()) else {}
        for slot, choice in chosen.items():
            parts = apply(layer.parts[slot], choice, stats.of_slot(tensors, slot.kind, owner=slot, library=job.library))
            shapes[slot] = parts.shape
            for name, parameter in parts.parameters():
                writer.add(name, parameter.bfloat16())
        job.listen.advance(layer.index + 1)
    add(Slot("norm"))
    add(Slot("head"))
    made = writer.finish(_in_16_bits(families.config_of(job.checkpoint.config, shapes)), like=job.model)
    job.listen.end()
    return made


def _stats(job: Job, layer: int) -> dict[str, torch.Tensor]:
    """None are gathered where nothing is judged."""
    return job.store.tensors(f"stats/{layer}") if job.config.uniform is None else {}


def _in_16_bits(config: dict[str, Any]) -> dict[str, Any]:
    """Whatever the parent was stored in, the child's weights are bfloat16; whichever of its two names the key has."""
    said = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(said, "bfloat16")}


def heal(job: Job, layout: Mapping[Slot, Choice], built: Path, folder: Path) -> Path:
    """Distil the built child block by block, fit it in sequence, then distil it whole; returns the folder of the healed
    child."""
    plan = job.config.heal
    changed = {slot: structural(choice) for slot, choice in layout.items() if structural(choice)}
    ids = torch.from_numpy(job.text.heal.ids[:, :-1])
    if not changed or not (plan.local_tokens or plan.fitted or plan.whole_tokens) or not len(ids):
        return built
    current = built
    if plan.local_tokens:
        current = _heal_local(job, changed, ids, built, folder.with_name(folder.name + "-blocks"))
    if plan.fitted:
        current = _fit(job, changed, ids, current, folder.with_name(folder.name + "-fitted"))
    if plan.whole_tokens:
        current = _heal_whole(job, ids, current, folder)
    return current


def _heal_local(job: Job, changed: Mapping[Slot, Choice], ids: torch.Tensor, built: Path, folder: Path) -> Path:
    plan = job.config.heal
    how = plan.model_dump(include={"library_tokens", "local_tokens", "local_lr", "batch_rows"})
    for slot, choice in changed.items():  # what another layout had here as well stays
        results = f"heal/local/{slot}", f"heal/local-loss/{slot}"
        job.store.made_from(f"heal/local/{slot}", {"choice": choice.to_json(), **how}, *results)
    rows = ids[: JUDGES + -(-plan.local_tokens // ids.shape[1])]
    child = Walk(Checkpoint(built), dtype=job.dtype)
    new = local.heal(
        job.walk,
        child,
        changed,
        rows,
        tokens=plan.local_tokens,
        lr=plan.local_lr,
        batch_rows=plan.batch_rows,
        store=job.store,
        listen=job.listen,
    )
    return _with(job, child, {name: tensor for tensors in new.values() for name, tensor in tensors.items()}, folder)


def _fit(job: Job, changed: Mapping[Slot, Choice], ids: torch.Tensor, built: Path, folder: Path) -> Path:
    child = Walk(Checkpoint(built), dtype=job.dtype)
    found = in_sequence.fit(
        job.walk,
        child,
        changed,
        ids,
        tokens=job.config.heal.fitted,
        batch_rows=4,
        store=job.store,
        listen=job.listen,
    )
    return _with(job, child, found, folder)


def _with(job: Job, child: Walk, replaced: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """A folder of the child in which some tensors are other ones."""
    with waiting(job.listen, "write child"):
        writer = Writer(folder, joins=families.joined(child.checkpoint.config))
        for name in child.checkpoint.entries:
            writer.add(name, replaced[name] if name in replaced else child.checkpoint.read(name))
        return writer.finish(child.checkpoint.config, like=child.checkpoint.path)


def _heal_whole(job: Job, ids: torch.Tensor, built: Path, folder: Path) -> Path:
    needed = 10 * job.parent_bytes  # parent; child, its gradient and Adam's two moments in float32
    if needed > job.max_ram:
        raise ValueError(
            f"healing the whole model needs about {units.show_bytes(needed)} of memory and --max-ram allows "
            f"{units.show_bytes(job.max_ram)}; raise it or set --heal-tokens 0"
        )
    plan = job.config.heal
    with waiting(job.listen, "load models"):
        parent = load_model(job.model, dtype=job.dtype).requires_grad_(False)
        child = load_model(built, dtype=torch.float32)
    whole.heal(
        parent,
        child,
        ids,
        tokens=plan.whole_tokens,
        lr=plan.whole_lr,
        batch_rows=plan.batch_rows,
        dtype=job.dtype,
        store=job.store,
        listen=job.listen,
    )
    checkpoint = Checkpoint(built)
    state = dict(child.named_parameters(remove_duplicate=False))
    with waiting(job.listen, "write child"):
        writer = Writer(folder, joins=families.joined(checkpoint.config))
        for name in checkpoint.entries:
            writer.add(name, state[name].detach().bfloat16())
        return writer.finish(checkpoint.config, like=built)
