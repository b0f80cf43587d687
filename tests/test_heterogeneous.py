"""Children whose layers differ load in transformers, and only where they load right."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pennyweight import families, kinds
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.writer import Writer
from pennyweight.judge.stats import SlotStats
from pennyweight.live import patch as heterogeneous
from pennyweight.live.blocks import SkippedAttention
from pennyweight.live.load import load_model
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model.choices import PARENT, Choice
from pennyweight.model.slots import Slot
from pennyweight.variants import apply, ffn_width, kv_heads, linear, noop, reshape_all, window
from tests.conftest import FAMILIES

LAYOUT = {
    Slot("mixer", 0): Choice((("noop", noop.Spec()),)),
    Slot("ffn", 0): Choice((("ffn_width", ffn_width.Spec(64)),)),
    Slot("mixer", 1): Choice((("kv_heads", kv_heads.Spec(1, "best")), ("window", window.Spec(8)))),
    Slot("ffn", 1): Choice((("noop", noop.Spec()),)),
    Slot("mixer", 2): Choice((("linear", linear.Spec("product")),)),
    Slot("ffn", 2): Choice((("linear", linear.Spec("product")),)),
}


def build(folder, out, layout):
    """A child on disk, made without the fit job."""
    walk = Walk(Checkpoint(folder))
    shapes = reshape_all(walk.shapes, layout)
    stats = {
        kind: SlotStats({"activation_mean_abs": torch.arange(float(inner)), "inner_moment": torch.eye(inner)})
        for kind, inner in ((kind, walk.shapes[Slot(kind, 0)].inner_size) for kind in ("mixer", "ffn"))
    }
    writer = Writer(out, joins=families.joined(walk.checkpoint.config))
    for slot in (Slot("embed"), Slot("norm"), Slot("head")):
        for name in walk.blocks[slot].tensors():
            writer.add(name, walk.matrix(slot))
    for layer in walk.each():
        for slot, parts in layer.parts.items():
            for name, parameter in apply(parts, layout.get(slot, PARENT), stats[slot.kind]).parameters():
                writer.add(name, parameter)
    return writer.finish(families.config_of(walk.checkpoint.config, shapes), like=folder)


@pytest.fixture(scope="module", params=FAMILIES)
def child(request, pico, tmp_path_factory):
    return build(pico(request.param), tmp_path_factory.mktemp("child") / request.param, LAYOUT)


def ids() -> torch.Tensor:
    return torch.arange(60).mul(7919).remainder(300).view(2, 30)


def test_config_says_what_the_layers_are(child):
    walk = Walk(Checkpoint(child))
    assert walk.shapes == families.shapes(walk.checkpoint.config)
    assert walk.checkpoint.config["per_layer_config"]["0"]["skip"] == ["attention"]


def test_transformers_computes_what_the_walk_computes(child):
    model = load_model(child, dtype=torch.float32)
    assert torch.equal(model(ids(), use_cache=False).logits, Streamed(Walk(Checkpoint(child)))(ids()).logits)


def test_generation_with_a_cache_equals_recomputing(child):
    """Also with the first layer's attention gone (which transformers asks for the length) and a window of 8."""
    model = load_model(child, dtype=torch.float32)
    found = model.generate(ids()[:1], max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
    text = ids()[:1]
    for _ in range(24):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(found, text)


def test_left_padding_changes_nothing_that_is_seen(child):
    model = load_model(child, dtype=torch.float32)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids()[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 30, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    alone = model(ids()[:1], use_cache=False).logits[:, -1]
    beside = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


def test_save_and_load_again(child, tmp_path):
    model = load_model(child, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(model(ids()).logits, again(ids()).logits)


def test_without_the_patch_transformers_refuses(child):
    """It would otherwise ignore `skip` and fill missing weights with noise: a size of 0 makes it stop."""
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(child)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_windows_alone_make_transformers_stop_too(model_type, pico, tmp_path):
    """No size differs then, and nothing that transformers knows says that layers do."""
    folder = pico(model_type)
    child = build(folder, tmp_path / "child", {Slot("mixer", 1): Choice((("window", window.Spec(8)),))})
    walk = Walk(Checkpoint(child))
    own = [Walk(Checkpoint(folder)).shapes[Slot("mixer", layer)].window for layer in range(3)]
    assert [walk.shapes[Slot("mixer", layer)].window for layer in range(3)] == [own[0], 8, own[2]]
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(child)
    found = load_model(child, dtype=torch.float32)(ids(), use_cache=False).logits
    assert torch.equal(found, Streamed(walk)(ids()).logits)
    parent = load_model(folder, dtype=torch.float32)(ids(), use_cache=False).logits
    assert not torch.allclose(found[:, 20:], parent[:, 20:], atol=1e-3)
    torch.testing.assert_close(found[:, :8], parent[:, :8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
def test_windows_among_windows_of_the_family_s_own(model_type, pico, tmp_path):
    """A layer that sees all is given the very window that others have, and one of those a narrower one."""
    folder = pico(model_type)
    mine = {
        Slot("mixer", 0): Choice((("window", window.Spec(6)),)),
        Slot("mixer", 1): Choice((("window", window.Spec(20)),)),
    }
    child = build(folder, tmp_path / "child", mine)
    walk, model = Walk(Checkpoint(child)), load_model(child, dtype=torch.float32)
    assert [walk.shapes[Slot("mixer", layer)].window for layer in range(3)] == [6, 20, 20]
    found = model(ids(), use_cache=False).logits
    assert torch.equal(found, Streamed(walk)(ids()).logits)
    again = build(child, tmp_path / "again", {})
    assert Walk(Checkpoint(again)).shapes == walk.shapes
    text = model.generate(ids()[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(text[:, 30:], model(text, use_cache=False).logits[:, 29:-1].argmax(dim=-1))


def test_matrices_that_lie_as_one_on_disk_are_written_as_one(pico, tmp_path):
    """Stock transformers loads a child of equal layers, and what it saves again; parts have checksums of their own."""
    narrow = {Slot("ffn", i): Choice((("ffn_width", ffn_width.Spec(64)),)) for i in range(3)}
    folder = build(pico("phi3"), tmp_path / "uniform", narrow)
    said = load_file(folder / "model.safetensors")
    assert said["model.layers.1.mlp.gate_up_proj.weight"].shape == (128, 64)
    assert said["model.layers.1.self_attn.qkv_proj.weight"].shape == (128, 64)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids(), use_cache=False).logits
    assert torch.equal(Streamed(Walk(Checkpoint(folder)))(ids()).logits, expected)
    load_model(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert torch.equal(again(ids(), use_cache=False).logits, expected)
    said["model.layers.1.mlp.gate_up_proj.weight"][70, 3] += 1  # row 6 of up_proj
    save_file(said, folder / "model.safetensors", metadata={"format": "pt"})
    Checkpoint(folder).read("model.layers.1.mlp.gate_up_proj.gate_proj.weight")
    with pytest.raises(ValueError, match=r"gate_up_proj\.up_proj\.weight, .* is not what was written"):
        Checkpoint(folder).read("model.layers.1.mlp.gate_up_proj.up_proj.weight")


def test_uninstall_leaves_transformers_as_it_was():
    modeling = __import__("transformers.models.llama.modeling_llama", fromlist=["x"])
    before = modeling.LlamaDecoderLayer.__init__
    heterogeneous.install()
    heterogeneous.install()
    assert modeling.LlamaDecoderLayer.__init__ is not before
    heterogeneous.uninstall()
    assert modeling.LlamaDecoderLayer.__init__ is before


def test_a_child_of_equal_layers_needs_no_patch(pico, tmp_path):
    narrow = {Slot("ffn", i): Choice((("ffn_width", ffn_width.Spec(64)),)) for i in range(3)}
    folder = build(pico("llama"), tmp_path / "uniform", narrow)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(stock(ids(), use_cache=False).logits, Streamed(Walk(Checkpoint(folder)))(ids()).logits)


def test_unknown_words_in_skip_are_refused(child):
    config = AutoConfig.from_pretrained(child)
    overrides = config._heterogeneity_spec.per_layer_overrides
    overrides[0]["skip"] = ["router"]
    with heterogeneous.installed(), pytest.raises(ValueError, match=r"layer 0: per_layer_config names \['router'\]"):
        AutoModelForCausalLM.from_config(config)


def test_a_skipped_block_keeps_no_cache_but_the_length():
    from transformers import DynamicCache

    cache = DynamicCache()
    out, _ = SkippedAttention(0)(torch.ones(2, 5, 8), past_key_values=cache)
    assert not out.any()
    assert cache.get_seq_length() == 5
    assert kinds.names("families")
