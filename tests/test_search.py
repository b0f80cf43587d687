"""Searches against brute force: the exact one finds the optimum, the others keep to the bounds and never beat it."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest

from pennyweight import kinds
from pennyweight.cli._common import own_stdout
from pennyweight.search import Infeasible, Problem, evolve, greedy, mip, random, solution, uniform

UNITS = np.array([1.0, 1e6, 1e-3])  # bytes dwarf seconds: bounds of one problem differ by orders of magnitude
SPACES = 120


@dataclasses.dataclass(frozen=True)
class Everything:
    """Every choice of a problem with its score and its costs."""

    choices: np.ndarray
    scores: np.ndarray
    spent: np.ndarray

    def allowed(self, problem: Problem) -> np.ndarray:
        slack = 1e-9 * np.maximum(1.0, np.abs(problem.limits))
        inside = (self.spent <= problem.limits + slack).all(axis=1)
        for old in problem.different_from:
            inside &= (self.choices != np.asarray(old)).sum(axis=1) >= problem.min_different
        return inside


def enumerate_all(problem: Problem) -> Everything:
    choices = np.array(list(itertools.product(*[range(len(score)) for score in problem.scores])))
    slots = range(len(problem.scores))
    scores = np.sum([problem.scores[i][choices[:, i]] for i in slots], axis=0)
    return Everything(choices, scores, np.sum([problem.costs[i][choices[:, i]] for i in slots], axis=0))


def random_problem(seed: int) -> Problem:
    """1 to 6 slots of 1 to 5 variants under 1 to 3 bounds: some whole numbers with many ties, some of mixed signs,
    some bounds out of reach."""
    rng = np.random.default_rng(seed)
    slots, bounds = int(rng.integers(1, 7)), int(rng.integers(1, 4))
    whole, mixed = rng.random(2) < 0.4
    scores, costs = [], []
    for size in rng.integers(1, 6, slots):
        if whole:
            scores.append(rng.integers(-3, 9, size).astype(float))
            costs.append(rng.integers(-4 if mixed else 0, 9, (size, bounds)) * UNITS[:bounds])
        else:
            scores.append(rng.normal(size=size))
            costs.append((rng.normal(size=(size, bounds)) if mixed else rng.random((size, bounds))) * UNITS[:bounds])
    free = Problem(tuple(scores), tuple(costs), np.full(bounds, np.inf), ("weights", "memory", "time")[:bounds])
    spent = enumerate_all(free).spent
    limits = spent.min(axis=0) + rng.uniform(-0.1, 0.7, bounds) * np.ptp(spent, axis=0)
    if whole:
        limits = np.round(limits / UNITS[:bounds]) * UNITS[:bounds]
    return dataclasses.replace(free, limits=limits)


def layers(seed: int, slots: int, variants: int, *, share: float = 0.25) -> Problem:
    """Slots as models have them: the dearer a variant in bytes, cache and time, the lower its score, roughly. The first
    variants are the cheapest; limits lie at a share of the way from these to the dearest."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.random((slots, variants, 3)), axis=1)
    scores = np.maximum(0, -np.log(costs.mean(axis=2) + 0.01) + 0.3 * rng.normal(size=(slots, variants)))
    limits = costs[:, 0].sum(axis=0) * (1 - share) + costs[:, -1].sum(axis=0) * share
    return Problem(
        scores=tuple(scores),
        costs=tuple(costs * UNITS),
        limits=limits * UNITS,
        names=("weights", "memory", "time"),
        labels=tuple(tuple(f"v{v}" for v in range(variants)) for _ in range(slots)),
        groups=tuple(("mixer", "ffn")[i % 2] for i in range(slots)),
    )


# ---------------------------------------------------------------------------------------------- the exact search


