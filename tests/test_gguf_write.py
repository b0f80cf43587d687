"""penny export: what is written is the same model to the bit, and what llama.cpp cannot hold is refused in one line."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pennyweight import formats
from pennyweight.cli import app
from pennyweight.disk.gguf import file as gguf_file
from pennyweight.disk.gguf import ggml
from pennyweight.disk.tokenizer import encode, load_tokenizer
from pennyweight.export.gguf import write
from pennyweight.formats import Grid, packed_int, planes

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime.alike import compare
from pennyweight.runtime.sources.open import open_source

PROMPT = [1, 5, 9, 200, 77, 31, 3, 8]
SAYABLE = {
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3_text": {"query_pre_attn_scalar": 24, "num_hidden_layers": 7, "layer_types": None},
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
}
"""What the config of a pico model says where files leave it to llama.cpp."""


def packed(folder, out, spec, *, only: str = "proj"):
    """The folder with matrices of that name packed, codes rounded; the rest bfloat16."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or only not in name:
            tensors[name] = tensor
            continue
        own, (low, high) = spec.over(tensor.shape[1]), spec.limits
        grouped = tensor.float().view(len(tensor), -1, own.group)
        scale = (grouped.abs().amax(-1) / high).bfloat16()
        codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(low, high).view(tensor.shape).to(torch.int8)
        find = lambda *_, codes=codes, scale=scale: (codes, Grid(scale))  # noqa: E731
        parts = formats.of(own).encode(tensor, own, find, None)
        tensors |= {formats.on_disk(name, suffix): part for suffix, part in parts.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "glm4", "granite", "gemma3_text", "smollm3", "mistral"])
def test_what_is_read_back_is_the_same_to_the_bit(pico, family, tmp_path):
    """Norms that lack 1 on disk lose the last bits of what they lack."""
    folder = pico(family, **SAYABLE.get(family, {}))
    written = write(folder, tmp_path / "model.gguf")
    found = compare(folder, written.path, PROMPT, 12)
    assert found.error <= (1e-6 if family.startswith("gemma") else 0.0) and found.same == 12
    assert not written.rounded and list(tmp_path.iterdir()) == [written.path]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (packed_int.Spec(4, 32), "Q4_0"),
        (packed_int.Spec(4, 64), "Q4_0"),
        (packed_int.Spec(8, 64), "Q8_0"),
        (planes.Spec(3, 32), "Q4_0"),
        (planes.Spec(5, 32), "Q5_0"),
        (planes.Spec(6, 64), "Q8_0"),
    ],
    ids=str,
)
def test_codes_and_scales_are_the_file_s(pico, tmp_path, spec, kind):
    """By the ggml project's own dequantiser; q_proj's rows, which lie in another order, aside."""
    folder = packed(pico("llama"), tmp_path / "packed", spec)
    written = write(folder, tmp_path / "model.gguf")
    assert written.types[kind] == 3 * 7 and written.types["BF16"] == 2 and not written.rounded
    assert compare(folder, written.path, PROMPT, 12).same == 12
    file = gguf_file.read(written.path)
    raw = file.read(file.tensors["blk.1.ffn_down.weight"])
    tensors = load_file(folder / "model.safetensors")
    parts = formats.read("model.layers.1.mlp.down_proj.weight", tensors, tensors.__getitem__)
    codes, scale = formats.codes(parts)
    expected = codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    np.testing.assert_array_equal(gguf.quants.dequantize(raw, Type[kind]), expected.numpy())


@pytest.mark.parametrize(("put", "kind"), [(ggml.q4_0, "Q4_0"), (ggml.q5_0, "Q5_0"), (ggml.q8_0, "Q8_0")])
def test_every_code_survives(put, kind):
    bits = int(kind[1])
    codes = np.arange(-(1 << bits - 1), 1 << bits - 1, dtype=np.int8).repeat(2).reshape(-1, 32)
    scale = np.linspace(0.01, 3, len(codes), dtype=np.float32).astype(np.float16).astype(np.float32)[:, None]
    np.testing.assert_array_equal(gguf.quants.dequantize(put(codes, scale), Type[kind]), codes * scale)


