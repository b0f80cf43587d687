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

KL and loss go by the parent's distributions in short (judge/shortened.py), which are made once with the parent's
states; what those do not tell, and everything outside of scoring, is compared over the whole vocabulary. KLs are kept
by stretches of `STRETCH` tokens too, which tell how sure their mean is.

Whatever the size of a group, a stopped task loses little: every few seconds it keeps the states of choices that have
gone further, and the sums of those that are being compared (`_Progress`). Work is counted in passes: one choice through
one layer, and a comparison as many as its logits cost.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from typing_extensions import TypedDict

from pennyweight.disk.opened import open_checkpoint
from pennyweight.judge import shortened
from pennyweight.judge.shortened import Short
from pennyweight.judge.stats import SlotStats, of_slot, read
from pennyweight.live.walk import Walk, autocast, float_logits
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Shapes
from pennyweight.model.slots import Slot
from pennyweight.runs import executor, scratch
from pennyweight.runs.scratch import Remembered
from pennyweight.variants import apply, reshape

METRICS = ("kl", "lm", "cosine", "nmse")
STRETCH = 32
"""Scored tokens whose KLs are added up into one number."""
_PER_LOGIT = 300.0  # operations of a product that what is done with a logit takes as long as, about
_PER_SHORT_LOGIT = 1200.0  # the same where rows of the matrix are gathered for every token
_LOGITS_PER_BLOCK = 2**23  # of the final comparison: bounds the tokens whose logits are held at once
_KEEP_EVERY_S, _KEEP_AT_LEAST_EVERY_S, _KEEP_SHARE = 12.0, 24.0, 0.05


class Sums(TypedDict):
    """Over the scored tokens of a chunk (kl, lm; kl also by stretches), or over its rows."""

    kl: float
    lm: float
    cosine: float
    nmse: float
    tokens: float
    rows: float
    kl_by_stretch: list[float]


Found = dict[str, dict[str, Sums]]
"""{slot: {choice key: sums}}"""


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
    return _passes_left(0 if slot.kind == "embed" else slot.layer, shapes) + logit_passes(slot, shapes)


def _passes_left(layer: int | None, shapes: Shapes) -> int:
    """From what enters a layer to the end; None: the end."""
    return 0 if layer is None else 1 + max(slot.layer or 0 for slot in shapes) - layer


def logit_passes(slot: Slot, shapes: Shapes) -> float:
    """How many passes through a layer comparing logits of a slot's choice takes as long as."""
    layer = sum(shape.flops for slot, shape in shapes.items() if slot.layer == 0)
    logits = next(shape for shape in shapes.values() if shape.makes_logits)
    (matrix,) = logits.weights()
    count, beside = matrix.shape[0], _PER_LOGIT
    if not shapes[slot].makes_logits and shortened.shortens(shapes[Slot("head")], logits):
        count, beside = shortened.TOP + shortened.DRAWN, _PER_SHORT_LOGIT
    return count * (logits.flops / matrix.shape[0] + beside) / layer


def hidden_path(folder: Path, chunk: int, layer: int) -> Path:
    """Hidden states entering `layer`; layer = number of layers: leaving the last one."""
    return folder / f"hidden-{chunk}-{layer}.safetensors"


def _short_path(folder: Path, chunk: int) -> Path:
    """The parent's distributions in short."""
    return folder / f"short-{chunk}.safetensors"


