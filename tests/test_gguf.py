"""GGUF files: read whole or refused by name and place, and what runs is what the file holds."""

from __future__ import annotations

import json
import random
import re
import struct
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from typer.testing import CliRunner

from pennyweight.cli import app
from pennyweight.disk.gguf import file as gguf
from pennyweight.disk.gguf import ggml
from pennyweight.disk.gguf.architectures import ARCHITECTURES
from tests.gguf_files import convert, interleaved, parent_of, quantise

_native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime.engine import Engine  # noqa: E402  (needs the native module)
from pennyweight.runtime.model import open_model  # noqa: E402
from pennyweight.runtime.sources.open import open_source  # noqa: E402
from pennyweight.runtime.sources.source import rearranged  # noqa: E402
from tests.test_engine import IDS, TRAINED_TO, relative, wanted  # noqa: E402

KINDS = {kind.name: kind for kind in ggml.KINDS.values()}
QUANTISED = [name for name, kind in KINDS.items() if kind.split]
EXACT = [name for name in QUANTISED if not KINDS[name].loss]
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # others: (0,)


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Every bit random, but for scales that are ordinary numbers. (rows, bytes)"""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, KINDS[name].nbytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        raw[..., at : at + 2] = rng.standard_normal((rows, blocks, 1)).astype("<f2").view(np.uint8)
    return raw.reshape(rows, -1)


def as_run(name: str, raw: np.ndarray) -> np.ndarray:
    """The float32 of every weight of the matrix that the engine would be given."""
    rows = ggml.rows(KINDS[name], raw)
    columns = raw.shape[1] // KINDS[name].nbytes * KINDS[name].columns
    matrix = _native.Matrix.rows(rows.codes, rows.scales, rows.minima, columns, KINDS[name].bits, 32, False)
    out = np.full((len(raw), columns), np.nan, np.float32)
    for i, row in enumerate(out):
        matrix.row(i, row)
    return out


# ------------------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3)])
def test_codes_and_scales_make_the_weights_of_the_ggml_project_to_the_bit(name, rows, blocks):
    raw = random_blocks(name, rows, blocks)
    parts = KINDS[name].split(raw.reshape(rows, blocks, -1))
    found = parts.codes.reshape(*parts.scale.shape, -1) * parts.scale[..., None]
    if parts.minimum is not None:
        found += parts.minimum[..., None]
    expected = reference.quants.dequantize(raw, Type[name])
    np.testing.assert_array_equal(found.reshape(rows, -1).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", EXACT)
def test_types_that_fit_the_engine_lose_nothing(name):
    raw = random_blocks(name, 37, 3)
    np.testing.assert_array_equal(as_run(name, raw), reference.quants.dequantize(raw, Type[name]))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_rounded_scales_stay_within_their_bound(name):
    raw = random_blocks(name, 37, 3)
    parts = KINDS[name].split(raw.reshape(37, 3, -1))
    most = 31 if name == "Q5_K" else 15
    # 2^-25: half the smallest float16, for products that are subnormal there
    bound = 2**-11 * (most * np.abs(parts.scale) + np.abs(parts.minimum)) + (most + 1) * 2**-25
    error = np.abs(as_run(name, raw) - reference.quants.dequantize(raw, Type[name])).reshape(37, -1, 32).max(-1)
    assert (error <= bound * 1.0001).all()
    assert error.max() > 0


def test_requantised_q6_k_stays_within_its_bound():
    raw = random_blocks("Q6_K", 37, 3)
    step = np.abs(KINDS["Q6_K"].split(raw.reshape(37, 3, -1)).scale).reshape(37, -1, 2).max(-1) / 4
    error = np.abs(as_run("Q6_K", raw) - reference.quants.dequantize(raw, Type.Q6_K)).reshape(37, -1, 2, 16).max(-1)
    assert (error.min(-1) <= 128 * (2**-11 * step + 2**-25)).all()  # the half whose scale is the larger: only rounded
    assert (error.max(-1) <= step * (1 + 2**-4) + 2**-18).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("name", "own", "added"), [("Q4_K", 0.08, 0.0008), ("Q5_K", 0.04, 0.0008), ("Q6_K", 0.02, 0.0042)]
)
def test_what_running_adds_to_the_error_of_normal_weights(name, own, added):
    """The numbers of docs/formats.md, relative to the weights."""
    weights = (0.02 * np.random.default_rng(0).standard_normal((64, 1024))).astype(np.float32)
    raw = quantise(weights, Type[name])
    stored = reference.quants.dequantize(raw, Type[name])
    assert relative(stored, weights) < own
    assert added / 2 < relative(as_run(name, raw), stored) < added
    assert relative(as_run(name, raw), weights) < own * 1.02


def test_zeros_stay_zeros():
    for name in QUANTISED:
        raw = quantise(np.zeros((3, 256), np.float32), Type[name])
        assert not as_run(name, raw).any() and not reference.quants.dequantize(raw, Type[name]).any()


# ----------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def parent(family, pico):
    return parent_of(family, pico)


@pytest.fixture(scope="module")
def brain(parent, tmp_path_factory):
    """A family's pico model as a GGUF file of bfloat16."""
    return convert(parent, tmp_path_factory.mktemp("brain"), "BF16")[0]


