"""Before any work: is the parent that the walk reads the one that transformers loads?

Everything that a job computes of the parent goes through live/walk.py and families/: which tensor makes the logits,
what a key that the config leaves out means, which files count. transformers decides these things by itself, and a user
will compare with what it loads. If both compute the same logits, the walk is right in all of them; a wrong head, norm,
window or rotary base is off by far more than rounding, at random ids as well as at text.

A parent that does not fit --max-ram is compared as far as it does: transformers loads its first layers only, with
embedding, last norm and head. What holds for those holds for all layers of their kind.
"""

from __future__ import annotations

import torch

from pennyweight.disk.gguf.file import gguf_of
from pennyweight.job.checks import Check
from pennyweight.job.job import Job
from pennyweight.live.load import load_stock, why_no_stock
from pennyweight.live.walk import Walk
from pennyweight.runs.events import waiting
from pennyweight.units import show_bytes

NAME = "the parent's logits, as read and as transformers loads it, relative error"
LIMIT = 1e-4
"""Of the 2-norm, in float32, where the two differ by the order of sums only."""
_TOKENS = 128


def hold_parent(job: Job) -> Check:
    """The check, kept. Raises ValueError if it is not: then every number that would follow were of another model."""
    layers = _loadable(job)
    limit = f"at most {LIMIT}"
    reason = why_no_stock(job.model)
    if reason is None and layers != job.walk.layers and gguf_of(job.model) is not None:
        reason = "transformers reads a GGUF file only whole, and --max-ram does not hold that"
    if reason is not None:
        return Check(NAME, False, limit, None, not_run=reason)
    if layers == 0:
        needed = show_bytes(_float_bytes(job, 1))
        return Check(NAME, False, limit, None, not_run=f"--max-ram does not hold one layer in transformers ({needed})")
    ids = torch.arange(min(_TOKENS, job.row_tokens)).mul(7919).remainder(job.checkpoint.config["vocab_size"])[None]
    with waiting(job.listen, "parent"), torch.no_grad():
        walked = _walked(Walk(job.checkpoint), ids, layers)
        some = None if layers == job.walk.layers else layers
        loaded = load_stock(job.model, layers=some)(ids, use_cache=False).logits
    error = float((walked - loaded).norm() / loaded.norm())
    if not error <= LIMIT:
        raise ValueError(
            f"{job.model} is another model as penny reads it than as transformers loads it: their logits differ by "
            f"{error:.3g} of their norm, at most {LIMIT:.0e} is expected. Something in its config.json or its tensors "
            "can be read in two ways; load it in transformers and write it again with save_pretrained"
        )
    name = NAME if layers == job.walk.layers else f"{NAME}; its first {layers} of {job.walk.layers} layers"
    return Check(name, True, limit, float(f"{error:.2g}"))


def _loadable(job: Job) -> int:
    """Layers that transformers may load in float32 beside the walk's one."""
    fitting = [count for count in range(1, job.walk.layers + 1) if 2 * _float_bytes(job, count) <= job.max_ram]
    return job.walk.layers if job.fits_whole else max(fitting, default=0)


def _float_bytes(job: Job, layers: int) -> int:
    """Of a model with the parent's first layers only, in float32."""
    shapes = [shape for slot, shape in job.shapes.items() if slot.layer is None or slot.layer < layers]
    return 4 * sum(weight.parameters for shape in shapes for weight in shape.weights())


def _walked(walk: Walk, ids: torch.Tensor, layers: int) -> torch.Tensor:
    hidden = walk.embed(ids)
    for index in range(layers):
        hidden = walk.layer(index).run(hidden)
    return walk.logits(hidden)
