"""The native engine computes what the PyTorch model computes, for every family and every kind of layer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.formats import packed_int
from pennyweight.live.load import load_model
from pennyweight.model.shapes import Attention
from pennyweight.quantize import rtn
from tests.conftest import FAMILIES
from tests.test_heterogeneous import LAYOUT, build

_native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime.engine import Engine, Row, processors  # noqa: E402  (needs the native module)
from pennyweight.runtime.generate import Batch, Request  # noqa: E402
from pennyweight.runtime.lower import NotRun, RotaryTables  # noqa: E402
from pennyweight.runtime.sources.folder import Folder  # noqa: E402

IDS = [int(i) for i in torch.arange(70).mul(7919).remainder(300)]


def wanted(folder, ids=IDS) -> np.ndarray:
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, pico):
    return pico(request.param)


@pytest.fixture(scope="module")
def child(folder, tmp_path_factory):
    return build(folder, tmp_path_factory.mktemp("child") / "child", LAYOUT)


@pytest.mark.parametrize("kernels", _native.kernel_names())
def test_16_bit_models_equal_pytorch_in_float32(folder, kernels):
    engine = Engine(folder, threads=1, cache="float32", kernels=kernels)
    assert engine.kernels == kernels
    assert relative(engine.logits(IDS), wanted(folder)) < 1e-4


@pytest.mark.parametrize("hidden_act", ["gelu_pytorch_tanh", "relu2"])
def test_gates_other_than_silu_equal_pytorch(pico, hidden_act):
    folder = pico("llama", hidden_act=hidden_act)
    assert relative(Engine(folder, threads=1, cache="float32").logits(IDS), wanted(folder)) < 1e-4


def test_layers_of_all_kinds_equal_pytorch(child):
    """Skipped and linear blocks, fewer KV heads, a window of 8 that the text is much longer than, odd widths."""
    assert relative(Engine(child, threads=2, force_threads=True, cache="float32").logits(IDS), wanted(child)) < 1e-4


@pytest.mark.parametrize(("cache", "allowed"), [("float16", 2e-3), ("int8", 4e-2)])
def test_smaller_caches_stay_near(folder, cache, allowed):
    error = relative(Engine(folder, threads=1, cache=cache).logits(IDS), wanted(folder))
    assert 0 < error < allowed


def test_fp8_is_the_older_name_of_int8(folder):
    found, expected = (Engine(folder, threads=1, cache=cache).logits(IDS) for cache in ("fp8", "int8"))
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def biased(pico, tmp_path):
    """biased(12.0) -> a model with a bias of 12 on a pair of channels of its keys that rotates slowly, as in Qwen2."""
    rope = {"rope_type": "default", "rope_theta": 1e7}
    plain = pico("qwen2", num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)

    def make(most: float):
        folder = Path(shutil.copytree(plain, tmp_path / f"{most}"))
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("k_proj.bias"):
                tensor[15], tensor[31] = most, -0.7 * most
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def test_8_bits_survive_keys_with_biases(biased):
    """One scale for all channels, as they are, would round most of them away: 0.06."""
    folder = biased(60.0)
    engine = Engine(folder, threads=1, cache="int8")
    assert not engine.notes
    assert relative(engine.logits(IDS), wanted(folder)) < 0.04


def test_layers_whose_keys_have_biases_that_8_bits_do_not_hold_stay_in_float16(biased):
    folder = biased(180.0)
    engine = Engine(folder, threads=1, cache="int8")
    assert engine.notes[0].startswith("keys and values of 3 of the layers stay in float16: their keys have biases")
    assert engine.cache_bytes_of(50) == Engine(folder, threads=1).cache_bytes_of(50)
    assert relative(engine.logits(IDS), wanted(folder)) < 5e-3


def test_bytes_of_keys_and_values_count_their_scales(folder):
    """A bfloat16 for every head and position; values are padded to whole blocks of 16. A layer that slides looks at no
    more than its window."""
    mixers = [block.shape for block in Folder(folder).blocks.values() if isinstance(block.shape, Attention)]
    heads, dim = sum(mixer.num_kv_heads for mixer in mixers), mixers[0].head_dim
    seen = sum(mixer.num_kv_heads * min(50, mixer.window or 50) for mixer in mixers)
    padded = -(-dim // 16) * 16
    for cache, each in (("float16", 2 * (dim + padded)), ("int8", dim + padded + 4), ("float32", 4 * (dim + padded))):
        engine = Engine(folder, threads=1, cache=cache)
        assert engine.cache_bytes_of(50) == seen * each
        engine.open(64)
        assert engine.cache_bytes == 64 * heads * each


def test_numbers_beyond_float16_name_the_cache_that_holds_them(pico, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors")
    for cache, said in (
        ("float16", "beyond float16's range (65504), in which they are kept; --cache float32"),
        ("float32", None),
    ):
        batch = Batch(Engine(folder, threads=1, cache=cache), places=1)
        text = batch.submit(Request(IDS, 3))
        while batch.busy:
            batch.step()
        assert (text.error is None) if said is None else (text.finish == "failed" and said in str(text.error))


def test_greedy_tokens_of_the_shipped_model_are_those_of_transformers():
    """20 prompts, 64 tokens each. Prompts are stretches of this file."""
    import pennyweight
    from pennyweight.runtime.model import open_model

    reference = Path(pennyweight.__file__).parent / "data" / "reference-dense"
    opened = open_model(reference, threads=1, cache="float32")
    text = Path(__file__).read_text()
    prompts = [opened.tokenizer.encode(text[400 * i : 400 * i + 120])[:24] for i in range(20)]
    batch = Batch(opened.engine, places=8, capacity=100)
    requests = [batch.submit(Request(ids, 64)) for ids in prompts]
    while batch.busy:
        batch.step()
    model = load_model(reference, dtype=torch.float32)
    expected = model.generate(
        torch.tensor(prompts), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0
    )
    assert [request.answer for request in requests] == expected[:, 24:].tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_packed_models_equal_the_dequantised_one(pico, tmp_path, bits, group):
    folder = quantised(pico("qwen3"), tmp_path / "packed", packed_int.Spec(bits, group))
    expected, engine = wanted(folder), Engine(folder, threads=2, force_threads=True, cache="float32")
    assert engine.weight_bytes < 0.75 * Checkpoint(pico("qwen3")).weight_bytes
    assert relative(engine.logits(IDS), expected) < 0.03  # 64 wide: 8-bit activations of blocks of 32


def quantised(folder, out, stored):
    """Every matrix of the layers packed, written by hand."""
    checkpoint, tensors, targets = Checkpoint(folder), {}, []
    for name in checkpoint.entries:
        tensor = checkpoint.read(name)
        if tensor.ndim == 2 and "layers" in name:
            codes, grid = rtn.quantize(tensor.float(), None, stored)
            parts = packed_int.pack(codes, grid, stored)
            tensors |= {name.removesuffix("weight") + part: t.contiguous() for part, t in parts.items()}
            targets.append(name.removesuffix(".weight"))
        else:
            tensors[name] = tensor
    shutil.copytree(folder, out)
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": packed_int.config_group(stored, targets)},
        "ignore": [],
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_weights_left_in_their_file_compute_the_same(folder, child):
    for each in (folder, child):
        found = Engine(each, threads=1, mapped=True)
        assert not found.notes
        np.testing.assert_array_equal(found.logits(IDS), Engine(each, threads=1).logits(IDS))


def test_packed_weights_cannot_stay_in_their_file_and_that_is_said(pico, tmp_path):
    folder = quantised(pico("llama"), tmp_path / "child", packed_int.Spec(4, 32))
    mapped, copied = Engine(folder, threads=1, mapped=True), Engine(folder, threads=1)
    assert "matrices were rearranged" in mapped.notes[0]
    assert not copied.notes
    np.testing.assert_array_equal(mapped.logits(IDS), copied.logits(IDS))


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_sharing_a_step_changes_no_bit(child, cache):
    """One by one, in chunks, and beside another sequence: the same floats."""
    engine = Engine(child, threads=2, force_threads=True, cache=cache)
    whole = engine.logits(IDS)
    one = engine.open(128)
    single = np.concatenate([engine.step([Row(one, i, token)]) for i, token in enumerate(IDS)])
    np.testing.assert_array_equal(single, whole)
    two, three = engine.open(128), engine.open(128)
    mixed = []
    for i in range(0, 70, 7):
        rows = [Row(two, i + j, IDS[i + j]) for j in range(7)]
        beside = [Row(three, i + j, IDS[-1 - i - j], False) for j in range(7)]
        mixed.append(engine.step([row for pair in zip(rows, beside, strict=True) for row in pair]))
    np.testing.assert_array_equal(np.concatenate(mixed), whole)


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_going_back_writes_over(child, cache):
    engine = Engine(child, threads=1, cache=cache)
    sequence = engine.open(128)
    engine.step([Row(sequence, i, token, False) for i, token in enumerate(IDS)])
    again = engine.step([Row(sequence, 40 + i, token) for i, token in enumerate(IDS[:20])])
    np.testing.assert_array_equal(again, engine.logits(IDS[:40] + IDS[:20])[40:])


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_a_copied_prefix_is_the_prefix(child, cache):
    engine = Engine(child, threads=1, cache=cache)
    source, target = engine.open(128), engine.open(100)
    engine.step([Row(source, i, token, False) for i, token in enumerate(IDS)])
    engine.copy(source, target, 50)
    found = engine.step([Row(target, 50 + i, token) for i, token in enumerate(IDS[:20])])
    np.testing.assert_array_equal(found, engine.logits(IDS[:50] + IDS[:20])[50:])


def test_a_window_longer_text_runs_in_a_ring(pico, tmp_path):
    """More positions than the ring of a windowed layer holds."""
    folder = build(pico("qwen3", max_position_embeddings=2048), tmp_path / "child", LAYOUT)
    ids = [int(i) for i in torch.arange(1300).mul(7919).remainder(300)]
    assert relative(Engine(folder, threads=1, cache="float32").logits(ids), wanted(folder, ids)) < 1e-4


@pytest.fixture(scope="module")
def ring(pico, tmp_path_factory):
    """A model with a window of 8, and texts longer than the ring of 528 positions that keeps it."""
    folder = pico("qwen3", max_position_embeddings=2048)
    return Engine(build(folder, tmp_path_factory.mktemp("ring") / "child", LAYOUT), threads=1)


def read_on(engine, sequence: int, tokens: list[int], position: int) -> np.ndarray:
    """Logits after the last of these tokens, from this position on."""
    for start in range(0, len(tokens) - 1, 512):
        part = tokens[start : min(start + 512, len(tokens) - 1)]
        engine.step([Row(sequence, position + start + i, token, False) for i, token in enumerate(part)])
    return engine.step([Row(sequence, position + len(tokens) - 1, tokens[-1])])[0]


@pytest.mark.parametrize("seed", range(8))
def test_what_a_ring_has_lost_is_never_looked_at(ring, seed):
    """Two texts read on, gone back in, copied at random: logits are those of a text read at once, or it is refused."""
    rng = np.random.default_rng(seed)
    capacity = [2000, 1200]
    texts: list[list[int]] = [[], []]
    sequences = [ring.open(size) for size in capacity]
    refused = 0
    for _ in range(24):
        which = int(rng.integers(2))
        text, sequence = texts[which], sequences[which]
        to = int(rng.integers(max(0, len(text) - rng.choice([20, 600, 2000])), len(text) + 1))
        if rng.random() < 0.3:  # from the other text
            other, to = 1 - which, min(int(rng.integers(len(texts[1 - which]) + 1)), capacity[which] - 1)
            if not ring.can_go_back(sequences[other], to):
                refused += 1
                with pytest.raises(ValueError, match="does not hold"):
                    ring.copy(sequences[other], sequence, to)
                continue
            ring.copy(sequences[other], sequence, to)
            text = texts[other]
        elif not ring.can_go_back(sequence, to):
            refused += 1
            with pytest.raises(ValueError, match="window of 8"):
                ring.step([Row(sequence, to, 1)])
            continue
        new = rng.integers(0, 300, min(int(rng.choice([1, 500, 900])), capacity[which] - to)).tolist()
        if not new:
            texts[which] = text[:to]
            continue
        texts[which] = text[:to] + new
        found = read_on(ring, sequence, new, to)
        fresh = ring.open(2000)
        np.testing.assert_array_equal(found, read_on(ring, fresh, texts[which], 0))
        ring.close(fresh)
    for sequence in sequences:
        ring.close(sequence)
    assert refused  # else these moves show nothing


def test_going_back_twice_is_refused_where_the_ring_went_round(ring):
    sequence = ring.open(1200)
    read_on(ring, sequence, [1] * 1000, 0)
    assert ring.can_go_back(sequence, 600) and not ring.can_go_back(sequence, 400)
    ring.step([Row(sequence, 600, 2)])
    assert not ring.can_go_back(sequence, 400)  # the text is short now; what it lost before has not come back
    with pytest.raises(ValueError, match="position 400: a layer with a window of 8"):
        ring.step([Row(sequence, 400, 2)])
    assert ring.can_go_back(sequence, 0)
    ring.close(sequence)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_threads_that_share_a_head_change_no_bit(pico, tmp_path, kv_heads):
    """A text of three segments: alone a row's heads are shared between threads, in a long prompt they are not."""
    folder = pico("llama", max_position_embeddings=2048, num_key_value_heads=kv_heads)
    ids = [int(i) for i in torch.arange(1300).mul(7919).remainder(300)]
    one, three = (Engine(folder, threads=threads, force_threads=True, cache="float32") for threads in (1, 3))
    expected = one.logits(ids)
    assert relative(expected, wanted(folder, ids)) < 1e-4
    np.testing.assert_array_equal(three.logits(ids), expected)
    for engine in (one, three):
        sequence = engine.open(1300)
        for start in range(0, 1299, 433):
            engine.step([Row(sequence, start + i, token, False) for i, token in enumerate(ids[start : start + 433])])
        np.testing.assert_array_equal(engine.step([Row(sequence, 1299, ids[1299])])[0], expected[1299])