def test_bfloat16_files_are_their_folders_to_the_bit(brain, parent):
    """Names, order of rows, biases, norms, tying, rotary tables: one of them wrong would show."""
    found = Engine(brain, threads=1)
    np.testing.assert_array_equal(found.logits(IDS), Engine(parent, threads=1).logits(IDS))
    assert found.notes == () and found.weight_bytes == Engine(parent, threads=1).weight_bytes


def test_a_mapped_file_computes_the_same(brain, family, parent, tmp_path):
    mapped = Engine(brain, threads=1, mapped=True)
    np.testing.assert_array_equal(mapped.logits(IDS), Engine(brain, threads=1).logits(IDS))
    reordered = 2 * pico_layers(parent) if ARCHITECTURES[family].interleaved else 0  # q_proj and k_proj
    assert mapped.notes == rearranged(reordered)
    packed = convert(parent, tmp_path, "Q4_0")[0]
    mapped = Engine(packed, threads=1, mapped=True)
    np.testing.assert_array_equal(mapped.logits(IDS), Engine(packed, threads=1).logits(IDS))
    assert "matrices were rearranged" in mapped.notes[-1]


def pico_layers(folder):
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_floats_equal_pytorch(parent, tmp_path, kind):
    file, same = convert(parent, tmp_path, kind)
    assert relative(Engine(file, threads=2, force_threads=True, cache="float32").logits(IDS), wanted(same)) < 1e-4


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models_equal_pytorch_on_their_weights(kind, pico, tmp_path):
    """Embedding and head included. The tolerance is for activations in 8 bits, which these random models make much of
    (3 %), and for what Q6_K loses (another 1 %)."""
    family = {"Q4_0": "qwen2", "Q4_K": "llama", "Q6_K": "qwen2"}.get(kind, "qwen3")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64} if KINDS[kind].columns == 256 else {}
    file, same = convert(pico(family, **sizes), tmp_path, kind)
    engine = Engine(file, threads=2, force_threads=True, cache="float32")
    expected = wanted(same)
    assert relative(engine.logits(IDS), expected) < (0.05 if kind == "Q6_K" else 0.04)
    layers = 3 * 7 + 1 + (family != "qwen2")  # matrices, the embedding, the head unless tied
    assert engine.notes == ((f"{layers} {kind} matrices: {KINDS[kind].loss}",) if KINDS[kind].loss else ())


