"""Are measured prices right? Predicted against measured time per output token, on models built for the purpose.

Block times come from the slope method (measure.py); a model's TPOT is predicted as their sum plus the rest. Then whole
heterogeneous children of the reference model's shapes, random layouts, are built and timed in the same runtime:
transformers on this CPU in bfloat16. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import _bench
import _reference
from pennyweight import heterogeneous, kinds, measure
from pennyweight.checkpoint import read_config
from pennyweight.cost import Workload, total
from pennyweight.evals.speed import Stepper
from pennyweight.families._decoder import with_shapes
from pennyweight.offers import combinations, single_choices
from pennyweight.slots import Shape, Slot

WORKLOAD = Workload(prompt=192, new=128)
MODELS = 14
STEPS = 60


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    config = read_config(options.model)
    shapes = kinds.family_of(config["model_type"]).slots(config)
    choices = {slot: _structural(shape) for slot, shape in shapes.items()}
    wanted = {shape for row in choices.values() for shape in row}
    cache = _bench.work_folder("price_check") / "latencies.json"
    if not options.quick:
        cache.unlink(missing_ok=True)
    latencies = measure.latencies(config, shapes, wanted, WORKLOAD, cache=cache)
    seconds = latencies.seconds()
    rng = np.random.default_rng(0)
    errors, rows = [], []
    for number in range(MODELS):
        # From nearly the parent to nearly nothing: each model changes a share of its slots.
        share = (number + 1) / MODELS
        picked = {s: row[rng.integers(len(row))] if rng.random() < share else shapes[s] for s, row in choices.items()}
        predicted = total(picked, WORKLOAD, seconds).decode_seconds
        measured = _tpot(config, picked)
        errors.append(abs(predicted - measured) / measured)
        rows.append({"predicted_ms": 1e3 * predicted, "measured_ms": 1e3 * measured})
        pair = f"predicted {1e3 * predicted:6.2f} ms, measured {1e3 * measured:6.2f} ms"
        print(f"model {number:>2}: {pair}, {errors[-1]:.1%}", flush=True)
    keys = {
        "models": MODELS,
        "median_abs_error": statistics.median(errors),
        "worst_abs_error": max(errors),
        "rows": rows,
    }
    bars = [
        _bench.bar("models", MODELS, ">=", 12),
        _bench.bar("median absolute error", keys["median_abs_error"], "<=", 0.15),
    ]
    return _bench.finish("price_check", options.quick, keys, bars)


def _structural(shape: Shape) -> list[Shape]:
    """Distinct shapes a slot can take by the structural axes, the parent's first."""
    free = {c.key(): 0.0 for c in single_choices(shape, _reference.STRUCTURAL, scored_tokens=512)}
    found = [resulting for _, resulting, _ in combinations(shape, free)]
    return list(dict.fromkeys(found))


def _tpot(config: dict[str, Any], shapes: dict[Slot, Shape]) -> float:
    """Median seconds of one decode step of a model with these shapes."""
    with heterogeneous.installed():
        built = AutoConfig.for_model(**json.loads(json.dumps(with_shapes(config, shapes))))
        model = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16).eval().requires_grad_(False)
    stepper = Stepper(model, WORKLOAD)
    for _ in range(5):
        stepper.step()
    return statistics.median(stepper.step() for _ in range(STEPS))


if __name__ == "__main__":
    sys.exit(main())
