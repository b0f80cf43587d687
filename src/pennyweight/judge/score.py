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

Whatever the size of a group, a stopped task loses little: every few seconds it keeps the states of choices that have
gone further, and the sums of those that are being compared (`_Progress`). Work is counted in passes: one choice through
one layer, and a comparison as many as its logits cost.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge.stats import SlotStats, of_slot, read
from pennyweight.live.walk import Walk, autocast, float_logits
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Shapes
from pennyweight.model.slots import Slot
from pennyweight.runs import executor, scratch
from pennyweight.runs.scratch import Remembered
from pennyweight.variants import apply

METRICS = ("kl", "lm", "cosine", "nmse")
_PER_LOGIT = 300.0  # operations of a product that what is done with a logit takes as long as, about
_LOGITS_PER_BLOCK = 2**23  # of the final comparison: bounds the tokens whose logits are held at once
_KEEP_EVERY_S, _KEEP_AT_LEAST_EVERY_S, _KEEP_SHARE = 12.0, 24.0, 0.05


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
    """Group slots, in model order, so that the hidden states of a group's choices fit. One slot never splits, and there
    are four groups at least, which may run side by side."""
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


def passes(slot: Slot, shapes: Shapes) -> float:
    """The work of scoring one choice of a slot on one chunk, in passes through a layer."""
    return _passes_left(0 if slot.kind == "embed" else slot.layer, shapes) + _logit_passes(shapes)


def _passes_left(layer: int | None, shapes: Shapes) -> int:
    """From what enters a layer to the end; None: the end."""
    return 0 if layer is None else 1 + max(slot.layer or 0 for slot in shapes) - layer


def _logit_passes(shapes: Shapes) -> float:
    """How many passes through a layer comparing logits takes as long as."""
    layer = sum(shape.flops for slot, shape in shapes.items() if slot.layer == 0)
    logits = next(shape for shape in shapes.values() if shape.makes_logits)
    (matrix,) = logits.weights()
    return (logits.flops + _PER_LOGIT * matrix.shape[0]) / layer


def hidden_path(folder: Path, chunk: int, layer: int) -> Path:
    """Hidden states entering `layer`; layer = number of layers: leaving the last one."""
    return folder / f"hidden-{chunk}-{layer}.safetensors"


@torch.no_grad()
def parent_chunk(model: Path, ids: np.ndarray, folder: Path, chunk: int, dtype: torch.dtype) -> None:
    """Task: cache the parent's hidden states at every layer for rows `ids` (rows, tokens + 1; the last is a target).
    Those that are there are not made again."""
    walk = Walk(Checkpoint(model), dtype=dtype)
    missing = [i for i in range(walk.layers + 1) if scratch.kept(hidden_path(folder, chunk, i)) is None]
    if not missing:
        return
    with autocast(dtype):
        if missing[0] == 0:
            hidden = walk.embed(torch.from_numpy(ids[:, :-1]))
            scratch.keep(hidden_path(folder, chunk, 0), {"hidden": hidden})
        else:
            hidden = scratch.needed(hidden_path(folder, chunk, missing[0] - 1))["hidden"]
        for layer in walk.each(max(0, missing[0] - 1)):
            hidden = layer.run(hidden)
            if layer.index + 1 in missing:
                scratch.keep(hidden_path(folder, chunk, layer.index + 1), {"hidden": hidden})


Pending = tuple[Slot, Choice]