def test_types_may_differ_from_matrix_to_matrix(pico, tmp_path):
    """As in the usual mixtures: more bits for v_proj and down_proj than for what they share an input with."""
    mixed = {"v_proj": "Q8_0", "down_proj": "F16", "embed": "Q5_0", "lm_head": "BF16"}
    pick = lambda name: next((kind for part, kind in mixed.items() if part in name), "Q4_0")  # noqa: E731
    file, same = convert(pico("llama"), tmp_path, pick)
    assert relative(Engine(file, threads=1, cache="float32").logits(IDS), wanted(same)) < 0.04


def test_large_tensors_are_read_by_parts(pico, tmp_path, monkeypatch):
    file, _ = convert(pico("llama"), tmp_path, lambda name: "F16" if "gate" in name else "Q4_1")
    whole = Engine(file, threads=1).logits(IDS)
    monkeypatch.setattr("pennyweight.disk.gguf.checkpoint._CHUNK_WEIGHTS", 1000)
    np.testing.assert_array_equal(Engine(file, threads=1).logits(IDS), whole)


def test_text_begins_as_the_file_says(pico, tmp_path):
    """And as the folder that it was made of does: its tokenizer names a BOS and does not add it."""
    ids = open_model(pico("qwen3"), threads=1).encode("hello")
    assert 0 not in ids
    key = "tokenizer.ggml.add_bos_token"
    silent = lambda writer: writer.kv_data[0].pop(key)  # noqa: E731
    begun = lambda writer: setattr(writer.kv_data[0][key], "value", True)  # noqa: E731
    for name, more, expected in (("a", lambda _: None, ids), ("b", silent, ids), ("c", begun, [0, *ids])):
        file, _ = convert(pico("qwen3"), tmp_path / name, "F16", more=more)
        assert open_model(file, threads=1).encode("hello") == expected


def test_rows_are_put_back_in_halves():
    """By hand, for two heads of four: rotary pairs (0, 2) and (1, 3) are neighbours in the file."""
    assert interleaved(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED_TO}


def rotary_frequencies(rope: dict) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 24, "max_position_embeddings": 256}
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters={"rope_theta": 10000.0, **rope})).inv_freq


def add_llama3(writer) -> None:
    plain, scaled = (rotary_frequencies(rope) for rope in ({"rope_type": "default"}, LLAMA3))
    assert not torch.equal(plain, scaled)
    writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())


