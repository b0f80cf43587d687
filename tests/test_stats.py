"""The calibration pass gathers what its docstring says, in chunks as in one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pennyweight.disk.checkpoint import Checkpoint, read_entry, read_header
from pennyweight.judge import stats
from pennyweight.live import magnitudes
from pennyweight.live.walk import Walk, run_layer
from tests.conftest import SHAPES


@pytest.fixture(params=SHAPES)
def folder(request, pico):
    return pico(request.param)


def ids(rows: int = 5, tokens: int = 33) -> np.ndarray:
    return (np.arange(rows * tokens) * 7919 % 300).reshape(rows, tokens)


def gather(folder, tmp_path, chunks):
    tokens = sum(
        stats.calibrate_chunk(folder, part, stats.NAMES, tmp_path, i, torch.float32)
        for i, part in enumerate(np.array_split(ids(), chunks))
    )
    return [stats.merge(tmp_path, chunks, layer, tokens) for layer in range(3)]


@torch.no_grad()
def test_moments_are_means_over_tokens(folder, tmp_path):
    found = gather(folder, tmp_path, 1)[1]
    walk = Walk(Checkpoint(folder))
    positions = walk.positions(33)
    hidden = run_layer(walk.layer(0), walk.embedding()(torch.from_numpy(ids())), positions)
    layer = walk.layer(1)
    x = layer.input_layernorm(hidden)
    attended = layer.self_attn(hidden_states=x, attention_mask=None, **positions)[0]
    middle = hidden + attended
    z = layer.post_attention_layernorm(middle)
    inner = layer.mlp.act_fn(layer.mlp.gate_proj(z)) * layer.mlp.up_proj(z)
    y = layer.mlp.down_proj(inner)

    def mean_product(a, b):
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        return a.T @ b / len(a)

    expected = {
        "mixer.input_moment": mean_product(x, x),
        "mixer.cross_moment": mean_product(attended, x),
        "ffn.input_moment": mean_product(z, z),
        "ffn.cross_moment": mean_product(y, z),
        "ffn.down_moment": mean_product(inner, inner),
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
    assert set(found) == {*expected, "mixer.output_moment", *counted}
    assert torch.equal((found["ffn.inner_counts"] * ids().size).round(), magnitudes.counts(inner.abs()))


def test_chunks_do_not_change_the_means(folder, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    for whole, parts in zip(gather(folder, tmp_path / "one", 1), gather(folder, tmp_path / "three", 3), strict=True):
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_only_what_is_wanted_is_gathered(folder, tmp_path):
    stats.calibrate_chunk(folder, ids(2), ("activation_mean_abs",), tmp_path, 0, torch.float32)
    assert set(read_header(stats.partial_path(tmp_path, 0, 0))) == {"ffn.activation_mean_abs"}


def test_a_stopped_chunk_goes_on_to_the_same_result(folder, tmp_path):
    def content(layer):
        entries = read_header(stats.partial_path(tmp_path, 0, layer))
        return {name: read_entry(name, entry) for name, entry in entries.items()}

    stats.calibrate_chunk(folder, ids(2), stats.NAMES, tmp_path, 0, torch.float32)
    before = content(2)
    stats.partial_path(tmp_path, 0, 2).unlink()
    stats.calibrate_chunk(folder, ids(2), stats.NAMES, tmp_path, 0, torch.float32)
    after = content(2)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_bfloat16_arithmetic_still_sums_in_float32(folder, tmp_path):
    stats.calibrate_chunk(folder, ids(), stats.NAMES, tmp_path, 0, torch.bfloat16)
    for name, moment in stats.merge(tmp_path, 1, 0, ids().size).items():
        assert moment.dtype == torch.float32
        if name.endswith(("input_moment", "output_moment", "down_moment")):
            assert torch.linalg.eigvalsh(moment.double()).min() > -1e-6 * moment.abs().max(), name