@pytest.mark.parametrize("first", range(0, SPACES, 20))
def test_mip_equals_brute_force(first):
    outcomes = {"solved": 0, "infeasible": 0}
    for seed in range(first, first + 20):
        problem = random_problem(seed)
        every = enumerate_all(problem)
        allowed = every.allowed(problem)
        if not allowed.any():
            with pytest.raises(Infeasible):
                mip.solve(problem)
            outcomes["infeasible"] += 1
            continue
        found = mip.solve(problem)
        assert found.score == pytest.approx(every.scores[allowed].min(), rel=1e-9, abs=1e-9), f"seed {seed}"
        assert found.optimal
        outcomes["solved"] += 1
        # re-checked here, from the arrays alone
        spent = sum(cost[v] for cost, v in zip(problem.costs, found.choice, strict=True))
        assert (spent <= problem.limits + 1e-9 * np.maximum(1, np.abs(problem.limits))).all()
        assert found.spent == pytest.approx(spent)
        assert found.score == pytest.approx(sum(s[v] for s, v in zip(problem.scores, found.choice, strict=True)))
    assert min(outcomes.values()) >= 2, "the spaces should hold both kinds"


def test_what_cannot_be_met_is_reported_with_a_bound_and_a_value_that_can_be():
    mended = 0
    for seed in range(SPACES):
        problem = random_problem(seed)
        every = enumerate_all(problem)
        if every.allowed(problem).any():
            continue
        with pytest.raises(Infeasible) as err:
            mip.solve(problem)
        loosened = [
            every.allowed(
                dataclasses.replace(problem, limits=np.where(problem.limits == limit, np.inf, problem.limits))
            )
            for limit in problem.limits
        ]
        if not any(allowed.any() for allowed in loosened):
            continue  # no single bound is to blame
        found = err.value
        assert found.bound is not None
        assert found.nearest is not None
        k = problem.names.index(found.bound)
        assert found.limit == problem.limits[k] < found.nearest
        limits = problem.limits.copy()
        limits[k] = found.nearest
        met = dataclasses.replace(problem, limits=limits)
        assert mip.solve(met).spent[k] == pytest.approx(found.nearest)
        limits = limits.copy()
        limits[k] -= 1e-6 * max(1.0, abs(found.nearest))
        assert not every.allowed(dataclasses.replace(problem, limits=limits)).any(), "a lower value would have done"
        mended += 1
    assert mended >= 10


def test_the_message_of_an_infeasible_budget_names_what_came_and_what_would_do():
    problem = Problem(
        (np.zeros(2), np.zeros(1)), (np.array([[3.0], [4.0]]), np.array([[5.0]])), np.array([7.0]), ("weight_bytes",)
    )
    with pytest.raises(Infeasible) as err:
        mip.solve(problem)
    assert (err.value.bound, err.value.limit, err.value.nearest) == ("weight_bytes", 7.0, 8.0)
    assert str(err.value) == "weight_bytes of 7 cannot be met; the least possible is 8"


def test_bounds_that_only_fail_together_are_blamed_with_the_others_kept():
    # cheap in a is dear in b: each bound can be met, both cannot
    costs = (np.array([[0.0, 10.0], [10.0, 0.0]]),) * 2
    problem = Problem((np.zeros(2),) * 2, costs, np.array([5.0, 5.0]), ("a", "b"))
    with pytest.raises(Infeasible) as err:
        mip.solve(problem)
    assert (err.value.bound, err.value.nearest) == ("a", 20.0)


def test_a_bound_out_of_reach_is_priced_with_the_other_bounds_in_place():
    # a alone could be 1, but then b breaks: the nearest a under b is 3
    costs = (np.array([[1.0, 9.0], [3.0, 2.0], [4.0, 1.0]]),)
    problem = Problem((np.zeros(3),), costs, np.array([0.5, 5.0]), ("a", "b"))
    with pytest.raises(Infeasible) as err:
        mip.solve(problem)
    assert (err.value.bound, err.value.nearest) == ("a", 3.0)


def test_a_larger_budget_never_does_worse():
    for seed in range(6):
        found = [mip.solve(layers(seed, 5, 7, share=share)).score for share in (0.0, 0.1, 0.25, 0.5, 0.8, 1.0)]
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]


def test_without_bounds_every_slot_takes_its_best():
    rng = np.random.default_rng(0)
    scores = tuple(rng.normal(size=size) for size in (1, 63, 257))
    problem = Problem(scores, tuple(np.zeros((len(score), 0)) for score in scores), np.zeros(0), ())
    assert mip.solve(problem).choice == tuple(int(score.argmin()) for score in scores)


