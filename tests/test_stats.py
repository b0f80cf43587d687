"""The calibration pass gathers what its docstring says, in chunks as in one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pennyweight.disk.checkpoint import Checkpoint, read_entry, read_header
from pennyweight.judge import stats
from pennyweight.live import magnitudes
from pennyweight.live.walk import Walk
from pennyweight.model.slots import Slot
from pennyweight.variants import linear
from tests.conftest import FAMILIES


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


def gather(folder, tmp_path, chunks):
    tokens = sum(
        stats.calibrate_chunk(folder, part, everything(folder), tmp_path, i, torch.float32)
        for i, part in enumerate(np.array_split(ids(), chunks))
    )
    return [stats.merge(tmp_path, chunks, layer, tokens) for layer in range(3)]


@torch.no_grad()
def test_moments_are_means_over_tokens(folder, tmp_path):
    found = gather(folder, tmp_path, 1)[1]
    walk = Walk(Checkpoint(folder))
    hidden = walk.layer(0).run(walk.embed(torch.from_numpy(ids())))
    layer = walk.layer(1)
    mixer, ffn = (layer.parts[Slot(kind, 1)] for kind in ("mixer", "ffn"))
    x = hidden if mixer.norm("norm") is None else mixer.norm("norm")(hidden)
    attended = mixer.block(hidden_states=x, attention_mask=None, **walk.positions(33))[0]
    middle = hidden + (attended if mixer.norm("post_norm") is None else mixer.norm("post_norm")(attended))
    z = middle if ffn.norm("norm") is None else ffn.norm("norm")(middle)
    inner = ffn.block.act_fn(ffn.block.gate_proj(z)) * ffn.block.up_proj(z)
    y = ffn.block.down_proj(inner)

    def mean_product(a, b):
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        return a.T @ b / len(a)

    expected = {
        "mixer.input_moment": mean_product(x, x),
        "mixer.cross_moment": mean_product(attended, x),
        "ffn.input_moment": mean_product(z, z),
        "ffn.cross_moment": mean_product(y, z),
        "ffn.inner_moment": mean_product(inner, inner),
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
    stats.calibrate_chunk(folder, ids(2), {Slot("ffn", 0): ("activation_mean_abs",)}, tmp_path, 0, torch.float32)
    assert set(read_header(stats.partial_path(tmp_path, 0, 0))) == {"ffn.activation_mean_abs"}


def test_a_block_of_one_matrix_has_no_inner_activation(folder):
    walk = Walk(Checkpoint(folder))
    layer, slot = walk.layer(0), Slot("mixer", 0)
    layer.parts[slot] = linear.apply(layer.parts[slot], linear.Spec("product"), stats.SlotStats({}))
    with torch.no_grad(), stats.Collector(layer.parts, {slot: ("input_moment", "inner_moment")}) as found:
        layer.run(walk.embed(torch.from_numpy(ids())))
    assert set(found.sums) == {"mixer.input_moment"}


def test_a_stopped_chunk_goes_on_to_the_same_result(folder, tmp_path):
    def content(layer):
        entries = read_header(stats.partial_path(tmp_path, 0, layer))
        return {name: read_entry(name, entry) for name, entry in entries.items()}

    stats.calibrate_chunk(folder, ids(2), everything(folder), tmp_path, 0, torch.float32)
    before = content(2)
    stats.partial_path(tmp_path, 0, 2).unlink()
    stats.calibrate_chunk(folder, ids(2), everything(folder), tmp_path, 0, torch.float32)
    after = content(2)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_bfloat16_arithmetic_still_sums_in_float32(folder, tmp_path):
    stats.calibrate_chunk(folder, ids(), everything(folder), tmp_path, 0, torch.bfloat16)
    for name, moment in stats.merge(tmp_path, 1, 0, ids().size).items():
        assert moment.dtype == torch.float32
        if name.endswith(("input_moment", "inner_moment")):
            assert torch.linalg.eigvalsh(moment.double()).min() > -1e-6 * moment.abs().max(), name