def test_a_filled_sequence_stands_for_a_long_text(folder):
    engine = Engine(folder, threads=1)
    sequence = engine.open(200)
    engine.fill(sequence, 150)
    assert np.isfinite(engine.step([Row(sequence, 150, 1)])).all()
    with pytest.raises(ValueError, match="no room for 201 tokens"):
        engine.fill(sequence, 201)


TRAINED_TO = {"original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED_TO},
    {"rope_type": "yarn", "factor": 4.0, **TRAINED_TO},
    {"rope_type": "linear", "factor": 2.0},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_scalings(pico, scaling):
    folder = pico("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    assert relative(Engine(folder, threads=1, cache="float32").logits(IDS), wanted(folder)) < 1e-4


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, *SCALINGS])
def test_rotary_tables_that_grow_are_those_of_transformers(pico, scaling):
    folder = pico("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    tables = RotaryTables(Folder(folder))
    tables.cover(5000)
    assert 5000 <= tables.native.positions < 7000
    model = load_model(folder, dtype=torch.float32)
    whole = model.model.rotary_emb(torch.zeros(1), torch.arange(5000).unsqueeze(0))
    for first in (0, 1024, 3072):
        for found, expected in zip(tables._rows(first), whole, strict=True):
            np.testing.assert_array_equal(found, expected[0, first : first + len(found), : found.shape[1]].numpy())


def test_a_long_context_costs_nothing_until_it_is_used(pico):
    """Tables of 2^24 positions would be gigabytes, and take a minute."""
    folder = pico("llama", max_position_embeddings=2**24)
    engine = Engine(folder, threads=1, cache="float32")
    assert engine.context == 2**24
    first = engine.open(100)
    assert engine._rotary[0].native.positions < 2000
    ids = [int(i) for i in torch.arange(2100).mul(7919).remainder(300)]
    assert relative(engine.logits(ids), wanted(folder, ids)) < 1e-4
    assert relative(read_on(engine, first, IDS, 0), wanted(folder)[-1]) < 1e-4


def test_keys_and_values_that_do_not_fit_are_refused_before_anything_runs(pico, monkeypatch):
    wide = pico("llama", max_position_embeddings=2**24, head_dim=512, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"sequence of 16,777,216 tokens take 384.00 GiB, and .* of memory are free"):
        Engine(wide, threads=1).open(2**24)
    engine = Engine(pico("llama", max_position_embeddings=2**24), threads=1)
    each = engine.cache_bytes_of(16000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2.5 * each))
    sequence = engine.open(16000)
    engine.open(16000)
    with pytest.raises(ValueError, match="are promised to sequences that are open"):
        engine.open(16000)
    engine.fill(sequence, 16000)  # what is written is no longer free
    engine.open(8000)


