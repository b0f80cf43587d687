"""The whole job on pico models: it keeps its budget, resumes to the same bytes, and refuses what cannot work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from pennyweight.config import FitConfig, asked, merged
from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.job import checks as verify
from pennyweight.job.gather import gather_stats, score_choices
from pennyweight.job.job import open_job
from pennyweight.job.plan import plan
from pennyweight.job.run import run_job
from pennyweight.job.verify import _speed
from pennyweight.live.load import compute_dtype, load_model
from pennyweight.model import shapes as slots
from pennyweight.model.demand import Budget, Workload
from pennyweight.prices import planning
from pennyweight.prices.machine import Machine
from pennyweight.quantize import gptq
from pennyweight.report import summary
from pennyweight.report._facts import promises
from pennyweight.runs import scratch, space
from pennyweight.runs.events import Silent
from pennyweight.runs.lock import Held
from pennyweight.runs.store import Store
from pennyweight.runtime import engine
from pennyweight.runtime.lower import NotRun
from pennyweight.search import Infeasible
from tests.conftest import DISTINCT

QUICK = merged(
    FitConfig(),
    {
        "data": {"context": 64, "calibration_rows": 4, "score_rows": 2, "held_out_rows": 2, "rows_per_chunk": 2},
        "heal": {"local_tokens": 512, "whole_tokens": 1024, "batch_rows": 4},
        "workload": {"prompt": 32, "new": 16},
        "machine": "m2-max",  # this machine would be measured anew by every run, and is never twice the same
    },
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A little text of our own, so that tests do not read the whole standard library."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.py").write_text(
            Path(__file__).read_text()[:9000] + Path(slots.__file__).read_text()[i * 500 :][:9000]
        )
    return folder


def config(text, **changes) -> FitConfig:
    return merged(QUICK, {"data": {"text": str(text)}, **changes})


def run(model, out, wanted, listen=None):
    with open_job(model, out, wanted, listen=listen or Silent()) as job:
        return run_job(job)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))} | {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "penny.json")
    }


def only(family: str, model: Path, reason: str) -> None:
    if family not in str(model):
        pytest.skip(f"one family is enough: {reason} does not depend on it")


@pytest.fixture(scope="module", params=DISTINCT)
def finished(request, pico, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "out"
    also = ({"workload": {"prompt": 48, "new": 4, "concurrency": 2}, "budget": {"ttft": "1s", "throughput": "2tok/s"}},)
    wanted = config(
        text, budget={"weights": "26%"}, sweep=("weights=50%", "weights=1%"), solutions=2, min_different=2, also=also
    )
    return pico(request.param), out, wanted, run(pico(request.param), out, wanted)


def test_the_budget_is_kept_and_every_promise_checked(finished):
    model, out, _, report = finished
    assert safetensors_bytes(out) <= 0.26 * Checkpoint(model).weight_bytes
    assert len(report["verified"]["checks"]) == 9
    assert all(check["ok"] for check in report["verified"]["checks"])
    predicted = report["chosen"]["solutions"][0]["predicted"]["file_bytes"]
    assert predicted - 6000 <= safetensors_bytes(out) <= predicted


def test_the_folder_is_an_ordinary_model_folder(finished):
    from transformers import AutoTokenizer

    _, out, _, report = finished
    model = load_model(out)
    tokens = AutoTokenizer.from_pretrained(out)("import torch", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
    assert {"config.json", "penny.json", "report.json", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "report.json").read_text())["slots"] == report["slots"]


def test_runner_up_and_sweep_come_from_the_same_scores(finished):
    *_, report = finished
    first, second = report["chosen"]["solutions"]
    assert first["predicted"]["score"] <= second["predicted"]["score"]
    slots = first["layout"].keys() | second["layout"].keys()
    assert sum(first["layout"].get(slot) != second["layout"].get(slot) for slot in slots) >= 2
    wider, impossible = report["chosen"]["sweep"]
    assert wider["predicted"]["score"] <= first["predicted"]["score"]
    assert "weight_bytes" in impossible["infeasible"]


def test_a_further_demand_is_predicted_and_promised(finished):
    *_, report = finished
    (demand,), solution = report["also"], report["chosen"]["solutions"][0]
    assert demand["budget"] == {"ttft_seconds": 1.0, "tokens_per_second": 2.0}
    assert demand["predicted"] == solution["also"][0] != solution["predicted"]
    assert demand["predicted"]["ttft_seconds"] <= 1.0 < 2.0 <= demand["predicted"]["tokens_per_second"]
    own, first, rate = promises(report)
    assert own.name == "weight files"
    assert first.asked == "ttft ≤ 1s, prompts of 48 and 4 new tokens, 2 at once"
    assert rate.asked.startswith("throughput ≥ 2tok/s, prompts of 48")
    assert own.kept and first.kept and rate.kept
    assert first.how == "predicted, not measured"  # of another machine


def test_margins_are_monotone(finished):
    *_, report = finished
    found = report["margins"]["weight_bytes"]
    assert found["5% looser"] <= found["as asked"] <= found["5% tighter"]


def test_asking_again_gives_the_same_folder_without_work(finished):
    model, out, wanted, _ = finished
    before = digests(out)

    class Nothing(Silent):
        def begin(self, stage, **kwargs):
            assert stage in ("read inputs", "read child", "report"), f"{stage} ran again"

    run(model, out, wanted, listen=Nothing())
    assert digests(out) == before


def test_another_run_makes_the_same_bytes(finished, text, tmp_path):
    model, out, wanted, _ = finished
    only("phi3", model, "the order of work")
    run(model, tmp_path / "out", wanted)
    assert digests(tmp_path / "out") == digests(out)


def test_check_finds_another_layout(finished, tmp_path):
    _, out, _, _ = finished
    assert all(check.ok for check in verify.check_folder(out, 8))
    broken = shutil.copytree(out, tmp_path / "broken")
    card = json.loads((broken / "penny.json").read_text())
    slot = next(iter(card["layout"]))
    card["layout"][slot] = {"bits": {"bits": 8, "group": 32, "method": "rtn"}}
    (broken / "penny.json").write_text(json.dumps(card))
    assert not all(check.ok for check in verify.check_folder(broken, 8))


def test_check_holds_the_engine_against_other_logits(finished, monkeypatch):
    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    out, ids = finished[1], torch.arange(20)
    model = load_model(out, dtype=torch.float32)
    assert [check.ok for check in verify.check_engine(out, ids, model)] == [True]
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.roll(1, dims=0))
    assert [check.ok for check in verify.check_engine(out, ids, model)] == [False]

    def raising(err):
        def native_module():
            raise err

        monkeypatch.setattr(engine, "native_module", native_module)
        (check,) = verify.check_engine(out, ids, model)
        return check

    check = raising(engine.NativeMissing("the native module is missing"))
    assert (check.ok, check.failed, check.not_run) == (False, False, "the native module is missing")
    check = raising(NotRun("hidden_act 'gelu'"))
    assert (check.ok, check.failed, check.not_run) == (False, False, "hidden_act 'gelu'")
    for err in (RuntimeError("no threads left"), ValueError("damaged")):
        check = raising(err)
        assert (check.ok, check.failed, check.not_run) == (False, True, None)
        assert str(err) in check.found
    with pytest.raises(MemoryError):
        raising(MemoryError())


@pytest.mark.parametrize(
    ("err", "said"),
    [
        (engine.NativeMissing("the native module is missing"), "not measured: the native module is missing"),
        (NotRun("hidden_act 'gelu'"), "not measured: hidden_act 'gelu'"),
        (RuntimeError("no threads left"), None),
        (ValueError("damaged"), None),
    ],
)
def test_only_what_the_engine_does_not_run_is_left_unmeasured(err, said, pico, monkeypatch):
    job: Any = SimpleNamespace(
        config=FitConfig(),
        fits_whole=True,
        model=pico("llama"),
        checkpoint=Checkpoint(pico("llama")),
        listen=Silent(),
    )

    def native_module():
        raise err

    monkeypatch.setattr(engine, "native_module", native_module)
    load = Workload(prompt=16, new=8)
    if said is None:
        with pytest.raises(type(err), match=str(err)):
            _speed(job, pico("llama"), load)
    else:
        assert _speed(job, pico("llama"), load) == (None, said)
    speed, how = _speed(job, pico("llama"), Workload(prompt=300, new=8))
    assert speed is None and "takes up to 256 in all" in how


def test_every_batch_is_tried_with_measured_prices_too(monkeypatch):
    """By the solution and by the margins around it, which would otherwise be those of another batch."""
    from pennyweight.job import solve

    tried = []

    def at(job, budget, batch, solutions):
        tried.append(batch.concurrency)
        if batch.concurrency not in (2, 4):
            raise Infeasible("memory_bytes", 1.0, 2.0, "too much")
        return [SimpleNamespace(solution=SimpleNamespace(score=1 / batch.concurrency), workload=batch)]

    monkeypatch.setattr(solve, "_solve_at", at)
    budget = Budget(tokens_per_second=10.0)
    for prices in ("computed", "measured"):
        job: Any = SimpleNamespace(
            workload=Workload(concurrency=8), config=merged(FitConfig(), {"prices": prices}), budget=budget
        )
        tried.clear()
        assert solve.solve(job, budget)[0].workload.concurrency == 4
        assert tried == [1, 2, 4, 8]
        assert solve.margins(job) == {"tokens_per_second": {"5% tighter": 0.25, "as asked": 0.25, "5% looser": 0.25}}


def test_a_check_that_was_not_run_is_not_counted_as_passed(finished, tmp_path, monkeypatch):
    model, _, wanted, _ = finished
    only("llama", model, "a missing engine")

    def missing():
        raise engine.NativeMissing("the native module is missing")

    monkeypatch.setattr(engine, "native_module", missing)
    report = run(model, tmp_path / "out", wanted)
    told = "8 of 8 passed, 1 not run: the native module is missing"
    assert f"checks     {told}" in summary.render(report)
    for page in ("README.md", "report.html"):
        assert told in (tmp_path / "out" / page).read_text()
    found = json.loads((tmp_path / "out" / "report.json").read_text())["verified"]["checks"]
    assert [check["not_run"] for check in found] == [None] * 8 + ["the native module is missing"]
    assert sum(check["ok"] for check in found) == 8


@pytest.mark.parametrize("model_type", DISTINCT)
def test_a_budget_that_needs_nothing_changes_nothing(model_type, pico, text, tmp_path):
    """The child of an ample budget is the parent: same tensors, byte for byte."""
    model = pico(model_type)
    report = run(model, tmp_path / "out", config(text, budget={"weights": "200%"}))
    assert report["chosen"]["solutions"][0]["layout"] == {}
    assert report["chosen"]["solutions"][0]["predicted"]["score"] == 0.0
    parent, child = Checkpoint(model), Checkpoint(tmp_path / "out")
    assert set(parent.entries) == set(child.entries)
    assert all(torch.equal(parent.read(name), child.read(name)) for name in parent.entries)
    quality = report["verified"]["quality"]
    assert quality["agreement"]["kl"] == 0.0
    assert quality["agreement"]["top1"] == 1.0
    assert quality["parent"] == quality["child"]


class At(Silent):
    """Does something when a stage begins, or has advanced `ticks` times."""

    def __init__(self, stage: str, do, ticks: int = 0) -> None:
        self._stage, self._do, self._ticks, self._left = stage, do, ticks, -1

    def begin(self, stage, **kwargs):
        self._left = self._ticks if stage == self._stage else -1
        self._tick()

    def advance(self, done, **figures):
        self._left -= 1
        self._tick()

    def _tick(self) -> None:
        if self._left == 0:
            self._do()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_stopped_in_every_stage_it_goes_on_to_the_same_bytes(finished, tmp_path):
    model, out, wanted, _ = finished
    only("llama", model, "the run folder")
    for stage in ("stats", "score", "solve", "build", "heal blocks", "heal model", "pack", "verify", "agreement"):
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", wanted, listen=At(stage, interrupt, ticks=1))
        assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", wanted)
    assert digests(tmp_path / "out") == digests(out)


def test_what_an_earlier_call_did_is_not_told_as_done_now(finished, tmp_path):
    model, _, wanted, _ = finished
    only("llama", model, "a stage")
    stages: dict[str, tuple[int, int]] = {}

    class StopAfterBlocks(Silent):
        def begin(self, stage, *, total, done=0, unit=""):
            stages[stage] = done, total
            if stage == "heal model" and not stopped:
                raise KeyboardInterrupt

    stopped = False
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", wanted, listen=StopAfterBlocks())
    blocks = stages["heal blocks"][1]
    assert blocks > 0 and stages["heal blocks"] == (0, blocks)
    stopped = True
    stages.clear()
    run(model, tmp_path / "out", wanted, listen=StopAfterBlocks())
    assert stages["heal blocks"] == (blocks, blocks)
    assert not {"stats", "score", "solve", "build"} & set(stages)
    assert {"pack", "verify", "agreement", "samples", "report"} <= set(stages)


def run_folder(out: Path) -> Path:
    return out.with_name(out.name + ".run")


def test_what_a_run_stands_on_cannot_change(finished, text, tmp_path, monkeypatch):
    """Model, tokenizer, text, how it is dealt out, versions and arithmetic: the first difference is named, with what
    came, what the run was begun with and what to do."""
    model, out, wanted, _ = finished
    only("llama", model, "the run folder")

    def refused(difference: str, model=model, wanted=wanted):
        with pytest.raises(ValueError) as err:
            open_job(model, out, wanted, run=run_folder(out))
        said = str(err.value)
        assert said.startswith(f"{run_folder(out)} was begun with {difference}"), said
        assert ", now it is " in said and said.endswith("choose another --run folder, or go back to that")

    refused("seed 0, now it is 7", wanted=merged(wanted, {"seed": 7}))
    refused("text score_rows 2, now it is 3", wanted=merged(wanted, {"data": {"score_rows": 3}}))
    changed = shutil.copytree(text, tmp_path / "text")
    (changed / "0.py").write_text("x = 1\n" * 3000)
    refused("text sha256", wanted=merged(wanted, {"data": {"text": str(changed)}}))
    for name, difference in (("model.safetensors", "model "), ("tokenizer.json", "tokenizer tokenizer.json ")):
        other = shutil.copytree(model, tmp_path / name)
        raw = bytearray((other / name).read_bytes())
        raw[-1] ^= 1 if name == "model.safetensors" else ord("}") ^ ord(" ")
        (other / name).write_bytes(raw + (b"}" if name == "tokenizer.json" else b""))
        refused(difference, model=other)
    for package in ("pennyweight", "tokenizers", "torch", "transformers"):
        with monkeypatch.context() as patched:
            installed = lambda name, own=package: "0.0" if name == own else version(name)  # noqa: E731
            patched.setattr("pennyweight.job.job.version", installed)
            refused(f'versions {package} "{version(package)}", now it is "0.0"')
    with monkeypatch.context() as patched:
        patched.setattr("torch.get_num_threads", lambda: 99)
        refused("arithmetic threads 1, now it is 99")
    refused('arithmetic dtype "torch.', wanted=merged(wanted, {"compute": "float32" if BRAIN else "bfloat16"}))


BRAIN = compute_dtype("auto") == torch.bfloat16


class Stages(Silent):
    """Remembers what began, and how much of it had been done before."""

    def __init__(self) -> None:
        self.began: dict[str, tuple[int, int]] = {}

    def begin(self, stage, *, total, done=0, unit=""):
        self.began[stage] = done, total


@pytest.fixture
def again(finished, tmp_path):
    """A copy of a finished fit: its model, its config, its folder and its run folder."""
    model, out, wanted, _ = finished
    only("llama", model, "the run folder")
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(run_folder(out), run_folder(tmp_path / "out"))
    return model, tmp_path / "out", wanted


def test_another_budget_is_solved_from_the_scores_there_are(again, tmp_path):
    model, out, wanted = again
    other = merged(
        wanted, {"budget": {"weights": "45%"}, "sweep": ("weights=60%",), "solutions": 1, "search": "greedy"}
    )
    stages = Stages()
    report = run(model, out, other, stages)
    assert not {"text", "score parent", "score"} & set(stages.began) or set(stages.began) >= {"solve"}
    assert not {"score parent", "score"} & set(stages.began)
    assert report["chosen"]["sweep"][0]["budget"] == {"weights": "60%"}
    run(model, tmp_path / "new" / "out", other)
    assert digests(out) == digests(tmp_path / "new" / "out")


def test_another_budget_is_quantised_anew_where_only_bits_change(pico, text, tmp_path):
    model = pico("qwen3")
    wanted = config(text, axes=("bits",), heal={"local_tokens": 0, "whole_tokens": 0}, budget={"weights": "60%"})
    run(model, tmp_path / "out", wanted)
    other = merged(wanted, {"budget": {"weights": "40%"}})
    run(model, tmp_path / "out", other)
    run(model, tmp_path / "new" / "out", other)
    assert digests(tmp_path / "out") == digests(tmp_path / "new" / "out")


def test_what_comes_out_the_same_is_not_built_again(again):
    """Another sweep: solved anew, written anew (penny.json tells the config); nothing healed or quantised again."""
    model, out, wanted = again
    before, stages = digests(out), Stages()
    report = run(model, out, merged(wanted, {"sweep": ("weights=70%",)}), stages)
    assert [each["budget"] for each in report["chosen"]["sweep"]] == [{"weights": "70%"}]
    assert not {"stats", "score", "measure child", "build", "heal blocks", "heal model"} & set(stages.began)
    assert stages.began["solve"] == (0, 2) and stages.began["pack"] == (3, 3)
    after = digests(out)
    assert {name for name in before if before[name] != after[name]} == {"penny.json"}


def test_more_text_to_judge_by_only_judges_again(again):
    model, out, wanted = again
    stages = Stages()
    run(model, out, merged(wanted, {"data": {"held_out_rows": 3}}), stages)
    assert "verify" in stages.began and not {"stats", "score", "solve", "build", "heal model"} & set(stages.began)


def test_slots_that_stay_as_they_were_are_not_healed_again(again):
    model, out, wanted = again
    known = Store(run_folder(out), json.loads(raw_value(out, "origin"))).keys("heal/local/")
    stages = Stages()
    run(model, out, merged(wanted, {"heal": {"whole_tokens": 512}}), stages)
    done, total = stages.began["heal blocks"]
    assert done == total == len(known) > 0 and stages.began["heal model"][0] == 0


def test_blocks_that_are_healed_and_not_the_model_are_healed_once(pico, text, tmp_path):
    began = []

    class Began(Silent):
        def begin(self, stage, **kwargs):
            began.append(stage)

    heal = {"local_tokens": 512, "whole_tokens": 0}
    wanted = config(text, heal=heal, budget={"weights": "26%"})
    told = run(pico("qwen3"), tmp_path / "out", wanted, Began())
    assert [began.count(stage) for stage in ("build", "heal blocks", "heal model")] == [1, 1, 0]
    assert told["fitted"] and all(after <= before for before, after in told["fitted"].values())
    assert "fitted to the parent's residual stream" in (tmp_path / "out" / "README.md").read_text()
    run(pico("qwen3"), tmp_path / "out", merged(wanted, {"heal": {"fit_tokens": 0}}), Began())
    assert [began.count(stage) for stage in ("build", "heal blocks", "fit in sequence")] == [2, 2, 1]


def test_more_axes_score_only_what_is_new(again):
    model, out, wanted = again
    stages = Stages()
    run(model, out, merged(wanted, {"axes": (*wanted.axes, "few_bits")}), stages)
    done, total = stages.began["score"]
    assert 0 < total - done < total / 2


def test_the_result_may_go_to_another_place(again, tmp_path):
    model, out, wanted = again
    stages = Stages()
    with open_job(model, tmp_path / "elsewhere", wanted, run=run_folder(out), listen=stages) as job:
        run_job(job)
    assert set(stages.began) == {"read inputs", "report"}
    assert digests(tmp_path / "elsewhere") == digests(out)


def raw_value(out: Path, key: str) -> str:
    rows = sqlite3.connect(run_folder(out) / "run.sqlite").execute("select value from kept where key = ?", (key,))
    return rows.fetchone()[0]


def spoil(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes({"emptied": b"", "cut": raw[:-1], "flipped": raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:]}[how])


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *(("model.safetensors", how) for how in ("removed", "emptied", "cut", "flipped")),
        *((name, "flipped") for name in ("config.json", "penny.json", "tokenizer.json")),
    ],
)
def test_a_damaged_candidate_is_never_shipped(again, what, how):
    model, out, wanted = again
    before = digests(out)
    spoil(run_folder(out) / "candidate" / what, how)
    shutil.rmtree(out)
    run(model, out, wanted)
    assert digests(out) == before


@pytest.mark.parametrize("how", ["removed", "flipped"])
def test_whatever_file_of_a_run_folder_is_damaged_the_result_stays_right(again, how, tmp_path):
    """All of them at once, after which another child is asked for and the first one again."""
    model, out, wanted = again
    before = digests(out)
    for path in [path for path in run_folder(out).rglob("*") if path.is_file() and path.parent != run_folder(out)]:
        spoil(path, how)
    shutil.rmtree(out)
    run(model, out, wanted)
    assert digests(out) == before


def test_a_damaged_score_is_made_again(again):
    model, out, wanted = again
    before = digests(out)
    database = sqlite3.connect(run_folder(out) / "run.sqlite", isolation_level=None)
    key, value = database.execute("select key, value from kept where key like 'score/0/1.ffn/%'").fetchone()
    other = re.sub(r"\.(\d)", lambda digit: f".{(int(digit[1]) + 1) % 10}", value, count=1)
    database.execute("update kept set value = ? where key = ?", (other, key))
    database.execute("delete from kept where key = 'chosen'")
    database.close()
    stages = Stages()
    run(model, out, wanted, stages)
    done, total = stages.began["score"]
    assert 0 < total - done < total / 20
    assert digests(out) == before


def test_a_second_start_says_who_is_at_it_and_leaves(finished, tmp_path):
    model, out, wanted, _ = finished
    only("llama", model, "the run folder")
    with open_job(model, out, wanted):
        with pytest.raises(Held, match=rf"out\.run is worked on by process {os.getpid()} on .* since 20"):
            open_job(model, out, wanted)
        with open_job(model, out, wanted, dry=True) as dry:
            assert plan(dry)["slots"] > 0
    with open_job(model, out, wanted):
        pass


def test_a_dry_run_and_a_budget_that_cannot_be_met_leave_nothing_behind(pico, text, tmp_path):
    wanted = config(text, budget={"weights": "50%"})
    with open_job(pico("llama"), tmp_path / "out", wanted, dry=True) as job:
        assert plan(job)["choices"] > 0
    with pytest.raises(Infeasible):
        run(pico("llama"), tmp_path / "out", config(text, budget={"weights": "2%"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sweep": ("wait=30%",)}, "--sweep 'wait=30%': write BOUND=VALUE with one of memory, weights"),
        ({"sweep": ("weights",)}, "write BOUND=VALUE"),
        ({"sweep": ("weights=lots",)}, "'lots' is not a size"),
        ({"budget": {"tpot": "soon"}}, "'soon' is not a time"),
        ({"budget": {"throughput": "5km/h"}}, "is not a rate"),
        ({"axes": ("bits", "Bits")}, "there is no variants called 'Bits'; there are: bits"),
        ({"search": "luck"}, "there is no search called 'luck'"),
        ({"machine": "abacus"}, "no machine 'abacus'"),
        ({"max_pending": "many"}, "'many' is not a size"),
        ({"max_pending": "50%"}, "a share needs something to be a share of"),
        ({"max_ram": "some"}, "'some' is not a size"),
        ({"max_disk": "0"}, "is no room to work in"),
        ({"workload": {"prompt": 0}}, "prompt is 0; it must be at least 1"),
        ({"workload": {"context": 8}}, "context 8 is shorter than prompt"),
        ({"also": ({"workload": {"new": 0}, "budget": {"ttft": "1s"}},)}, "new is 0; it must be at least 1"),
        ({"also": ({"budget": {"ttft": "soon"}},)}, "'soon' is not a time"),
        ({"also": ({"workload": {"prompt": 64}},)}, "a workload beside the first needs a bound of its own: memory"),
    ],
)
def test_every_option_is_understood_before_anything_is_read(changes, said, text, tmp_path):
    wanted = merged(config(text, budget={"weights": "50%"}), changes)
    with pytest.raises(ValueError, match=re.escape(said)) as err:
        open_job(tmp_path / "no model here", tmp_path / "out", wanted)
    assert "\n" not in str(err.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "luck"}, "metric: Input should be 'kl', 'lm', 'cosine', 'nmse' or 'error'; found 'luck'"),
        ({"prices": "low"}, "prices: Input should be 'computed' or 'measured'"),
        ({"data": {"score_rows": 0}}, "data.score_rows: Input should be greater than or equal to 1; found 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    ],
)
def test_what_cannot_be_a_config_is_told_in_one_line(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)) as err:
        merged(FitConfig(), changes)
    assert "\n" not in str(err.value)


def test_a_further_demand_is_read_from_one_text():
    (found,) = merged(FitConfig(), asked(also=["prompt=2k, new=64,concurrency=8,ttft=900ms,cache=int8"])).also
    assert found.workload.model_dump(exclude={"context"}) == {
        "prompt": 2048,
        "new": 64,
        "concurrency": 8,
        "cache": "int8",
    }
    assert found.budget.model_dump(exclude_none=True) == {"ttft": "900ms"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt", "--also 'prompt': write NAME=VALUE, comma-separated, with names of memory"),
        ("promt=3", "--also 'promt=3': write NAME=VALUE"),
        ("cache=int7,ttft=1s", "cache: Input should be 'float16', 'int8' or 'float32'"),
        ("prompt=many,ttft=1s", "'many'"),
    ],
)
def test_a_further_demand_that_cannot_be_read_is_told_in_one_line(text, said):
    with pytest.raises(ValueError, match=re.escape(said)) as err:
        asked(also=[text])
    assert "\n" not in str(err.value)


def test_axes_are_trimmed_and_named_once():
    assert merged(FitConfig(), asked(axes=" bits, ffn_width,bits")).axes == ("bits", "ffn_width")


@pytest.mark.parametrize("out", ["model", "link", "parent", "run"])
def test_an_output_that_would_replace_an_input_is_refused(out, pico, text, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "models" / "model")
    (model / "penny.json").write_text("{}")
    (tmp_path / "models" / "penny.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    places = {"model": model, "link": tmp_path / "link", "parent": tmp_path / "models", "run": tmp_path / "new"}
    with pytest.raises(ValueError, match=r" is the model| lies in "):
        open_job(model, places[out], config(text, budget={"weights": "50%"}), run=tmp_path / "new" / "run")
    assert (model / "model.safetensors").exists()


def test_a_disk_that_fills_up_in_any_stage_stops_it_to_go_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    """Every way to write fails from the moment a stage has begun, as it fails in each library's own words."""
    model, out, wanted, _ = finished
    only("llama", model, "the run folder")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    def full_rust(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for stage in ("stats", "score parent", "score", "build", "heal blocks", "write child", "pack", "report"):
        with monkeypatch.context() as patched:

            def fill(patched=patched):
                patched.setattr("pennyweight.runs.store.write_atomic", full)
                patched.setattr("pennyweight.runs.scratch.save_file", full_rust)
                patched.setattr("pennyweight.judge.score._KEEP_EVERY_S", 0.0)
                patched.setattr("safetensors.torch.save_file", full_rust)
                patched.setattr(shutil, "copyfile", full)

            with pytest.raises(OSError) as err:
                run(model, tmp_path / "out", wanted, listen=At(stage, fill))
        assert err.value.errno == errno.ENOSPC
        assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", wanted)
    assert digests(tmp_path / "out") == digests(out)


def peak(model, out, wanted) -> tuple[int, dict]:
    """The most that the run folder held whenever something was told, and what was told beforehand."""
    sizes = [0]

    class Watching(Silent):
        def advance(self, done, **figures):
            sizes.append(space.used_bytes(run_folder(out)))

    report = run(model, out, wanted, Watching())
    return max(sizes), report["plan"]


def test_what_the_run_folder_takes_is_told_beforehand_and_bounded(pico, text, tmp_path, monkeypatch):
    monkeypatch.setattr("pennyweight.job.plan._SMALL", 2**19)
    model, heal = pico("llama"), {"whole_tokens": 512, "local_tokens": 0}
    wanted = config(text, budget={"weights": "25%"}, axes=("bits", "ffn_width"), heal=heal, max_pending="100kB")
    most, told = peak(model, tmp_path / "a", wanted)
    assert most <= told["disk_bytes"] <= 3 * most
    bounded = merged(wanted, {"max_disk": str(told["disk_bytes"] - 1)})
    less, told_less = peak(model, tmp_path / "b", bounded)
    assert less <= told_less["disk_bytes"] < told["disk_bytes"]
    assert space.used_bytes(run_folder(tmp_path / "b")) < space.used_bytes(run_folder(tmp_path / "a"))
    names = ("config.json", "model.safetensors")
    assert [digests(tmp_path / "a")[name] for name in names] == [digests(tmp_path / "b")[name] for name in names]
    with pytest.raises(ValueError, match="--max-disk 1kB is too little: the run folder needs up to"):
        run(model, tmp_path / "c", merged(wanted, {"max_disk": "1kB"}))
    assert not run_folder(tmp_path / "c").exists()


@pytest.mark.parametrize("there", [10**12, 10**5])
def test_a_disk_that_is_full_beforehand_is_full_and_one_that_is_too_small_is_refused(
    pico, text, tmp_path, monkeypatch, there
):
    monkeypatch.setattr("pennyweight.runs.space.free_bytes", lambda folder: 0)
    monkeypatch.setattr("pennyweight.runs.space.whole_bytes", lambda folder: there)
    with pytest.raises(OSError if there > 10**6 else ValueError, match="needs up to") as told:
        run(pico("llama"), tmp_path / "out", config(text))
    assert getattr(told.value, "errno", errno.ENOSPC) == errno.ENOSPC
    assert not run_folder(tmp_path / "out").exists()


def test_moments_that_only_codes_need_are_not_kept(pico, text, tmp_path):
    """Those of an FFN's inner activation are most of what statistics take."""
    wanted = config(text, budget={"weights": "40%"}, axes=("bits",))
    with open_job(pico("llama"), tmp_path / "out", wanted) as job:
        gather_stats(job)
        kept = job.store.tensors("stats/0")
        assert all(tensor.ndim == 1 for name, tensor in kept.items() if name.endswith("_moment"))
        score_choices(job)
    with open_job(pico("llama"), tmp_path / "out", merged(wanted, {"axes": ("bits", "kv_heads", "linear")})) as job:
        gather_stats(job)
        whole = {name for name, tensor in job.store.tensors("stats/0").items() if tensor.ndim == 2}
        crossed = {"mixer.cross_moment", "ffn.cross_moment"}
        assert whole == {"mixer.input_moment", "mixer.inner_moment", "ffn.input_moment"} | crossed


def test_codes_of_a_matrix_are_found_once(pico, text, tmp_path, monkeypatch):
    """Not for every chunk, not by every axis, not when a stopped run goes on, not when the child is measured."""
    found: list[tuple] = []
    quantize = gptq.quantize

    def counted(weight, prepared, spec):
        found.append((hashlib.sha256(weight.float().numpy().tobytes()).hexdigest(), str(spec)))
        return quantize(weight, prepared, spec)

    monkeypatch.setattr(gptq, "quantize", counted)
    axes = ("window", "bits", "mixed_bits")
    wanted = config(text, budget={"weights": "35%"}, axes=axes, heal={"whole_tokens": 0, "local_tokens": 0})
    wanted = merged(wanted, {"data": {"score_rows": 6}})  # three chunks

    with pytest.raises(KeyboardInterrupt):
        run(pico("llama"), tmp_path / "out", wanted, At("measure child", interrupt))
    groups = 2  # of 64 and 32 columns
    # Each of 7 matrices in 4 bits and two groups, but o_proj, whose 96 columns have groups of 32 either way, in one;
    # and in 8 bits where mixed_bits wants GPTQ to find those.
    assert len(found) == len(set(found)) == 3 * (7 * groups - 1 + 7)
    found.clear()

    with pytest.raises(KeyboardInterrupt):
        run(pico("llama"), tmp_path / "out", wanted, At("pack", interrupt))
    assert not found


def test_the_time_of_a_stage_is_without_that_of_stages_it_waits_for(pico, text, tmp_path):
    wanted = config(text, budget={"weights": "30%"}, heal={"local_tokens": 0, "whole_tokens": 512, "batch_rows": 4})
    report = run(pico("llama"), tmp_path / "out", wanted, At("heal model", lambda: time.sleep(3)))
    assert report["timings"]["heal"] >= 3 > report["timings"]["pack"] > 0


def test_packing_takes_the_codes_of_the_embedding_that_scoring_found(pico, text, tmp_path, monkeypatch):
    wanted = config(text, budget={"weights": "35%"}, axes=("bits",), heal={"whole_tokens": 0, "local_tokens": 0})
    made: list[str] = []
    of = scratch.Remembered.of

    def heard(self, source, how, make):
        return of(self, source, how, lambda: made.append(how) or make())

    monkeypatch.setattr(scratch.Remembered, "of", heard)

    report = run(pico("llama"), tmp_path / "out", wanted, At("pack", lambda: made.append("pack")))
    layout = report["chosen"]["solutions"][0]["layout"]
    assert layout["embed"]["bits"]["bits"] == 4 and made.count("pack") == 1
    assert made[-1] == "pack", "nothing was found again"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_share_is_of_the_parent_s_16_bits_and_the_child_says_what_it_is_stored_in(dtype, pico, text, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    parent = load_model(model, dtype=getattr(torch, dtype))
    parent.save_pretrained(model)
    wanted = config(text, budget={"weights": "60%"}, axes=("bits",))
    report = run(model, tmp_path / "out", wanted)
    whole = Checkpoint(pico("llama")).weight_bytes
    assert report["plan"]["parent_bytes"] == report["parent"]["bytes"] == whole
    assert safetensors_bytes(tmp_path / "out") <= 0.6 * whole
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {said[key] for key in ("dtype", "torch_dtype") if key in said} == {"bfloat16"}
    made = planning.plan(
        json.loads((model / "config.json").read_text()),
        Workload(prompt=32, new=16),
        Machine.load("m2-max"),
        wanted.budget.resolve(parent_bytes=whole),
        wanted.axes,
    )
    assert made.verdict.startswith("fits after shrinking: bits alone leaves")


def test_an_impossible_budget_is_refused_before_any_work(pico, text, tmp_path):
    class Nothing(Silent):
        def begin(self, stage, **kwargs):
            assert stage in ("read inputs", "plan"), f"{stage} began"

    with pytest.raises(Infeasible) as caught:
        run(pico("llama"), tmp_path / "out", config(text, budget={"weights": "2%"}), listen=Nothing())
    nearest = caught.value.nearest
    assert caught.value.bound == "weight_bytes"
    assert nearest is not None
    assert nearest > 0.02 * Checkpoint(pico("llama")).weight_bytes


def test_a_result_that_breaks_a_promise_is_not_shipped(finished, tmp_path, monkeypatch):
    model, _, wanted, _ = finished
    only("gemma3_text", model, "what becomes of a refused child")
    bad = verify.Check("greedy tokens after reloading in transformers", False, 128, 3)
    monkeypatch.setattr(verify, "check_reload", lambda *args: bad)
    with pytest.raises(verify.VerificationFailed, match="expected 128, found 3"):
        run(model, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "config.json").exists()


def test_too_large_for_memory_is_walked_instead(pico, text, tmp_path):
    wanted = config(
        text, budget={"weights": "40%"}, axes=("bits",), max_ram="10kB", heal={"whole_tokens": 0, "local_tokens": 0}
    )
    report = run(pico("qwen2"), tmp_path / "out", wanted)
    assert not report["verified"]["whole"]
    assert "walked layer by layer" in report["verified"]["checks"][-1]["name"]
    assert report["verified"]["quality"]["agreement"]["kl"] > 0


def test_healing_beyond_memory_is_refused(pico, text, tmp_path):
    with pytest.raises(ValueError, match="--heal-tokens 0"):
        run(pico("qwen2"), tmp_path / "out", config(text, budget={"weights": "20%"}, max_ram="10kB"))


def test_time_bounds_choose_faster_models(pico, text, tmp_path):
    """Priced for a shipped machine: a bound on TPOT below the parent's own is met."""
    base = {"machine": "m2-max", "axes": ("noop", "ffn_width"), "heal": {"whole_tokens": 0, "local_tokens": 0}}
    job = open_job(pico("llama"), tmp_path / "a", config(text, budget={"weights": "100%"}, **base))
    parent = plan(job)["parent"]["1"]["tpot_seconds"]
    bound = f"{parent * 0.8 * 1e6:.3f}us"
    report = run(pico("llama"), tmp_path / "b", config(text, budget={"tpot": bound}, **base))
    assert report["chosen"]["solutions"][0]["predicted"]["tpot_seconds"] <= 0.8 * parent
    assert report["chosen"]["solutions"][0]["layout"]


def test_an_ffn_of_odd_width_keeps_one_scale_per_row(pico, text, tmp_path):
    model = pico("llama", intermediate_size=172)
    report = run(model, tmp_path / "out", config(text, budget={"weights": "40%"}, axes=("bits",)))
    assert all(check["ok"] for check in report["verified"]["checks"])
    child = Checkpoint(tmp_path / "out")
    down = "model.layers.0.mlp.down_proj.weight_"
    assert child.entries[down + "scale"].shape == (64, 1)
    assert child.entries[down + "packed"].shape == (64, 22)


def test_text_from_the_parent_itself(pico, tmp_path):
    wanted = merged(
        QUICK, {"data": {"text": "parent", "sampled_rows": 16}, "budget": {"weights": "35%"}, "axes": ("bits",)}
    )
    report = run(pico("llama"), tmp_path / "out", wanted)
    assert all(check["ok"] for check in report["verified"]["checks"])


def test_a_tokenizer_of_another_model_is_refused(pico, text, tmp_path):
    wrong = shutil.copytree(pico("llama", vocab_size=200), tmp_path / "wrong")
    with pytest.raises(ValueError, match="vocabulary ends at 199"):
        run(wrong, tmp_path / "out", config(text, budget={"weights": "50%"}))


def test_a_folder_that_is_not_ours_is_left_alone(pico, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="was not made by penny"):
        open_job(pico("llama"), tmp_path / "out", config(text, budget={"weights": "50%"}))
    assert (tmp_path / "out" / "thesis.txt").exists()
