"""Racing: who is scored on more of the text, and that it changes no solution."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from pennyweight.config import FitConfig, merged
from pennyweight.job import race
from pennyweight.job.gather import (
    gather_stats,
    passes_of,
    score_choices,
    scored_keys,
    scores,
)
from pennyweight.job.job import open_job
from pennyweight.job.run import run_job
from pennyweight.job.solve import solve
from pennyweight.job.text import score_parts
from pennyweight.judge.partial import estimates
from pennyweight.model import shapes
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Silent
from pennyweight.search import Problem, mip

FFN, MIXER = Slot("ffn", 0), Slot("mixer", 0)


def drawn(seed: int, slots: int = 4, variants: int = 5, bounds: int = 2) -> Problem:
    rng = np.random.default_rng(seed)
    costs = tuple(rng.uniform(0, 1, (variants, bounds)) for _ in range(slots))
    scores = tuple(np.sort(rng.uniform(0, 1, variants)) for _ in range(slots))
    limits = np.full(bounds, 0.45 * slots)
    return Problem(scores, costs, limits, tuple("ab"[:bounds]))


def best(problem: Problem) -> tuple[float, tuple[int, ...]]:
    every = itertools.product(*(range(len(score)) for score in problem.scores))
    return min((problem.score(choice), choice) for choice in every if problem.allows(choice))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_could_be_in_an_optimum_is_a_contender(seed):
    """Against trying all: a variant that a lower score of its own brings into the best choice is found, and without
    lower scores nothing but what is within the gap."""
    problem = drawn(seed)
    lower = tuple(np.full(len(score), 0.1) for score in problem.scores)
    solution, contending = mip.contenders(problem, lower)
    assert solution.choice == best(problem)[1]
    for slot, own in enumerate(problem.scores):
        for variant in range(len(own)):
            lowered = [score.copy() for score in problem.scores]
            lowered[slot][variant] -= 0.1
            changed = Problem(tuple(lowered), problem.costs, problem.limits, problem.names)
            if best(changed)[1][slot] == variant:
                assert contending[slot][variant], (slot, variant)
    assert not all(mask.all() for mask in contending)
    few = mip.contenders(problem, tuple(np.zeros(len(score)) for score in problem.scores))[1]
    assert sum(map(np.count_nonzero, few)) <= sum(map(np.count_nonzero, contending))
    assert all(mask[variant] for mask, variant in zip(few, solution.choice, strict=True))


def test_what_was_scored_on_all_of_the_text_is_known():
    found = estimates({FFN: {"a": np.array([1.0, 2.0, 3.0])}}, [32, 32, 16])[FFN]["a"]
    assert (found.mean, found.error) == (6 / 80, 0.0)


def test_a_part_is_carried_over_by_what_its_slot_lost_on_both():
    """The slot's own ratio, not that of another; a geometric mean, so that no choice speaks louder than others."""
    whole = {"a": np.array([1.0, 1.0, 3.0, 3.0]), "b": np.array([200.0, 200.0, 200.0, 200.0])}
    sums = {FFN: {**whole, "c": np.array([5.0, 5.0])}, MIXER: {"d": np.array([7.0, 7.0])}}
    found = estimates(sums, [32] * 4)
    assert found[FFN]["c"].mean == pytest.approx(5 / 32 * (2 * 1) ** 0.5)
    assert found[MIXER]["d"].mean == pytest.approx(7 / 32 * (2 * 1) ** 0.5), "a slot without any goes by all"
    alone = estimates({MIXER: {"d": np.array([7.0, 7.0])}}, [32] * 4)
    assert alone[MIXER]["d"].mean == pytest.approx(7 / 32)
    assert estimates({MIXER: {"d": np.array([7.0])}}, [32] * 4)[MIXER]["d"].error == np.inf


def test_what_all_choices_lose_on_a_stretch_makes_none_of_them_less_sure():
    rng = np.random.default_rng(0)
    text = rng.uniform(0.1, 10, 16)
    alike = {FFN: {str(scale): scale * text for scale in (1.0, 2.0, 5.0)}}
    assert max(found.error for found in estimates(alike, [32] * 64)[FFN].values()) < 1e-9
    noise = {key: found * rng.uniform(0.5, 1.5, 16) for key, found in alike[FFN].items()}
    for key, found in estimates({FFN: noise}, [32] * 64)[FFN].items():
        alone = float((noise[key] / 32).std(ddof=1)) / 4
        assert 0 < found.error < alone * 0.75


def test_parts_of_the_scored_text():
    wanted = FitConfig()
    assert score_parts(wanted, 512) == [[1], [3], [4]]
    assert score_parts(merged(wanted, {"data": {"rows_per_chunk": 2}}), 512) == [[1], [2, 1], [2, 2]]
    assert score_parts(merged(wanted, {"data": {"score_rows": 16}}), 512) == [[2], [4, 2], [4, 4]]
    assert score_parts(wanted, 128) == [[4, 4]], "an eighth of it would tell nothing"
    assert score_parts(merged(wanted, {"data": {"score_rows": 4}}), 512) == [[4]]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.py").write_text(
            Path(__file__).read_text() + Path(shapes.__file__).read_text()[i * 500 :][:9000]
        )
    return folder