def test_a_window_beyond_any_text_is_none(pico):
    """What a config names may be more than 32 bits hold."""
    folder = pico("llama")
    expected = Engine(folder, threads=1).logits(IDS)
    for window in (256, 2**31 - 1, 2**31, 2**63 - 1, 2**70):
        source = Folder(folder)
        for slot, block in list(source.blocks.items()):
            if isinstance(block.shape, Attention):
                source.blocks[slot] = replace(block, shape=replace(block.shape, window=window))
        np.testing.assert_array_equal(Engine(source, threads=1).logits(IDS), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type 'dynamic'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12, "factor": 2}},
            "rope_type 'longrope'",  # the older key, and the oldest name in it
        ),
    ],
)
def test_what_the_engine_would_compute_differently_is_refused(pico, tmp_path, changes, said):
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in changes:
        config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=said):
        Engine(folder, threads=1)


def test_float16_scales_are_run_as_they_are(pico, tmp_path):
    folder = quantised(pico("llama"), tmp_path / "child", packed_int.Spec(4, 32))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("_scale"):
            tensors[name] = (tensors[name].float() * 1.0007).half()
    save_file(tensors, folder / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if "weight_" not in name}
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        plain[name] = packed_int.unpack({p: tensors[name.replace("weight", p)] for p in PARTS})
    whole = shutil.copytree(pico("llama"), tmp_path / "whole")
    save_file(plain, whole / "model.safetensors")
    found, expected = (Engine(each, threads=1, cache="float32").logits(IDS) for each in (folder, whole))
    assert relative(found, expected) < 1e-2


