"""What leaving input channels out costs: bits per byte of the shipped model at equal bytes read per token.

All children are zigzag made by the same packing as `penny fit` uses, and differ in which input leaves out which share
of its channels; the mean over matrices, weighted by their bytes, is 25, 40 or 50 %. The time a token takes is measured
on the text that judges them: what is better must not be slower. With symmetric scales (4.25 bits):

    uniform   the same share everywhere, channels compared by |x|
    wina      the same share everywhere, compared by |x| times the norm of the column (arXiv:2505.19427)
    greedy    per layer, shares raised in small steps where the layer's output changes least (TEAL, arXiv:2408.14690)
    mip       each input's share from one exact search over the whole model, scores measured one input at a time

and `super`: what mip chose, with scales of scales (4.5 bits).

Tables come from calibration text, judgement from text nothing else saw, half code, half books where the data folder
has them. The first tokens of a row are whole, all others are thinned, as in writing token by token. A model of 6.5 M
weights says whether our implementation does what it should; what larger models lose is another question.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

import _bench
import _reference
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.evals.loss import loss
from pennyweight.job.pack import pack
from pennyweight.judge import score
from pennyweight.live import magnitudes
from pennyweight.live.load import load_model
from pennyweight.live.parts import Parts, parts_of
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Silent
from pennyweight.runs.store import Store
from pennyweight.search import Problem, mip
from pennyweight.variants import sparsity

TARGETS = (0.25, 0.40, 0.50)
METHODS = ("uniform", "wina", "greedy", "mip")
STEP = 0.05
MOST = 0.9
Shares = dict[tuple[Slot, str], float]


def inputs(walk: Walk) -> dict[tuple[Slot, str], float]:
    """Every input that may be thinned, and its share of all weights that read such inputs."""
    sizes: dict[tuple[Slot, str], float] = {}
    for slot, shape in walk.shapes.items():
        if slot.kind in ("mixer", "ffn"):
            for weight in shape.weights():
                if len(weight.shape) == 2:
                    which = "inner" if shape.reads[weight.name] == "inner" else "entering"
                    sizes[slot, which] = sizes.get((slot, which), 0) + weight.parameters
    total = sum(sizes.values())
    return {key: size / total for key, size in sizes.items()}


def modules(slots: Mapping[Slot, Parts]) -> Iterator[tuple[tuple[Slot, str], Any]]:
    """The modules that thin, in the order in which they run; hooks attached, tables still empty."""
    for slot, parts in slots.items():
        if slot.layer is not None:
            for activation, module in sparsity.attach(parts, sparsity.Spec(0.0, 0.0).sparsity).items():
                yield (slot, "entering" if activation == "input" else "inner"), module


def calibrated(slots: Mapping[Slot, Parts], run: Any) -> dict[tuple[Slot, str], Any]:
    """The thinning modules of these slots, their tables counted in one run of the dense layers."""
    found = dict(modules(slots))
    counted: dict[Any, list[torch.Tensor]] = {key: [] for key in found}
    handles = [
        module.register_forward_pre_hook(magnitudes.counting(counted[key]), with_kwargs=True, prepend=True)
        for key, module in found.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    for key, module in found.items():
        magnitudes.fill(module, torch.stack(counted[key]).sum(dim=0))
    return found


@torch.no_grad()
def greedy(walk: Walk, ids: torch.Tensor, target: float) -> tuple[Shares, list[float]]:
    """TEAL's allocation: each layer on its own, on the dense model's inputs, all layers at the same target. Also each
    layer's error over that of the same share everywhere."""
    weight, chosen, ratios = inputs(walk), {}, []
    hidden = walk.embed(ids)
    late = slice(3 * ids.shape[1] // 4, None)  # the error is judged where there is most context
    for layer in walk.each():
        own = {key: size for key, size in weight.items() if key[0].layer == layer.index}
        total = sum(own.values())
        dense = layer.run(hidden)
        found = calibrated(layer.parts, functools.partial(layer.run, hidden))
        share = dict.fromkeys(own, 0.0)

        def error(layer: Any = layer, dense: torch.Tensor = dense, hidden: torch.Tensor = hidden) -> float:
            return float((layer.run(hidden) - dense)[:, late].norm())

        for module in found.values():
            module.left_out = target
        uniform = error()
        for module in found.values():
            module.left_out = 0.0
        while sum(own[key] / total * share[key] for key in own) < target - 1e-9:
            left = target - sum(own[key] / total * share[key] for key in own)
            errors = {}
            for key in own:
                raised = min(share[key] + STEP * 0.25 * total / own[key], share[key] + left * total / own[key])
                if raised <= MOST:
                    found[key].left_out = raised
                    errors[key] = (error(), raised)
                    found[key].left_out = share[key]
            best = min(errors, key=lambda key: errors[key][0])
            share[best] = found[best].left_out = errors[best][1]
        ratios.append(error() / uniform)
        chosen |= share
        hidden = dense
    return chosen, ratios


@torch.no_grad()
def scored(
    walk: Walk, calibration: torch.Tensor, rows: torch.Tensor, step: float
) -> dict[tuple[Slot, str], np.ndarray]:
    """KL of the whole model against itself when one input alone leaves out 0, `step`, two of them ... 90 %."""
    layers, states, found = list(walk.each()), [walk.embed(rows)], dict[tuple[Slot, str], Any]()
    counted = walk.embed(calibration)
    for layer in layers:
        found |= calibrated(layer.parts, functools.partial(layer.run, counted))
        counted = layer.run(counted)
        states.append(layer.run(states[-1]))
    dense = walk.logits(states[-1]).flatten(0, 1)
    p, nobody = dense.softmax(dim=-1), torch.zeros(len(dense), 1, dtype=torch.int64)
    table = {}
    for done, (key, module) in enumerate(found.items(), 1):
        row, first = [0.0], key[0].layer or 0
        for level in range(1, round(MOST / step) + 1):
            module.left_out = level * step
            hidden = states[first]  # what comes before it is as it was
            for layer in layers[first:]:
                hidden = layer.run(hidden)
            row.append(float(score.divergence(p, walk.logits(hidden).flatten(0, 1) - dense, nobody)[0].mean()))
        module.left_out = 0.0
        table[key] = np.maximum.accumulate(row)  # less can never be worth more: what wiggles is noise of few tokens
        print(f"  scored input {done} of {len(found)}", end="\r", flush=True)
    return table


def exact(
    table: dict[tuple[Slot, str], np.ndarray], weight: dict[tuple[Slot, str], float], target: float, step: float
) -> Shares:
    """The shares of least summed score whose weighted mean is at least the target."""
    kept = [weight[key] * (1 - step * np.arange(len(row))) for key, row in table.items()]
    problem = Problem(
        scores=tuple(table.values()),
        costs=tuple(values.reshape(-1, 1) for values in kept),
        limits=np.array([1 - target]),
        names=("bytes read",),
    )
    choice = mip.solve(problem).choice
    return {key: step * v for key, v in zip(table, choice, strict=True)}


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    quick = options.quick
    job = _reference.opened(options.model)
    calibration = torch.from_numpy(job.text.calibration.ids[:16, :-1])
    rows = torch.from_numpy(job.text.score.ids[:1, :256] if quick else job.text.score.ids[:, :-1])
    step = 2 * STEP if quick else STEP
    held_out = _reference.held_out(job, 4 if quick else 48)
    same_kind = job.text.held_out  # of the kind the tables were counted on, which books are not
    walk = Walk(Checkpoint(options.model))
    weight = inputs(walk)
    folder = _bench.work_folder("sparsity_quality")
    keys: dict[str, Any] = {"parent": loss(load_model(options.model, dtype=torch.float32), held_out).bits_per_byte}
    print(f"parent in bfloat16: {keys['parent']:.4f} bits per byte")
    table = scored(walk, calibration, rows, step)
    worst, block_errors = 0.0, []
    for target in TARGETS[-1:] if quick else (0.0, *TARGETS):
        shares: dict[str, Shares] = {"uniform": dict.fromkeys(weight, target)}
        if target:
            by_layer, ratios = greedy(walk, calibration[: 1 if quick else 4], target)
            shares |= {"wina": shares["uniform"], "greedy": by_layer, "mip": exact(table, weight, target, step)}
            block_errors += ratios
        if not quick:
            shares["super"] = shares["mip" if target else "uniform"]
        children: dict[str, Any] = {}
        for method, chosen in shares.items():
            child = children[method] = _child(walk, chosen, method, calibration, folder / f"{method}-{target}")
            model = load_model(child, dtype=torch.float32)
            seen = _left_out(model, walk, torch.from_numpy(held_out.ids[:, :-1]))
            other = max((abs(seen[key] - chosen[key]) for key in chosen if chosen[key]), default=0.0)
            alike = _left_out(model, walk, torch.from_numpy(same_kind.ids[:, :-1]))
            far = max((abs(alike[key] - chosen[key]) for key in chosen if chosen[key]), default=0.0)
            worst = max(worst, far)
            found = {
                "bits_per_byte": loss(model, held_out).bits_per_byte,
                "left_out": sum(weight[key] * seen[key] for key in weight),
            }
            keys[f"{method} {target:.0%}"] = found
            print(
                f"{target:4.0%} {method:8} {found['bits_per_byte']:.4f} bits per byte  left out "
                f"{found['left_out']:.1%} (an input off by up to {other:.1%}, {far:.1%} on text like the tables')",
                flush=True,
            )
        for method, seconds in _tpot(children, held_out.ids[: 2 if quick else 12], 3 if quick else 5).items():
            keys[f"{method} {target:.0%}"]["tpot_seconds"] = seconds
            print(f"{target:4.0%} {method:8} {seconds * 1e6:.0f} us a token", flush=True)
    keys["greedy_layer_error_over_uniform"] = block_errors
    better = sum(ratio <= 1 for ratio in block_errors) / len(block_errors)
    bars = [
        _bench.bar("share an input leaves out on held-out text, most off by", worst, "<=", 0.02),
        _bench.bar("layers in which greedy's error is at most uniform's", better, ">=", 0.95),
    ]
    for target in TARGETS[-1:] if quick else TARGETS:
        of = {method: keys[f"{method} {target:.0%}"]["bits_per_byte"] for method in METHODS}
        bars.append(_bench.bar(f"{target:.0%}: greedy over uniform", of["greedy"] / of["uniform"], "<=", 1.0))
        bars.append(_bench.bar(f"{target:.0%}: mip over greedy", of["mip"] / of["greedy"], "<=", 1.0))
        # What is better must not be so by taking longer; where it takes less, it could leave out less still.
        takes = {method: keys[f"{method} {target:.0%}"]["tpot_seconds"] for method in METHODS}
        bars.append(
            _bench.bar(f"{target:.0%}: greedy's time over uniform's", takes["greedy"] / takes["uniform"], "<=", 1.05)
        )
        bars.append(_bench.bar(f"{target:.0%}: mip's time over greedy's", takes["mip"] / takes["greedy"], "<=", 1.05))
    return _bench.finish("sparsity_quality", quick, keys, bars)


def _child(walk: Walk, shares: Shares, method: str, calibration: torch.Tensor, folder: Any) -> Any:
    layout = {}
    for slot in (slot for slot in walk.shapes if slot.kind in ("mixer", "ffn")):
        spec = sparsity.Spec(shares[slot, "entering"], shares[slot, "inner"], weighted=method == "wina")
        if method == "super":
            spec = dataclasses.replace(spec, group=32, scales="super")
        layout[slot] = Choice((("sparsity", spec),))
    shutil.rmtree(folder, ignore_errors=True)
    return pack(walk, layout, calibration, folder / "model", files={}, store=Store(folder / "run", {}), listen=Silent())


@torch.no_grad()
def _left_out(model: Any, walk: Walk, ids: torch.Tensor) -> Shares:
    """The share of its channels that each input really leaves out on this text, first tokens aside."""
    sums: dict[tuple[Slot, str], list[float]] = {}

    def hook(key: tuple[Slot, str]) -> Any:
        def watch(module: Any, args: Any, kwargs: Any) -> None:
            x = (kwargs.get("hidden_states") if "hidden_states" in kwargs else args[0])[:, magnitudes.DENSE_TOKENS :]
            size = x.abs().float() if module.importance is None else x.abs().float() * module.importance.float()
            bound = magnitudes.threshold(module.magnitudes, module.left_out) if module.left_out else -math.inf
            sums.setdefault(key, []).append(float((size <= bound).float().mean()))

        return watch

    handles = []
    for slot, parts in parts_of(model, walk.blocks).items():
        if slot.layer is not None:
            for which, activation in (("entering", "input"), ("inner", "inner")):
                module, _ = parts.reading(activation)
                handles.append(module.register_forward_pre_hook(hook((slot, which)), with_kwargs=True, prepend=True))
    for part in ids.split(8):
        model(part, use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: sum(values) / len(values) for key, values in sums.items()}


def _tpot(children: dict[str, Any], texts: np.ndarray, repeats: int) -> dict[str, float]:
    """Mean seconds a token in the native engine, one thread, over the text that quality was judged on: how many
    channels a token leaves out is the text's doing. Children take turns text by text, and of each token the fastest
    time counts. A text is 64 tokens of prompt and as many that are timed."""
    from pennyweight.runtime.engine import Engine, Row

    prompt = new = 64
    engines = {name: Engine(folder, context=prompt + new, threads=1) for name, folder in children.items()}
    best = {name: np.full((len(texts), new), np.inf) for name in children}
    for _ in range(repeats):
        for at, text in enumerate(texts):
            for name, engine in engines.items():
                sequence = engine.open(prompt + new)
                engine.step([Row(sequence, i, int(token), False) for i, token in enumerate(text[:prompt])])
                for i, token in enumerate(text[prompt : prompt + new]):
                    started = time.perf_counter()
                    engine.step([Row(sequence, prompt + i, int(token), True, True)])
                    best[name][at, i] = min(best[name][at, i], time.perf_counter() - started)
                engine.close(sequence)
    return {name: float(seconds.mean()) for name, seconds in best.items()}


if __name__ == "__main__":
    raise SystemExit(main())
