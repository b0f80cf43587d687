"""How long a job takes, and what it leaves out to be done in time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pennyweight.config import FitConfig, merged
from pennyweight.job import hours
from pennyweight.job.hours import LEAST, TooShort, within
from pennyweight.job.job import open_job
from pennyweight.job.plan import plan
from pennyweight.prices import measure
from pennyweight.runs.events import Silent
from pennyweight.runs.store import Store


def linear(config: FitConfig) -> dict[str, float]:
    """Seconds that grow with everything that a job can do less of."""
    data, heal = config.data, config.heal
    return {
        "heal": 0.01 * heal.whole_tokens + 0.01 * heal.local_tokens,
        "score": 100.0 * data.score_rows,
        "library": 0.01 * heal.library_tokens,
        "stats": 50.0 * data.calibration_rows,
    }


ASKED = merged(
    FitConfig(),
    {
        "heal": {"whole_tokens": 300_000, "local_tokens": 60_000, "library_tokens": 50_000},
        "data": {"score_rows": 8, "calibration_rows": 16},
    },
)
LONG = sum(linear(ASKED).values())  # 5,700 s


def asked_for(seconds: float) -> FitConfig:
    return merged(ASKED, {"hours": seconds / 3600})


def values(config: FitConfig) -> tuple[int, ...]:
    return tuple(getattr(getattr(config, section), name) for section, name in LEAST)


def test_what_fits_is_left_as_it_is():
    found, left_out = within(asked_for(LONG), linear)
    assert values(found) == values(ASKED) and left_out == ""


def test_one_thing_after_another_is_done_less():
    """Healing first; then, with healing at its least, text; nothing below its least; never later than asked."""
    least, whole = tuple(LEAST.values()), values(ASKED)
    cut = []
    for seconds in (5000, 2600, 2000, 1500, 1100, 800):
        found, left_out = within(asked_for(seconds), linear)
        now = values(found)
        assert sum(linear(found).values()) <= seconds
        assert all(low <= value <= high for low, value, high in zip(least, now, whole, strict=True))
        assert left_out.startswith(f"to be done in {seconds / 3600:g} h: ")
        cut.append([value < high for value, high in zip(now, whole, strict=True)])
        order = [now[0:2] == least[0:2], now[2] == least[2], now[3] == least[3]]
        for step, more in zip(order, (now[2] < whole[2], now[3] < whole[3], now[4] < whole[4]), strict=True):
            assert step or not more, "what comes later is touched only when what comes before is at its least"
    assert cut[0] == [True, True, False, False, False]
    assert cut[-1] == [True] * 5


def test_what_is_below_its_least_already_is_not_raised():
    config = merged(ASKED, {"heal": {"whole_tokens": 0, "local_tokens": 0, "library_tokens": 0}, "hours": 0.2})
    found, left_out = within(config, linear)
    assert (found.heal.whole_tokens, found.heal.local_tokens, found.heal.library_tokens) == (0, 0, 0)
    assert "heal" not in left_out and "rows" in left_out


def test_too_few_hours_are_refused_with_the_least():
    with pytest.raises(TooShort, match=r"--hours 0.05 is too little: .* about 11:40 .* at least --hours 0.2") as err:
        within(merged(ASKED, {"hours": 0.05}), linear)
    told = float(str(err.value).rsplit(" ", 1)[1])
    within(merged(ASKED, {"hours": told}), linear)


def fit_config(tmp_path, **changes) -> FitConfig:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(3000)))
    given = {
        "budget": {"weights": "50%"},
        "machine": "m2-max",
        "data": {"text": str(text), "context": 64},
        "axes": ("bits", "ffn_width"),
    }
    return merged(merged(FitConfig(), given), changes)


@pytest.fixture
def rate(monkeypatch):
    """Says what this machine multiplies in a second."""
    real = measure.Machine.load("m2-max")

    def set_to(flops: float) -> None:
        monkeypatch.setattr(measure, "machine", lambda listen=None: replace(real, flops=flops, flops_share=1.0))

    set_to(1e9)
    return set_to


def test_a_job_takes_longer_on_a_slower_machine_and_with_more_to_do(pico, tmp_path, rate):
    def told(**changes) -> dict[str, float]:
        with open_job(pico("llama"), tmp_path / "out", fit_config(tmp_path, **changes), dry=True) as job:
            return plan(job)["seconds"]

    base = told()
    assert set(base) == {"stats", "library", "score", "heal", "pack", "verify"}
    more = {
        "score": {"data": {"score_rows": 16}},
        "heal": {"heal": {"whole_tokens": 600_000}},
        "stats": {"data": {"calibration_rows": 64}},
        "verify": {"data": {"held_out_rows": 64}},
        "library": {"heal": {"library_tokens": 10_000}},
    }
    for stage, changes in more.items():
        changed = told(**changes)
        assert changed[stage] > base[stage], stage
        assert {name for name in base if changed[name] != base[name]} <= {stage, "pack"}
    assert told(axes=("bits",))["heal"] == 0, "nothing changes its shape"
    assert told(race=False)["score"] == told(metric="lm")["score"]
    rate(1e8)
    slower = told()
    assert slower["heal"] == pytest.approx(10 * base["heal"], rel=1e-2)


def test_hours_hold_for_the_next_call_however_busy_the_machine_is(pico, tmp_path, rate):
    wanted = fit_config(tmp_path, hours=0.05)
    model, out = pico("llama"), tmp_path / "out"
    with open_job(model, out, wanted, dry=True) as job:
        told = plan(job)
        assert "tokens of healing the whole" in told["left_out"]
        assert sum(told["seconds"].values()) <= 0.05 * 3600
        assert job.config.heal.whole_tokens < wanted.heal.whole_tokens
    with open_job(model, out, wanted) as job:
        first = job.config
        assert job.store.get("hours")["left_out"] == told["left_out"]
    rate(1e7)
    with open_job(model, out, wanted) as job:
        assert job.config == first
    with pytest.raises(TooShort, match="at least --hours"):
        open_job(model, tmp_path / "new", wanted)
    assert not (tmp_path / "new.run").exists()
    rate(1e12)
    with open_job(model, out, merged(wanted, {"hours": 0.06})) as job:
        assert job.config.heal == wanted.heal, "other hours are decided anew"


def test_a_run_folder_is_looked_into_without_being_made(tmp_path):
    assert Store.peek(tmp_path / "none", "hours") is None and not (tmp_path / "none").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.sqlite").write_text("no database")
    assert Store.peek(tmp_path / "broken", "hours") is None
    store = Store(tmp_path / "run", {"a": 1})
    store.put("hours", {"x": 2})
    store.close()
    assert Store.peek(tmp_path / "run", "hours") == {"x": 2}
    assert Store.peek(tmp_path / "run", "other") is None


def test_estimates_know_what_is_not_judged(pico, tmp_path, rate):
    model = pico("llama")
    with open_job(model, tmp_path / "a", fit_config(tmp_path), dry=True) as job:
        read = job.checkpoint.config
    of = lambda **changes: hours.seconds(fit_config(tmp_path, **changes), read, Silent())  # noqa: E731
    quick = of(axes=("bits",), metric="error")
    uniform = of(axes=("bits",), uniform={"bits": 4})
    assert quick["score"] < of(axes=("bits",))["score"] and quick["stats"] > 0
    assert uniform["stats"] == 0