PARTS = ("weight_packed", "weight_scale", "weight_shape")


def test_bad_rows_are_refused(folder):
    engine = Engine(folder, threads=1)
    sequence = engine.open(10)
    for rows, said in [
        ([Row(5, 0, 1)], "not open"),
        ([Row(sequence, 0, 300)], "vocabulary of 300"),
        ([Row(sequence, 1, 1)], "the next is 0"),
        ([Row(sequence, 0, 1), Row(sequence, 2, 1)], "the next is 1"),
        ([], "1 to 512"),
    ]:
        with pytest.raises(ValueError, match=said):
            engine.step(rows)
    with pytest.raises(ValueError, match="1 to 256"):
        engine.open(300)


def test_too_many_heads_on_one_are_refused(pico):
    folder = pico("qwen3", num_attention_heads=129, num_key_value_heads=1, head_dim=2)
    with pytest.raises(NotRun, match="129 heads on 1 key-value heads"):
        Engine(folder, threads=1)


def test_more_threads_than_processors_are_refused_unless_forced(folder):
    """They would only wait for each other; thousands would take the machine down."""
    many = processors() + 1
    for wanted, said in ((many, f"{many} threads on the {many - 1} processors"), (4096, "--force-threads"), (-1, "at")):
        with pytest.raises(ValueError, match=said):
            Engine(folder, threads=wanted)
    assert Engine(folder, threads=many, force_threads=True).threads == many
    assert 1 <= Engine(folder, threads=0).threads <= processors()
    with pytest.raises(ValueError, match="at least 1"):
        Engine(folder, threads=-1, force_threads=True)


