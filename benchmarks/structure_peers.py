"""Structure at equal bytes: our search's child beside children that the known rules give.

All of them the shipped model at 80 and 65 % of its bytes in 16 bits, nothing quantised, each healed whole on as many
tokens of the same text. The rules are written here from their papers:

    depth      ShortGPT (arXiv:2403.03853): the layers whose output is most like their input go, whole
    width      Minitron (arXiv:2407.14679): every FFN loses its least active channels, all the same number
    width + ls the same uniform width, down_proj fitted in least squares on what the whole FFN gave
    svd        SVD-LLM (arXiv:2403.07378): every matrix of a block is two of one rank, truncated where inputs are white

Ours is what the exact search picks, fitted in sequence (heal/in_sequence.py) as a job does it before it heals.
Uniform rules get the greatest size that the bytes allow. Bits per byte on rows that nothing saw, code and books apart;
before healing with the interval of 95 % of paired differences (rows drawn anew 2,000 times), after it also with the
spread over seeds, which deal out the order of the text. A model of 7 M parameters tells how our implementation does
beside these rules, not what they do to a large one. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import _bench
import _reference
from pennyweight.config import HealConfig
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.evals.loss import by_row, nats_per_target
from pennyweight.heal import in_sequence, whole
from pennyweight.job.children import build
from pennyweight.job.job import Job
from pennyweight.live.load import load_model
from pennyweight.live.walk import Walk, autocast
from pennyweight.model.choices import Choice, Layout
from pennyweight.model.slots import Slot
from pennyweight.prices.offers import file_bytes
from pennyweight.runs.progress import Terminal
from pennyweight.runs.store import Store
from pennyweight.search import mip
from pennyweight.texts import Rows
from pennyweight.variants import ffn_width, noop, reshape

SCRIPT = "structure_peers"
SHARES, SEEDS = (0.80, 0.65), (0, 1, 2)
TOKENS, ROWS, DRAWS = 60_000, 64, 2000
PEERS = ("depth", "width", "width + ls", "svd")


class Peers:
    """The rules, on one scored job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        shapes: dict[Slot, Any] = {slot: shape for slot, shape in job.shapes.items() if slot.kind == "ffn"}
        self._channels = {slot: shape.intermediate_size for slot, shape in shapes.items()}

    def bytes_of(self, layout: Layout) -> int:
        """Of the files of a child."""
        total = 0
        for slot, block in self.job.blocks.items():
            total += file_bytes(block.having(reshape(block.shape, layout[slot])) if slot in layout else block)
        return total

    def depth(self, most: int) -> Layout:
        influence = self._influence()
        gone: list[int] = []
        for layer in sorted(influence, key=lambda layer: influence[layer]):
            layout = {Slot(kind, each): _choice("noop", noop.Spec()) for each in gone for kind in ("mixer", "ffn")}
            if self.bytes_of(layout) <= most:
                return layout
            gone.append(layer)
        raise SystemExit("no depth is small enough")

    @torch.no_grad()
    def _influence(self) -> dict[int, float]:
        """Of each layer: 1 - cos(what enters, what leaves), mean over tokens."""
        job, found = self.job, {}
        ids = torch.from_numpy(job.text.calibration.ids[:, :-1])
        with autocast(job.dtype):
            hidden = job.walk.embed(ids)
            for layer in job.walk.each():
                after = layer.run(hidden, together=4)
                found[layer.index] = float((1 - nn.functional.cosine_similarity(hidden, after, dim=-1)).mean())
                hidden = after
        return found

    def width(self, most: int, init: Any) -> Layout:
        (channels,) = set(self._channels.values())
        for width in range(channels - 8, 0, -8):
            layout = {slot: _choice("ffn_width", ffn_width.Spec(width, init)) for slot in self._channels}
            if self.bytes_of(layout) <= most:
                return layout
        raise SystemExit("no width is small enough")

    @torch.no_grad()
    def svd(self, most: int) -> Any:
        """The model with two matrices for each of a block's, and their bytes."""
        whole_bytes = self.bytes_of({})
        matrices = [
            (slot, weight, block)
            for slot, block in self.job.blocks.items()
            if slot.layer is not None
            for weight in block.shape.weights()
            if weight.is_matrix
        ]
        held = sum(weight.nbytes for _, weight, _ in matrices)
        kept = 1 - (whole_bytes - most) / held
        model: Any = load_model(self.job.model, dtype=torch.float32)
        for slot, weight, block in matrices:
            rows, columns = weight.shape
            rank = int(kept * rows * columns / (rows + columns))
            moment = self.job.store.tensors(f"stats/{slot.layer}")[
                f"{slot.kind}.{block.shape.reads[weight.name]}_moment"
            ]
            path = f"model.layers.{slot.layer}.{block.names[weight.name].removesuffix('.weight')}"
            own = model.get_submodule(path)
            model.set_submodule(path, _truncated(own, moment, rank))
        return model