@torch.no_grad()
def parent_chunk(
    model: Path, ids: np.ndarray, scored: np.ndarray, folder: Path, chunk: int, dtype: torch.dtype
) -> None:
    """Task: cache the parent's hidden states at every layer for rows `ids` (rows, tokens + 1; the last is a target),
    and its distributions in short. Those that are there are not made again."""
    walk = Walk(open_checkpoint(model), dtype=dtype)
    missing = [i for i in range(walk.layers + 1) if scratch.kept(hidden_path(folder, chunk, i)) is None]
    with autocast(dtype):
        if missing and missing[0] == 0:
            hidden = walk.embed(torch.from_numpy(ids[:, :-1]))
            scratch.keep(hidden_path(folder, chunk, 0), {"hidden": hidden})
        else:
            last = missing[0] - 1 if missing else walk.layers
            hidden = scratch.needed(hidden_path(folder, chunk, last))["hidden"]
        for layer in walk.each(max(0, missing[0] - 1)) if missing else ():
            hidden = layer.run(hidden)
            if layer.index + 1 in missing:
                scratch.keep(hidden_path(folder, chunk, layer.index + 1), {"hidden": hidden})
        short = _short_path(folder, chunk)
        if shortened.shortens(walk.shapes[Slot("head")], walk.shapes[walk.logits_slot]) and scratch.kept(short) is None:
            states = walk.norm()(hidden).flatten(0, 1)[torch.from_numpy(scored).flatten()]
            scratch.keep(short, shortened.shorten(walk, states, seed=chunk).tensors())


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
        self.compared: dict[Pending, list[tuple[float, float]]] = {}  # kl and lm by stretch, as far as they are
        self.stretches = 1
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
            sums = zip(found["done"].tolist(), found["sums"].tolist(), strict=True)
            found = [[(kl, lm) for kl, lm in own[:done]] for done, own in sums]
            self.compared = dict(zip(self._every, found, strict=True))

    def passes(self, shapes: Shapes) -> float:
        """Those that are done, told without reading a state."""
        found = scratch.kept(self._sums)
        compared = [0] * len(self._every) if found is None else (found["done"] / found["sums"].shape[1]).tolist()
        done = 0.0
        for (slot, choice), share in zip(self._every, compared, strict=True):
            done += share * logit_passes(slot, shapes)
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
            sums = torch.zeros(len(self._every), self.stretches, 2, dtype=torch.float64)
            done = torch.zeros(len(self._every), dtype=torch.int64)
            for number, each in enumerate(self._every):
                own = self.compared.get(each, [])
                done[number] = len(own)
                sums[number, : len(own)] = torch.tensor(own, dtype=torch.float64).reshape(-1, 2)
            scratch.keep(self._sums, {"sums": sums, "done": done})
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
) -> Found:
    """Task: sums over one chunk.

    ids (rows, tokens + 1), scored (rows, tokens) bool; stats: layer -> file of its statistics; codes: the folder of
    those that were found; library: that of variants that were trained.
    """
    walk, found = Walk(open_checkpoint(model), dtype=dtype), Remembered(codes)
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
        targets, counted = torch.from_numpy(ids[:, 1:]), torch.from_numpy(scored)
        short = None
        if shortened.shortens(walk.shapes[Slot("head")], walk.shapes[walk.logits_slot]):
            short = Short.of(scratch.needed(_short_path(folder, chunk)))
        return compare(walk, final, pending, targets, counted, codes=found, progress=progress, short=short)


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
    short: Short | None = None,
) -> Found:
    """Sums of every metric from the states leaving the last layer.

    final: the parent's (rows, tokens, hidden); pending: (slot, choice, child's states of that shape). A choice for the
    head, or for an embedding that is tied to it, also changes the matrix that makes the child's logits. `short`: the
    parent's distributions, for the other children; without it they are compared over the whole vocabulary.
    """
    norm, head = walk.norm(), walk.head(as_stored=True).root
    parent = norm(final)
    out: Found = {}
    rows: list[_Compared] = []
    keep = scored.flatten()
    against = _Parent(walk, head, parent.flatten(0, 1)[keep], targets.flatten()[keep])
    for slot, choice, hidden in pending:
        child = norm(hidden)
        sums: Sums = {
            "kl": 0.0,
            "lm": 0.0,
            **_hidden_sums(parent, child),
            "tokens": float(scored.sum()),
            "rows": float(len(final)),
            "kl_by_stretch": [],
        }
        out.setdefault(str(slot), {})[choice.key()] = sums
        each = _Compared((slot, choice), sums, child.flatten(0, 1)[keep])
        if slot != walk.logits_slot or not choice:
            rows.append(each)
        else:  # rare and large: its logits are made from its own matrix, one choice at a time
            shape = reshape(walk.shapes[slot], choice)
            changed = walk.head(as_stored=all(weight.stored.short for weight in shape.weights()))
            apply(changed, choice, SlotStats({}, codes=codes))
            each.own = changed.root
            _whole_sums(against, [each], progress)
            each.own = None
            del changed  # before the next choice reads another one
    if short is None:
        _whole_sums(against, rows, progress)
    else:
        _short_sums(against, short, rows, progress)
    return out