def test_parts_that_do_not_fit_are_refused(pico, tmp_path):
    """Before anything runs: a kernel would read past the end."""
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    source = Folder(folder)
    plain, short = source.vector, "model.layers.1.post_attention_layernorm.weight"
    source.vector = lambda name: plain(name)[:-1] if name == short else plain(name)
    with pytest.raises(ValueError, match=r"1\.ffn: the model's parts do not fit: the norm has 63 values, expected 64"):
        Engine(source, threads=1)


def test_memory_of_a_closed_sequence_is_given_back(folder):
    engine = Engine(folder, threads=1)
    before = engine.cache_bytes
    sequence = engine.open(200)
    assert engine.cache_bytes > before
    engine.close(sequence)
    assert engine.cache_bytes == before
    assert engine.open(16) == sequence


@pytest.fixture(scope="module")
def zigzag_model(pico, tmp_path_factory):
    """A folder whose layers hold exactly what zigzag packs, and how to lower it so that the engine runs zigzag."""
    from pennyweight.formats import Grid, zigzag

    folder = tmp_path_factory.mktemp("zigzag") / "model"
    shutil.copytree(pico("qwen3"), folder)
    tensors, packed, spec = load_file(folder / "model.safetensors"), {}, zigzag.Spec(group=32)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layers" in name:
            grouped = tensor.float().view(-1, 32, tensor.shape[1])
            scale = (grouped.abs().amax(dim=1) / 7).half()
            codes = (tensor.float() / scale.float().repeat_interleave(32, dim=0) + 8).round().clamp(0, 15).byte()
            packed[name] = zigzag.pack(codes, Grid(scale), spec.of(len(tensor)))
            tensors[name] = zigzag.unpack(packed[name])
    save_file(tensors, folder / "model.safetensors")

    def engine(monkeypatch, threads, threshold=-1.0):
        plain = Folder.matrix

        def matrix(source, name):
            if name not in packed:
                return plain(source, name)
            parts, own = packed[name], zigzag.spec_of(packed[name])
            rows, columns = (int(n) for n in parts["weight_shape"])
            raw = parts["weight_zigzag"].numpy()
            made = _native.Matrix.zigzag(raw, rows, columns, own.tile_rows, own.group, _native.Scales[own.scales])
            made.threshold = threshold
            return made

        with monkeypatch.context() as patched:
            patched.setattr(Folder, "matrix", matrix)
            patched.setattr(Folder, "matrices", lambda source, names: [matrix(source, name) for name in names])
            return Engine(folder, threads=threads, force_threads=True, cache="float32")

    return folder, engine