def add_yarn(writer) -> None:
    writer.add_rope_scaling_type(reference.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


@pytest.mark.parametrize(
    ("scaling", "add"),
    [
        (LLAMA3, add_llama3),
        ({"rope_type": "yarn", "factor": 4.0, **TRAINED_TO}, add_yarn),
        ({"rope_type": "linear", "factor": 2.0}, lambda writer: writer.add_rope_scaling_factor(2.0)),
    ],
)
def test_rotary_scalings(pico, tmp_path, scaling, add):
    folder = pico("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    file, _ = convert(folder, tmp_path / "scaled", "F32", more=add)
    expected = wanted(folder)
    assert relative(Engine(file, threads=1, cache="float32").logits(IDS), expected) < 1e-4
    unscaled, _ = convert(folder, tmp_path / "plain", "F32")
    assert relative(Engine(unscaled, threads=1, cache="float32").logits(IDS), expected) > 0.01


# --------------------------------------------------------------------------------------------------------- commands


def penny(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_run_says_the_same_of_file_and_folder(brain, parent):
    command = ("hello", "--max-tokens", 16, "--threads", 1, "--json")
    told, expected = (json.loads(penny("run", model, *command).stdout) for model in (brain, parent))
    for key in ("text", "finish", "tokens", "prompt_tokens"):
        assert told[key] == expected[key]


def test_what_was_requantised_is_said(pico, tmp_path):
    pick = lambda name: "Q6_K" if "down" in name or "embed" in name else "Q4_K"  # noqa: E731
    file, _ = convert(pico("qwen3", hidden_size=256, intermediate_size=512), tmp_path, pick)
    said = (
        "penny: 4 Q6_K matrices: requantised to 8 bits in groups of 32 columns",
        "penny: 19 Q4_K matrices: scales and minima rounded to float16",
    )
    for command in (("run", file, "hello", "--max-tokens", 2), ("bench", file, "--prompt", 4, "--new", 2)):
        done = penny(*command, "--threads", 1)
        assert done.exit_code == 0, done.output
        assert all(line in done.stderr.splitlines() for line in said)
    draft = penny("run", file, "hello", "--max-tokens", 2, "--draft", file, "--threads", 1)
    assert draft.stderr.count(said[0]) == 2


def test_files_are_served(brain, family):
    from tests.test_serve import get, post, serving

    with serving(open_model(brain, threads=1)) as (address, _):
        assert get(f"{address}/v1/models").json()["data"][0]["id"] == "model"
        ask = {"model": "model", "prompt": "hello", "max_tokens": 4, "temperature": 0}
        assert post(f"{address}/v1/completions", json=ask).json()["usage"]["prompt_tokens"] > 1


def test_a_file_that_is_not_there(tmp_path):
    gone = penny("run", tmp_path / "gone.gguf", "hello")
    assert gone.exit_code == 2 and "gone.gguf does not exist" in gone.stderr


# ----------------------------------------------------------------------------------------------------------- damage


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, start)


def whole(entries: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + data


NAME = entry("general.name", 8, text("tiny"))
ROW = tensor("a", (1, 32), 0, 0)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"GGML" + whole([], [])[4:], "begins with b'GGML', not with b'GGUF'"),
        (b"GGUF", "4 bytes, the header alone has 24"),
        (b"", "0 bytes, the header alone has 24"),
        (whole([], [], version=1), "version 1 at byte 4; versions 2 and 3 are read"),
        (whole([], [], version=3 << 24), "it was written for a big-endian machine"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
            f"{2**60} tensors, more than the rest of the file could hold, at byte 8",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 9),
            "9 metadata entries, more than the rest of the file could hold, at byte 16",
        ),
        (whole([NAME, NAME], []), "a second entry general.name at byte 60"),
        (whole([entry("a", 13, bytes(8))], []), "a of type 13 (0 to 12 exist) at byte 33"),
        (
            whole([entry("a", 9, struct.pack("<IQ", 9, 0))], []),
            "a, an array of type 9 (numbers and strings are possible)",
        ),
        (whole([entry("a", 9, struct.pack("<IQ", 12, 99))], []), "99 values of a, more than"),
        (
            whole([entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []),
            "text that is not UTF-8 (invalid start byte) at byte 37",
        ),
        (whole([entry("split.count", 2, struct.pack("<H", 3))], []), "is one of 3 files of a model; join them first"),
        (
            whole([entry("general.alignment", 4, struct.pack("<I", 24))], [ROW]),
            "general.alignment is 24; expected a power",
        ),
        (whole([], [ROW, tensor("a", (1, 32), 0, 128)], bytes(256)), "a second tensor a at byte 65"),
        (whole([], [ROW, tensor("b", (1, 32), 0, 96)], bytes(256)), "b at 96 of the data instead of 128, at byte 65"),
        (whole([], [ROW], bytes(127)), "a ends at byte 224, the file at 223; truncated"),
        (whole([], [tensor("a", (1, 2**62), 0, 0)], bytes(64)), "truncated"),
        (
            whole([], [tensor("a", (1, 32), 11, 0)]),
            "a is stored as Q3_K (type 11, entry at byte 24); types that are read: F32, F16",
        ),
        (whole([], [tensor("a", (1, 32), 77, 0)]), "a is stored as a type unknown to us (type 77"),
        (whole([], [tensor("a", (1, 33), 2, 0)]), "a of shape (1, 33) in blocks of 32 (Q4_0) at byte 24"),
        (whole([], [tensor("a", (0, 32), 0, 0)]), "a of shape (0, 32) in blocks"),
        (whole([], [tensor("a", (1,) * 5, 0, 0)]), "a of 5 dimensions (1 to 4 are possible)"),
        (whole([NAME], [])[:-20], "at byte"),
    ],
    ids=range(24),
)
def test_damage_is_named_with_its_place(tmp_path, raw, said):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(said)) as err:
        gguf.read(path)
    assert str(path) in str(err.value)


