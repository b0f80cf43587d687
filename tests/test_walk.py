"""Walking a checkpoint layer by layer is running the model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from pennyweight import families
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model import shapes as slots
from pennyweight.model.slots import Slot
from pennyweight.variants import reshape_all
from tests.conftest import FAMILIES


@pytest.fixture(params=FAMILIES)
def folder(request, pico):
    return pico(request.param)


def ids(rows: int = 2, tokens: int = 37) -> torch.Tensor:
    return torch.arange(rows * tokens).mul(7919).remainder(300).view(rows, tokens)


def test_logits_equal_transformers(folder):
    walked = Streamed(Walk(Checkpoint(folder)))(ids()).logits
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(walked, whole(ids(), use_cache=False).logits)


def test_shapes_name_every_tensor_and_count_every_weight(folder):
    checkpoint = Checkpoint(folder)
    walk = Walk(checkpoint)
    named = [name for block in walk.blocks.values() for name in block.tensors()]
    assert sorted(named) == sorted(checkpoint.entries)
    assert slots.parameters(walk.shapes) == sum(math.prod(e.shape) for e in checkpoint.entries.values())


def test_parts_are_the_live_modules_of_their_slot(folder):
    walk = Walk(Checkpoint(folder))
    layer = walk.layer(1)
    assert list(layer.parts) == [Slot("mixer", 1), Slot("ffn", 1)]
    for parts in layer.parts.values():
        matrices = {w.name: w.shape for w in parts.shape.weights() if len(w.shape) == 2}
        assert {name: tuple(m.weight.shape) for name, m in parts.matrices().items()} == matrices


def test_config_round_trip_of_unchanged_shapes(folder):
    config = Checkpoint(folder).config
    shapes = Walk(Checkpoint(folder)).shapes
    again = families.config_of(config, shapes)
    assert families.shapes(again) == shapes == reshape_all(shapes, {})
    assert "per_layer_config" not in again


def test_a_missing_tensor_is_named(folder, tmp_path):
    import json
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 4
    for by_layer in ("layer_types", "no_rope_layers"):
        config.pop(by_layer, None)
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.3\.\S+ is missing"):
        Walk(Checkpoint(broken))


def test_nan_weights_are_named(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.startswith("model.layers.1.mlp.") and "up_proj.weight" in name)
    tensors[name][-3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.\S*up_proj\.weight holds 1 NaN"):
        Streamed(Walk(Checkpoint(broken)))(ids())


def test_windows_of_the_family_s_own_are_walked(pico):
    """A whole model masks layers that slide; a layer by itself has to be told."""
    folder = pico("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    walk = Walk(Checkpoint(folder))
    assert [walk.shapes[Slot("mixer", layer)].window for layer in range(3)] == [None, 8, 8]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = whole(ids(), use_cache=False).logits
    torch.testing.assert_close(Streamed(walk)(ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_yarn_reaches_the_positions(pico):
    """The numbers of gpt-oss's YaRN: theta 150000, head_dim 64, from 4096 tokens, factors 32 and 56."""
    concentrations = {}
    for factor in (32.0, 56.0):
        rope = {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        }
        walk = Walk(Checkpoint(pico("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)))
        cos, sin = walk.places(2)["position_embeddings"]
        concentrations[factor] = float(cos[0, 0, 0])
        frequency = torch.atan2(sin[0, 1, :32], cos[0, 1, :32])
        plain = 150000.0 ** (-torch.arange(0, 64, 2) / 64)
        share = (plain / frequency - 1) / (factor - 1)  # 0 below the ramp, 1 above it
        assert share[:9].abs().max() < 1e-4
        assert (share[18:] - 1).abs().max() < 1e-3
        assert 0 < share[9] < share[17] < 1
    assert concentrations[32.0] == pytest.approx(1.3466, abs=1e-4)
    assert concentrations[56.0] == pytest.approx(1.4025, abs=1e-4)
    assert (concentrations[56.0] / concentrations[32.0]) ** 2 == pytest.approx(1.0848, abs=1e-4)