@dataclass
class _Compared:
    """A child beside its parent: its states (scored tokens, hidden); the matrix of its logits if that is its own."""

    of: Pending
    sums: Sums
    child: torch.Tensor
    own: nn.Linear | None = None


@dataclass(frozen=True)
class _Parent:
    """The parent's states (scored tokens, hidden), what makes its logits of them, as it is stored (in float32 it would
    be the largest thing in memory), and the tokens that came."""

    walk: Walk
    head: nn.Linear
    states: torch.Tensor
    targets: torch.Tensor

    def products(self, change: torch.Tensor) -> torch.Tensor:
        """Of a change of the states with the matrix of the logits, float32."""
        if self.head.weight.dtype == self.walk.dtype:
            return self.head(change).float()
        return float_logits(change, self.head.weight)


class _HiddenSums(TypedDict):
    cosine: float
    nmse: float


def _hidden_sums(parent: torch.Tensor, child: torch.Tensor) -> _HiddenSums:
    p, c = parent.float().flatten(1), child.float().flatten(1)
    if torch.equal(p, c):
        return {"cosine": 0.0, "nmse": 0.0}
    cosine = 1 - torch.nn.functional.cosine_similarity(p.double(), c.double(), dim=1)
    nmse = (p - c).square().mean(dim=1) / (p.square().mean(dim=1) + 1e-6)
    return {"cosine": float(cosine.sum()), "nmse": float(nmse.double().sum())}