def test_headers_are_read_whole(tmp_path):
    """Every type of value, in both versions."""
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    entries = [entry(f"k{kind}", kind, struct.pack("<" + code, 1)) for kind, code in numbers.items()]
    entries += [entry(f"a{kind}", 9, struct.pack(f"<IQ2{code}", kind, 2, 1, 0)) for kind, code in numbers.items()]
    entries += [NAME, entry("words", 9, struct.pack("<IQ", 8, 2) + text("é") + text(""))]
    for version in (2, 3):
        path = tmp_path / "whole.gguf"
        path.write_bytes(whole(entries, [ROW, tensor("b", (64,), 8, 128)], bytes(128 + 68), version))
        file = gguf.read(path)
        assert [file.metadata[f"k{kind}"] for kind in numbers] == [1] * len(numbers)
        assert [file.metadata[f"a{kind}"].tolist() for kind in numbers] == [[1, 0]] * len(numbers)
        assert file.metadata["general.name"] == "tiny" and file.metadata["words"] == ["é", ""]
        assert [(t.name, t.shape, t.nbytes) for t in file.tensors.values()] == [("a", (1, 32), 128), ("b", (64,), 68)]
        with pytest.raises(ValueError, match=r"k6 is '1.0'; expected int"):
            file.get("k6", int)


def test_no_truncation_goes_unseen(tmp_path, pico):
    raw = convert(pico("qwen2", num_hidden_layers=1), tmp_path, "Q4_0")[0].read_bytes()
    path = tmp_path / "short.gguf"
    for length in [*range(64), *range(64, len(raw), 211), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="byte") as err:
            gguf.read(path)
        assert "short.gguf" in str(err.value)


def test_flipped_bits_are_refused_or_run(tmp_path, pico):
    """Whatever a header says, the answer is a ValueError that names the file, or a model that runs."""
    source = convert(pico("llama", num_hidden_layers=1), tmp_path, "Q4_1")[0]
    raw, start = bytearray(source.read_bytes()), min(t.start for t in gguf.read(source).tensors.values())
    path, chance, refused = tmp_path / "flipped.gguf", random.Random(0), 0
    vocabulary = raw.index(b"tokenizer.ggml.token_type")
    for turn in range(300):
        at = chance.randrange(start) if turn % 2 else chance.choice([*range(800), *range(vocabulary, start)])
        raw[at] ^= 1 << (bit := chance.randrange(8))
        path.write_bytes(raw)
        raw[at] ^= 1 << bit
        try:
            opened = open_model(path, context=16, threads=1)
            opened.engine.logits([1, 2, 3])
            opened.encode("hello")
        except ValueError as err:
            assert "flipped.gguf" in str(err), (at, bit)
            refused += 1
    assert 100 < refused < 300


def test_broken_scales_are_named_with_their_place(tmp_path, pico):
    file, _ = convert(pico("qwen3", num_hidden_layers=1), tmp_path, lambda name: "Q8_0" if "up_proj" in name else "F16")
    raw, header = bytearray(file.read_bytes()), gguf.read(file)
    for name, step in (("blk.0.ffn_up.weight", 68), ("blk.0.attn_v.weight", 64), ("output_norm.weight", 0)):
        place = header.tensors[name]
        at = place.start + 3 * step
        (tmp_path / "nan.gguf").write_bytes(raw[:at] + b"\xff\xff\xff\x7f" + raw[at + 4 :])
        with pytest.raises(ValueError, match=f"nan.gguf: {name} from byte {place.start} on: .*nan|.*NaN"):
            Engine(tmp_path / "nan.gguf")


