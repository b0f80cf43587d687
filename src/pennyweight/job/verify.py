"""Open the written folder again and hold it against every promise; measure parent and child side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.opened import open_checkpoint
from pennyweight.evals.agree import agree
from pennyweight.evals.loss import loss
from pennyweight.job import checks as verify
from pennyweight.job import packed
from pennyweight.job.job import Job
from pennyweight.live.load import load_model, load_stock, why_no_stock
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs.events import waiting
from pennyweight.variants import reshape_all


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
        with torch.no_grad():
            opened.append(verify.check_engine(candidate, prompts[0], child(prompts[:1]).logits[0].float()))
    else:
        opened = [_check_walk(job, layout, healed, candidate, prompts[:1])]
        parent, child = (_streamed(folder, job) for folder in (job.model, candidate))
    listen.advance(len(alone) + len(opened))
    listen.end()
    for name, model in () if whole else (("parent", parent), ("child", child)):
        listen.begin(f"read {name}", total=model.walk.layers, unit="layers")
        model.read(torch.from_numpy(rows.ids[:, :-1]))
        listen.end()
    quality = {
        "parent": asdict(loss(parent, rows, listen=listen, stage="loss of parent")),
        "child": asdict(loss(child, rows, listen=listen, stage="loss of child")),
    }
    agreement = agree(parent, child, rows, listen=listen)
    quality["agreement"] = asdict(agreement)
    follows = verify.check_follows(agreement, job.store.get("unhealed")["kl"])
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
    speed, how = _speed(job, candidate)
    return {
        "checks": [check.to_json() for check in checks],
        "whole": whole,
        "quality": quality,
        "samples": samples,
        "speed": speed,
        "speed_how": how,
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


def _speed(job: Job, candidate: Path) -> tuple[dict[str, Any] | None, str]:
    """Parent and child in the native engine, as `penny run` would run them, and in words how that was measured or why
    it was not."""
    from pennyweight.runtime.bench import bench
    from pennyweight.runtime.engine import Engine, NativeMissing
    from pennyweight.runtime.lower import NotRun

    if job.config.machine != "this":
        return None, "not measured: the prices are another machine's"
    if not job.fits_whole:
        return None, "not measured: the models are too large to be loaded whole here"
    prompt, new = job.workload.prompt, job.workload.new
    longest = job.checkpoint.config.get("max_position_embeddings")
    if longest is not None and prompt + new > longest:
        return None, f"not measured: a prompt of {prompt} and {new} new tokens; the model takes up to {longest} in all"
    found = {}
    job.listen.begin("speed", total=2, unit="models")
    try:
        for name, folder in (("parent", job.model), ("child", candidate)):
            engine = Engine(folder, context=job.workload.context)
            found[name] = bench(engine, job.workload).to_json()
            job.listen.advance(len(found))
    except (NativeMissing, NotRun) as err:
        job.listen.end("not measured")
        return None, f"not measured: {err}"
    job.listen.end()
    speed = found["child"]
    return found, f"measured in the native engine, {speed['kernels']} kernels on {speed['threads']} threads"
