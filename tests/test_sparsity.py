"""Channels left out: the thresholds leave out what they promise, and a fit with sparse blocks keeps every promise."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import pytest
import torch

from pennyweight import formats, quantize
from pennyweight.config import merged
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.formats import zigzag
from pennyweight.job import checks
from pennyweight.job.job import open_job
from pennyweight.job.plan import plan
from pennyweight.judge.stats import SlotStats
from pennyweight.live import magnitudes
from pennyweight.live.load import load_model
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model.shapes import Weight
from pennyweight.model.slots import Slot
from pennyweight.variants import layout_from_json, sparsity
from tests.conftest import DISTINCT
from tests.test_job import config, run, text  # noqa: F401  (text is a fixture)


def test_tables_of_counts_are_the_quantiles():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    values[:20_000] = 0
    table = magnitudes.quantiles(magnitudes.counts(values[:50_000]) + magnitudes.counts(values[50_000:]))
    wanted = torch.quantile(values, torch.linspace(0, 1, len(table)))
    assert torch.allclose(table[1:-1], wanted[1:-1], rtol=1 / 60, atol=1e-3)
    assert bool((table.diff() >= 0).all())
    for share in (0.25, 0.4, 0.5, 0.7):
        left_out = float((values <= magnitudes.threshold(table, share)).float().mean())
        assert abs(left_out - share) < 0.004


def test_nothing_counted_is_said():
    with pytest.raises(ValueError, match="did not reach this input"):
        magnitudes.quantiles(torch.zeros(magnitudes.BINS))


def test_columns_that_matter_more_are_kept_longer():
    weights = [torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 3.0]])]
    assert torch.allclose(magnitudes.importance(weights), torch.tensor([3.0, 5.0]) / 4)
    block = torch.nn.Linear(4, 4, bias=False)
    block.weight.data = torch.eye(4)
    magnitudes.leave_out(block, 4, 0.5, weighted=True)
    block.magnitudes.data = torch.linspace(0, 2, len(block.magnitudes))  # half is below 1
    block.importance.data = torch.tensor([1.0, 0.1, 1.0, 3.0])
    x = torch.tensor([[2.0, 2.0, 0.9, -0.9]])
    assert torch.equal(block(x), torch.tensor([[2.0, 0.0, 0.0, -0.9]]))
    many = block(x.expand(1, 6, 4))
    assert torch.equal(many[0, :4], x.expand(4, 4))  # the first tokens of a text are whole
    assert torch.equal(many[0, 4:], block(x).expand(2, 4))


def test_zigzag_bytes_are_those_of_the_format():
    from pennyweight.quantize import rtn

    kinds = (zigzag.Spec(64), zigzag.Spec(64, "affine", ordered=True), zigzag.Spec(32, "super"))
    for (rows, columns), stored in itertools.product(((64, 64), (200, 7), (384, 129)), kinds):
        weight = torch.randn(rows, columns)
        parts = zigzag.encode(weight, stored, lambda w, spec: rtn.quantize(w, None, spec), torch.rand(columns))
        assert sum(t.numel() * t.element_size() for t in parts.values()) == stored.nbytes(rows, columns)
        assert Weight("w", (rows, columns), stored).nbytes == stored.nbytes(rows, columns)
        assert formats.stored_of(parts) == stored
        error = (formats.unpack(parts) - weight).norm() / weight.norm()
        assert error < 0.12  # normal weights in 4 bits with groups of 64


def test_a_row_of_another_size_costs_nothing():
    """Groups span rows; without a scale per row the small ones would round to nothing."""
    weight = torch.randn(128, 64) * torch.logspace(-3, 0, 128).unsqueeze(1)
    parts = quantize.pack(weight, "input", SlotStats({}), sparsity.Spec(0.0, 0.0).stored, "gptq")
    error = (formats.unpack(parts) - weight).norm(dim=1) / weight.norm(dim=1)
    assert error.max() < 0.2


KINDS = ({}, {"scales": "affine"}, {"group": 32, "scales": "super", "ordered": True})


@pytest.fixture(scope="module", params=DISTINCT)
def finished(request, pico, text, tmp_path_factory):  # noqa: F811
    """A child with sparse blocks, stored in another way for each family: what the axis offers by default, and the rest
    of what it can be asked for."""
    offered = sparsity.options
    own = KINDS[DISTINCT.index(request.param) % len(KINDS)]
    with pytest.MonkeyPatch.context() as patch:
        others = lambda shape: [dataclasses.replace(spec, **own) for spec in offered(shape)]  # noqa: E731
        patch.setattr(sparsity, "options", others)
        yield _finish(request, pico, text, tmp_path_factory.mktemp("sparse"))


def _finish(request, pico, text, folder):  # noqa: F811
    slow = {"name": "slow memory", "memory_bytes": 10**9, "bandwidth": 1e9, "flops": 1e12}
    (folder / "slow.json").write_text(json.dumps(slow))
    heal = {"local_tokens": 0, "whole_tokens": 0}
    base = config(text, axes=("sparsity", "ffn_width"), heal=heal, machine=str(folder / "slow.json"))
    base = merged(base, {"data": {"calibration_rows": 16, "held_out_rows": 16}})
    model, out = pico(request.param), folder / "out"
    parent = plan(open_job(model, folder / "probe", merged(base, {"budget": {"weights": "100%"}})))
    bound = f"{parent['parent']['1']['tpot_seconds'] * 0.68 * 1e6:.4f}us"
    return model, out, run(model, out, merged(base, {"budget": {"tpot": bound}}))


def test_a_bound_on_tpot_is_met_with_sparse_blocks(finished):
    _, out, report = finished
    assert all(check["ok"] for check in report["verified"]["checks"])
    layout = layout_from_json(report["chosen"]["solutions"][0]["layout"])
    sparse = {slot: choice["sparsity"] for slot, choice in layout.items() if "sparsity" in choice}
    assert any(spec.entering + spec.inner > 0 for spec in sparse.values())
    shapes = Walk(Checkpoint(out)).shapes
    assert all(shapes[slot].sparsity == spec.sparsity for slot, spec in sparse.items())
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pennyweight-zigzag"


def test_transformers_alone_refuses_zigzag(finished):
    from transformers import AutoModelForCausalLM

    with pytest.raises((ValueError, KeyError), match="pennyweight"):
        AutoModelForCausalLM.from_pretrained(finished[1])


def test_the_share_left_out_is_the_share_asked_for(finished, text):  # noqa: F811
    """On the text the tables come from, with all other blocks thinned as well. On held-out text a thousand tokens of a
    random model tell little; benchmarks/sparsity_quality.py holds the shipped model to 2 points there."""
    model, out, _ = finished
    wanted = merged(config(text, budget={"weights": "100%"}), {"data": {"calibration_rows": 16, "held_out_rows": 16}})
    job = open_job(model, out.with_name("again"), wanted)
    rows = torch.from_numpy(job.text.calibration.ids[:, :-1])
    walk = Walk(Checkpoint(out))
    whole = load_model(out, dtype=torch.float32)
    seen: dict[tuple[Slot, str], list[float]] = {}

    def watch(slot, which):
        def hook(module, args, kwargs=None):
            x = (kwargs or {}).get("hidden_states", args[0] if args else None)
            size = x.abs() * (1 if module.importance is None else module.importance)
            seen.setdefault((slot, which), []).append(
                float((size <= magnitudes.threshold(module.magnitudes, module.left_out)).float().mean())
            )

        return hook

    for slot, shape in walk.shapes.items():
        if getattr(shape, "sparsity", None) is None:
            continue
        layer = whole.model.layers[slot.layer]
        block = layer.self_attn if slot.kind == "mixer" else layer.mlp
        inner = block.o_proj if slot.kind == "mixer" else block.down_proj
        block.register_forward_pre_hook(watch(slot, "entering"), with_kwargs=True, prepend=True)
        inner.register_forward_pre_hook(watch(slot, "inner"), with_kwargs=True, prepend=True)
    with torch.no_grad():
        whole(rows)
    assert seen
    for (slot, which), shares in seen.items():
        asked = getattr(walk.shapes[slot].sparsity, which)
        if asked:
            assert abs(sum(shares) / len(shares) - asked) < 0.01, (slot, which)


def test_walked_and_whole_agree(finished):
    ids = torch.arange(24).mul(7919).remainder(300).view(1, -1)
    whole = load_model(finished[1], dtype=torch.float32)(ids).logits
    assert torch.allclose(Streamed(Walk(Checkpoint(finished[1])))(ids).logits, whole, atol=1e-4)


def test_zigzag_left_in_its_file_computes_the_same(finished):
    from pennyweight.runtime.engine import Engine

    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    ids = [int(i) for i in torch.arange(40).mul(7919).remainder(300)]
    mapped, copied = (Engine(finished[1], threads=1, mapped=mapped) for mapped in (True, False))
    assert not mapped.notes
    for sparse in (False, True):
        assert (mapped.logits(ids, sparse=sparse) == copied.logits(ids, sparse=sparse)).all()


def test_the_engine_runs_what_transformers_runs(finished):
    """Nearly: a channel next to its threshold goes the other way when rounding moves it, and with 64 channels each
    counts. So it is what leaving out changes that must point the same way, and the first tokens must be whole."""
    from pennyweight.runtime.engine import Engine, Row

    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    ids = [int(i) for i in torch.arange(40).mul(7919).remainder(300)]
    whole = load_model(finished[1], dtype=torch.float32)
    for module in whole.modules():
        if hasattr(module, "left_out"):
            module.register_buffer("kept_share", torch.tensor(module.left_out), persistent=False)
            module.left_out = 0.0
    dense = whole(torch.tensor([ids])).logits[0].detach()
    for module in whole.modules():
        if hasattr(module, "left_out"):
            module.left_out = float(module.kept_share)
    sparse = whole(torch.tensor([ids])).logits[0].detach()
    engine = Engine(finished[1], threads=1, cache="float32")
    relative = lambda a, b: float((torch.from_numpy(a) - b).norm() / b.norm())  # noqa: E731
    assert relative(engine.logits(ids), dense) < 0.03
    sequence = engine.open(len(ids))
    rows = [Row(sequence, i, token, True, i >= magnitudes.DENSE_TOKENS) for i, token in enumerate(ids)]
    found = engine.step(rows)
    changed, wanted = torch.from_numpy(found) - dense, sparse - dense
    assert float(torch.nn.functional.cosine_similarity(changed[4:].flatten(), wanted[4:].flatten(), dim=0)) > 0.8
    assert relative(found[:4], dense[:4]) < 0.03 < relative(found[4:], dense[4:])
    none = Engine(finished[1], threads=1, cache="float32", sparsity=0.0)
    assert (none.logits(ids, sparse=True) == none.logits(ids)).all()


def test_the_check_of_the_engine_holds_sparse_children_too(finished, monkeypatch):
    """All tokens with all columns, and as many columns as were asked for: dropping every one of them is not ok."""
    from pennyweight.runtime import lower

    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    out, ids = finished[1], torch.arange(96).mul(7919).remainder(300)
    model = load_model(out, dtype=torch.float32)
    shares = [module.left_out for module in model.modules() if getattr(module, "left_out", 0)]

    def ok(**more) -> list[bool]:
        return [check.ok for check in checks.check_engine(out, ids, model, **more)]

    assert ok(near=0.25) == [True, True]  # these tokens are no text
    assert [module.left_out for module in model.modules() if getattr(module, "left_out", 0)] == shares
    for other, wrong in ((1e30, "none"), (0.0, "all")):
        with monkeypatch.context() as patch:
            patch.setattr(lower, "threshold", lambda table, share, other=other: torch.tensor(other))
            assert ok(near=0.25) == [True, False], wrong
    tables = [module.magnitudes for module in model.modules() if getattr(module, "left_out", 0)]
    before = [table.data.clone() for table in tables]
    for table in tables:
        table.data.fill_(1e30)
    with monkeypatch.context() as patch:  # both sides drop everything, which is not what was asked for
        patch.setattr(lower, "threshold", lambda table, share: torch.tensor(1e30))
        assert ok(near=0.25) == [True, False]
    for table, old in zip(tables, before, strict=True):
        table.data.copy_(old)
    last = model.get_input_embeddings()
    last.weight.data[int(ids[-1])] += 1.0  # the last token alone is another one
    assert ok(near=0.25)[0] is False


def test_what_was_written_sparsely_begins_no_prompt(finished):
    """An answer does not depend on what happens to be in the cache: prompts are read with all columns."""
    from pennyweight.runtime.engine import Engine
    from pennyweight.runtime.generate import Batch, Request

    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    engine = Engine(finished[1], threads=1)
    prompt = [int(i) for i in torch.arange(20).mul(7919).remainder(300)]

    def answered(batch, ids):
        written = batch.submit(Request(ids, 30))
        while batch.busy:
            batch.step()
        return written

    batch = Batch(engine, places=2)
    whole = answered(batch, prompt).tokens
    again = answered(batch, [*whole, 7])
    assert engine.is_sparse and again.shared == len(prompt)
    assert again.answer == answered(Batch(engine, places=1), [*whole, 7]).answer


def test_sparsity_of_a_model_without_tables_is_refused(pico):
    from pennyweight.runtime.engine import Engine

    with pytest.raises(ValueError, match="penny fit --axes sparsity"):
        Engine(pico("llama"), threads=1, sparsity=0.4)


def test_a_folder_that_lacks_a_tensor_or_has_one_too_many_is_refused(finished, tmp_path):
    from safetensors.torch import load_file, save_file

    for change, said in (
        (lambda t: t.pop("model.norm.weight"), "is missing"),
        (lambda t: t.update(x=t["model.norm.weight"].clone()), "no place for"),
    ):
        folder = shutil.copytree(finished[1], tmp_path / said.split()[0])
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_slot_is_thinned_by_its_own_counts(pico, weighted):
    """By plain counts, or by weighted ones where importance counts; each activation by its own."""
    counted = {
        f"{activation}_{name}": magnitudes.counts(scale * torch.rand(5000, generator=torch.Generator().manual_seed(i)))
        for i, (activation, name, scale) in enumerate(
            [
                ("input", "counts", 1.0),
                ("input", "weighted_counts", 2.0),
                ("inner", "counts", 3.0),
                ("inner", "weighted_counts", 4.0),
            ]
        )
    }
    for slot in (Slot("mixer", 0), Slot("ffn", 0)):
        parts = Walk(Checkpoint(pico("llama"))).layer(0).parts[slot]
        spec = sparsity.Spec(0.3, 0.5, weighted)
        thinned = sparsity.thin(parts, spec, SlotStats(counted))
        assert thinned.shape.sparsity == spec.sparsity
        for activation, share, most in (("input", 0.3, (1.0, 2.0)), ("inner", 0.5, (3.0, 4.0))):
            module, readers = thinned.reading(activation)
            found = counted[f"{activation}_{'weighted_counts' if weighted else 'counts'}"]
            assert torch.equal(module.magnitudes.data, magnitudes.quantiles(found).bfloat16().float())
            assert module.left_out == share and float(module.magnitudes[-1]) == pytest.approx(most[weighted], rel=0.02)
            if weighted:
                wanted = magnitudes.importance([linear.weight for linear in readers]).bfloat16()
                assert torch.equal(module.importance.data, wanted.float())
            else:
                assert module.importance is None


def test_seen_whole_and_the_channels_that_are_kept():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    assert magnitudes.kept(block, torch.zeros(1, 9, 4)) == {}
    with torch.no_grad():
        block[0].weight.copy_(torch.eye(4))
    magnitudes.leave_out(block[0], 4, 0.5)
    block[0].magnitudes.data = torch.linspace(0, 2, len(block[0].magnitudes))  # half is below 1
    x = torch.tensor([0.5, 3.0, -0.9, -1.1]).expand(1, 9, 4)
    with magnitudes.whole(block):
        assert torch.equal(block[0](x), x) and magnitudes.kept(block, x) == {}
    assert block[0].left_out == 0.5 and not torch.equal(block[0](x), x)
    assert magnitudes.kept(block, x) == {block[0]: (10, 20)}
    x = torch.cat([torch.zeros(1, 4, 4), 0.5 * x[:, 4:]], dim=1)  # the first are whole, whatever they are
    assert magnitudes.kept(block, x) == {block[0]: (5, 20)}


def test_between_which_shares_the_engine_may_count():
    """Columns of matrices one under the other count once or once each: every mixture lies between."""
    counts = [(30, 100, 3), (80, 100, 1), (10, 50, 2), (20, 50, 1)]
    low, high = checks._bounds(counts)
    every = [
        sum(n * own[0] for n, own in zip(times, counts, strict=True))
        / sum(n * own[1] for n, own in zip(times, counts, strict=True))
        for times in itertools.product(*(range(1, count + 1) for _, _, count in counts))
    ]
    assert (low, high) == (pytest.approx(min(every)), pytest.approx(max(every)))
    assert checks._bounds([(3, 4, 1)]) == (0.75, 0.75)
