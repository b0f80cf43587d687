"""Model folders: what is written reads back, nothing half-written is seen, damage is named with its file."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pennyweight.disk import tensors, writer
from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.disk.model_config import read_config
from pennyweight.disk.tensors import header_bytes, read_entry, read_header
from pennyweight.disk.tokenizer import accompanying
from pennyweight.disk.writer import Writer, write_atomic

CONFIG = {"model_type": "llama", "hidden_size": 64}
DTYPES = [getattr(torch, name) for name in tensors._TORCH.values()]


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


def some_tensors(count: int = 7) -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.weight": random_tensor(torch.bfloat16, 5, 63, seed=i) for i in range(count)}


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **how) -> Path:
    writer = Writer(folder, **how)
    for name, tensor in (some_tensors() if tensors is None else tensors).items():
        writer.add(name, tensor)
    return writer.finish(CONFIG)


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write(tmp_path / "sharded", shard_bytes=2 * 5 * 63 * 2)


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    opened = Checkpoint(folder)
    assert set(opened.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = opened.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read, tensor)


# ---------------------------------------------------------------------------------------------------- round trips


def test_what_is_written_reads_back(model):
    assert_holds(model, some_tensors())
    assert Checkpoint(model).config.said == CONFIG
    assert Checkpoint(model).weight_bytes == 7 * 5 * 63 * 2
    assert sorted(path.name for path in model.iterdir()) == ["checksums.json", "config.json", "model.safetensors"]


def test_a_model_larger_than_a_shard_is_cut_and_indexed(sharded):
    assert_holds(sharded, some_tensors())
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(path.name for path in sharded.glob("*.safetensors")) == names
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 5 * 63 * 2
    assert index["weight_map"] == {name: names[i // 2] for i, name in enumerate(some_tensors())}
    for i, name in enumerate(some_tensors()):  # other readers agree on where each tensor lies
        assert name in load_file(sharded / names[i // 2])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_shards_reads_back(tmp_path, count):
    folder = write(tmp_path / "model", some_tensors(count), shard_bytes=1)
    assert_holds(folder, some_tensors(count))
    assert len(list(folder.glob("*.safetensors"))) == count
    assert (folder / "model.safetensors.index.json").exists() == (count > 1)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    tensors = {
        "small": random_tensor(torch.int8, 1),
        "large": random_tensor(torch.int8, 257),
        "last": random_tensor(torch.int8, 1),
    }
    folder = write(tmp_path / "model", tensors, shard_bytes=63)
    assert_holds(folder, tensors)
    assert len(list(folder.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_equals_safetensors_own(tmp_path, dtype):
    shapes = {
        "scalar": (),
        "none": (0,),
        "none of many": (3, 0, 2),
        "one": (1,),
        "odd": (63,),
        "matrix": (3, 257),
        "stack": (2, 1, 5),
    }
    path = tmp_path / "model.safetensors"
    save_file({name: random_tensor(dtype, *shape) for name, shape in shapes.items()}, path)
    entries, theirs = read_header(path), load_file(path)
    assert set(entries) == set(theirs)
    for name, tensor in theirs.items():
        mine = read_entry(name, entries[name])
        assert mine.dtype == tensor.dtype
        assert mine.shape == tensor.shape
        assert torch.equal(mine, tensor)
        assert entries[name].nbytes == tensor.numel() * tensor.element_size()


def test_a_view_of_a_larger_tensor_is_written_as_what_it_shows(tmp_path):
    whole = random_tensor(torch.float32, 63, 257)
    tensors = {"transposed": whole.T, "rows": whole[5:7], "needs no gradient": torch.nn.Parameter(whole[:1].clone())}
    assert_holds(write(tmp_path / "model", tensors), {name: tensor.detach() for name, tensor in tensors.items()})


def test_what_belongs_to_a_model_comes_along_and_nothing_that_can_be_run(tmp_path, model, tokenizer_file):
    shutil.copyfile(tokenizer_file, model / "tokenizer.json")
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "additional_chat_templates").mkdir()
    belongs = {
        *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"),
        *("chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json"),
        *("LICENSE", "LICENCE.md", "NOTICE.txt", "USE_POLICY.md"),
    }
    for name in belongs - {"tokenizer.json"}:
        (model / name).write_text("{}")
    for name in ("notes.txt", "tokenizer.py", "tokenization_own.py", "license.py", "pytorch_model.bin", "vocab.pkl"):
        (model / name).write_text("not copied")
    (model / "additional_chat_templates" / "run.py").write_text("not copied")
    writer = Writer(tmp_path / "child")
    writer.add("weight", torch.zeros(1))
    child = writer.finish(CONFIG, like=model, files={"penny.json": {"score": 0.5}})
    ours = {"checksums.json", "config.json", "model.safetensors", "penny.json"}
    found = {path.relative_to(child).as_posix() for path in child.rglob("*") if path.is_file()}
    assert found == ours | belongs
    assert json.loads((child / "penny.json").read_text()) == {"score": 0.5}
    (model / "NOTICE.txt").unlink()
    os.mkfifo(model / "NOTICE.txt")
    with pytest.raises(ValueError, match=r"NOTICE\.txt is not an ordinary file"):
        accompanying(model)


# ------------------------------------------------------------------------------------------------- whole or absent


def test_nothing_is_visible_before_it_is_finished(tmp_path):
    folder = tmp_path / "model"
    writer = Writer(folder, shard_bytes=1)
    for name, tensor in some_tensors().items():
        writer.add(name, tensor)
        assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="is not a model"):
        Checkpoint(folder)
    writer.finish(CONFIG)
    assert folder.exists()
    assert not writer.partial.exists()


def test_what_a_killed_writer_left_is_neither_read_nor_mixed_in(tmp_path):
    folder = tmp_path / "model"
    killed = Writer(folder, shard_bytes=1)
    for name, tensor in some_tensors().items():
        killed.add(name, tensor)
    assert any(killed.partial.iterdir())
    with pytest.raises(FileNotFoundError):
        Checkpoint(folder)
    write(folder, {"other": torch.zeros(63)})
    assert_holds(folder, {"other": torch.zeros(63)})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_older_model_stays_whole_until_the_new_one_takes_its_place(tmp_path, sharded):
    before = Checkpoint(sharded).fingerprint()
    writer = Writer(sharded)
    writer.add("other", torch.zeros(63))
    assert Checkpoint(sharded).fingerprint() == before
    writer.finish(CONFIG)
    assert_holds(sharded, {"other": torch.zeros(63)})
    assert not (sharded / "model.safetensors.index.json").exists(), "nothing of the older model is left"


def test_a_file_holds_its_old_or_its_new_content(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, b"old")
    assert path.read_bytes() == b"old"

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------------- damage


def test_a_missing_folder_says_what_a_model_is(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere is not a model: expected a folder with config.json.*or a GGUF file"
    ):
        Checkpoint(tmp_path / "nowhere")


def test_a_folder_without_config_or_without_weights(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor .*convert other weights"):
        Checkpoint(model)
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a model: expected a folder with config.json"):
        Checkpoint(model)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"model_type: llama"])
def test_a_config_that_is_not_json(model, content):
    (model / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is not JSON: "):
        Checkpoint(model)


@pytest.mark.parametrize("content", ["{}", '{"hidden_size": 63}'])
def test_a_config_without_a_model_type(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json has no model_type; it is not a transformers config"):
        Checkpoint(model)


@pytest.mark.parametrize("content", ["[1]", '"model_type"', "null"])
def test_a_config_that_is_no_object(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: Input should be a valid dictionary; found "):
        Checkpoint(model)


def test_a_config_can_be_read_from_the_folder_or_the_file(model):
    assert read_config(model).said == read_config(model / "config.json").said == CONFIG


@pytest.mark.parametrize("missing", [1, 63, 257])
def test_a_truncated_file_is_named_with_the_tensor_that_is_cut(model, missing):
    path = model / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - missing)
    message = (
        rf"model.safetensors: model.layers.6.weight ends at byte {size}, the file at {size - missing}; it is truncated"
    )
    with pytest.raises(ValueError, match=message):
        Checkpoint(model)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63])
def test_a_file_that_ends_inside_its_header(model, size):
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        file.truncate(size)
    length &= 256 ** min(size, 8) - 1
    if size == 8:
        length = int.from_bytes(path.read_bytes(), "little")
    with pytest.raises(
        ValueError, match=f"header says {length} bytes but the file has {size}; truncated or not safetensors"
    ):
        Checkpoint(model)


def with_header(path: Path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


def test_a_header_longer_than_the_file(model):
    path = model / "model.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + bytes(63))
    with pytest.raises(ValueError, match=r"model.safetensors: header says 1000000000000 bytes but the file has 71"):
        Checkpoint(model)


@pytest.mark.parametrize("header", [b"", b"not json", b"{", b"\xff\xff"])
def test_a_header_that_is_not_json(model, header):
    with_header(model / "model.safetensors", header)
    with pytest.raises(ValueError, match=r"model.safetensors: the header at byte 8 is damaged: Invalid JSON: "):
        Checkpoint(model)


@pytest.mark.parametrize("header", [b"[]", b"null", b"63", b'"x"'])
def test_a_header_that_is_json_but_no_object(model, header):
    with_header(model / "model.safetensors", header)
    with pytest.raises(ValueError, match=r"model.safetensors: the header at byte 8 is damaged: .* an object"):
        Checkpoint(model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}, "w says shape .2,. F32 but bytes 0 to 12; damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "w says shape .2,. F32 but bytes 8 to 0; damaged"),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
            r".* w\.data_offsets\.0: .*; found -8",
        ),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            r"w ends at byte \d+, the file at \d+; it is truncated",
        ),
        (
            {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
            "w has dtype F8_E4M3; supported are F64, F32, .*BOOL",
        ),
        ({"dtype": "F32", "shape": [2]}, r"the header .* is damaged: w\.data_offsets: Field required"),
        (
            {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
            r".* w\.shape: .* array; found 2",
        ),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, r"the header .* is damaged: w\.data_offsets: .* 2 items"),
        ([], "the header .* is damaged: w: .* an object"),
        # Sizes are plain numbers: "A" times 6 GB would be 6 GB.
        ({"dtype": "F32", "shape": ["A", 6 * 10**9], "data_offsets": [0, 8]}, r".* w\.shape\.0: .*; found 'A'"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, r".* w\.shape\.0: .*; found True"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, r".* w\.shape\.0: .*; found 2\.0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [False, 8]}, r".* w\.data_offsets\.0: .*; found False"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, r".* w\.dtype: .*; found \['F32'\]"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, "w says shape .*; damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "4 bytes after the last tensor; damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "w begins at byte 4 of the data, 0 was expected"),
    ],
)
def test_a_tensor_whose_entry_makes_no_sense_or_lies_past_the_end(model, entry, message):
    with_header(model / "model.safetensors", json.dumps({"w": entry}).encode(), bytes(8))
    with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
        Checkpoint(model)


def test_tensors_that_share_bytes_or_a_name(model):
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    with_header(model / "model.safetensors", json.dumps({"a": entry, "b": entry}).encode(), bytes(8))
    with pytest.raises(ValueError, match="b begins at byte 0 of the data, 8 was expected; damaged"):
        Checkpoint(model)
    twice = f'{{"a": {json.dumps(entry)}, "a": {json.dumps({**entry, "data_offsets": [8, 16]})}}}'
    with_header(model / "model.safetensors", twice.encode(), bytes(16))
    with pytest.raises(ValueError, match="a begins at byte 8 of the data, 0 was expected; damaged"):
        Checkpoint(model)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    save_file({"a.weight": random_tensor(torch.float16, 3, 63), "b.bias": random_tensor(torch.float32, 7)}, path)
    return path


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_a_bit_flipped_in_the_header_never_crashes_and_never_reads_past_the_end(small_file, data):
    sound = small_file.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    damaged = bytearray(sound)
    damaged[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = small_file.with_name("flipped.safetensors")
    path.write_bytes(damaged)
    try:
        entries = read_header(path)
    except ValueError as err:
        assert "flipped.safetensors" in str(err)
    else:  # a name, say, that is merely another one
        for name, entry in entries.items():
            assert 8 <= entry.start <= entry.end <= len(sound)
            assert read_entry(name, entry).numel() * read_entry(name, entry).element_size() == entry.nbytes


@settings(max_examples=60)
@given(data=st.data())
def test_a_bit_flipped_in_the_weights_is_refused_with_its_place(packed_folder, data):
    folder, raw, entries = packed_folder
    name = data.draw(st.sampled_from(sorted(entries)))
    entry = entries[name]
    at, bit = data.draw(st.integers(entry.start, entry.end - 1)), data.draw(st.integers(0, 7))
    entry.file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
    damaged = Checkpoint(folder)
    for read in (damaged.read, damaged.map):
        with pytest.raises(
            ValueError, match=f"{re.escape(str(entry.file))}: {name}, bytes {entry.start} to {entry.end}"
        ):
            read(name)
    for other in set(entries) - {name}:
        damaged.read(other)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    """A folder with tensors of several types, its weight file's bytes, and where they lie."""
    tensors = {f"of {dtype}": random_tensor(dtype, 7, 5) for dtype in DTYPES}
    folder = write(tmp_path_factory.mktemp("packed") / "model", tensors)
    return folder, (folder / "model.safetensors").read_bytes(), Checkpoint(folder).entries