def wanted_of(text: Path, **changes) -> FitConfig:
    given = {
        "data": {"text": str(text), "context": 64, "calibration_rows": 4, "score_rows": 8, "held_out_rows": 2},
        "heal": {"local_tokens": 0, "whole_tokens": 0},
        "workload": {"prompt": 32, "new": 16},
        "machine": "m2-max",
        "budget": {"weights": "40%"},
        "axes": ("bits", "ffn_width", "noop"),
    }
    return merged(merged(FitConfig(), given), changes)


class Interrupted(Silent):
    """Stops in the middle of the `rounds`th round of scoring."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._stage = rounds, ""

    def begin(self, stage, *, total, done=0, unit=""):
        self._stage = stage
        self._rounds -= stage == "score"

    def advance(self, done, **figures):
        if self._rounds == 0 and self._stage == "score":
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def raced(pico, text, tmp_path_factory):
    """A finished job whose text is raced over although it is small: (model, out, wanted, report)."""
    model, out, wanted = pico("llama"), tmp_path_factory.mktemp("raced") / "out", wanted_of(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pennyweight.job.text._LEAST_PART", 64)
        with open_job(model, out, wanted) as job:
            report = run_job(job)
    return model, out, wanted, report


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("pennyweight.job.text._LEAST_PART", 64)


def test_a_race_scores_less_and_finds_what_full_scores_find(raced, tmp_path, small_parts):
    model, out, wanted, report = raced
    told = report["scored"]
    assert told["choices"] == told["in_full"] + told["told_early"] and told["told_early"] > 0
    assert 1 / 8 < told["share_of_work"] < 1
    with open_job(model, tmp_path / "out", merged(wanted, {"race": False}), run=tmp_path / "run") as job:
        gather_stats(job)
        score_choices(job)
        full = solve(job, job.budget)[0].to_json()
        known = scores(job)
        assert race.told(job) == {
            "choices": told["choices"],
            "in_full": told["choices"],
            "told_early": 0,
            "share_of_work": 1,
        }
    chosen = report["chosen"]["solutions"][0]
    assert chosen["layout"] == full["layout"]
    assert chosen["predicted"]["score"] == full["predicted"]["score"], "picks are scored on all of the text"
    with open_job(model, out, wanted) as job:
        assert race.unproven(job, report["chosen"]) == []
        found = scores(job)
    ratios = [found[slot][key]["kl"] / each["kl"] for slot, own in known.items() for key, each in own.items()]
    assert 0.8 < np.median(ratios) < 1.25, "estimates of the same"


def test_another_budget_scores_what_more_it_needs(raced, small_parts):
    model, out, wanted, report = raced
    with open_job(model, out, merged(wanted, {"budget": {"weights": "28%"}})) as job:
        before = scored_keys(job)
        other = run_job(job)
        assert before < scored_keys(job)
        assert race.unproven(job, other["chosen"]) == []
    assert other["scored"]["in_full"] > report["scored"]["in_full"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_race_that_was_stopped_goes_on_with_the_same_rounds(raced, tmp_path, rounds, small_parts):
    model, _, wanted, report = raced
    with open_job(model, tmp_path / "out", wanted) as job, pytest.raises(KeyboardInterrupt):
        job.listen = Interrupted(rounds)
        run_job(job)
    with open_job(model, tmp_path / "out", wanted) as job:
        assert job.store.get("chosen") is None and len(job.store.keys("race/")) == rounds
        assert race.begun(job)
        again = run_job(job)
        told = job.store.values("race/")
    assert (
        again["scored"] == report["scored"]
        and again["chosen"]["solutions"][0]["layout"] == report["chosen"]["solutions"][0]["layout"]
    )
    assert len(told) >= 3


def test_what_a_pick_lacks_is_scored_and_solved_again(raced, tmp_path, small_parts, monkeypatch):
    """Where the rule for contenders finds none, picks are still proven."""
    monkeypatch.setattr(race, "_contenders", lambda job: [])
    model, _, wanted, _ = raced
    with open_job(model, tmp_path / "out", wanted) as job:
        report = run_job(job)
        assert race.unproven(job, report["chosen"]) == []
        assert len(job.store.keys("race/")) > 1
        first = {key for key in scored_keys(job) if key.startswith("score/0/")}
        assert len(first) == report["scored"]["choices"]


def test_only_kls_are_raced(pico, text, tmp_path, small_parts):
    for number, changes in enumerate(({"race": False}, {"metric": "nmse"}, {"metric": "lm"})):
        with open_job(pico("llama"), tmp_path / f"{number}", wanted_of(text, **changes)) as job:
            every = set(passes_of(job))
            assert set(race.next_round(job)) == every


def test_a_plan_says_what_all_choices_are_scored_on(pico, text, tmp_path, small_parts):
    with open_job(pico("llama"), tmp_path / "out", wanted_of(text), dry=True) as job:
        from pennyweight.job.plan import plan

        assert plan(job)["first_share"] == 0.125