def test_zigzag_layers_run(zigzag_model, monkeypatch):
    folder, engine = zigzag_model
    one, two = (engine(monkeypatch, threads).logits(IDS) for threads in (1, 2))
    error = relative(one, wanted(folder))
    assert error < 0.03  # folded activations in 8 bits
    # Sums end in other last bits, which moves a few activations to the next code: some of the error that codes make.
    assert relative(two, one) < error / 2
    np.testing.assert_array_equal(two, engine(monkeypatch, 2).logits(IDS))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_zigzag_rows_are_the_same_alone_and_together(zigzag_model, monkeypatch, threads):
    """A product of one token splits columns, one of many tokens splits rows: the same bits."""
    made = zigzag_model[1](monkeypatch, threads, 0.3)
    together, thinned = made.logits(IDS), made.logits(IDS, sparse=True)
    assert relative(thinned, together) > 0.01
    sequence = made.open(len(IDS))
    alone = [made.step([Row(sequence, i, token)]) for i, token in enumerate(IDS)]
    np.testing.assert_array_equal(np.concatenate(alone), together)
    alone = [made.step([Row(sequence, i, token, True, True)]) for i, token in enumerate(IDS)]
    np.testing.assert_array_equal(np.concatenate(alone), thinned)
    mixed = made.step([Row(sequence, i, token, True, i >= 40) for i, token in enumerate(IDS)])
    np.testing.assert_array_equal(mixed[:40], together[:40])
    assert 0 < relative(mixed[40:], thinned[40:]) < relative(thinned[40:], together[40:])  # another beginning


def test_sparse_rows_leave_columns_out(zigzag_model, monkeypatch):
    folder, engine = zigzag_model
    nothing, some = engine(monkeypatch, 2, 0.0), engine(monkeypatch, 2, 0.3)
    dense = nothing.logits(IDS)
    np.testing.assert_array_equal(nothing.logits(IDS, sparse=True), dense)  # only zeros are left out
    np.testing.assert_array_equal(some.logits(IDS), dense)
    assert some.kept_share == 1
    thinned = some.logits(IDS, sparse=True)
    assert 0.3 < some.kept_share < 0.95
    assert 0 < relative(thinned, wanted(folder)) < 1
