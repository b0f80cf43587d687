"""The calibration pass gathers what its docstring says, in chunks as in one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge import stats
from pennyweight.live import magnitudes
from pennyweight.live.walk import Layer, Walk
from pennyweight.model.slots import Slot
from pennyweight.runs import scratch
from pennyweight.variants import linear
from tests.conftest import FAMILIES
from tests.live import gate


@pytest.fixture(params=FAMILIES)
def folder(request, pico):
    return pico(request.param)


def ids(rows: int = 5, tokens: int = 33) -> np.ndarray:
    return (np.arange(rows * tokens) * 7919 % 300).reshape(rows, tokens)


def everything(folder) -> stats.Wanted:
    """All statistics of every slot; what only FFNs are asked for not of attention."""
    walk = Walk(Checkpoint(folder))
    attention = tuple(name for name in stats.NAMES if name != "activation_mean_abs")
    return {slot: attention if slot.kind == "mixer" else stats.NAMES for slot in walk.shapes if slot.layer is not None}


def calibrate(folder, tmp_path, parts, wanted, dtype=torch.float32):
    """All parts of the rows through all three layers."""
    stats.embed(folder, dict(enumerate(parts)), tmp_path, dtype)
    for layer in range(3):
        here = {slot: names for slot, names in wanted.items() if slot.layer == layer}
        stats.calibrate(folder, layer, range(len(parts)), here, tmp_path, dtype)


def gather(folder, tmp_path, chunks):
    calibrate(folder, tmp_path, np.array_split(ids(), chunks), everything(folder))
    return [stats.merge(tmp_path, chunks, layer, ids().size) for layer in range(3)]


@torch.no_grad()
def test_moments_are_means_over_tokens(folder, tmp_path):
    found = gather(folder, tmp_path, 1)[1]
    walk = Walk(Checkpoint(folder))
    hidden = walk.layer(0).run(walk.embed(torch.from_numpy(ids())))
    layer = walk.layer(1)
    mixer, ffn = (layer.parts[Slot(kind, 1)] for kind in ("mixer", "ffn"))
    x = hidden if mixer.norm("norm") is None else mixer.norm("norm")(hidden)
    attended = mixer.block(hidden_states=x, **layer.places(33))[0]
    added = attended if mixer.norm("post_norm") is None else mixer.norm("post_norm")(attended)
    middle = hidden + mixer.place.residual * added
    z = middle if ffn.norm("norm") is None else ffn.norm("norm")(middle)
    inner = gate(ffn.block)(ffn.matrix("gate_proj")(z)) * ffn.matrix("up_proj")(z)
    y = ffn.block.down_proj(inner)

    def mean_product(a, b):
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        return a.T @ b / len(a)

    def share(part, output):
        added = output if part.norm("post_norm") is None else part.norm("post_norm")(output)
        leaving = layer.run(hidden)
        return ((part.place.residual * added).square().sum(-1) / leaving.square().sum(-1)).mean().view(1)

    expected = {
        "mixer.input_moment": mean_product(x, x),
        "mixer.cross_moment": mean_product(attended, x),
        "ffn.input_moment": mean_product(z, z),
        "ffn.cross_moment": mean_product(y, z),
        "ffn.inner_moment": mean_product(inner, inner),
        "mixer.share": share(mixer, attended),
        "ffn.share": share(ffn, y),
        "ffn.activation_mean_abs": inner.abs().flatten(0, 1).mean(dim=0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    counted = {
        f"{kind}.{which}_{name}"
        for kind in ("mixer", "ffn")
        for which in ("input", "inner")
        for name in ("counts", "weighted_counts")
    }
    assert set(found) == {*expected, "mixer.inner_moment", *counted}
    assert torch.equal((found["ffn.inner_counts"] * ids().size).round(), magnitudes.counts(inner.abs()))


def test_chunks_do_not_change_the_means(folder, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    for whole, parts in zip(gather(folder, tmp_path / "one", 1), gather(folder, tmp_path / "three", 3), strict=True):
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_only_what_is_wanted_is_gathered(folder, tmp_path):
    calibrate(folder, tmp_path, [ids(2)], {Slot("ffn", 0): ("activation_mean_abs",)})
    assert set(scratch.needed(stats.sums_path(tmp_path, 0, 0))) == {"ffn.activation_mean_abs"}
    assert scratch.kept(stats.sums_path(tmp_path, 0, 1)) is None


def test_a_block_of_one_matrix_has_no_inner_activation(folder):
    walk = Walk(Checkpoint(folder))
    layer, slot = walk.layer(0), Slot("mixer", 0)
    layer.parts[slot] = linear.apply(layer.parts[slot], linear.Spec("product"), stats.SlotStats({}))
    with torch.no_grad(), stats.Collector(layer.parts, {slot: ("input_moment", "inner_moment")}) as found:
        layer.run(walk.embed(torch.from_numpy(ids())))
    assert set(found.sums) == {"mixer.input_moment"}


@pytest.mark.parametrize("damaged", ["sums", "states"])
def test_what_is_gone_or_damaged_is_made_again_and_nothing_else(damaged, folder, tmp_path, monkeypatch):
    path = stats.sums_path(tmp_path, 1, 2) if damaged == "sums" else stats.hidden_path(tmp_path, 1, 3)
    parts = np.array_split(ids(4), 2)
    calibrate(folder, tmp_path, parts, everything(folder))
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    ran, run = [], Layer.run
    monkeypatch.setattr(Layer, "run", lambda self, *args, **more: ran.append(self.index) or run(self, *args, **more))
    calibrate(folder, tmp_path, parts, everything(folder))
    assert ran == [2]
    assert path.read_bytes() == before


def test_bfloat16_arithmetic_still_sums_in_float32(folder, tmp_path):
    calibrate(folder, tmp_path, [ids()], everything(folder), torch.bfloat16)
    for name, moment in stats.merge(tmp_path, 1, 0, ids().size).items():
        assert moment.dtype == torch.float32
        if name.endswith(("input_moment", "inner_moment")):
            assert torch.linalg.eigvalsh(moment.double()).min() > -1e-6 * moment.abs().max(), name
