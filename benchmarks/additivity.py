"""Do scores add up? Spearman correlation of summed replace-1-block KL with the true KL of whole children.

Random children at several levels of compression (share of the parent's bytes taken away by structural axes), and
children that only lose whole blocks, for which the sum is known to fail. Measured before healing, on the rows the
scores were taken on, so that only additivity is tested and not how one text speaks for another.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import _bench
import _reference
from pennyweight.job.solve import assembled
from pennyweight.search import random

LEVELS = (0.10, 0.20, 0.30, 0.50, 0.70)


def correlation(predicted: np.ndarray, true: np.ndarray) -> float:
    """Spearman's rank correlation."""
    result: Any = spearmanr(predicted, true)
    return float(result.statistic)


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    sampled = 12 if options.quick else 60
    job = _reference.scored(options.model, score_rows=2 if options.quick else 8)
    children = assembled(job, job.text.score)
    spearman: dict[str, float] = {}
    ratio: dict[str, float] = {}
    cases = [(f"{level:.0%}", _reference.STRUCTURAL, level) for level in LEVELS]
    cases += [(f"removal only, {level:.0%}", ("noop",), level) for level in (0.10, 0.30)]
    pooled: list[tuple[float, float]] = []
    for name, axes, level in cases:
        problem, table = _reference.budget_problem(job, axes, 1 - level)
        rng = np.random.default_rng(0)
        pairs = []
        while len(pairs) < sampled:
            choice = random.draw(problem, rng)
            if choice is not None:
                pairs.append((problem.score(choice), children.measure(_reference.layout(table, choice))["kl"]))
        predicted, true = np.array(pairs).T
        spearman[name] = correlation(predicted, true)
        ratio[name] = float(np.median(true / predicted))
        if axes == _reference.STRUCTURAL and level <= 0.30:
            pooled += pairs
        print(f"{name:<20} spearman {spearman[name]:.3f}   true / predicted KL, median {ratio[name]:.2f}", flush=True)
    spearman["up to 30%, pooled"] = correlation(*np.array(pooled).T)
    bars = [_bench.bar(f"spearman at {level:.0%}", spearman[f"{level:.0%}"], ">=", 0.8) for level in LEVELS[:3]]
    keys = {"spearman": spearman, "true_over_predicted": ratio, "children_per_level": sampled}
    return _bench.finish("additivity", options.quick, keys, bars)


if __name__ == "__main__":
    sys.exit(main())