def test_checksums_are_optional_and_may_not_be_damaged(model):
    names = list(Checkpoint(model).entries)
    (model / "checksums.json").write_text(json.dumps({names[0]: "00000000"}))
    with pytest.raises(ValueError, match=r"remove checksums\.json"):
        Checkpoint(model).read(names[0])
    Checkpoint(model).read(names[1])
    for content in ("{", "[]", '{"a": 1}'):
        (model / "checksums.json").write_text(content)
        with pytest.raises(ValueError, match=r"checksums\.json(:| is not JSON)"):
            Checkpoint(model)
    (model / "checksums.json").unlink()
    Checkpoint(model).read(names[0])


def test_a_mapped_tensor_is_the_tensor_and_the_file_is_not_written_to(model):
    opened, before = Checkpoint(model), (model / "model.safetensors").read_bytes()
    for name in opened.entries:
        mapped = opened.map(name)
        assert torch.equal(mapped, opened.read(name))
        mapped.zero_()
    assert (model / "model.safetensors").read_bytes() == before


def test_a_file_cut_after_it_was_opened(model):
    opened = Checkpoint(model)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate((model / "model.safetensors").stat().st_size - 63)
    assert torch.equal(opened.read("model.layers.0.weight"), some_tensors()["model.layers.0.weight"])
    with pytest.raises(ValueError, match=r"model.safetensors: ended inside model.layers.6.weight, 63 bytes short"):
        opened.read("model.layers.6.weight")


