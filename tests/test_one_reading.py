"""One reading of a model: what transformers makes of its folder is what walk, engine, costs and children are made of,
and what it refuses, or what no sound file says, ends in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pennyweight import families, formats
from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.disk.gguf import file as gguf
from pennyweight.disk.model_config import read_config
from pennyweight.formats import packed_int, zigzag
from pennyweight.live.load import load_model
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.variants import ffn_width, noop, reshape_all, window
from tests.conftest import FAMILIES
from tests.test_heterogeneous import build

Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
SLIDES = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def ids(tokens: int = 30) -> torch.Tensor:
    return torch.arange(tokens).mul(7919).remainder(300).view(1, tokens)


def edited(folder: Path, tmp: Path, drop: tuple[str, ...] = (), tensors: Edit | None = None, **config: Any) -> Path:
    """A copy of a model with other config keys and other tensors."""
    made = shutil.copytree(folder, tmp / f"edited-{len(list(tmp.iterdir()))}")
    said = {**json.loads((made / "config.json").read_text()), **config}
    (made / "config.json").write_text(json.dumps({key: value for key, value in said.items() if key not in drop}))
    if tensors is not None:
        kept = load_file(made / "model.safetensors")
        save_file(tensors(kept), made / "model.safetensors", metadata={"format": "pt"})
    return made


def walked(folder: Path) -> torch.Tensor:
    return Streamed(Walk(Checkpoint(folder)))(ids()).logits


def of_transformers(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(ids(), use_cache=False).logits


def run(folder: Path) -> torch.Tensor:
    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    from pennyweight.runtime.engine import Engine

    return torch.from_numpy(Engine(folder, threads=1, cache="float32").logits(ids()[0].tolist()))[None]


def assert_one_model(folder: Path) -> None:
    """Walk and engine compute what transformers computes."""
    expected = of_transformers(folder)
    torch.testing.assert_close(walked(folder), expected, rtol=1e-5, atol=1e-5)
    assert (run(folder) - expected).norm() < 1e-4 * expected.norm()


# ---------------------------------------------------------------------------------------------------------- defaults


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen2 sliding", "qwen3 sliding"])
def parent(request, pico) -> Path:
    family, *slides = request.param.split()
    return pico(family, **(SLIDES if slides else {}))


def test_no_key_of_a_config_has_a_default_of_ours(parent, tmp_path):
    """Every key is taken out, and set to null. transformers is asked once for each config that it makes of them: with
    equal configs and weights it computes the same."""
    said, expected, ran = json.loads((parent / "config.json").read_text()), {}, 0
    keys = [key for key in said if key not in ("architectures", "transformers_version", "dtype", "pad_token_id")]
    for key, gone in [(key, gone) for key in keys for gone in (True, False)]:
        folder = edited(parent, tmp_path, drop=(key,)) if gone else edited(parent, tmp_path, **{key: None})
        try:
            made = json.dumps(AutoConfig.from_pretrained(folder).to_dict(), sort_keys=True)
        except Exception:
            with pytest.raises(ValueError, match=r"config\.json") as refused:
                walked(folder)
            assert "\n" not in str(refused.value)
            continue
        try:
            found = walked(folder)
        except ValueError as refused:  # sizes that these weights have not: transformers would fill in noise
            if "no window" in str(refused):
                with pytest.raises(ValueError, match="sliding_window"):
                    of_transformers(folder)
                continue
            assert "config.json promises shape" in str(refused) or "these divide the heads" in str(refused)
            assert key == "tie_word_embeddings" or key.split("_")[-1] in ("size", "layers", "heads", "dim", "bias")
            continue
        ran += 1
        if made not in expected:
            expected[made] = of_transformers(folder)
            assert (run(folder) - expected[made]).norm() < 1e-4 * expected[made].norm(), key
        assert torch.allclose(found, expected[made], rtol=1e-5, atol=1e-5), key
        shutil.rmtree(folder)
    assert ran >= 13


def test_sliding_layers_begin_where_transformers_lets_them(pico, tmp_path):
    """Qwen2's default for the first of them is 28, so a model of 3 layers has none."""
    sliding = pico("qwen2", **SLIDES)
    layers = lambda folder: [Walk(Checkpoint(folder)).shapes[Slot("mixer", i)].window for i in range(3)]  # noqa: E731
    assert layers(sliding) == [None, 8, 8]
    assert layers(edited(sliding, tmp_path, drop=("layer_types", "max_window_layers"))) == [None] * 3
    assert layers(edited(sliding, tmp_path, drop=("layer_types",), max_window_layers=2)) == [None, None, 8]
    assert layers(edited(sliding, tmp_path, drop=("layer_types",), use_sliding_window=False)) == [None] * 3
    for off in ({"use_sliding_window": False}, {"sliding_window": None}):  # transformers builds it, and cannot run it
        with pytest.raises(ValueError, match="lets layer 1 slide, but there is no window for it"):
            layers(edited(sliding, tmp_path, **off))
    assert (
        layers(edited(pico("llama"), tmp_path, sliding_window=8, layer_types=["sliding_attention"] * 3)) == [None] * 3
    )


