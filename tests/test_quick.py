"""penny quantize: the same job where nothing is searched by running children, and what its scores are made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pennyweight.cli import app
from pennyweight.config import FitConfig, merged
from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.disk.tokenizer import load_tokenizer
from pennyweight.evals.agree import agree, compare
from pennyweight.evals.loss import loss
from pennyweight.job.gather import gather_stats, scores, singles
from pennyweight.job.job import open_job
from pennyweight.job.run import run_job
from pennyweight.judge import moments, score
from pennyweight.judge.stats import Collector
from pennyweight.live.load import load_stock
from pennyweight.live.walk import Walk
from pennyweight.model.slots import Slot
from pennyweight.report import draw
from pennyweight.runs.events import Silent
from pennyweight.texts import from_path, rows

QUICK = {
    "data": {"context": 64, "calibration_rows": 4, "score_rows": 2, "held_out_rows": 2, "rows_per_chunk": 2},
    "heal": {"local_tokens": 0, "whole_tokens": 0},
    "workload": {"prompt": 32, "new": 16},
    "machine": "m2-max",  # this machine would be measured anew by every run
    "metric": "error",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.py").write_text(Path(__file__).read_text() + f"# {i}\n" * (i + 1))
    return folder


def config(text, **changes) -> FitConfig:
    return merged(merged(FitConfig(), QUICK), {"data": {"text": str(text)}, **changes})


def run(model, out, wanted):
    with open_job(model, out, wanted, listen=Silent()) as job:
        report = run_job(job)
        return report, job.store.keys("stats/") if job.store else []


def kept_in(folder: Path) -> dict[str, set[tuple[int, int]]]:
    walk = Walk(Checkpoint(folder))
    return {str(slot): {(way.bits, way.group) for way in walk.stored(slot)} for slot in walk.shapes}


@pytest.fixture(scope="module")
def uniform(pico, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("uniform") / "out"
    wanted = config(text, uniform={"bits": 4}, axes=("bits",))
    return pico("llama"), out, wanted, *run(pico("llama"), out, wanted)


def test_uniform_bits_are_the_same_everywhere_and_nothing_is_gathered(uniform):
    _, out, _, report, gathered = uniform
    kept = {slot: ways - {(16, 0)} for slot, ways in kept_in(out).items()}
    assert {slot for slot, ways in kept.items() if ways == {(8, 64)}} == {"embed", "head"}
    assert sum(ways == {(4, 32)} for ways in kept.values()) == 2 * 3
    assert not gathered and all(slot["score"] == 0 for slot in report["slots"])
    assert len(report["verified"]["checks"]) == 8 and all(check["ok"] for check in report["verified"]["checks"])
    assert report["unhealed"]["kl"] > 0


def test_a_matrix_that_the_group_does_not_divide_has_a_smaller_one(pico, text, tmp_path):
    """Not one scale for a whole row of 96: an FFN that was made narrower would pay for it. Stock transformers and the
    engine read it (checks)."""
    wanted = config(text, uniform={"bits": 4, "group": 64}, axes=("bits",))
    report, _ = run(pico("llama", intermediate_size=96), tmp_path / "out", wanted)
    stored = Checkpoint(tmp_path / "out").config["quantization_config"]["config_groups"].values()
    (of_down,) = (each["weights"] for each in stored if "model.layers.0.mlp.down_proj" in each["targets"])
    (of_up,) = (each["weights"] for each in stored if "model.layers.0.mlp.up_proj" in each["targets"])
    assert (of_down["strategy"], of_down["group_size"], of_up["group_size"]) == ("group", 32, 64)
    assert len(report["verified"]["checks"]) == 8 and all(check["ok"] for check in report["verified"]["checks"])


def test_codes_of_uniform_bits_are_better_than_rounding(uniform, text):
    """GPTQ on what enters each layer of the child, though no statistics of the parent were gathered."""
    *_, report, _ = uniform
    assert report["verified"]["quality"]["agreement"]["kl"] < 0.9 * report["unhealed"]["kl"]


def test_a_finished_uniform_run_goes_on_to_the_same_bytes(uniform):
    model, out, wanted, *_ = uniform
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    run(model, out, wanted)
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() == digest


def test_pages_of_a_uniform_run_claim_no_search(uniform):
    _, out, *_ = uniform
    card, page = (out / "README.md").read_text(), draw(out).read_text()
    assert "nothing was searched" in card and "nothing was searched" in page
    assert "least summed score" not in card + page and "budget was kept" not in card


@pytest.mark.parametrize(
    ("uniform", "blocks", "ends"),
    [
        ({"bits": 3, "group": 64}, (3, 32), (8, 64)),
        ({"bits": 5, "group": 128, "embedding_bits": 3}, (8, 64), (4, 64)),
    ],
)
def test_slots_take_the_fewest_bits_from_those_asked_for_on(pico, text, tmp_path, uniform, blocks, ends):
    wanted = config(text, uniform=uniform, axes=("bits", "few_bits"))
    with open_job(pico("llama"), tmp_path / "out", wanted, dry=True) as job:
        found = singles(job)
    for slot, (choice,) in found.items():
        ((_, spec),) = choice.specs
        assert (spec.bits, spec.group) == (ends if slot.layer is None else blocks)
    wanted = config(text, uniform={"bits": 4, "embedding_bits": 9}, axes=("bits",))
    with (
        open_job(pico("llama"), tmp_path / "out", wanted, dry=True) as job,
        pytest.raises(ValueError, match=r"embed can be kept in 4, 8 bits, not in 9"),
    ):
        singles(job)


def test_a_mix_keeps_its_budget_and_runs_no_child_to_choose(pico, text, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "score_chunk", lambda *_: pytest.fail("a child was scored"))
    wanted = config(text, budget={"weights": "36%"}, axes=("bits", "mixed_bits"))
    report, gathered = run(pico("qwen3"), tmp_path / "out", wanted)
    assert gathered and safetensors_bytes(tmp_path / "out") <= 0.36 * report["parent"]["bytes"]
    assert len({ways for own in kept_in(tmp_path / "out").values() for ways in own} - {(16, 0)}) > 1
    predicted = report["chosen"]["solutions"][0]["predicted"]
    assert predicted["score"] == pytest.approx(sum(slot["score"] for slot in report["slots"]))
    assert predicted["score"] > 0 and "lm" not in predicted
    draw(tmp_path / "out")


def test_errors_fall_with_bits_and_narrow_groups(pico, text, tmp_path):
    with open_job(pico("qwen3"), tmp_path / "out", config(text, axes=("bits",), budget={"weights": "50%"})) as job:
        gather_stats(job)
        known = scores(job)
        for slot, offered in singles(job).items():
            by_way = {(c["bits"].bits, c["bits"].group): known[slot][c.key()]["error"] for c in offered}
            assert 0 < by_way[8, 64] < 0.05 * by_way[4, 32] < 0.05 * by_way[4, 64]


def test_what_is_lost_is_the_error_of_the_answers():
    """Against the definition: the mean square of dW x over that of W x, on the inputs themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(17, 24, generator=generator)
    kept = weight + 0.1 * torch.randn(17, 24, generator=generator)
    answers, wrong = x @ weight.T, x @ (kept - weight).T
    found = moments.lost(weight, kept, x.T @ x / len(x))
    assert found == pytest.approx(float(wrong.square().sum() / answers.square().sum()), rel=1e-4)
    assert moments.lost(weight, kept, None) == pytest.approx(float(((kept - weight) ** 2).sum() / (weight**2).sum()))
    assert moments.lost(torch.zeros(3, 4), torch.ones(3, 4), None) == 0.0


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_the_share_is_of_what_joins_the_residual_stream(pico, family):
    """Norms behind a block and factors on what it adds included, token by token: with the FFN's part alone changed,
    the stream that leaves the layer less the one before the FFN is what it adds."""
    walk = Walk(Checkpoint(pico(family)))
    layer = walk.layer(1)
    hidden = walk.embed(torch.arange(40).view(2, 20))
    ffn = Slot("ffn", 1)
    with torch.no_grad(), Collector(layer.parts, {ffn: ("share",)}) as collector:
        left = layer.run(hidden)
    module = layer.parts[ffn].norm("post_norm") or layer.parts[ffn].block
    handle = module.register_forward_hook(lambda _m, _a, output: output * 0)
    with torch.no_grad():
        without = layer.run(hidden)
    handle.remove()
    expected = (left - without).square().sum(-1) / left.square().sum(-1)
    assert float(collector.sums["ffn.share"]) == pytest.approx(float(expected.sum()), rel=1e-3)


