"""What people type: paths stay paths, names are fetched once, whole and undamaged, or refused in one line."""

from __future__ import annotations

import json
import re
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download
from typer.testing import CliRunner

import pennyweight as pw
from pennyweight import families
from pennyweight.cli import app
from pennyweight.disk import hub, tried
from pennyweight.disk.hub import Name, Unfetched, find, name_of
from pennyweight.disk.opened import name_of as called
from pennyweight.disk.opened import open_checkpoint, open_vocabulary
from pennyweight.prices import measure
from pennyweight.prices.machine import Machine
from tests.hub_server import Hub, serving

SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that is the only one there is, and an empty cache. The library reads its variables when it is imported."""
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        yield made


@pytest.fixture
def model(pico) -> Path:
    return pico("llama")


@pytest.fixture
def filled(server, model) -> Hub:
    """owner/pico: a model, and what is never fetched beside it."""
    server.add(
        "owner/pico", model, **{"model.bin": b"pickle", "modeling.py": b"raise", "README.md": b"#", "LICENSE": b"yes"}
    )
    return server


def penny(*words):
    return CliRunner().invoke(app, list(map(str, words)))


# ---------------------------------------------------------------------------------------------------- names and paths


def test_what_can_only_be_a_path_is_none_of_a_hub_s_names():
    for path in (
        "./a/b",
        "../a/b",
        "/a/b",
        "~/a",
        "a/b/",
        "a",
        "a/b/c",
        "a/b.gguf",
        "a/config.json",
        "a\\b",
        "",
        "a b/c",
    ):
        assert name_of(path) is None, path
    assert name_of("owner/name") == Name("owner/name")
    assert name_of("Owner-1/na.me_2@refs/pr/1") == Name("Owner-1/na.me_2", "refs/pr/1")
    assert name_of("owner/name:Q4_K_M") == Name("owner/name", None, "Q4_K_M")
    assert name_of("owner/name@v1:sub/file.gguf") == Name("owner/name", "v1", "sub/file.gguf")
    assert name_of("smollm2") == Name("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert str(name_of("owner/name@v1:Q8_0")) == "owner/name@v1:Q8_0"


def test_nothing_is_asked_of_a_network_unless_a_name_was_typed(server, model, tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "here").symlink_to(model)
    assert find("owner/here") == Path("owner/here")  # what is there wins, whatever it is called
    assert find(model) == model
    with pytest.raises(FileNotFoundError, match=r"owner/gone does not exist; owner is a folder here"):
        find("owner/gone")
    for path in ("gone", "./a/b", "a/b.gguf", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match=r"does not exist\. A model of a hub is typed owner/name"):
            find(path)
    assert server.asked == []


def test_a_listed_name_stands_for_its_repository_and_says_so(server, model):
    server.add("HuggingFaceTB/SmolLM2-135M-Instruct", model)
    told = []
    assert called(find("smollm2", tell=told.append)) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert told == ["smollm2 is HuggingFaceTB/SmolLM2-135M-Instruct of the hub"]


# ------------------------------------------------------------------------------------------------------------ fetching


def test_only_what_is_read_is_fetched_and_only_once(filled, model, monkeypatch):
    folder = find("owner/pico")
    assert called(folder) == "owner/pico"
    fetched = {path.name for path in folder.iterdir()}
    assert fetched == {"LICENSE", "model.safetensors", *(SMALL & {p.name for p in model.iterdir()})}
    assert filled.files_asked() == fetched
    assert open_checkpoint(folder).fingerprint() == open_checkpoint(model).fingerprint()
    filled.asked.clear()
    assert find("owner/pico") == folder and filled.files_asked() == set()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    filled.asked.clear()
    assert find("owner/pico") == folder and filled.asked == []
    assert hub.cached(Name("owner/pico")) and not hub.cached(Name("owner/other")) and filled.asked == []
    with pytest.raises(Unfetched, match="owner/other is not in the cache, and HF_HUB_OFFLINE is set"):
        find("owner/other")


def test_a_hub_that_cannot_be_reached_leaves_what_was_fetched(filled, monkeypatch):
    folder = find("owner/pico@v1")
    filled.status = 503
    told: list[str] = []
    assert find("owner/pico@v1", tell=told.append) == folder
    assert re.fullmatch(
        r"http://.* answers 503 for owner/pico; try again later; owner/pico@v1 is taken from .*", told[0]
    )
    with pytest.raises(Unfetched, match=r"owner/other is not in the cache, and http://.* answers 503"):
        find("owner/other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unfetched, match=r"is not in the cache, and http://127\.0\.0\.1:9 cannot be reached"):
        find("owner/other")


def test_plans_fetch_the_config_and_say_so(filled):
    done = penny("plan", "owner/pico", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["parameters"] > 0
    assert "owner/pico: of the repository config.json alone was fetched" in done.stderr
    assert filled.files_asked() == {"config.json"}
    assert pw.plan("owner/pico").parameters == json.loads(done.stdout)["parameters"]
    filled.status = 503
    with pytest.raises(Unfetched, match=r"owner/pico is in the cache only in part, and .* answers 503"):
        find("owner/pico")


def test_shards_are_those_that_the_index_names(server, model, tmp_path):
    whole = (model / "model.safetensors").read_bytes()
    files = server.add("owner/sharded", model).files
    del files["model.safetensors"]
    names = list(open_checkpoint(model).entries)
    files["odd-1.safetensors"], files["other-2.safetensors"] = whole, whole
    files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": dict.fromkeys(names, "odd-1.safetensors")}
    ).encode()
    folder = find("owner/sharded")
    assert {path.name for path in folder.glob("*.safetensors")} == {"odd-1.safetensors"}
    assert open_checkpoint(folder).entries.keys() == set(names)
    files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": dict.fromkeys(names, "gone.safetensors")}
    ).encode()
    with pytest.raises(ValueError, match=r"names gone\.safetensors, which the repository does not have"):
        find("owner/sharded")


def test_one_gguf_file_by_its_quantisation_or_its_name(server, model):
    files = server.add("owner/files", model).files
    for kind in ("Q4_K_M", "Q4_K_S", "Q8_0"):
        files[f"m.{kind}.gguf"] = b"GGUF" + kind.encode()
    for typed in ("owner/files:Q4_K_M", "owner/files:q4_k_m", "owner/files@main:m.Q4_K_M.gguf"):
        assert find(typed).read_bytes() == b"GGUFQ4_K_M"
    assert server.files_asked() == {"m.Q4_K_M.gguf"}
    with pytest.raises(FileNotFoundError, match=r"has no GGUF file Q2_K; there are m\.Q4_K_M\.gguf, m\.Q4_K_S"):
        find("owner/files:Q2_K")
    del files["model.safetensors"]
    with pytest.raises(ValueError, match=r"owner/files means 3 GGUF files; add one after a colon: m\.Q4"):
        find("owner/files")
    for kind in ("Q4_K_M", "Q4_K_S"):
        del files[f"m.{kind}.gguf"]
    assert find("owner/files").name == "m.Q8_0.gguf"


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_download_that_breaks_off_goes_on_where_it_was(filled, model, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    filled.cut["model.safetensors"] = [5000, 3000]
    folder = find("owner/pico")
    assert filled.ranges == ["bytes=5000-", "bytes=8000-"]
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_download_that_keeps_breaking_off_is_temporary_and_keeps_whole_files(filled):
    filled.cut["model.safetensors"] = [0] * 20
    done = penny("check", "owner/pico")
    assert done.exit_code == 75 and len(done.stderr.strip().splitlines()[-1]) < 400
    assert "penny: " in done.stderr.strip().splitlines()[-1]
    filled.cut.clear()
    filled.asked.clear()
    find("owner/pico")
    assert filled.files_asked() == {"model.safetensors"}


def test_damage_on_the_way_is_found_by_the_hub_s_hashes(filled, model):
    repository = filled.repositories["owner/pico"]
    for file in ("tokenizer.json", "model.safetensors"):
        content = repository.files[file]
        repository.sent[file] = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        with pytest.raises(Unfetched, match=rf"{file} was damaged \(other bytes than the hub has\) and is deleted"):
            find("owner/pico")
        del repository.sent[file]
    folder = find("owner/pico")
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_file_that_became_shorter_in_the_cache_is_fetched_again(filled):
    weights = find("owner/pico") / "model.safetensors"
    content = weights.read_bytes()
    weights.resolve().write_bytes(content[:-10])
    with pytest.raises(Unfetched, match=rf"{len(content) - 10} bytes, the hub has {len(content)}"):
        find("owner/pico")
    assert (find("owner/pico") / "model.safetensors").read_bytes() == content


def test_a_disk_that_is_too_full_is_looked_at_before(filled, monkeypatch):
    find("owner/pico", only_config=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**4))
    filled.asked.clear()
    done = penny("run", "owner/pico", "hello")
    assert done.exit_code == 75 and "the disk is full: owner/pico takes" in done.stderr
    assert filled.files_asked() == set()


def test_one_line_for_what_the_hub_does_not_have_or_give(filled, model, monkeypatch):
    filled.add("owner/gated", model).gated = True
    pickles = filled.add("owner/pickles", model).files
    pickles["pytorch_model.bin"] = pickles.pop("model.safetensors")
    filled.add("owner/data", model).files.pop("config.json")
    foreign = filled.add("owner/foreign", model).files
    foreign["config.json"] = b'{"model_type": "t5"}'
    for typed, said in (
        ("owner/gone", r"owner/gone is neither a path here nor a model at http"),
        ("owner/pico@v9", r"owner/pico has no revision v9"),
        (
            "owner/gated",
            r"owner/gated is gated: accept its terms at http.*/owner/gated, then log in \(hf auth login\) or",
        ),
        ("owner/pickles", r"holds no model\.safetensors, only pytorch_model\.bin, a kind of file that is not read"),
        ("owner/data", r"owner/data holds no config\.json"),
        ("owner/foreign", r"model_type 't5' is not supported"),
        ("owner/pico:Q4_0", r"owner/pico holds no GGUF file"),
    ):
        done = penny("check", typed)
        assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1, (typed, done.stderr)
        assert re.search(said, done.stderr), (typed, done.stderr)
    assert "model.safetensors" not in filled.files_asked()  # a model that is not supported is not fetched
    monkeypatch.setenv("HF_TOKEN", "another")
    assert "owner/gated is gated" in penny("check", "owner/gated").stderr
    monkeypatch.setenv("HF_TOKEN", "key")
    assert open_vocabulary(find("owner/gated")).tokenizer is not None


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--rows", "1", "--context-tokens", "16", "--text", "{model}/config.json", "--against", "owner/pico"),
        ("check", "--tokens", "2"),
        ("fit", "--weights", "50%", "--out", "out", "--dry-run", "--machine", "m2-max"),
        ("bench", "--prompt", "8", "--new", "4", "--repeats", "1"),
        ("run", "hello", "--max-tokens", "2"),
        ("plan", "--against", "owner/pico"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_takes_a_name(filled, model, words, monkeypatch):
    monkeypatch.setattr(measure, "machine", lambda **options: Machine.load("m2-max"))
    done = penny(words[0], "owner/pico", *(word.format(model=model) for word in words[1:]))
    assert done.exit_code == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- penny models


def test_tried_models_are_of_known_families_and_their_numbers_stand_in_documents():
    documents = Path(__file__).parents[1]
    for name, model in tried.models().items():
        assert families.of({"gemma3": "gemma3_text"}.get(model.family, model.family))
        assert hub.name_of(name) == Name(model.hub)
        for one in model.measured:
            text = (documents / one.where).read_text()
            for number in re.findall(r"\d[\d.,]*\d|\d", one.value):
                assert number in text, (name, one)


def test_models_are_listed_with_what_is_here(server, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PENNY_CACHE", str(tmp_path))
    file = tmp_path / "models" / "gemma3" / tried.models()["gemma3"].file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    listed = json.loads(penny("models", "--json").stdout)
    assert {name: one["here"] for name, one in listed.items()} == {
        "smollm2": [],
        "qwen-coder": [],
        "gemma3": [str(file)],
    }
    server.add("HuggingFaceTB/SmolLM2-135M-Instruct", model)
    find("smollm2")
    said = penny("models").stdout
    assert "here: HuggingFaceTB/SmolLM2-135M-Instruct" in said and "not here yet" in said