def _truncated(own: nn.Linear, moment: torch.Tensor, rank: int) -> nn.Sequential:
    """Two matrices of one rank whose product errs least on inputs of this second moment (SVD-LLM, eq. 3 to 7)."""
    moment = moment.double()
    damped = moment + 1e-5 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    white = torch.linalg.cholesky(damped)
    u, s, v = torch.linalg.svd(own.weight.double() @ white, full_matrices=False)
    root = s[:rank].sqrt()
    first = nn.Linear(own.in_features, rank, bias=False)
    last = nn.Linear(rank, own.out_features, bias=own.bias is not None)
    right = torch.linalg.solve_triangular(white.T, (root[:, None] * v[:rank]).T, upper=True).T
    first.weight.data, last.weight.data = right.float(), (u[:, :rank] * root).float()
    if own.bias is not None:
        last.bias.data = own.bias.detach().clone()
    return nn.Sequential(first, last)


def _choice(axis: str, spec: Any) -> Choice:
    return Choice(((axis, spec),))


@torch.no_grad()
def nats(model: Any, rows: Rows) -> np.ndarray:
    """Of every row."""
    found = []
    for number, logits in enumerate(by_row(model, rows)):
        targets = torch.from_numpy(rows.ids[number, 1:][rows.scored[number]])
        found.append(float(nats_per_target(logits, targets).double().sum()))
    return np.array(found)