def test_tokens_template_and_ends_come_along(pico, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(pico("llama"), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    size = len(tokenizer)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if len(tensor) == config["vocab_size"]:
            tensors[name] = torch.cat([tensor, tensor[: size + 2 - len(tensor)]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size + 2}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ends]}))
    source = open_source(write(folder, tmp_path / "model.gguf").path)
    found = source.vocabulary()
    text = "It's 12345, naïve:\n\n  x <|im_start|>a<think>b<|im_end|>"
    assert encode(found.tokenizer, text) == encode(tokenizer, text)
    assert found.tokenizer.chat_template == tokenizer.chat_template and {0, ends} <= found.stop
    assert found.tokenizer.decode([ends], skip_special_tokens=True) == ""
    assert found.tokenizer.decode([tokenizer.convert_tokens_to_ids("<think>")], skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize("prefix", [True, False])
def test_a_vocabulary_of_pieces_comes_along(pico, tmp_path, prefix):
    """Merges become scores: those that came first score highest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("▁", "th"), ("th", "e"), ("▁th", "e"), ("1", "2"), ("i", "s"), ("▁", "is")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"the12is"]
    words += list(dict.fromkeys("".join(merge) for merge in merges))
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    folder = tmp_path / "pieces"
    shutil.copytree(pico("llama"), folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    found = open_source(write(folder, tmp_path / "model.gguf").path).vocabulary()
    for text in ("the is this 12", "  the ét 121\n"):
        assert encode(found.tokenizer, text) == encode(tokenizer, text)
    assert 2 in found.stop and len(encode(tokenizer, "the")) == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_scaling_is_said(pico, tmp_path, rope):
    folder = pico("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    found = compare(folder, write(folder, tmp_path / "model.gguf").path, [*PROMPT, *range(40)], 8)
    assert found.error < 1e-5 and found.same == 8


def test_layers_that_differ_and_sparse_ones_are_refused(pico, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(pico("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"sliding_window": None, "per_layer_config": {"1": {"sliding_window": 16}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"1\.mixer is not shaped as other layers are.*penny quantize"):
        write(folder, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"window None instead of 20; it cannot hold this model"):
        write(pico("mistral"), tmp_path / "model.gguf")
    dynamic = pico("llama", rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match=r"cannot say rotary scaling 'dynamic'"):
        write(dynamic, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model*"))


def test_what_has_no_type_is_rounded_only_when_asked(pico, tmp_path):
    """An FFN of 172 channels keeps one scale a row, which no type of llama.cpp does."""
    folder = packed(pico("llama", intermediate_size=172), tmp_path / "odd", packed_int.Spec(4, 32), only="down_proj")
    with pytest.raises(ValueError, match=r"down_proj.*172 columns share a scale.*--round f16"):
        write(folder, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"Q8_0 keeps whole 32 columns.*172"):
        write(folder, tmp_path / "model.gguf", rounded="q8_0")
    written = write(folder, tmp_path / "model.gguf", rounded="f16")
    assert written.rounded == 3 and written.types["F16"] == 3
    assert compare(folder, written.path, PROMPT, 4).error < 0.05
    small = packed(pico("llama"), tmp_path / "small", packed_int.Spec(4, 32), only="up_proj")
    tensors = load_file(small / "model.safetensors")
    name = next(each for each in tensors if "up_proj" in each and each.endswith("scale"))
    tensors[name][0, 0] = 1e-9
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="too small or too large for float16"):
        write(small, tmp_path / "small.gguf")


def test_the_command_compares_and_names_the_file(pico, tmp_path):
    out = tmp_path / "model.gguf"
    told = ["export", str(pico("qwen3")), "--to", "gguf", "--out", str(out)]
    found = CliRunner().invoke(app, told)
    assert found.exit_code == 0 and found.stdout.strip() == str(out), found.stderr
    assert "greedy tokens of the file read back: 32, expected 32" in found.stderr
    again = CliRunner().invoke(app, told)
    assert again.exit_code == 2 and "exists" in again.stderr
    inside = CliRunner().invoke(app, ["export", str(pico("qwen3")), "--out", str(pico("qwen3") / "x.gguf")])
    assert inside.exit_code == 2 and "lies in the model" in inside.stderr
    other = CliRunner().invoke(app, ["export", str(pico("qwen3")), "--to", "onnx", "--out", str(tmp_path / "x")])
    assert other.exit_code == 2 and "there is gguf" in other.stderr
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_reads_back_as_another_is_deleted(pico, tmp_path, monkeypatch):
    """As if rows of q_proj had been left in transformers' order."""
    monkeypatch.setattr("pennyweight.export.gguf.order_of", lambda *_: None)
    out = tmp_path / "model.gguf"
    found = CliRunner().invoke(app, ["export", str(pico("llama")), "--out", str(out)])
    assert found.exit_code == 4 and "logits of the file read back" in found.stderr and not out.exists()