class _Progress:
    """What a task keeps in `folder` every few seconds, so that the next one goes on from there: hidden states that are
    on their way, each with the layer it enters next, and sums of comparisons.

    A state that was not kept, or is damaged, begins again where its choice does.
    """

    def __init__(self, folder: Path, chunk: int, group: Group) -> None:
        self._folder, self._chunk = folder, chunk
        self._every = [(slot, choice) for slot, offered in group.slots for choice in offered]
        told = "\n".join(f"{slot} {choice.key()}" for slot, choice in self._every)
        self._sums = folder / f"compared-{chunk}-{_short(told)}.safetensors"
        self.states: dict[Pending, tuple[int, torch.Tensor]] = {}
        self._kept: dict[Pending, int] = {}
        self.compared: dict[Pending, list[float]] = {}  # blocks of tokens, of `blocks`, kl and lm so far
        self.blocks = 1
        self._due = time.monotonic() + _KEEP_EVERY_S

    def load(self) -> None:
        for each in self._every:
            for layer, path in sorted(self._files(each), reverse=True):
                found = scratch.kept(path)
                if found is not None:
                    self.states[each], self._kept[each] = (layer, found["hidden"]), layer
                    break
        found = scratch.kept(self._sums)
        if found is not None:
            self.compared = dict(zip(self._every, found["sums"].tolist(), strict=True))
            self.blocks = int(found["blocks"])

    def passes(self, shapes: Shapes) -> float:
        """Those that are done, told without reading a state."""
        found = scratch.kept(self._sums)
        compared = 0.0 if found is None else float(found["sums"][:, 0].sum() / found["blocks"])
        done = compared * _logit_passes(shapes)
        for slot, choice in self._every:
            layers = [layer for layer, _ in self._files((slot, choice))]
            if layers:
                begun = 0 if slot.kind == "embed" else slot.layer
                done += _passes_left(begun, shapes) - _passes_left(max(layers), shapes)
        return done

    def set(self, each: Pending, layer: int, hidden: torch.Tensor) -> None:
        self.states[each] = layer, hidden
        self.tick()

    def tick(self) -> None:
        """Keep what is new, if it is time."""
        began = time.monotonic()
        if began < self._due:
            return
        for each, (layer, hidden) in self.states.items():
            if self._kept.get(each) != layer:
                scratch.keep(self._path(each, layer), {"hidden": hidden})
                for older, path in self._files(each):
                    if older != layer:
                        path.unlink()
                self._kept[each] = layer
        if self.compared:
            sums = [self.compared.get(each, [0.0, 0.0, 0.0]) for each in self._every]
            tensors = {"sums": torch.tensor(sums, dtype=torch.float64), "blocks": torch.tensor(self.blocks)}
            scratch.keep(self._sums, tensors)
        ended = time.monotonic()
        pause = min(_KEEP_AT_LEAST_EVERY_S, (ended - began) / _KEEP_SHARE)
        self._due = ended + max(_KEEP_EVERY_S, pause)

    def forget(self) -> None:
        for each in self._every:
            for _, path in self._files(each):
                path.unlink()
        self._sums.unlink(missing_ok=True)

    def _path(self, each: Pending, layer: int) -> Path:
        slot, choice = each
        return self._folder / f"state-{self._chunk}-{slot}-{_short(choice.key())}-{layer}.safetensors"

    def _files(self, each: Pending) -> list[tuple[int, Path]]:
        """(the layer that it enters next, file) of what is kept of a state."""
        found = self._folder.glob(self._path(each, 0).name.replace("-0.safetensors", "-*.safetensors"))
        return [(int(path.stem.rpartition("-")[2]), path) for path in found]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def passes_done(folder: Path, chunk: int, group: Group, shapes: Shapes) -> float:
    """The work of a task that an earlier call did and kept."""
    return _Progress(folder, chunk, group).passes(shapes)


def forget(folder: Path, chunk: int, group: Group) -> None:
    """Delete what a finished task has kept."""
    _Progress(folder, chunk, group).forget()


