"""Which choices are scored on more of the text: rounds, as in successive halving (Jamieson & Talwalkar 2016), but those
that go on are found by what the search says.

All choices are scored on the first part of the text (`score_parts` of job/text.py). Then a choice is a contender if it
could be in an optimum were its own score lower by `SURE` standard errors: by the reduced costs of the linear relaxation
(search/mip.py), for the asked budget with its runners-up, every budget of the sweep and every batch that a bound on
throughput leaves open. Contenders are scored on their next part, and so on until all of them are scored on all of the
text. What a search then picks has to be, too; where it is not (other searches than the exact one go their own ways),
that is scored and solved again.

Each round is written down before it is worked on, so that a job which was stopped goes on with the same. Only KLs are
raced: they are sums over tokens that cannot be negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pennyweight.job.gather import Round, estimated, key_of, parts_of, passes_of, scored_keys, singles
from pennyweight.job.job import Job
from pennyweight.job.plan import prices
from pennyweight.job.solve import every_offer
from pennyweight.judge.partial import Estimate
from pennyweight.model.choices import Choice
from pennyweight.model.demand import batches
from pennyweight.model.slots import Slot
from pennyweight.prices import offers
from pennyweight.search import Infeasible, mip
from pennyweight.variants import layout_from_json

SURE = 3.0


def begun(job: Job) -> Round:
    """What an earlier call wrote down and did not finish, or has lost since."""
    offered = {key for slot, own in singles(job).items() for choice in own for key in _all_of(job, slot, choice)}
    told = [key for number in job.store.values("race/", list[str]).values() for key in number]
    return sorted((set(told) & offered) - scored_keys(job))


def next_round(job: Job) -> Round:
    """Keys of the scores that are to be made next, written down; none if all contenders are scored in full."""
    known = scored_keys(job)
    every = [(slot, choice) for slot, own in singles(job).items() for choice in own]
    parts = parts_of(job)
    first = [key_of(job, chunk, slot, choice) for slot, choice in every for chunk in parts[0]]
    found = [key for key in first if key not in known]
    if not found and len(parts) > 1:
        found = [key for slot, choice in _contenders(job) for key in _next_part(job, slot, choice, known)]
    return write_down(job, found)


def unproven(job: Job, chosen: Mapping[str, Any]) -> Round:
    """What is missing of the scores of picks: solutions, and those of the sweep."""
    known, picked = scored_keys(job), dict[str, None]()
    for solution in (*chosen["solutions"], *(swept for swept in chosen["sweep"] if "layout" in swept)):
        for slot, choice in layout_from_json(solution["layout"]).items():
            for spec in choice.specs:
                picked |= dict.fromkeys(_all_of(job, slot, Choice((spec,))))
    return [key for key in picked if key not in known]


def write_down(job: Job, found: Round) -> Round:
    if found:
        job.store.put(f"race/{len(job.store.keys('race/')):06}", found)
    return found


def told(job: Job) -> dict[str, Any]:
    """For the report: how many choices were scored on all of the text, how many were told early to be out of the
    question, and the work that this took as a share of scoring all in full."""
    known = scored_keys(job)
    every = [(slot, choice) for slot, own in singles(job).items() for choice in own]
    full = sum(all(key in known for key in _all_of(job, slot, choice)) for slot, choice in every)
    wanted = [key for slot, choice in every for key in _all_of(job, slot, choice)]
    work = passes_of(job)
    done = sum(work[key] for key in wanted if key in known)
    share = done / sum(work[key] for key in wanted) if wanted else 1.0
    return {"choices": len(every), "in_full": full, "told_early": len(every) - full, "share_of_work": round(share, 4)}


def _all_of(job: Job, slot: Slot, choice: Choice) -> list[str]:
    return [key_of(job, chunk, slot, choice) for part in parts_of(job) for chunk in part]


def _next_part(job: Job, slot: Slot, choice: Choice, known: set[str]) -> list[str]:
    for part in parts_of(job):
        missing = [key for chunk in part if (key := key_of(job, chunk, slot, choice)) not in known]
        if missing:
            return missing
    return []


def _contenders(job: Job) -> list[tuple[Slot, Choice]]:
    """Choices not scored in full that could be in an optimum, in model order."""
    found = estimated(job)
    if all(each.error == 0 for own in found.values() for each in own.values()):
        return []
    contending: set[tuple[Slot, str]] = set()
    for slot, offer in _contending_offers(job, found):
        contending |= {(slot, Choice((spec,)).key()) for spec in offer.choice.specs}
    return [
        (slot, choice)
        for slot, own in singles(job).items()
        for choice in own
        if (slot, choice.key()) in contending and found[slot][choice.key()].error > 0
    ]


def _contending_offers(job: Job, found: Mapping[Slot, Mapping[str, Estimate]]) -> Iterator[tuple[Slot, offers.Offer]]:
    seconds, _ = prices(job)
    budgets = [(job.budget, job.config.solutions), *((job.swept(bound), 1) for bound in job.config.sweep)]
    workloads = dict.fromkeys(batch for budget, _ in budgets for batch in batches(budget, job.workload))
    tables = {workload: every_offer(job, workload, seconds) for workload in workloads}
    for budget, solutions in budgets:
        for workload in batches(budget, job.workload):
            table, earlier = tables[workload], []
            lower = tuple(
                np.array([SURE * sum(found[slot][Choice((s,)).key()].error for s in o.choice.specs) for o in row])
                for slot, row in table.items()
            )
            for _ in range(solutions):
                problem = offers.problem(
                    table, budget, workload, job.also, different_from=earlier, min_different=job.config.min_different
                )
                try:
                    best, contending = mip.contenders(problem, lower)
                except Infeasible:  # another batch may do; if none does, solving says so
                    break
                earlier.append(best.choice)
                for (slot, row), mask in zip(table.items(), contending, strict=True):
                    yield from ((slot, row[index]) for index in np.flatnonzero(mask))
