"""GGUF files wherever a folder is taken: planned, judged, checked, fitted, as the floats that their codes stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.gguf.checkpoint import GgufCheckpoint
from pennyweight.disk.opened import generation_config, open_checkpoint, open_config, open_vocabulary
from pennyweight.disk.tokenizer import added, load_tokenizer
from pennyweight.disk.writer import Writer
from pennyweight.job.checks import check_folder, check_tokenizer
from pennyweight.live.load import load_model, load_stock, why_no_stock
from pennyweight.live.walk import Walk
from tests.gguf_files import convert, parent_of
from tests.test_gguf import penny
from tests.test_job import config, run, text  # noqa: F401  (a fixture)

IDS = torch.arange(40).mul(7919).remainder(300)[None]


@pytest.fixture(scope="module", params=["llama", "gemma3", "phi3", "olmo2"])
def files(request, pico, tmp_path_factory):
    """A pico model's GGUF file in 8 bits and the folder of the same weights."""
    return convert(parent_of(request.param, pico), tmp_path_factory.mktemp("files"), "Q8_0")


def test_a_tensor_is_the_floats_that_the_file_says_in_transformers_order(files, monkeypatch):
    monkeypatch.setattr("pennyweight.disk.gguf.checkpoint._CHUNK_WEIGHTS", 1000)  # several reads of a matrix
    file, same = files
    found, expected = GgufCheckpoint(file), Checkpoint(same)
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in found.entries.items():
        assert entry.shape == expected.entries[name].shape
        torch.testing.assert_close(found.read(name), expected.read(name), rtol=0, atol=2e-7)  # norms less 1


def test_whole_and_layer_by_layer_it_is_what_transformers_loads(files):
    file, same = files
    expected = load_model(same, dtype=torch.float32)(IDS).logits
    walk = Walk(open_checkpoint(file))
    hidden = walk.embed(IDS)
    for layer in walk.each():
        hidden = layer.run(hidden)
    for found in (walk.logits(hidden), load_model(file, dtype=torch.float32)(IDS).logits):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if "olmo2" in str(open_config(file)["model_type"]):
        assert why_no_stock(file) == "transformers reads no GGUF files of olmo2"
    else:
        torch.testing.assert_close(load_stock(file)(IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_its_words_go_along_into_a_folder(pico, tmp_path):
    file, _same = convert(
        pico("llama"), tmp_path, "Q8_0", more=lambda writer: writer.add_chat_template("{{ messages }}")
    )
    checkpoint = open_checkpoint(file)
    writer = Writer(tmp_path / "out")
    for name in checkpoint.entries:
        writer.add(name, checkpoint.read(name).bfloat16())
    out = writer.finish(checkpoint.config.said, like=file)
    assert check_tokenizer(file, out).ok
    assert load_tokenizer(out).chat_template == "{{ messages }}" and generation_config(out) == {"eos_token_id": [0]}
    one, other = open_vocabulary(file).tokenizer, load_tokenizer(out)
    assert one("Once upon 3 naïve\n")["input_ids"] == other("Once upon 3 naïve\n")["input_ids"]
    assert other.decode(other("Once upon")["input_ids"]) == "Once upon"
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_bos_that_the_file_asks_for_is_put_before_texts_in_the_folder_too(pico, tmp_path):
    def more(writer):
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = True

    file, _ = convert(pico("llama"), tmp_path, "Q8_0", more=more)
    found = open_vocabulary(file)
    assert found.begin == (0,) and added(found.tokenizer) == ([0], [])
    found.tokenizer.save_pretrained(tmp_path / "words")
    assert added(load_tokenizer(tmp_path / "words")) == ([0], [])


def test_it_is_planned_judged_and_checked_as_a_folder_that_holds_it(files, tmp_path, text):  # noqa: F811
    file, same = files
    (tmp_path / "holds").mkdir()
    shutil.copyfile(file, tmp_path / "holds" / "it.gguf")
    plans = [penny("plan", place, "--json") for place in (file, tmp_path / "holds", same)]
    assert len({json.loads(done.stdout)["parameters"] for done in plans}) == 1
    assert all(check.ok for check in check_folder(tmp_path / "holds", 4))
    done = penny("eval", file, "--against", same, "--rows", "2", "--context-tokens", "32", "--text", text, "--json")
    assert json.loads(done.stdout)["agreement"]["kl"] < 1e-4, done.stderr


@pytest.mark.parametrize(("arch", "axes"), [("llama", ("bits", "ffn_width")), ("olmo2", ("bits",))])
def test_it_is_fitted(arch, axes, pico, text, tmp_path):  # noqa: F811
    """By transformers' own reading of the file, and where that has none, without it."""
    file, _ = convert(parent_of(arch, pico), tmp_path, "Q8_0")
    heal = {"local_tokens": 0, "whole_tokens": 0}
    told = run(file, tmp_path / "out", config(text, budget={"weights": "40%"}, axes=axes, heal=heal))
    checks = told["verified"]["checks"]
    assert told["model"] == "model" and not [check for check in checks if not check["ok"] and not check["not_run"]]
    unrun = [check["not_run"] for check in checks if check["not_run"]]
    assert unrun == ([] if arch == "llama" else ["transformers reads no GGUF files of olmo2"])
    assert all(check.ok for check in check_folder(tmp_path / "out", 4))
    assert open_vocabulary(tmp_path / "out").stop == open_vocabulary(file).stop