class Results:
    """Nats of rows by name, in a file; what is there is not measured again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, measure: Callable[[], np.ndarray]) -> np.ndarray:
        if name not in self._known:
            self._known[name] = [round(each, 6) for each in measure()]
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(self._known))
            partial.replace(self._file)
        return np.array(self._known[name])


def fitted(job: Job, layout: Layout, folder: Path) -> Any:
    """The child of a layout, fitted in sequence."""
    found = in_sequence.fit(
        job.walk,
        Walk(Checkpoint(folder), dtype=job.dtype),
        [slot for slot, choice in layout.items() if choice],
        torch.from_numpy(job.text.heal.ids[:, :-1]),
        tokens=HealConfig().fitted,
        batch_rows=4,
        store=Store(folder.with_name(f"{folder.name} fit"), {"child": folder.name}),
        listen=Terminal(),
    )
    child: Any = load_model(folder, dtype=torch.float32)
    child.load_state_dict(found, strict=False)
    return child


def healed(job: Job, child: Any, parent: Any, seed: int, work: Path) -> Any:
    """The child distilled whole, in a store of its own."""
    ids = torch.from_numpy(job.text.heal.ids[:, :-1])
    ids = ids[torch.from_numpy(np.random.default_rng(seed).permutation(len(ids)))]
    store = Store(work, {"child": work.name})
    whole.heal(
        parent, child, ids, tokens=TOKENS, lr=None, batch_rows=2, dtype=job.dtype, store=store, listen=Terminal()
    )
    return child


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    inputs = f"{options.model.resolve()} {SHARES} {SEEDS} {TOKENS} {ROWS}"
    found = _bench.cached(SCRIPT, inputs) if options.quick else measure(options.model, inputs)
    if found is None:
        return _bench.skip(SCRIPT, True, "a full run takes an hour and has not been made with this code")
    _bench.remember(SCRIPT, inputs, found)
    bars = []
    for share, of in found["gain"].items():
        for peer, gain in of.items():
            for when in ("before", "after"):
                name = f"{share}, {when} healing: bits per byte of {peer} over ours, less the uncertainty"
                bars.append(_bench.bar(name, round(gain[when]["surely"], 5), ">", 0))
    return _bench.finish(SCRIPT, options.quick, found, bars)


def measure(model: Path, inputs: str) -> dict[str, Any]:
    job = _reference.scored(model)
    peers, parent = Peers(job), load_model(model, dtype=torch.float32)
    version = hashlib.sha256(f"{_bench.package_hash()} {inputs}".encode()).hexdigest()[:12]
    work = _bench.work_folder(SCRIPT) / version
    work.mkdir(exist_ok=True)
    results, rows = Results(work / "results.json"), _reference.held_out(job, ROWS)
    own = results.get("parent", lambda: nats(parent, rows))
    bits: dict[str, Any] = {"parent": _bits(own, rows)}
    gains: dict[str, Any] = {}
    for share in SHARES:
        most, said = int(share * job.checkpoint.weight_bytes), f"{share:.0%}"
        problem, table = _reference.budget_problem(job, _reference.STRUCTURAL, share)
        layouts = {
            "ours": lambda p=problem, t=table: _reference.layout(t, mip.solve(p).choice),
            "depth": lambda m=most: peers.depth(m),
            "width": lambda m=most: peers.width(m, "slice"),
            "width + ls": lambda m=most: peers.width(m, "fitted"),
        }

        def opened(name: str, layouts=layouts, most=most, said=said) -> Any:
            if name == "svd":
                return peers.svd(most)
            folder = work / f"{said} {name}"
            layout = layouts[name]()
            assert peers.bytes_of(layout) <= most, name
            made = folder if folder.exists() else build(job, layout, folder)
            return fitted(job, layout, made) if name == "ours" else load_model(made, dtype=torch.float32)

        of: dict[str, dict[str, Any]] = {}
        for name in ("ours", *PEERS):
            before = results.get(f"{said} {name} before", lambda n=name: nats(opened(n), rows))
            after = [
                results.get(
                    f"{said} {name} after {seed}",
                    lambda n=name, s=seed, o=opened, a=said: nats(
                        healed(job, o(n), parent, s, work / f"{a} {n} {s} run"), rows
                    ),
                )
                for seed in SEEDS
            ]
            of[name] = {"before": [before], "after": after}
            told = {when: [_bits(each, rows) for each in found] for when, found in of[name].items()}
            bits.setdefault(said, {})[name] = told
            print(said, name, json.dumps(told), flush=True)
        gains[said] = {peer: {when: _gain(of, peer, when, rows) for when in ("before", "after")} for peer in PEERS}
    return {"bits_per_byte": bits, "gain": gains}


def _bits(nats: np.ndarray, rows: Rows) -> dict[str, float]:
    """Per byte: of all rows, of code (the first half), of books."""
    half = len(nats) // 2
    parts = {"all": slice(None), "code": slice(0, half), "books": slice(half, None)}
    return {k: round(float(nats[p].sum() / np.log(2) / rows.nbytes[p].sum()), 5) for k, p in parts.items()}


def _gain(of: dict[str, dict[str, Any]], peer: str, when: str, rows: Rows) -> dict[str, float]:
    """Bits per byte of a peer less ours: the mean, and what is left of it when the interval over rows and the spread
    over seeds are taken off."""
    pairs = [(theirs - ours) / np.log(2) for theirs, ours in zip(of[peer][when], of["ours"][when], strict=True)]
    each = [float(pair.sum() / rows.nbytes.sum()) for pair in pairs]
    draw, mean = np.random.default_rng(0), np.mean(pairs, axis=0)
    taken = draw.integers(0, len(mean), (DRAWS, len(mean)))
    drawn = mean[taken].sum(axis=1) / rows.nbytes[taken].sum(axis=1)
    low = float(np.quantile(drawn, 0.025))
    return {"mean": float(np.mean(each)), "surely": min(low, float(np.mean(each)) - (max(each) - min(each)))}


if __name__ == "__main__":
    sys.exit(main())
