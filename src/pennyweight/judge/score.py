"""Replace-1-block scores: how much worse the model gets when one slot alone takes a variant.

For every slot and choice the model is run with exactly that slot changed, from the parent's cached hidden states of
that layer onwards, and compared with the parent's cached final states (Puzzle, arXiv:2411.19146). Metrics, all zero
for the parent's own choice:

    kl      nats per token of KL(parent || child) over the vocabulary; the default
    lm      increase of the language-modelling loss, nats per token
    cosine  1 - cos of the final hidden states, each row's values as one vector, mean over rows
    nmse    MSE(child, parent) / MSE(parent, 0) of the final hidden states, mean over rows

Choices travel together: a layer is built once and every choice made below it passes through, so that the model is not
read once per choice. They go in groups of layers, each starting from its own cached states: at most a quarter of the
slots, fewer if the hidden states of a group's choices do not fit `max_pending_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from pennyweight.disk.checkpoint import Checkpoint, read_entry, read_header
from pennyweight.judge.stats import SlotStats, of_slot
from pennyweight.live.walk import Layer, Walk, autocast, float_logits
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs import executor
from pennyweight.variants import apply

METRICS = ("kl", "lm", "cosine", "nmse")
_LOGITS_PER_BLOCK = 2**23  # of the final comparison: bounds the tokens whose logits are held at once


@dataclass(frozen=True)
class Group:
    """Slots of consecutive layers and the choices to score for each."""

    slots: tuple[tuple[Slot, tuple[Choice, ...]], ...]

    @property
    def first_layer(self) -> int:
        return (
            min((slot.layer if slot.layer is not None else 0) for slot, _ in self.slots if slot.kind != "head")
            if any(slot.kind != "head" for slot, _ in self.slots)
            else -1
        )


def groups(choices: Mapping[Slot, Sequence[Choice]], hidden_bytes: int, max_pending_bytes: int) -> list[Group]:
    """Group slots, in model order, so that the hidden states of a group's choices fit. One slot never splits.

    A group is what a stopped job has to do again: none is larger than a quarter of the slots.
    """
    groups: list[list[tuple[Slot, tuple[Choice, ...]]]] = [[]]
    pending, most = 0, -(-len(choices) // 4)
    for slot, offered in choices.items():
        size = len(offered) * hidden_bytes
        if groups[-1] and (pending + size > max_pending_bytes or len(groups[-1]) == most):
            groups.append([])
            pending = 0
        groups[-1].append((slot, tuple(offered)))
        pending += size
    return [Group(tuple(group)) for group in groups if group]


def hidden_path(folder: Path, chunk: int, layer: int) -> Path:
    """Hidden states entering `layer`; layer = number of layers: leaving the last one."""
    return folder / f"hidden-{chunk}-{layer}.safetensors"


@torch.no_grad()
def parent_chunk(model: Path, ids: np.ndarray, folder: Path, chunk: int, dtype: torch.dtype) -> None:
    """Task: cache the parent's hidden states at every layer for rows `ids` (rows, tokens + 1; the last is a target)."""
    walk = Walk(Checkpoint(model), dtype=dtype)
    if hidden_path(folder, chunk, walk.layers).exists():
        return

    def keep(index: int, hidden: torch.Tensor) -> None:
        path = hidden_path(folder, chunk, index)
        save_file({"hidden": hidden}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    with autocast(dtype):
        hidden = walk.embed(torch.from_numpy(ids[:, :-1]))
        for layer in walk.each():
            keep(layer.index, hidden)
            hidden = layer.run(hidden)
        keep(walk.layers, hidden)


@torch.no_grad()
def score_chunk(
    model: Path,
    ids: np.ndarray,
    scored: np.ndarray,
    folder: Path,
    chunk: int,
    group: Group,
    stats: Mapping[int, Path],
    dtype: torch.dtype,
) -> dict[str, dict[str, dict[str, float]]]:
    """Task: {slot: {choice key: sums}} over one chunk. Sums are over scored tokens (kl, lm, tokens) or rows.

    ids (rows, tokens + 1), scored (rows, tokens) bool; stats: layer -> file of its statistics.
    """
    walk = Walk(Checkpoint(model), dtype=dtype)
    wanted = dict(group.slots)
    pending: list[tuple[Slot, Choice, torch.Tensor]] = []
    with autocast(dtype):
        if group.first_layer >= 0:
            for choice in wanted.get(Slot("embed"), ()):
                parts = walk.embedding()
                apply(parts, choice, SlotStats({}))
                pending.append((Slot("embed"), choice, parts.root(torch.from_numpy(ids[:, :-1])).float()))
                del parts
            for layer in walk.each(group.first_layer):
                here = {slot: offered for slot, offered in group.slots if slot.layer == layer.index}
                entering = _load(hidden_path(folder, chunk, layer.index))["hidden"] if here else None
                pending = _through_layer(layer, here, entering, stats.get(layer.index), pending)
                del layer
        final = _load(hidden_path(folder, chunk, walk.layers))["hidden"]
        pending += [(Slot("head"), choice, final) for choice in wanted.get(Slot("head"), ())]
        return compare(walk, final, pending, torch.from_numpy(ids[:, 1:]), torch.from_numpy(scored))


def _through_layer(
    layer: Layer,
    choices: Mapping[Slot, tuple[Choice, ...]],
    entering: torch.Tensor | None,
    stats: Path | None,
    pending: list[tuple[Slot, Choice, torch.Tensor]],
) -> list[tuple[Slot, Choice, torch.Tensor]]:
    """Pending states one layer further, and those of this layer's own choices begun from what enters the parent's. A
    function of its own, so that the layer and its moments are gone before the next layer or the logits need room."""
    pending = [(slot, choice, layer.run(hidden)) for slot, choice, hidden in pending]
    tensors = _load(stats) if choices and stats is not None else {}
    for slot, offered in choices.items():
        of = of_slot(tensors, slot.kind)
        for choice in offered:
            edited = layer.fork(slot)
            apply(edited.parts[slot], choice, of)
            assert entering is not None
            pending.append((slot, choice, edited.run(entering)))
            executor.tick(len(pending))
    return pending


def _load(path: Path) -> dict[str, torch.Tensor]:
    return {name: read_entry(name, entry) for name, entry in read_header(path).items()}


def compare(
    walk: Walk,
    final: torch.Tensor,
    pending: list[tuple[Slot, Choice, torch.Tensor]],
    targets: torch.Tensor,
    scored: torch.Tensor,
) -> dict[str, dict[str, dict[str, float]]]:
    """Sums of every metric, {slot: {choice key: sums}}, from the states leaving the last layer.

    final: the parent's (rows, tokens, hidden); pending: (slot, choice, child's states of that shape). A choice for the
    head, or for an embedding that is tied to it, also changes the matrix that makes the child's logits.
    """
    norm, head = walk.norm(), walk.head().root
    parent = norm(final)
    out: dict[str, dict[str, dict[str, float]]] = {}
    rows: list[tuple[dict[str, float], torch.Tensor, nn.Linear | None]] = []
    for slot, choice, hidden in pending:
        child = norm(hidden)
        sums = {
            **_hidden_sums(parent, child),
            "kl": 0.0,
            "lm": 0.0,
            "tokens": float(scored.sum()),
            "rows": float(len(final)),
        }
        out.setdefault(str(slot), {})[choice.key()] = sums
        if slot != walk.logits_slot or not choice:
            rows.append((sums, child, None))
        else:  # rare and large: its logits are made from its own matrix, one choice at a time
            changed = walk.head()
            apply(changed, choice, SlotStats({}))
            _logit_sums(head, parent, [(sums, child, changed.root)], targets, scored)
            del changed  # before the next choice reads another one
    _logit_sums(head, parent, rows, targets, scored)
    return out


def _hidden_sums(parent: torch.Tensor, child: torch.Tensor) -> dict[str, float]:
    p, c = parent.float().flatten(1), child.float().flatten(1)
    if torch.equal(p, c):
        return {"cosine": 0.0, "nmse": 0.0}
    cosine = 1 - torch.nn.functional.cosine_similarity(p.double(), c.double(), dim=1)
    nmse = (p - c).square().mean(dim=1) / (p.square().mean(dim=1) + 1e-6)
    return {"cosine": float(cosine.sum()), "nmse": float(nmse.double().sum())}


def _logit_sums(
    head: nn.Linear,
    parent: torch.Tensor,
    rows: list[tuple[dict[str, float], torch.Tensor, nn.Linear | None]],
    targets: torch.Tensor,
    scored: torch.Tensor,
) -> None:
    """Add KL and loss increase to each row's sums, a block of tokens at a time.

    Everything is computed from logit *differences* d = head(child - parent): KL = log sum p e^(d - mean_p d). That is
    exact for d = 0 and loses nothing to rounding when d is small, unlike a difference of two logits in bfloat16.
    """
    keep = scored.flatten()
    flat_parent, flat_targets = parent.flatten(0, 1)[keep], targets.flatten()[keep]
    flat_rows = [(sums, child.flatten(0, 1)[keep], own) for sums, child, own in rows]
    tokens = max(16, min(256, _LOGITS_PER_BLOCK // len(head.weight)))
    for start in range(0, len(flat_parent), tokens):
        block = slice(start, start + tokens)
        states, wanted = flat_parent[block], flat_targets[block, None]
        logits = float_logits(states, head.weight)
        p = logits.softmax(dim=-1)
        for sums, child, own in flat_rows:
            if own is None:
                difference = head(child[block] - states).float()
            else:
                difference = float_logits(child[block], own.weight).sub_(logits)
            kl, lm = divergence(p, difference, wanted)
            sums["kl"] += float(kl.double().sum())
            sums["lm"] += float(lm.double().sum())


def divergence(p: torch.Tensor, difference: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) and log p(target) - log q(target) per token, where q = softmax(log p + difference).

    p (tokens, vocab) float32, difference the same shape, targets (tokens, 1) int64. Both zero if difference is.
    """
    mean = (p * difference).sum(dim=-1, keepdim=True)
    centred = difference - mean
    if float(centred.amax()) < 40:
        kl = torch.log1p((p * torch.expm1(centred)).sum(dim=-1))
    else:
        kl = torch.logsumexp(p.clamp_min(1e-38).log() + centred, dim=-1)
    lm = kl - centred.gather(-1, targets).squeeze(-1)
    return kl, lm


def mean(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token and per-row means of summed sums."""
    per = {"kl": "tokens", "lm": "tokens", "cosine": "rows", "nmse": "rows"}
    return {metric: sums[metric] / sums[per[metric]] for metric in METRICS}