def test_a_window_that_no_text_fills_is_none(pico, tmp_path):
    folder = edited(pico("qwen2", **SLIDES), tmp_path, sliding_window=2**31 - 1)
    assert [Walk(Checkpoint(folder)).shapes[Slot("mixer", i)].window for i in range(3)] == [None] * 3
    assert_one_model(folder)


CONFIGS = {name: family.KEYS for name, family in ((m, families.of(m)) for m in (*FAMILIES, "gpt_oss"))}


@settings(max_examples=150)
@given(data=st.data())
def test_what_a_file_says_stays_and_what_it_leaves_open_is_transformers(data):
    model_type = data.draw(st.sampled_from(sorted(CONFIGS)))
    size = st.sampled_from([64, 128])
    values = {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), size),
        **dict.fromkeys(("num_attention_heads", "num_local_experts"), st.sampled_from([4, 8])),
        **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), st.sampled_from([2, 4, None])),
        **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings"), st.booleans()),
        "num_hidden_layers": st.just(4),
        "head_dim": st.sampled_from([16, None]),
        "hidden_act": st.sampled_from(["silu", "relu"]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-3]),
        "max_position_embeddings": size,
        "sliding_window": st.sampled_from([8, None]),
        "max_window_layers": st.sampled_from([0, 2, 28]),
        "layer_types": st.sampled_from(
            [None, ["sliding_attention", "full_attention"] * 2, ["attention"] * 4, ["full_attention"] * 4]
        ),
    }
    stated = data.draw(st.sets(st.sampled_from(sorted(values))))
    said = {"model_type": model_type, **{key: data.draw(values[key]) for key in sorted(stated)}}
    try:
        made = AutoConfig.for_model(**said).to_dict()
    except Exception:
        return
    read = families.resolved(said)
    for key in data.draw(st.permutations(sorted(read.keys_read))):
        assert read[key] == read.get(key) == made.get(key), key
    again = pickle.loads(pickle.dumps(families.resolved(said)))
    assert again["rms_norm_eps"] == made["rms_norm_eps"] and again.said == said


# ------------------------------------------------------------------------------------------------------------- tying