def test_scales_beyond_float16_are_refused(tmp_path, pico):
    file, _ = convert(pico("qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=1), tmp_path, "Q4_K")
    raw, place = bytearray(file.read_bytes()), gguf.read(file).tensors["blk.0.attn_k.weight"]
    raw[place.start : place.start + 8] = struct.pack("<ee", 60000, 1) + b"\xff" * 4
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"attn_k.weight from byte .*row 0 has the scale 3780000.0 over the 1. group"):
        Engine(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.add_string("general.architecture", "mamba"), "'mamba' is not run; supported are llama, qwen2"),
        (lambda w: w.add_expert_count(8), "a mixture of experts; only dense llama models"),
        (lambda w: w.add_tensor("blk.0.gate.weight", np.ones(2, np.float32)), "1 tensors have no place in a llama"),
        (lambda w: w.tensors[0].pop("token_embd.weight"), "token_embd.weight is missing"),
        (lambda w: w.tensors[0].pop("blk.0.attn_q.weight"), "attn_q.weight is missing; the metadata promise"),
        (lambda w: w.add_feed_forward_length(96), "has shape (128, 64); the metadata promise shape (96, 64)"),
        (lambda w: w.add_head_count([4, 2]), "attention.head_count is '[4 2]'; expected int"),
        (lambda w: w.add_head_count_kv(3), "4 heads on 3 key-value heads"),
        (lambda w: w.add_value_length(32), "values of another width than keys"),
        (lambda w: w.add_rope_dimension_count(12), "rotary embedding on a part of each head"),
        (lambda w: w.add_block_count(2**31), "layers in fewer tensors"),
        (lambda w: w.add_context_length(2**31), "a context above"),
        (lambda w: w.add_layer_norm_rms_eps(float("nan")), "an epsilon of nan"),
        (lambda w: w.add_rope_freq_base(float("inf")), "rotary base inf"),
        (lambda w: w.add_rope_scaling_type(reference.RopeScalingType.LONGROPE), "'longrope' or its factors are"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, np.float32)), "of shape (5,); expected 12 positive"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(12, np.float32)), "(12,); expected 12 positive numbers"),
        (lambda w: w.kv_data[0].pop("llama.block_count"), "the metadata lack llama.block_count"),
        (lambda w: w.add_tokenizer_model("bert"), "tokenizer 'bert' is not built; supported are gpt2 and llama"),
        (lambda w: w.add_token_list(["a"] * 301), "301 tokens, 300 types and 300 rows"),
        (lambda w: w.add_token_merges(["a b", "a nowhere"]), "merge 0, 'a b', is not of tokens to a token"),
        (lambda w: w.add_eos_token_id(300), "eos_token_id is 300; there are 300 tokens"),
    ],
    ids=range(22),
)  # fmt: skip
def test_what_is_not_run_is_said(tmp_path, pico, change, said):
    def more(writer):
        replaced = writer.kv_data[0]
        writer.kv_data = [_Replacing(replaced)]
        change(writer)

    file, _ = convert(pico("llama", num_hidden_layers=1), tmp_path, "F16", more=more)
    with pytest.raises(ValueError, match=re.escape(said)) as err:
        open_model(file, threads=1)
    assert "model.gguf" in str(err.value)


class _Replacing(dict):
    """Metadata whose entries may be given again, which the writer refuses."""

    def __contains__(self, key: object) -> bool:
        return False


def test_a_window_that_is_not_applied_is_said(tmp_path, pico):
    file, _ = convert(pico("llama"), tmp_path, "F16", more=lambda writer: writer.add_sliding_window(128))
    assert "a sliding window of 128 tokens, which is not applied" in Engine(file, threads=1).notes[0]
    assert open_source(file).config["max_position_embeddings"] == 256


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, pico):
    file, _ = convert(pico("qwen2"), tmp_path, "F16")
    source = open_source(file)
    Path(file).write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"model.gguf: ended at byte \d+, inside"):
        Engine(source, threads=1)
