"""Open the written folder again and hold it against every promise; measure parent and child side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.evals.agree import agree
from pennyweight.evals.loss import loss
from pennyweight.job import checks as verify
from pennyweight.job import packed
from pennyweight.job.job import Job
from pennyweight.live.load import load_model
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
    listen.begin("verify", total=3 + whole + (job.budget.weight_bytes is not None), unit="checks")
    predicted = chosen["solutions"][0]["predicted"]
    checks = verify.check_bytes(candidate, job.budget.weight_bytes, predicted["file_bytes"])
    shapes = reshape_all(job.shapes, layout)
    checks.append(verify.check_shapes(candidate, shapes))
    listen.advance(len(checks))
    prompts = torch.from_numpy(rows.ids[: min(4, len(rows.ids)), :32])
    if whole:
        made = Walk(Checkpoint(healed))
        memory_child = packed.whole(load_model(healed, dtype=torch.float32), made, job.store, layout)
        checks.append(verify.check_reload(candidate, memory_child, prompts, 32))
        del memory_child
    else:
        short = prompts[:1]
        expected = Streamed(Walk(Checkpoint(candidate)))(short).logits.argmax(dim=-1)
        again = Streamed(packed.Packed(Walk(Checkpoint(healed)), job.store, layout))(short).logits.argmax(dim=-1)
        same = int((expected == again).sum())
        checks.append(
            verify.Check(
                "next tokens of the written folder, walked layer by layer",
                same == expected.numel(),
                expected.numel(),
                same,
            )
        )
    listen.advance(len(checks))

    def model(folder: Path) -> Any:
        return load_model(folder, dtype=torch.float32) if whole else Streamed(Walk(Checkpoint(folder), dtype=job.dtype))

    parent, child = model(job.model), model(candidate)
    if whole:
        with torch.no_grad():
            checks.append(verify.check_engine(candidate, prompts[0], child(prompts[:1]).logits[0].float()))
        listen.advance(len(checks))
    listen.end()
    batch = 8 if whole else len(rows.ids)
    quality = {
        "parent": asdict(loss(parent, rows, batch_size=batch, listen=listen, stage="loss of parent")),
        "child": asdict(loss(child, rows, batch_size=batch, listen=listen, stage="loss of child")),
        "agreement": asdict(agree(parent, child, rows, batch_size=batch, listen=listen)),
    }
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
