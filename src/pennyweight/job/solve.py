"""The exact best choice per slot within the budget, and within the other budgets of a sweep, from one scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pennyweight import kinds, texts
from pennyweight.job.gather import gather_stats, scores, singles
from pennyweight.job.job import Job
from pennyweight.job.library import train_library
from pennyweight.job.plan import prices
from pennyweight.judge.assembled import Assembled
from pennyweight.model.choices import Choice, layout_to_json
from pennyweight.model.demand import Budget, Workload
from pennyweight.model.slots import Slot
from pennyweight.prices import offers
from pennyweight.prices.cost import Seconds, model_figures
from pennyweight.prices.offers import Offer
from pennyweight.search import Infeasible, Solution


@dataclass(frozen=True)
class Chosen:
    """A solved budget: the choice of every slot, the workload it was solved for, and the solver's own account."""

    layout: dict[Slot, Choice]
    workload: Workload
    solution: Solution
    predicted: dict[str, float]  # in the words of Budget, and `score`
    also: tuple[dict[str, float], ...] = ()  # under each further demand, in the words of Budget

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": layout_to_json(self.layout),
            "workload": asdict(self.workload),
            "predicted": self.predicted,
            "also": list(self.also),
            "optimal": self.solution.optimal,
            "seconds": self.solution.seconds,
        }


def solve_all(job: Job) -> dict[str, Any]:
    """The asked budget, and every budget of the sweep from the same scores."""
    job.listen.begin("solve", total=1 + len(job.config.sweep), unit="budgets")
    best = solve(job, job.budget, solutions=job.config.solutions)
    job.listen.advance(1)
    sweep = []
    for bounds in job.config.sweep:
        name, text = (part.strip() for part in bounds.split("=", 1))
        changed = job.swept(bounds)
        try:
            sweep.append({"budget": {name: text}, **solve(job, changed)[0].to_json()})
        except Infeasible as err:
            sweep.append({"budget": {name: text}, "infeasible": str(err)})
        job.listen.advance(1 + len(sweep))
    job.listen.end()
    return {"solutions": [chosen.to_json() for chosen in best], "sweep": sweep}


def solve(job: Job, budget: Budget, *, solutions: int = 1) -> list[Chosen]:
    """The best layouts within a budget, best first. Each differs from those before in `min_different` slots.

    Where the budget leaves the batch open they are those of the batch that loses least, the smallest of several. Raises
    Infeasible.
    """
    found = offers.met(budget, job.workload, lambda batch: _solve_at(job, budget, batch, solutions))
    return min((chosen for _, chosen in found), key=lambda chosen: chosen[0].solution.score)


def offered(job: Job, workload: Workload, seconds: Seconds) -> dict[Slot, list[Offer]]:
    """Every slot's offers, scored, as far as they can be chosen. For the best solution alone undominated ones are
    enough; the runners-up may need an offer that is worse than the one the best took."""
    table = every_offer(job, workload, seconds)
    return table if job.config.solutions > 1 else {slot: offers.undominated(row) for slot, row in table.items()}


def every_offer(job: Job, workload: Workload, seconds: Seconds) -> dict[Slot, list[Offer]]:
    """Every slot's offers, scored."""
    scored, metric = scores(job), job.config.metric
    costs = {slot: {key: found[metric] for key, found in own.items()} for slot, own in scored.items()}
    table = {}
    for slot, block in job.blocks.items():
        table[slot] = offers.offers(block, costs.get(slot, {}), workload, seconds, job.also)
    if job.config.uniform is not None:
        for slot, (choice,) in singles(job).items():
            alike = offers.offers(job.blocks[slot], {choice.key(): 0.0}, workload, seconds, job.also)
            table[slot] = [offer for offer in alike if offer.choice]
    return table


def _solve_at(job: Job, budget: Budget, workload: Workload, solutions: int) -> list[Chosen]:
    seconds, _ = prices(job)
    table, scored = offered(job, workload, seconds), scores(job)
    search = kinds.load("search", job.config.search)
    found: list[Chosen] = []
    for _ in range(solutions):
        problem = offers.problem(
            table,
            budget,
            workload,
            job.also,
            different_from=[chosen.solution.choice for chosen in found],
            min_different=job.config.min_different,
        )
        try:
            extra = {"evaluate": _true_kl(job, table)} if getattr(search, "EVALUATES", False) else {}
            solution = search.solve(problem, seed=job.config.drawn_by, **extra)
        except Infeasible as err:
            if found:
                break
            raise offers.in_users_words(err, table, budget, workload, job.also) from None
        picked = {slot: row[v] for (slot, row), v in zip(table.items(), solution.choice, strict=True)}
        shapes = {slot: offer.shape for slot, offer in picked.items()}
        predicted = model_figures(shapes, workload, seconds)
        predicted["file_bytes"] = sum(offer.file_bytes for offer in picked.values()) + offers.FILE_OVERHEAD
        predicted["score"] = solution.score
        if job.config.uniform is None and job.config.metric != "error":
            taken = ((slot, Choice((spec,)).key()) for slot, offer in picked.items() for spec in offer.choice.specs)
            predicted["lm"] = sum(scored[slot][key]["lm"] for slot, key in taken)
        layout = {slot: offer.choice for slot, offer in picked.items() if offer.choice}
        also = tuple(model_figures(shapes, demand.workload, seconds) for demand in job.also)
        found.append(Chosen(layout, workload, solution, predicted, also))
    return found


def assembled(job: Job, rows: texts.Rows) -> Assembled:
    """Children of the job's parent in memory, measured on `rows`. Raises ValueError if the parent does not fit
    --max-ram."""
    if not job.fits_whole:
        raise ValueError(
            f"trying whole children needs the model in memory; --max-ram {job.config.max_ram} is too small"
        )
    gather_stats(job, singles(job))
    train_library(job, singles(job))
    return Assembled(
        job.walk, lambda layer: job.store.tensors(f"stats/{layer}"), rows, codes=job.found_codes, library=job.library
    )


def _true_kl(job: Job, table: Mapping[Slot, Sequence[Offer]]) -> Callable[[tuple[int, ...]], float]:
    """What the evolutionary search minimises: the child's measured KL on the scored rows."""
    made = assembled(job, job.text.score)

    def evaluate(choice: tuple[int, ...]) -> float:
        picked = {slot: row[v].choice for (slot, row), v in zip(table.items(), choice, strict=True)}
        return made.measure(picked)["kl"]

    return evaluate


def margins(job: Job) -> dict[str, dict[str, float | None]]:
    """What each bound costs: the score if it alone were 5 % looser or tighter (None where that cannot be met), by the
    scores there are: estimates of choices that were not scored on all of the text."""
    out: dict[str, dict[str, float | None]] = {}
    bounds = job.budget.bounds()
    for name, bound in bounds.items():
        out[name] = {}
        for label, factor in (("5% tighter", 0.95), ("as asked", 1.0), ("5% looser", 1.05)):
            factor = 2 - factor if name == "tokens_per_second" else factor
            try:
                value: Any = bound * factor
                changed = Budget(**{**bounds, name: int(value) if name.endswith("bytes") else value})  # type: ignore[arg-type]
                out[name][label] = solve(job, changed)[0].solution.score
            except Infeasible:
                out[name][label] = None
    return out
