"""Open the written folder again and hold it against every promise; measure parent and child side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.opened import open_checkpoint
from pennyweight.evals.agree import compare
from pennyweight.job import checks as verify
from pennyweight.job import packed
from pennyweight.job.job import Job
from pennyweight.job.plan import described
from pennyweight.live.load import load_model, load_stock, why_no_stock
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.demand import Workload
from pennyweight.model.slots import Slot
from pennyweight.runs.events import waiting
from pennyweight.variants import reshape_all

_ENGINE_TOKENS = 128  # of a text, for the engine: so many tell the share of columns that it reads


def verify_child(
    job: Job, layout: Mapping[Slot, Choice], chosen: Mapping[str, Any], healed: Path, candidate: Path
) -> dict[str, Any]:
    """Checks, then what was measured beside them, as data. What goes wrong on the way is raised: only a promise that is
    not kept is an answer."""
    whole, listen, rows = job.fits_whole, job.listen, job.text.held_out
    limit, predicted = job.budget.weight_bytes, chosen["solutions"][0]["predicted"]["file_bytes"]
    listen.begin("verify", total=4 + whole + (limit is not None), unit="checks")
    alone = [
        *verify.check_bytes(candidate, limit, predicted),
        verify.check_shapes(candidate, reshape_all(job.shapes, layout)),
        verify.check_tokenizer(job.model, candidate),
    ]
    listen.advance(len(alone))
    prompts = torch.from_numpy(rows.ids[: min(4, len(rows.ids)), :32])
    if whole:
        made = Walk(Checkpoint(healed))
        memory_child = packed.whole(load_model(healed, dtype=torch.float32), made, job.store, layout)
        opened = [verify.check_reload(candidate, memory_child, prompts, 32)]
        del memory_child
        listen.advance(len(alone) + 1)
        stock = why_no_stock(job.model) is None
        parent = load_stock(job.model) if stock else load_model(job.model, dtype=torch.float32)
        child = load_model(candidate, dtype=torch.float32)
        opened += verify.check_engine(candidate, torch.from_numpy(rows.ids[0, :_ENGINE_TOKENS]), child)
    else:
        opened = [_check_walk(job, layout, healed, candidate, prompts[:1])]
        parent, child = (_streamed(folder, job) for folder in (job.model, candidate))
    listen.advance(len(alone) + len(opened))
    listen.end()
    for name, model in () if whole else (("parent", parent), ("child", child)):
        listen.begin(f"read {name}", total=model.walk.layers, unit="layers")
        model.read(torch.from_numpy(rows.ids[:, :-1]))
        listen.end()
    compared = compare(parent, child, rows, listen=listen)
    quality = asdict(compared)
    follows = verify.check_follows(compared.agreement, job.store.get("unhealed")["kl"])
    checks = [verify.Check(**job.store.get("parent")), *alone, *follows, *opened]
    samples = {}
    if whole:
        texts_of = lambda m: [job.tokenizer.decode(row) for row in verify.generate(m, prompts[:, :24], 48)]  # noqa: E731
        with waiting(listen, "samples"):
            samples = {
                "prompts": [job.tokenizer.decode(row) for row in prompts[:, :24]],
                "parent": texts_of(parent),
                "child": texts_of(child),
            }
    workload = Workload(**chosen["solutions"][0]["workload"])
    speed, how = _speed(job, candidate, workload)
    also = [_speed(job, candidate, demand.workload) for demand in job.also]
    return {
        "checks": [check.to_json() for check in checks],
        "whole": whole,
        "quality": quality,
        "samples": samples,
        "speed": speed,
        "speed_how": how,
        "also": [{"speed": speed, "speed_how": how} for speed, how in also],
        "slowdown": None if speed is None else _slowdown(job, workload),
        "memory": None if job.budget.memory_bytes is None else _memory(job, candidate, workload),
    }


def _check_walk(
    job: Job, layout: Mapping[Slot, Choice], healed: Path, candidate: Path, ids: torch.Tensor
) -> verify.Check:
    """The written folder gives the next tokens that the run folder's packed tensors give, both walked."""
    expected = Streamed(packed.Packed(Walk(Checkpoint(healed)), job.store, layout))(ids).logits.argmax(dim=-1)
    same = int((Streamed(Walk(Checkpoint(candidate)))(ids).logits.argmax(dim=-1) == expected).sum())
    name = "next tokens of the written folder, walked layer by layer"
    return verify.Check(name, same == expected.numel(), expected.numel(), same)


def _streamed(folder: Path, job: Job) -> Streamed:
    return Streamed(Walk(open_checkpoint(folder), dtype=job.dtype), on_layer=job.listen.advance)


def _speed(job: Job, candidate: Path, workload: Workload) -> tuple[dict[str, Any] | None, str]:
    """Parent and child in the native engine, as `penny run` would run them, in turn and at the batch that was chosen,
    and in words how that was measured or why it was not."""
    from pennyweight.runtime.bench import bench_in_turn
    from pennyweight.runtime.engine import Engine, NativeMissing
    from pennyweight.runtime.lower import NotRun

    if job.config.machine != "this":
        return None, "not measured: the prices are another machine's"
    if not job.fits_whole:
        return None, "not measured: the models are too large to be loaded whole here"
    prompt, new = workload.prompt, workload.new
    longest = job.checkpoint.config.get("max_position_embeddings")
    if longest is not None and prompt + new > longest:
        return None, f"not measured: a prompt of {prompt} and {new} new tokens; the model takes up to {longest} in all"
    job.listen.begin("speed", total=1)
    try:
        engines = [Engine(folder, context=workload.context, cache=workload.cache) for folder in (job.model, candidate)]
        parent, child = bench_in_turn(engines, workload)
    except (NativeMissing, NotRun) as err:
        job.listen.end("not measured")
        return None, f"not measured: {err}"
    job.listen.end()
    how = f"measured in the native engine, {child.kernels} kernels on {child.threads} threads"
    return {"parent": parent.to_json(), "child": child.to_json()}, how


def _slowdown(job: Job, workload: Workload) -> float:
    """How many times as long this machine takes as when its prices were made."""
    from pennyweight.prices import measure

    with waiting(job.listen, "measure machine"):
        if job.config.prices == "computed":
            return measure.slowdown(described(job))
        cache = measure.cache_folder() / "latencies.json"
        return measure.Models(job.checkpoint.config, job.shapes, workload, cache=cache).slowdown()


def _memory(job: Job, candidate: Path, workload: Workload) -> dict[str, int] | None:
    """The most that parent and child took while they served the workload, each in a process of its own; None where that
    cannot be measured."""
    from pennyweight.runtime import footprint

    if not job.fits_whole or job.config.machine != "this":
        return None
    with waiting(job.listen, "memory"):
        try:
            folders = {"parent": job.model, "child": candidate}
            return {name: footprint.of_folder(folder, workload).peak_bytes for name, folder in folders.items()}
        except footprint.NotTold:
            return None