@pytest.mark.parametrize("scale", [1e-7, 1e-12, 1e9])
def test_scores_of_any_size_are_told_apart(scale):
    """HiGHS stops within 1e-6 of the best objective: scores as small as that must be scaled up first."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores = tuple(rng.random(5) * scale for _ in range(5))
        problem = Problem(scores, tuple(rng.random((5, 1)) for _ in range(5)), np.array([1.5]), ("weights",))
        every = enumerate_all(problem)
        assert mip.solve(problem).score == pytest.approx(every.scores[every.allowed(problem)].min(), rel=1e-9, abs=0)


def test_small_differences_count_beside_large_scores():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores = tuple(np.concatenate([[15.0], rng.random(5) * 1e-7]) for _ in range(5))
        costs = tuple(np.concatenate([[[0.0]], 0.1 + rng.random((5, 1))]) for _ in range(5))
        problem = Problem(scores, costs, np.array([1.6]), ("weights",))
        every = enumerate_all(problem)
        best = every.scores[every.allowed(problem)].min()
        assert mip.solve(problem).score == pytest.approx(best, rel=1e-12, abs=1e-13)


def test_a_bound_is_not_passed_by_what_the_solver_calls_rounding():
    """HiGHS lets a row be passed by 1e-6; a choice 1e-7 over the bound is still over."""
    limit = 1e9
    costs = (np.array([[limit * (1 + 1e-7)], [limit * (1 + 2e-7)], [limit * (1 - 1e-7)], [0.0]]),)
    problem = Problem((np.array([0.0, 0.1, 1.0, 9.0]),), costs, np.array([limit]), ("weights",))
    assert mip.solve(problem).choice == (2,)


def test_a_choice_exactly_at_the_bound_is_inside():
    thirds = Problem((np.array([0.0, 1.0]),) * 3, (np.array([[1 / 3], [0.0]]),) * 3, np.array([1.0]), ("time",))
    tenths = Problem((np.array([0.0, 1.0]),) * 3, (np.array([[0.1], [0.0]]),) * 3, np.array([0.3]), ("time",))
    for problem in (thirds, tenths):  # 0.1 + 0.1 + 0.1 > 0.3 in floating point
        assert mip.solve(problem).choice == (0, 0, 0)


def test_columns_that_the_relaxation_has_no_use_for_are_still_considered():
    """Slot one holds more free columns than the first core; the best of slot two lies outside it."""
    scores = (np.zeros(63), np.array([0.0, 10.0, 6.0]))
    costs = (np.zeros((63, 1)), np.array([[10.0], [0.0], [5.0]]))
    found = mip.solve(Problem(scores, costs, np.array([5.0]), ("weights",)))
    assert found.choice[1] == 2  # half of 0 and half of 1 would score 5
    assert found.optimal


def by_dynamic_programming(problem: Problem) -> float:
    """The least score under one bound in whole numbers: best[c] is the least score that spends at most c."""
    best = np.zeros(int(problem.limits[0]) + 1)
    for score, cost in zip(problem.scores, problem.costs, strict=True):
        options = []
        for value, spent in zip(score, cost[:, 0].astype(int), strict=True):
            option = np.full(len(best), np.inf)
            option[spent:] = best[: len(best) - spent] + value
            options.append(option)
        best = np.min(options, axis=0)
    return float(best[-1])


def test_mip_equals_dynamic_programming_where_brute_force_ends():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        scores, costs = rng.random((40, 30)), rng.integers(0, 60, (40, 30, 1)).astype(float)
        problem = Problem(tuple(scores), tuple(costs), np.array([257.0]), ("weights",))
        assert mip.solve(problem).score == pytest.approx(by_dynamic_programming(problem), rel=1e-9)


def test_forty_slots_of_thirty_variants_under_three_bounds_are_proven_quickly():
    problem = layers(4, 40, 30)
    started = time.perf_counter()
    found = mip.solve(problem, time_limit_s=30.0)
    assert found.optimal
    assert problem.allows(found.choice)
    assert time.perf_counter() - started < 20.0
    assert found.seconds < 20.0


def test_a_search_leaves_the_file_descriptors_of_its_process_alone(monkeypatch):
    """A server in the same process writes to them."""
    redirected = []
    with monkeypatch.context() as while_it_runs:
        while_it_runs.setattr("os.dup2", lambda *which: redirected.append(which))
        mip.solve(layers(20, 12, 8))
    assert not redirected


def test_commands_keep_their_standard_output_to_themselves(capfd):
    with own_stdout():
        for seed in (20, 21, 22, 23):  # at the odd ones HiGHS prints a debug line past sys.stdout
            mip.solve(layers(seed, 12, 8))
    print("the result")
    assert capfd.readouterr() == ("the result\n", "")


# ------------------------------------------------------------------------------------------------------ diversity


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_different", [1, 2, 4])
def test_the_nth_best_under_diversity_equals_brute_force(seed, min_different):
    problem = dataclasses.replace(layers(seed, 5, 4, share=0.5), min_different=min_different)
    every = enumerate_all(problem)
    found: list = []
    for _ in range(6):
        problem = dataclasses.replace(problem, different_from=tuple(old.choice for old in found))
        allowed = every.allowed(problem)
        if not allowed.any():
            with pytest.raises(Infeasible):
                mip.solve(problem)
            break
        found.append(mip.solve(problem))
        assert found[-1].score == pytest.approx(every.scores[allowed].min())
    assert len(found) >= 2
    scores = [old.score for old in found]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(scores))
    for one, other in itertools.combinations(found, 2):
        assert sum(a != b for a, b in zip(one.choice, other.choice, strict=True)) >= min_different


def test_no_search_returns_what_is_too_close_to_an_earlier_choice():
    problem = layers(3, 7, 5, share=0.5)
    earlier = greedy.solve(problem).choice
    apart = dataclasses.replace(problem, different_from=(earlier,), min_different=3)
    assert problem.allows(earlier)
    assert not apart.allows(earlier)
    assert not apart.allows((*[1 - min(v, 1) for v in earlier[:2]], *earlier[2:]))
    for search in (mip, random, evolve):
        choice = search.solve(apart, seed=1).choice
        assert sum(a != b for a, b in zip(choice, earlier, strict=True)) >= 3
    with pytest.raises(Infeasible, match="greedy search ended on a choice too close to an earlier one"):
        greedy.solve(apart)


def test_when_every_choice_is_used_up_no_bound_is_blamed():
    used = ((0, 0), (0, 1), (1, 0), (1, 1))
    problem = Problem(
        (np.zeros(2),) * 2, (np.ones((2, 1)),) * 2, np.array([9.0]), ("a",), different_from=used, min_different=1
    )
    with pytest.raises(Infeasible) as err:
        mip.solve(problem)
    assert (err.value.bound, err.value.nearest) == (None, None)


# ------------------------------------------------------------------------------------------------------ baselines

BASELINES = (greedy, uniform, random, evolve)


def name_of(search) -> str:
    return search.__name__.rsplit(".", 1)[1]


def solve(search, problem: Problem, seed: int):
    few = {"evaluations": 40} if search is evolve else {}
    return search.solve(problem, seed=seed, time_limit_s=30.0, **few)


def test_every_search_of_the_room_is_compared():
    assert {name_of(search) for search in (mip, *BASELINES)} == set(kinds.names("search"))


@pytest.mark.parametrize("search", BASELINES, ids=name_of)
def test_a_baseline_stays_inside_the_bounds_and_never_beats_mip(search):
    for seed in range(8):
        problem = layers(seed, 7, 5)
        best, found = mip.solve(problem), solve(search, problem, seed)
        spent = sum(cost[v] for cost, v in zip(problem.costs, found.choice, strict=True))
        assert (spent <= problem.limits * (1 + 1e-9)).all()
        assert found.spent == pytest.approx(spent)
        assert best.score <= found.score + 1e-9
        assert not found.optimal


@pytest.mark.parametrize("search", [greedy, random, evolve], ids=name_of)
def test_a_baseline_copes_with_negative_costs_ties_and_zero_limits(search):
    solved = 0
    for seed in range(45):
        problem = random_problem(seed)
        if seed % 3 == 0:  # with costs as large as bytes are
            problem = dataclasses.replace(
                problem, limits=0 * problem.limits, costs=tuple(1e9 * cost for cost in problem.costs)
            )
        every = enumerate_all(problem)
        allowed = every.allowed(problem)
        if not allowed.any():
            continue
        try:
            found = solve(search, problem, seed)
        except Infeasible:
            assert search is greedy, "only greedy may miss a choice that exists"
            continue
        assert problem.allows(found.choice)
        assert found.score >= every.scores[allowed].min() - 1e-9
        solved += 1
    assert solved >= 15


@pytest.mark.parametrize("search", [random, evolve], ids=name_of)
def test_equal_seeds_give_equal_choices_and_others_differ(search):
    problem = layers(1, 12, 6)
    call = {"evaluate": lambda choice: -problem.score(choice), "evaluations": 40} if search is evolve else {}

    def found(seed: int) -> tuple[int, ...]:
        return search.solve(problem, seed=seed, **call).choice

    assert found(3) == found(3)
    assert len({found(seed) for seed in range(4)}) > 1


def test_random_spends_the_budget_without_looking_at_scores():
    problem = layers(2, 20, 6)
    other_scores = dataclasses.replace(problem, scores=tuple(-score for score in problem.scores))
    assert random.solve(problem, seed=1).choice == random.solve(other_scores, seed=1).choice
    for share in (0.25, 0.5, 0.9):
        bounded = layers(2, 20, 6, share=share)
        assert (random.solve(bounded, seed=1).spent > 0.9 * bounded.limits).any()


def test_random_gives_up_after_its_time_limit():
    problem = Problem((np.zeros(2),), (np.ones((2, 1)),), np.array([0.5]), ("a",))
    with pytest.raises(Infeasible, match=r"random search found no feasible choice in 0.05 s"):
        random.solve(problem, time_limit_s=0.05)


def test_uniform_gives_one_label_per_group_and_the_best_such():
    for seed in range(6):
        problem = layers(seed, 6, 5, share=0.5)
        found = uniform.solve(problem)
        labels = [problem.labels[i][v] for i, v in enumerate(found.choice)]
        assert len(set(labels[0::2])) == len(set(labels[1::2])) == 1
        every = enumerate_all(problem)
        alike = [(every.choices[:, i::2] == every.choices[:, [i]]).all(axis=1) for i in (0, 1)]
        assert found.score == pytest.approx(every.scores[alike[0] & alike[1] & every.allowed(problem)].min())


def test_uniform_matches_variants_by_label_wherever_they_stand():
    scores = (np.array([1.0, 5.0]), np.array([7.0, 2.0, 0.0]))
    costs = (np.zeros((2, 1)), np.zeros((3, 1)))
    labels = (("half", "parent"), ("parent", "half", "quarter"))
    problem = Problem(scores, costs, np.array([1.0]), ("a",), labels=labels, groups=("ffn", "ffn"))
    assert uniform.solve(problem).choice == (0, 1)
    with pytest.raises(ValueError, match="the slots of group ffn have no variant in common"):
        uniform.solve(dataclasses.replace(problem, labels=(("a", "b"), ("c", "d", "e"))))
    with pytest.raises(ValueError, match="needs a label for every variant and a group for every slot"):
        uniform.solve(dataclasses.replace(problem, labels=()))


def test_greedy_takes_the_best_where_the_budget_is_loose_and_says_so_where_it_gets_stuck():
    problem = layers(5, 9, 5)
    loose = dataclasses.replace(problem, limits=problem.limits * 100)
    assert greedy.solve(loose).score == pytest.approx(mip.solve(loose).score)
    impossible = dataclasses.replace(problem, limits=problem.limits * 0.01)
    with pytest.raises(Infeasible, match="greedy search found nothing payable for slot"):
        greedy.solve(impossible)


def test_greedy_keeps_enough_for_the_slots_still_to_come_and_rolls_leftovers_over():
    scores = (np.array([0.0, 1.0]), np.array([5.0]), np.array([6.0, 7.0]))
    costs = (np.array([[2.0], [0.0]]), np.array([[8.0]]), np.array([[1.0], [0.0]]))
    problem = Problem(scores, costs, np.array([9.0]), ("a",))  # the first slot's share is 3, the second needs 8
    assert greedy.solve(problem).choice == (1, 0, 0)
    assert greedy.solve(dataclasses.replace(problem, limits=np.array([10.0]))).choice == (0, 0, 1)


def test_evolve_follows_the_measured_loss_instead_of_the_scores():
    problem = layers(6, 4, 5, share=0.5)
    every = enumerate_all(problem)
    rng = np.random.default_rng(0)
    interaction = rng.random((5, 5))

    def loss(choice: tuple[int, ...]) -> float:  # neighbours interact: no sum of scores
        return sum(float(interaction[a, b]) for a, b in itertools.pairwise(choice))

    start = mip.solve(problem).choice
    found = evolve.solve(problem, seed=0, evaluate=loss, evaluations=1000, start=start)
    true = np.array([loss(tuple(choice)) for choice in every.choices])
    assert loss(found.choice) < loss(start)
    assert loss(found.choice) <= np.quantile(true[every.allowed(problem)], 0.02)
    assert problem.allows(found.choice)


# --------------------------------------------------------------------------------------------------------- errors


def test_a_choice_outside_its_bounds_never_leaves_a_search():
    problem = Problem((np.zeros(2),), (np.array([[1.0], [3.0]]),), np.array([2.0]), ("weights",))
    assert solution(problem, (0,), optimal=True, seconds=0.0).spent == pytest.approx([1.0])
    with pytest.raises(RuntimeError, match=r"outside its bounds: spent \{'weights': .*3.0.*\}, limits \[2.\]"):
        solution(problem, (1,), optimal=True, seconds=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": (np.zeros(2),)}, "scores and costs need one array per slot"),
        ({"names": ("a", "b")}, "names and limits one entry per bound"),
        ({"scores": (np.zeros(2), np.zeros(3))}, r"slot 1: 3 scores and costs \(2, 1\) for 1 bounds"),
        ({"scores": (np.zeros(0), np.zeros(2)), "costs": (np.zeros((0, 1)), np.zeros((2, 1)))}, "slot 0: 0 scores"),
        ({"scores": (np.zeros(2), np.array([0.0, np.nan]))}, "slot 1: scores and costs must be finite numbers"),
        ({"costs": (np.full((2, 1), np.inf), np.zeros((2, 1)))}, "slot 0: scores and costs must be finite numbers"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused_where_it_is_made(changes, message):
    sound = Problem((np.zeros(2),) * 2, (np.zeros((2, 1)),) * 2, np.array([1.0]), ("a",))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sound, **changes)


def test_a_choice_that_was_not_proven_in_time_is_not_called_optimal(monkeypatch):
    """HiGHS says with its status that it stopped before the proof; its choice is given all the same."""
    problem, milp = layers(3, 6, 4), mip.milp
    best = mip.solve(problem)

    def stopped(*args, **kwargs):
        result = milp(*args, **kwargs)
        result.status = 1
        return result

    monkeypatch.setattr(mip, "milp", stopped)
    found = mip.solve(problem)
    assert best.optimal and not found.optimal and found.choice == best.choice


def test_a_core_that_ran_out_of_time_proves_nothing(monkeypatch):
    """The best of some columns is not the best of all until the others are ruled out."""
    scores = (np.zeros(63), np.array([0.0, 10.0, 6.0]))
    costs = (np.zeros((63, 1)), np.array([[10.0], [0.0], [5.0]]))
    problem = Problem(scores, costs, np.array([5.0]), ("weights",))
    monkeypatch.setattr(
        mip, "time", type("clock", (), {"perf_counter": staticmethod(itertools.count(0.0, 1e3).__next__)})
    )
    found = mip.solve(problem, time_limit_s=1.0)
    assert problem.allows(found.choice) and not found.optimal