def with_a_head(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * factor}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_open_comes_in_one_order(pico, family):
    """Of sets Python makes another order in every process, and children would have other bytes each time."""
    said = json.loads((pico(family) / "config.json").read_text())
    module = families.of(family)
    bare = {key: said[key] for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    read = families.resolved(bare)
    assert read["rms_norm_eps"] > 0
    wanted = dict.fromkeys((*families._decoder.KEYS, *module.KEYS))
    assert [key for key in read if key not in bare] == [key for key in wanted if key not in bare]


def test_a_head_that_is_tied_and_yet_another_is_used_as_transformers_uses_it(pico, tmp_path):
    tied = pico("qwen2")
    folder = edited(tied, tmp_path, tensors=lambda kept: with_a_head(kept, -2.0))
    assert_one_model(folder)
    assert not torch.allclose(walked(folder), walked(tied))
    checkpoint = Checkpoint(folder)
    assert "ties the head" in checkpoint.notes[0]
    walk = Walk(checkpoint)
    assert walk.logits_slot == Slot("head") and walk.shapes[Slot("head")].nbytes == 2 * 300 * 64
    whole = load_model(folder, dtype=torch.float32)
    torch.testing.assert_close(whole(ids(), use_cache=False).logits, walked(folder), rtol=1e-5, atol=1e-5)
    child = build(folder, tmp_path / "child", {Slot("ffn", 1): Choice((("ffn_width", ffn_width.Spec(64)),))})
    said = json.loads((child / "config.json").read_text())
    assert said["tie_word_embeddings"] is False and Checkpoint(child).notes == ()
    narrow = load_model(child, dtype=torch.float32)
    torch.testing.assert_close(narrow(ids(), use_cache=False).logits, walked(child), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_the_embedding_stays_tied(pico, tmp_path):
    folder = edited(pico("qwen2"), tmp_path, tensors=lambda kept: with_a_head(kept, 1.0))
    assert Walk(Checkpoint(folder)).logits_slot == Slot("embed")
    assert Checkpoint(folder).notes == () == Walk(Checkpoint(folder)).notes
    assert_one_model(folder)


def test_a_head_without_an_embedding_and_one_of_another_size(pico, tmp_path):
    folder = edited(pico("qwen2"), tmp_path, tensors=lambda kept: {**kept, "lm_head.weight": torch.zeros(7, 64)})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight has shape \(7, 64\); config.json promises shape \(300, 64\)"
    ):
        Walk(Checkpoint(folder))


# ------------------------------------------------------------------------------------------------------------- files


def test_only_the_files_that_transformers_reads_are_read(pico, tmp_path):
    folder, sound = edited(pico("llama"), tmp_path), walked(pico("llama"))
    backup = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(backup, folder / "model_backup.safetensors", metadata={"format": "pt"})
    stale = {"metadata": {}, "weight_map": dict.fromkeys(backup, "model-00001-of-00009.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert torch.equal(walked(folder), sound)
    assert_one_model(folder)
    (note,) = Checkpoint(folder).notes
    assert "not read, as in transformers: model_backup.safetensors, model.safetensors.index.json" in note
    assert safetensors_bytes(folder) == (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"only model_backup\.safetensors, which transformers would not read"):
        Checkpoint(folder)


def test_notes_reach_those_who_run_the_model(pico, tmp_path):
    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    from pennyweight.runtime.engine import Engine

    stray = lambda kept: {**kept, "model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}  # noqa: E731
    folder = edited(pico("llama"), tmp_path, tensors=stray)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    notes = Engine(folder, threads=1).notes
    assert any("other.safetensors" in note for note in notes)
    assert any("no place for are not read: model.layers.7.mlp.up_proj.weight" in note for note in notes)
    with pytest.raises(ValueError, match="does not fit the model its config describes"):
        load_model(folder)


@pytest.fixture
def sharded(pico, tmp_path) -> Path:
    folder = edited(pico("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def index(folder: Path, **names: str) -> None:
    path = folder / "model.safetensors.index.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "weight_map": {**said["weight_map"], **names}}))


def test_shards_are_those_that_the_index_names(sharded):
    assert_one_model(sharded)
    assert Checkpoint(sharded).notes == ()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "..", "", "a\\b"]
)
def test_an_index_names_files_of_its_own_folder(sharded, name):
    save_file({"x": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    index(sharded, x=name)
    with pytest.raises(ValueError, match=r"index\.json names .*; shards lie in the folder itself"):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_names_and_no_file_has(sharded):
    index(sharded, x="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"index\.json names x, which no file has \(1 missing\)"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded):
    first = sharded / "model-00001-of-00002.safetensors"
    save_file({**load_file(first), **load_file(sharded / "model-00002-of-00002.safetensors")}, first)
    with pytest.raises(ValueError, match=r"is in model-00001-of-00002\.safetensors, too"):
        Checkpoint(sharded)


def test_a_hub_s_cache_is_read_through_its_links_and_named_by_its_model(pico, tmp_path):
    from pennyweight.runtime.sources.open import open_source

    blobs = tmp_path / "models--owner--a--model" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(pico("llama").iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    link = tmp_path / "mine"
    link.symlink_to(pico("llama"))
    assert open_source(snapshot).name == "owner/a--model"
    assert open_source(link).name == "mine"
    assert torch.equal(walked(snapshot), walked(pico("llama")))


def test_nothing_is_unpickled_and_no_code_of_a_folder_runs(pico, tmp_path):
    folder = edited(
        pico("llama"), tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )
    trap = tmp_path / "sprung"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    torch.save(Trap(str(trap)), folder / "pytorch_model.bin")
    load_model(folder)
    (folder / "model.safetensors").unlink()
    for opened in (load_model, Checkpoint):
        with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
            opened(folder)
    assert not trap.exists()


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse", "itself", "adapter"])
def test_what_is_no_weight_file(pico, tmp_path, kind):
    folder = edited(pico("llama"), tmp_path)
    path = folder / "model.safetensors"
    if kind != "adapter":
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "itself":
        path.symlink_to(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not an ordinary file|cannot be opened|header at byte 8|merge it into them"):
        Checkpoint(folder)


def test_a_folder_that_holds_one_gguf_file_means_that(tmp_path):
    from pennyweight.runtime.sources.open import open_source

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a\.gguf: 4 bytes, the header alone has 24"):
        open_source(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one of them, such as .*a\.gguf"):
        open_source(tmp_path)


# -------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**40),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 2**30),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 0),
        ("num_attention_heads", 10**400),
        ("vocab_size", 2**40),
        ("vocab_size", "300"),
        ("hidden_size", 64.0),
        ("head_dim", 23),
        ("head_dim", -24),
        ("hidden_act", ["silu"]),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-6"),
        ("max_position_embeddings", 2**24 + 1),
        ("sliding_window", 0),
        ("sliding_window", -1),
        ("tie_word_embeddings", "false"),
        ("is_causal", False),
        ("layer_types", "full_attention"),
        ("layer_types", ["chunked_attention"] * 3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "10000"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": ["yarn"]}),
        ("rope_parameters", {"rope_type": "unheard of", "rope_theta": 1e4}),
        ("rope_scaling", [1]),
        ("per_layer_config", []),
        ("per_layer_config", {"7": {"intermediate_size": 64}}),
        ("per_layer_config", {"1": {"intermediate_size": "64"}}),
        ("per_layer_config", {"1": {"hidden_act": "relu"}}),
        ("per_layer_config", {"1": {"skip": "attention"}}),
        ("per_layer_config", {"1": {"sparsity": {"attention": {"entering": "all"}}}}),
        ("per_layer_config", {"1": {"intermediate_size": 64}, "01": {"intermediate_size": 32}}),
        ("skip", ["attention"]),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": [], "config_groups": {}}),
        ("quantization_config", "none"),
        ("dtype", "load"),
        ("transformers_weights", "../other.safetensors"),
        ("configuration_files", ["config.5.0.0.json"]),
    ],
    ids=str,
)
def test_a_value_that_no_sound_config_has_is_one_line(pico, tmp_path, key, value):
    folder = edited(pico("qwen3", **SLIDES), tmp_path, **{key: value})
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        walked(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    with pytest.raises(ValueError, match=r"config\.json|transformers cannot load it"):
        load_model(folder)


@pytest.mark.parametrize(
    "key", ["num_labels", "attribute_map", "__dict__", "to_dict", "_attn_implementation", "is_causal"]
)
def test_keys_that_mean_nothing_to_a_family_do_nothing(pico, tmp_path, key):
    """Given to transformers' config, they would replace its attributes, or make a list of as many names."""
    folder = edited(pico("qwen3"), tmp_path, **{key: True if key == "is_causal" else "x"})
    assert torch.equal(walked(folder), walked(pico("qwen3")))


def test_a_generation_config_that_is_none(pico, tmp_path):
    folder = edited(pico("llama"), tmp_path)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json: .* dictionary"):
        load_model(folder)


def packed(kept: dict[str, torch.Tensor], **differs: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """One matrix of the model in packed integers, some of its parts others or gone."""
    name = "model.layers.1.mlp.up_proj.weight"
    rows, columns = kept[name].shape
    parts = packed_int.random(rows, columns, packed_int.Spec(4, 32), torch.Generator().manual_seed(0), 2**10)
    found = {**kept, **{formats.on_disk(name, suffix): part for suffix, part in parts.items()}}
    found |= {formats.on_disk(name, suffix): part for suffix, part in differs.items() if part is not None}
    gone = {name, *(formats.on_disk(name, suffix) for suffix, part in differs.items() if part is None)}
    return {each: tensor.contiguous() for each, tensor in found.items() if each not in gone}


@pytest.mark.parametrize(
    "differs",
    [
        {"weight_shape": torch.tensor([128])},
        {"weight_shape": torch.tensor(128)},
        {"weight_shape": torch.tensor([128, -64])},
        {"weight_shape": torch.tensor([128.0, 64.0])},
        {"weight_shape": torch.tensor([2**62, 2**62])},
        {"weight_shape": None},
        {"weight_scale": None},
        {"weight_scale": torch.ones(3, dtype=torch.bfloat16)},
        {"weight_scale": torch.ones(128, 2, dtype=torch.int32)},
        {"weight_packed": torch.zeros(128, 8, dtype=torch.float32)},
        {"weight_packed": torch.zeros(1, dtype=torch.int32)},
    ],
    ids=lambda differs: " ".join(f"{k} {v if v is None or v.numel() < 4 else v.shape}" for k, v in differs.items()),
)
def test_parts_of_a_matrix_that_do_not_belong_together(pico, tmp_path, differs):
    folder = edited(pico("llama"), tmp_path, tensors=lambda kept: packed(kept, **differs))
    with pytest.raises(ValueError, match=r"up_proj\.weight") as refused:
        walked(folder)
    assert "\n" not in str(refused.value)
    assert walked(edited(pico("llama"), tmp_path, tensors=packed)).isfinite().all()


def test_bits_that_config_and_files_tell_differently(pico, tmp_path):
    """transformers unpacks by the config, and would compute anything."""
    name = "model.layers.1.mlp.up_proj"
    for bits, target in ((8, name), (8, "Linear"), (4, name), (8, "model.layers.0.mlp.up_proj")):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        said = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": [target], "weights": weights}},
        }
        folder = edited(pico("llama"), tmp_path, tensors=packed, quantization_config=said)
        if bits == 8 and ".0." not in target:
            with pytest.raises(ValueError, match=r"up_proj\.weight is stored in 4 bits; quantization_config says 8"):
                Walk(Checkpoint(folder))
        else:
            Walk(Checkpoint(folder))


def test_a_zigzag_layout_that_is_none():
    parts = zigzag.random(128, 32, zigzag.Spec(), torch.Generator().manual_seed(0), 2**10)
    tensors = {formats.on_disk("x.weight", suffix): part for suffix, part in parts.items()}
    assert formats.read("x.weight", tensors, tensors.__getitem__).keys() == parts.keys()
    for wrong in ({"x.weight_layout": torch.tensor([64, 9, 128])}, {"x.weight_row_scale": torch.ones(3)}):
        damaged = {**tensors, **wrong}
        with pytest.raises(ValueError, match=r"^x\.weight: "):
            formats.read("x.weight", damaged, damaged.__getitem__)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_are_floats(pico, tmp_path, dtype):
    folder = edited(
        pico("llama"), tmp_path, tensors=lambda kept: {**kept, "model.norm.weight": torch.ones(64).to(dtype)}
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as .*; floats are expected"):
        Walk(Checkpoint(folder))


@pytest.mark.parametrize(
    ("key", "kind", "value", "said"),
    [
        ("tokens", 9, (4, [1, 2]), "tokenizer.ggml.tokens, a list of uint32,"),
        ("merges", 9, (6, [1.0]), "tokenizer.ggml.merges, a list of float32,"),
        ("merges", 4, 7, "tokenizer.ggml.merges, which is no list,"),
        ("scores", 9, (4, [1]), "tokenizer.ggml.scores, a list of uint32,"),
        ("token_type", 9, (6, [1.0]), "tokenizer.ggml.token_type, a list of float32,"),
    ],
)
def test_lists_of_a_gguf_tokenizer_are_of_their_type(tmp_path, key, kind, value, said):
    import struct

    from tests.test_gguf import entry, whole

    number = lambda code, each: struct.pack("<f" if code == 6 else "<I", each)  # noqa: E731
    raw = number(kind, value) if kind != 9 else b""
    if kind == 9:
        code, items = value
        raw = struct.pack("<IQ", code, len(items)) + b"".join(number(code, item) for item in items)
    (tmp_path / "a.gguf").write_bytes(whole([entry(f"tokenizer.ggml.{key}", kind, raw)], []))
    with pytest.raises(ValueError, match=said):
        gguf.read(tmp_path / "a.gguf")


# ------------------------------------------------------------------------------------------------------------- children


def test_a_child_s_config_is_the_file_s_words_and_what_changed(pico, tmp_path):
    drop = ("rms_norm_eps", "layer_types", "max_window_layers", "num_key_value_heads")
    folder = edited(pico("qwen2"), tmp_path, drop=drop, sliding_window=4096, my_own=[1], tie_word_embeddings=True)
    read = read_config(folder)
    assert read["num_key_value_heads"] == 32 and read["sliding_window"] is None
    said = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    read = families.resolved(said)
    shapes = families.shapes(read)
    assert families.config_of(read, shapes) == said
    narrow = {Slot("ffn", i): Choice((("ffn_width", ffn_width.Spec(64)),)) for i in range(3)}
    assert families.config_of(read, reshape_all(shapes, narrow)) == {**said, "intermediate_size": 64}


def test_more_than_ten_layers_that_differ_are_read_alike(pico, tmp_path):
    """transformers fills their numbers with zeros when it saves: "03"."""
    parent = pico("llama", num_hidden_layers=11, hidden_size=32, intermediate_size=64)
    changed = {Slot("mixer", 3): ("window", window.Spec(8)), Slot("ffn", 10): ("noop", noop.Spec())}
    layout = {slot: Choice((spec,)) for slot, spec in changed.items()}
    child = build(parent, tmp_path / "child", layout)
    whole = load_model(child, dtype=torch.float32)
    torch.testing.assert_close(whole(ids(), use_cache=False).logits, walked(child), rtol=1e-5, atol=1e-5)
    whole.save_pretrained(tmp_path / "again")
    assert "03" in json.loads((tmp_path / "again" / "config.json").read_text())["per_layer_config"]
    assert Walk(Checkpoint(tmp_path / "again")).shapes == Walk(Checkpoint(child)).shapes
