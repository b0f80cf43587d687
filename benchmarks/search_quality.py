"""Is the exact search worth it? Held-out KL of children of equal bytes, chosen by mip, greedy, uniform and random.

One scoring pass gives every search the same table. The children are assembled as they were scored, before any
healing, and measured against the parent on rows that nothing saw: half code, half books where the books are there.
Structural axes alone at 80 % and 65 % of the parent's bytes, all axes at 30 % and 20 %; random is the mean of three
seeds.
"""

from __future__ import annotations

import sys

import _bench
import _reference
from pennyweight import kinds
from pennyweight.job.solve import assembled
from pennyweight.search import Infeasible

BUDGETS = ((_reference.STRUCTURAL, 0.80), (_reference.STRUCTURAL, 0.65), (_reference.ALL, 0.30), (_reference.ALL, 0.20))
SEEDS = (0, 1, 2)


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    job = _reference.scored(options.model, score_rows=2 if options.quick else 8)
    children = assembled(job, _reference.held_out(job, 8 if options.quick else 32))
    keys: dict[str, dict[str, float | None]] = {}
    lowest, clearly = 0, 0
    for axes, share in BUDGETS:
        problem, table = _reference.budget_problem(job, axes, share)

        def kl(search: str, seed: int = 0) -> float | None:
            try:
                solution = kinds.load("search", search).solve(problem, seed=seed)  # noqa: B023
            except Infeasible:
                return None
            return children.measure(_reference.layout(table, solution.choice))["kl"]  # noqa: B023

        found = {search: kl(search) for search in ("mip", "greedy", "uniform")}
        drawn = [value for seed in SEEDS[: 1 if options.quick else 3] if (value := kl("random", seed)) is not None]
        found["random"] = sum(drawn) / len(drawn) if drawn else None
        name = f"{'structural' if axes == _reference.STRUCTURAL else 'all axes'} at {share:.0%}"
        keys[name] = found
        print(name, "  ".join(f"{search} {'infeasible' if v is None else f'{v:.4f}'}" for search, v in found.items()))
        mip = found["mip"]
        rivals = [value for search, value in found.items() if search != "mip" and value is not None]
        assert mip is not None
        lowest += all(mip < value for value in rivals)
        simple = [value for search in ("greedy", "uniform") if (value := found[search]) is not None]
        clearly += not simple or mip <= 0.85 * min(simple)
    bars = [
        _bench.bar("budgets at which mip is lowest", lowest, "==", 4),
        _bench.bar("budgets at which mip <= 0.85 x the best of greedy and uniform", clearly, ">=", 2),
    ]
    return _bench.finish("search_quality", options.quick, {"kl": keys}, bars)


if __name__ == "__main__":
    sys.exit(main())