class _Adding:
    """KL and loss increase of children, stretch by stretch, as far as `progress` has kept them."""

    def __init__(self, parent: _Parent, rows: Sequence[_Compared], progress: _Progress | None) -> None:
        self._rows, self._progress, self._shapes = rows, progress, parent.walk.shapes
        self._stretches = -(-len(parent.states) // STRETCH)
        self.by_stretch: dict[Pending, list[tuple[float, float]]] = {} if progress is None else progress.compared
        if progress is not None:
            progress.stretches = self._stretches

    def still(self, start: int) -> list[_Compared]:
        """Children that have not been compared from a token on."""
        return [row for row in self._rows if len(self.by_stretch.setdefault(row.of, [])) * STRETCH == start]

    def add(self, row: _Compared, kl: torch.Tensor, lm: torch.Tensor) -> None:
        """Those of the tokens that follow."""
        parts = zip(kl.double().split(STRETCH), lm.double().split(STRETCH), strict=True)
        found = [(float(kl.sum()), float(lm.sum())) for kl, lm in parts]
        self.by_stretch[row.of] += found
        executor.tick(len(found) * logit_passes(row.of[0], self._shapes) / self._stretches)

    def tick(self) -> None:
        if self._progress is not None:
            self._progress.tick()

    def end(self) -> None:
        for row in self._rows:
            found = self.by_stretch.get(row.of, [])
            row.sums["kl"], row.sums["lm"] = sum(kl for kl, _ in found), sum(lm for _, lm in found)
            row.sums["kl_by_stretch"] = [float(f"{kl:.7g}") for kl, _ in found]


def _whole_sums(parent: _Parent, rows: Sequence[_Compared], progress: _Progress | None) -> None:
    """Add KL and loss increase to each row's sums, a block of tokens at a time, over the whole vocabulary.

    Everything is computed from logit *differences* d = head(child - parent): KL = log sum p e^(d - mean_p d). That is
    exact for d = 0 and loses nothing to rounding when d is small, unlike a difference of two logits in bfloat16.
    """
    adding = _Adding(parent, rows, progress)
    tokens = STRETCH * max(1, min(256, _LOGITS_PER_BLOCK // len(parent.head.weight)) // STRETCH)
    for start in range(0, len(parent.states), tokens):
        todo, block = adding.still(start), slice(start, start + tokens)
        if not todo:
            continue
        compared = _Whole(parent, block)
        for row in todo:
            adding.add(row, *compared.divergence(row))
            adding.tick()
    adding.end()


class _Whole:
    """The parent's logits of a block of tokens."""

    def __init__(self, parent: _Parent, block: slice) -> None:
        self._parent, self._block = parent, block
        self._products = float_logits(parent.states[block], parent.head.weight)
        self._p = parent.walk.finished(self._products).softmax(dim=-1)

    def divergence(self, row: _Compared) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and loss increase of each token."""
        parent, child = self._parent, row.child[self._block]
        if row.own is None:
            difference = parent.products(child - parent.states[self._block])
        else:
            difference = float_logits(child, row.own.weight).sub_(self._products)
        change = parent.walk.change_of_logits(self._products, difference)
        return divergence(self._p, change, parent.targets[self._block, None])


def _short_sums(parent: _Parent, short: Short, rows: Sequence[_Compared], progress: _Progress | None) -> None:
    """The same from the parent's distributions in short: one stretch of all children at a time."""
    matrix, divisor, adding = parent.head.weight, parent.walk.divisor, _Adding(parent, rows, progress)
    gathered = torch.empty(STRETCH * short.tokens.shape[1], matrix.shape[1], dtype=matrix.dtype)  # its pages stay
    for start in range(0, len(parent.states), STRETCH):
        todo = adding.still(start)
        if not todo:
            continue
        block = slice(start, start + STRETCH)
        here = Short(short.tokens[block], short.weights[block], short.mean[block])
        own = torch.index_select(matrix, 0, here.tokens.flatten(), out=gathered[: here.tokens.numel()])
        own = own.view(*here.tokens.shape, -1).float()
        targets = matrix[parent.targets[block]].float()
        change = torch.stack([(row.child[block] - parent.states[block]).float() for row in todo])
        change = change if divisor == 1 else change / divisor
        whole = None
        for row, kl, lm in zip(todo, *shortened.divergences(here, own, targets, change), strict=True):
            if float(kl.mean()) < shortened.BROKEN:
                adding.add(row, kl, lm)
            else:
                whole = whole or _Whole(parent, block)
                adding.add(row, *whole.divergence(row))
        adding.tick()
    adding.end()


def divergence(p: torch.Tensor, difference: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) and log p(target) - log q(target) per token, where q = softmax(log p + difference).

    p (tokens, vocab) float32, difference the same shape, targets (tokens, 1) int64. Both zero if difference is.
    """
    mean = (p * difference).sum(dim=-1, keepdim=True)
    centred = difference - mean
    if float(centred.amax()) < 40:
        kl = torch.log1p((p * torch.expm1(centred).sub_(centred)).sum(dim=-1))  # p centred adds up to rounding only
    else:
        kl = torch.logsumexp(p.clamp_min(1e-38).log() + centred, dim=-1)
    lm = kl - centred.gather(-1, targets).squeeze(-1)
    return kl, lm


def mean(sums: Sums) -> dict[str, float]:
    """Per-token and per-row means of summed sums."""
    per = {"kl": "tokens", "lm": "tokens", "cosine": "rows", "nmse": "rows"}
    return {metric: sums[metric] / sums[per[metric]] for metric in METRICS}