def test_a_shard_that_the_index_names_is_missing(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    (sharded / "model-00003-of-00004.safetensors").unlink()
    message = r"sharded: the index names model-00002-of-00004.safetensors, which is not there \(2 missing\)"
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(sharded)


def test_files_that_the_index_does_not_name_are_left_alone(sharded):
    save_file({"stray": torch.zeros(1)}, sharded / "stray.safetensors")
    assert_holds(sharded, some_tensors())


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"metadata": {}}'])
def test_an_index_that_is_none(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json( is not JSON)?: "):
        Checkpoint(sharded)


def test_a_tensor_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match=r"model has no tensor lm_head.weight; its config.json promises one"):
        Checkpoint(model).read("lm_head.weight")


# ---------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(sharded, tmp_path):
    copied = shutil.copytree(sharded, tmp_path / "copied")
    assert Checkpoint(copied).fingerprint() == Checkpoint(sharded).fingerprint()
    (copied / "README.md").write_text("about this model")
    assert Checkpoint(copied).fingerprint() == Checkpoint(sharded).fingerprint()


@pytest.mark.parametrize("shard", [1, 4])
@pytest.mark.parametrize("byte", [-1, -63])
def test_the_fingerprint_changes_with_one_flipped_byte(sharded, shard, byte):
    before = Checkpoint(sharded).fingerprint()
    path = sharded / f"model-0000{shard}-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    assert Checkpoint(sharded).fingerprint() != before


def test_the_fingerprint_changes_with_the_config(sharded):
    before = Checkpoint(sharded).fingerprint()
    (sharded / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 96}))
    assert Checkpoint(sharded).fingerprint() != before


# ----------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("count", [1, 63, 257])
def test_header_bytes_bound_what_the_entries_take(tmp_path, count):
    tensors = {
        f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(i % 5, 3, dtype=torch.bfloat16) for i in range(count)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({}, tmp_path / "empty")
    with (tmp_path / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    promised = header_bytes((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    assert length - len("{}") - 7 <= promised <= 2 * length


def test_safetensors_bytes_counts_weight_files_with_their_headers(sharded):
    files = [path for path in sharded.iterdir() if re.fullmatch(r"model-.*\.safetensors", path.name)]
    assert safetensors_bytes(sharded) == sum(path.stat().st_size for path in files) > Checkpoint(sharded).weight_bytes