def test_one_pass_gives_the_losses_and_the_agreement(pico, text):
    tokenizer = load_tokenizer(pico("llama"))
    measured = rows(from_path(text), tokenizer, 48).take(3)
    parent, child = load_stock(pico("llama")), load_stock(pico("llama", initializer_range=0.03))
    found = compare(parent, child, measured)
    assert found.agreement == agree(parent, child, measured)
    for mine, model in ((found.parent, parent), (found.child, child)):
        whole = loss(model, measured)
        assert (mine.tokens, mine.nbytes) == (whole.tokens, whole.nbytes)
        assert mine.nats == pytest.approx(whole.nats, rel=1e-6)
    assert found.parent.nats != pytest.approx(found.child.nats, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "either --bits"),
        (("--bits", "4", "--weights", "30%"), "either --bits"),
        (("--weights", "30%", "--group", "64"), "--group and --embedding-bits go with --bits"),
        (("--bits", "4", "--axes", "bits,ffn_width"), "cannot judge the axis ffn_width"),
        (("--weights", "30%", "--axes", "sparsity"), "cannot judge the axis sparsity; choose --axes among bits"),
    ],
)
def test_what_quantize_cannot_do_is_said_in_one_line(pico, tmp_path, options, said):
    found = CliRunner().invoke(app, ["quantize", str(pico("llama")), "--out", str(tmp_path / "out"), *options])
    assert found.exit_code == 2 and said in found.stderr and not list(tmp_path.iterdir())


def test_the_command_makes_a_folder_and_names_it(pico, text, tmp_path):
    out = tmp_path / "small"
    told = [
        "--bits",
        "8",
        "--text",
        str(text),
        "--context-tokens",
        "64",
        "--calibration-rows",
        "2",
        "--held-out-rows",
        "1",
    ]
    found = CliRunner().invoke(app, ["quantize", str(pico("llama")), "--out", str(out), *told])
    assert found.exit_code == 0, found.stderr
    assert found.stdout.splitlines()[-1] == str(out) and "8 of 8 passed" in found.stdout
    assert json.loads((out / "penny.json").read_text())["config"]["uniform"] == {
        "bits": 8,
        "group": 32,
        "embedding_bits": 8,
    }