@torch.no_grad()
def score_chunk(
    model: Path,
    ids: np.ndarray,
    scored: np.ndarray,
    folder: Path,
    chunk: int,
    group: Group,
    stats: Mapping[int, Path],
    codes: Path,
    dtype: torch.dtype,
    library: Path | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Task: {slot: {choice key: sums}} over one chunk. Sums are over scored tokens (kl, lm, tokens) or rows.

    ids (rows, tokens + 1), scored (rows, tokens) bool; stats: layer -> file of its statistics; codes: the folder of
    those that were found; library: that of variants that were trained.
    """
    walk, found = Walk(Checkpoint(model), dtype=dtype), Remembered(codes)
    progress, wanted = _Progress(folder, chunk, group), dict(group.slots)
    progress.load()
    with autocast(dtype):
        for choice in wanted.get(Slot("embed"), ()):
            if (Slot("embed"), choice) not in progress.states:
                parts = walk.embedding()
                apply(parts, choice, SlotStats({}, codes=found))
                hidden = parts.root(torch.from_numpy(ids[:, :-1])).float()
                progress.set((Slot("embed"), choice), 0, hidden)
                del parts
        for index in range(group.first_layer, walk.layers) if group.first_layer >= 0 else ():
            begin = {slot: offered for slot, offered in group.slots if slot.layer == index}
            _through_layer(
                walk, index, begin, hidden_path(folder, chunk, index), stats.get(index), found, progress, library
            )
        final = scratch.needed(hidden_path(folder, chunk, walk.layers))["hidden"]
        pending = [(*each, hidden) for each, (_, hidden) in progress.states.items()]
        pending += [(Slot("head"), choice, final) for choice in wanted.get(Slot("head"), ())]
        targets = torch.from_numpy(ids[:, 1:])
        return compare(walk, final, pending, targets, torch.from_numpy(scored), codes=found, progress=progress)


def _through_layer(
    walk: Walk,
    index: int,
    choices: Mapping[Slot, tuple[Choice, ...]],
    entering: Path,
    stats: Path | None,
    codes: Remembered,
    progress: _Progress,
    library: Path | None,
) -> None:
    """States one layer further, and those of this layer's own choices begun from what enters the parent's. A function
    of its own, so that the layer and its moments are gone before the next layer or the logits need room."""
    states = progress.states
    further = [each for each, (layer, _) in states.items() if layer == index]
    begin = {slot: [choice for choice in own if (slot, choice) not in states] for slot, own in choices.items()}
    if not further and not any(begin.values()):
        return
    layer = walk.layer(index)
    for each in further:
        progress.set(each, index + 1, layer.run(states[each][1]))
        executor.tick()
    if not any(begin.values()):
        return
    hidden, tensors = scratch.needed(entering)["hidden"], {} if stats is None else read(stats)
    for slot, offered in begin.items():
        of = of_slot(tensors, slot.kind, codes=codes, owner=slot, library=library)
        for choice in offered:
            edited = layer.fork(slot)
            apply(edited.parts[slot], choice, of)
            progress.set((slot, choice), index + 1, edited.run(hidden))
            executor.tick()


def compare(
    walk: Walk,
    final: torch.Tensor,
    pending: Sequence[tuple[Slot, Choice, torch.Tensor]],
    targets: torch.Tensor,
    scored: torch.Tensor,
    *,
    codes: Remembered | None = None,
    progress: _Progress | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Sums of every metric, {slot: {choice key: sums}}, from the states leaving the last layer.

    final: the parent's (rows, tokens, hidden); pending: (slot, choice, child's states of that shape). A choice for the
    head, or for an embedding that is tied to it, also changes the matrix that makes the child's logits.
    """
    norm, head = walk.norm(), walk.head(as_stored=True).root  # in float32 it would be the largest thing in memory
    parent = norm(final)
    out: dict[str, dict[str, dict[str, float]]] = {}
    rows: list[_Compared] = []
    for slot, choice, hidden in pending:
        child = norm(hidden)
        sums = {**_hidden_sums(parent, child), "tokens": float(scored.sum()), "rows": float(len(final))}
        out.setdefault(str(slot), {})[choice.key()] = sums
        each = _Compared((slot, choice), sums, child)
        if slot != walk.logits_slot or not choice:
            rows.append(each)
        else:  # rare and large: its logits are made from its own matrix, one choice at a time
            changed = walk.head(as_stored=True)
            apply(changed, choice, SlotStats({}, codes=codes))
            each.own = changed.root
            _logit_sums(walk, head, parent, [each], targets, scored, progress)
            each.own = None
            del changed  # before the next choice reads another one
    _logit_sums(walk, head, parent, rows, targets, scored, progress)
    return out


@dataclass
class _Compared:
    """A child beside its parent: its states (rows, tokens, hidden), and the matrix of its logits if that is its own."""

    of: Pending
    sums: dict[str, float]
    child: torch.Tensor
    own: nn.Linear | None = None


def _hidden_sums(parent: torch.Tensor, child: torch.Tensor) -> dict[str, float]:
    p, c = parent.float().flatten(1), child.float().flatten(1)
    if torch.equal(p, c):
        return {"cosine": 0.0, "nmse": 0.0}
    cosine = 1 - torch.nn.functional.cosine_similarity(p.double(), c.double(), dim=1)
    nmse = (p - c).square().mean(dim=1) / (p.square().mean(dim=1) + 1e-6)
    return {"cosine": float(cosine.sum()), "nmse": float(nmse.double().sum())}


def _logit_sums(
    walk: Walk,
    head: nn.Linear,
    parent: torch.Tensor,
    rows: Sequence[_Compared],
    targets: torch.Tensor,
    scored: torch.Tensor,
    progress: _Progress | None,
) -> None:
    """Add KL and loss increase to each row's sums, a block of tokens at a time.

    Everything is computed from logit *differences* d = head(child - parent): KL = log sum p e^(d - mean_p d). That is
    exact for d = 0 and loses nothing to rounding when d is small, unlike a difference of two logits in bfloat16.
    head: the parent's matrix of the logits, as it is stored.
    """
    computed = head if head.weight.dtype == walk.dtype else functools.partial(float_logits, matrix=head.weight)
    keep = scored.flatten()
    flat_parent, flat_targets = parent.flatten(0, 1)[keep], targets.flatten()[keep]
    flat_rows = [(row, row.child.flatten(0, 1)[keep]) for row in rows]
    sums: dict[Pending, list[float]] = {} if progress is None else progress.compared
    tokens = max(16, min(256, _LOGITS_PER_BLOCK // len(head.weight)))
    blocks, passes = -(-len(flat_parent) // tokens), _logit_passes(walk.shapes)
    if progress is not None:
        progress.blocks = blocks
    for number in range(blocks):
        todo = [(row, child) for row, child in flat_rows if sums.setdefault(row.of, [0, 0.0, 0.0])[0] == number]
        if not todo:
            continue
        block = slice(number * tokens, (number + 1) * tokens)
        states, wanted = flat_parent[block], flat_targets[block, None]
        products = float_logits(states, head.weight)
        p = walk.finished(products).softmax(dim=-1)
        for row, child in todo:
            if row.own is None:
                difference = computed(child[block] - states).float()
            else:
                difference = float_logits(child[block], row.own.weight).sub_(products)
            kl, lm = divergence(p, walk.change_of_logits(products, difference), wanted)
            _, kl_before, lm_before = sums[row.of]
            sums[row.of] = [number + 1, kl_before + float(kl.double().sum()), lm_before + float(lm.double().sum())]
            executor.tick(passes / blocks)
            if progress is not None:
                progress.tick()
    for row in rows:
        _, row.sums["kl"], row.sums["lm"] = sums.get(row.of, [0, 0.0, 0.0])


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
