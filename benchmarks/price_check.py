"""Are measured prices right? Predicted against measured time per output token, on models built for the purpose.

Block times come from the slope method (measure.py); a model's TPOT is predicted as their sum plus the rest. Then whole
heterogeneous children of the reference model's shapes, random layouts, are built and timed in the same runtime:
transformers on this CPU in bfloat16. Weights are random: time does not depend on them.

Twice: at the reference model's shapes, where a token's time is mostly the cost of calling small operations, and at
those of a model of 0.2 B, where it is mostly reading weights. `without_prices` is the error of whoever says the middle
of all measured times for every model: prices are worth what they are better than that.
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
MODELS = {"quick": 7, "full": 14}  # at each set of shapes
STEPS = 60
LARGER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    keys: dict[str, Any] = {"models": 0, "median_abs_error": float("nan"), "shapes": {}}
    errors: list[float] = []
    for name, config in (("reference model", read_config(options.model)), ("0.2 B", LARGER)):
        found = check(name, config, quick=options.quick)
        keys["shapes"][name] = found
        errors += [abs(predicted - measured) / measured for predicted, measured in found["predicted_and_measured_ms"]]
    keys |= {"models": len(errors), "median_abs_error": statistics.median(errors), "worst_abs_error": max(errors)}
    bars = [
        _bench.bar("models", keys["models"], ">=", 12),
        _bench.bar("median absolute error", keys["median_abs_error"], "<=", 0.15),
    ]
    for name, found in keys["shapes"].items():
        bars.append(_bench.bar(f"median absolute error, {name}", found["median_abs_error"], "<=", 0.15))
    return _bench.finish("price_check", options.quick, keys, bars)


def check(name: str, config: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Predicted and measured milliseconds per token of random children of these shapes, and how far they are apart."""
    shapes = kinds.family_of(config["model_type"]).slots(config)
    choices = {slot: _structural(shape) for slot, shape in shapes.items()}
    wanted = {shape for row in choices.values() for shape in row}
    cache = _bench.work_folder("price_check") / f"{name.replace(' ', '-')}.json"
    if not quick:
        cache.unlink(missing_ok=True)
    seconds = measure.latencies(config, shapes, wanted, WORKLOAD, cache=cache).seconds()
    rng = np.random.default_rng(0)
    pairs = []
    models = MODELS["quick" if quick else "full"]
    for number in range(models):
        # From nearly the parent to nearly nothing: each model changes a share of its slots.
        share = (number + 1) / models
        picked = {s: row[rng.integers(len(row))] if rng.random() < share else shapes[s] for s, row in choices.items()}
        pairs.append((1e3 * total(picked, WORKLOAD, seconds).decode_seconds, 1e3 * _tpot(config, picked)))
        predicted, measured = pairs[-1]
        error = abs(predicted - measured) / measured
        print(
            f"{name} {number:>2}: predicted {predicted:6.2f} ms, measured {measured:6.2f} ms, {error:.1%}", flush=True
        )
    measured = [m for _, m in pairs]
    middle = statistics.median(measured)
    return {
        "median_abs_error": statistics.median(abs(p - m) / m for p, m in pairs),
        "without_prices": statistics.median(abs(middle - m) / m for m in measured),
        "predicted_and_measured_ms": pairs,
    }


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
