"""The whole job on pico models: it keeps its budget, resumes to the same bytes, and refuses what cannot work."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pennyweight.config import FitConfig, merged
from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.job import checks as verify
from pennyweight.job.job import open_job
from pennyweight.job.plan import plan
from pennyweight.job.run import run_job
from pennyweight.job.verify import _speed
from pennyweight.live.load import load_model
from pennyweight.model import shapes as slots
from pennyweight.model.demand import Workload
from pennyweight.report import summary
from pennyweight.runs.events import Silent
from pennyweight.runtime import engine
from pennyweight.runtime.lower import NotRun
from pennyweight.search import Infeasible
from tests.conftest import FAMILIES

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
        (folder / f"{i}.py").write_text(Path(__file__).read_text() + Path(slots.__file__).read_text()[i * 500 :][:9000])
    return folder


def config(text, **changes) -> FitConfig:
    return merged(QUICK, {"data": {"text": str(text)}, **changes})


def run(model, out, wanted, listen=None):
    return run_job(open_job(model, out, wanted, listen=listen or Silent()))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))} | {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "penny.json")
    }


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, pico, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "out"
    wanted = config(text, budget={"weights": "26%"}, sweep=("weights=50%", "weights=1%"), solutions=2, min_different=2)
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
    logits = load_model(out, dtype=torch.float32)(ids.view(1, -1)).logits[0].detach()
    assert verify.check_engine(out, ids, logits).ok
    assert not verify.check_engine(out, ids, logits.roll(1, dims=1)).ok

    def raising(err):
        def native_module():
            raise err

        monkeypatch.setattr(engine, "native_module", native_module)
        return verify.check_engine(out, ids, logits)

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
        workload=Workload(prompt=16, new=8),
        model=pico("llama"),
        checkpoint=Checkpoint(pico("llama")),
        listen=Silent(),
    )

    def native_module():
        raise err

    monkeypatch.setattr(engine, "native_module", native_module)
    if said is None:
        with pytest.raises(type(err), match=str(err)):
            _speed(job, pico("llama"))
    else:
        assert _speed(job, pico("llama")) == (None, said)
    job.workload = Workload(prompt=300, new=8)
    speed, how = _speed(job, pico("llama"))
    assert speed is None and "takes up to 256 in all" in how


def test_a_check_that_was_not_run_is_not_counted_as_passed(finished, tmp_path, monkeypatch):
    model, _, wanted, _ = finished
    if "llama" not in str(model):
        pytest.skip("one family is enough: the engine is told apart, not the model")

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


@pytest.mark.parametrize("model_type", FAMILIES)
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


@pytest.mark.parametrize("stage", ["stats", "score", "build", "heal blocks", "heal model", "pack", "verify"])
def test_stopped_in_any_stage_it_goes_on_to_the_same_bytes(stage, finished, tmp_path):
    model, out, wanted, _ = finished
    if "qwen3" not in str(model):
        pytest.skip("one family is enough: stages do not depend on it")

    class StopIn(Silent):
        def begin(self, name, **kwargs):
            self.name = name

        def advance(self, done, **figures):
            if self.name == stage:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", wanted, listen=StopIn())
    assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", wanted)
    assert digests(tmp_path / "out") == digests(out)


def test_what_an_earlier_call_did_is_not_told_as_done_now(finished, tmp_path):
    model, _, wanted, _ = finished
    if "qwen3" not in str(model):
        pytest.skip("one family is enough: stages do not depend on it")
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
    assert {"pack", "verify", "loss of parent", "loss of child", "agreement", "samples", "report"} <= set(stages)


def test_another_config_model_or_text_is_refused_with_the_reason(finished, pico, text, tmp_path):
    model, out, wanted, _ = finished
    folder = out.with_name(out.name + ".run")
    with pytest.raises(ValueError, match=r"config\.seed was 0, now it is 7"):
        open_job(model, out, merged(wanted, {"seed": 7}), run=folder)
    other = shutil.copytree(text, tmp_path / "text")
    (other / "0.py").write_text("x = 1\n" * 3000)
    with pytest.raises(ValueError, match="text was"):
        same = merged(wanted, {"data": {"text": str(text)}})
        (text / "extra.py").write_text("y = 2\n")
        try:
            open_job(model, out, same, run=folder)
        finally:
            (text / "extra.py").unlink()
    changed = shutil.copytree(model, tmp_path / "model")
    raw = bytearray((changed / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (changed / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="model was"):
        open_job(changed, out, wanted, run=folder)


def test_an_impossible_budget_is_refused_before_any_work(pico, text, tmp_path):
    class Nothing(Silent):
        def begin(self, stage, **kwargs):
            assert stage == "read inputs", f"{stage} began"

    with pytest.raises(Infeasible) as caught:
        run(pico("llama"), tmp_path / "out", config(text, budget={"weights": "2%"}), listen=Nothing())
    nearest = caught.value.nearest
    assert caught.value.bound == "weight_bytes"
    assert nearest is not None
    assert nearest > 0.02 * Checkpoint(pico("llama")).weight_bytes


def test_a_result_that_breaks_a_promise_is_not_shipped(finished, tmp_path, monkeypatch):
    model, _, wanted, _ = finished
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
    parent = plan(job)["parent"]["tpot_seconds"]
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
