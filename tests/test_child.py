"""The child is what it says: the parent that transformers loads, its tokenizer, the bytes that were made, in a place
where they replace nothing of anybody else's."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pennyweight import texts
from pennyweight.cli import app
from pennyweight.disk import places
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.tokenizer import load_tokenizer
from pennyweight.evals import sample
from pennyweight.evals.agree import Agreement, agree
from pennyweight.evals.loss import loss
from pennyweight.job import checks, outputs, parent
from pennyweight.job.job import open_job
from pennyweight.job.run import run_job
from pennyweight.live import load, patch
from pennyweight.live.load import load_model, load_stock
from pennyweight.live.streamed import Streamed
from pennyweight.live.walk import Walk
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Silent
from tests.test_job import config, digests, text  # noqa: F401  (text is a fixture)

FAST: dict[str, Any] = {
    "heal": {"local_tokens": 0, "whole_tokens": 0},
    "axes": ("bits",),
    "budget": {"weights": "100kB"},
}

ADDED = {"<|one|>": 300, "<|two|>": 301, "<|im_end|>": 302}


def penny(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def scattered(pico, tokenizer_file, tmp_path_factory) -> Path:
    """A parent in float32 whose tokenizer lies in vocab.json, merges.txt and added_tokens.json, without a
    tokenizer.json, and whose end is an added token."""
    folder = shutil.copytree(pico("qwen2", vocab_size=304), tmp_path_factory.mktemp("scattered") / "parent")
    load_stock(folder).save_pretrained(folder)
    model = json.loads(tokenizer_file.read_text())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).eos_token_id == 302
    return folder


@pytest.fixture(scope="module")
def finished(scattered, text, tmp_path_factory):  # noqa: F811
    """(parent, out, what was asked, report) of a job that has ended."""
    out, wanted = tmp_path_factory.mktemp("finished") / "out", config(text, **FAST)
    with open_job(scattered, out, wanted) as job:
        return scattered, out, wanted, run_job(job)


# ------------------------------------------------------------------------------------------- as transformers loads it


def a_job(model: Path, **changes: Any) -> Any:
    """As much of a job as `hold_parent` asks."""
    walk = Walk(Checkpoint(model))
    job = {"model": model, "checkpoint": walk.checkpoint, "walk": walk, "shapes": walk.shapes, "listen": Silent()}
    return SimpleNamespace(**{**job, "row_tokens": 64, "fits_whole": True, "max_ram": 2**30, **changes})


def test_a_parent_that_the_walk_reads_otherwise_than_transformers_is_refused(pico, monkeypatch):
    """Each is a mistake that was made: another head, windows left out, another base of positions, another epsilon."""
    model = pico("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=False)
    held = parent.hold_parent(a_job(model))
    assert held.ok and held.found <= 1e-6
    mistakes = {
        "head": lambda at: at.setattr(Walk, "logits_slot", Slot("embed")),
        "windows": lambda at: at.setattr(patch, "dress", lambda *_: None),
        "positions": lambda at: at.setattr(Walk, "places", other_places),
        "epsilon": lambda at: at.setattr(Walk, "norm", other_norm),
    }
    places, norm = Walk.places, Walk.norm

    def other_places(self, tokens, *of):
        cos, sin = places(self, tokens + 1, *of)["position_embeddings"]
        return {**places(self, tokens, *of), "position_embeddings": (cos[:, 1:] * 1.01, sin[:, 1:])}

    def other_norm(self):
        made: Any = norm(self)
        made.variance_epsilon = 1e-3
        return made

    for make in mistakes.values():
        with monkeypatch.context() as at, pytest.raises(ValueError, match="another model as penny reads it than as"):
            make(at)
            parent.hold_parent(a_job(model))


def test_a_parent_that_does_not_fit_is_compared_as_far_as_it_does(pico, monkeypatch):
    model = pico("llama")
    layer = 4 * sum(w.parameters for s, shape in a_job(model).shapes.items() if s.layer == 0 for w in shape.weights())
    rest = 4 * sum(w.parameters for s, shape in a_job(model).shapes.items() if s.layer is None for w in shape.weights())
    small = {"fits_whole": False, "max_ram": 2 * (rest + 2 * layer) + 1}
    held = parent.hold_parent(a_job(model, **small))
    assert held.ok and held.name.endswith("its first 2 of 3 layers")
    with monkeypatch.context() as at, pytest.raises(ValueError, match="another model"):
        at.setattr(Walk, "embed", lambda self, ids: self.matrix(Slot("embed"))[ids + 1].float())
        parent.hold_parent(a_job(model, **small))
    held = parent.hold_parent(a_job(model, fits_whole=False, max_ram=2 * (rest + layer) - 1))
    assert not held.ok and not held.failed and "--max-ram" in str(held.not_run)


def test_a_folder_that_transformers_cannot_load_is_an_error_in_one_line(pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    (model / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"transformers cannot load .*model: ") as caught:
        load_stock(model)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def some_rows(pico, text):  # noqa: F811
    return texts.rows(texts.from_path(text), load_tokenizer(pico("llama")), 64).take(4)


class Constant:
    """The same distribution after every token."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_no_guess_without_context_is_nearer_than_the_parent_s_mean(pico, some_rows):
    model = load_stock(pico("llama"))
    with torch.no_grad():
        ids, scored = torch.from_numpy(some_rows.ids[:, :-1]), torch.from_numpy(some_rows.scored)
        mean = model(ids).logits[scored].softmax(dim=-1).mean(dim=0).log()
    found = agree(model, Constant(mean), some_rows)
    assert found.kl == pytest.approx(found.blind_kl, abs=1e-5) and found.blind_kl > 0.05
    for seed in range(3):
        noise = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed))
        assert agree(model, Constant(mean + 0.1 * noise), some_rows).kl > found.blind_kl


def of_a_language_model(kl: float) -> Agreement:
    return Agreement(kl=kl, blind_kl=4.0, top1=0.5, tokens=8192)


@pytest.mark.parametrize(
    ("kl", "unhealed", "passes"),
    [
        (0.05, 0.04, [True, True]),  # 22 % of the bytes
        (1.5, 2.5, [True, True]),  # very small, healed
        (1e-4, 0.0, [True, True]),  # nothing chosen, a float32 parent rounded
        (3.0, 0.04, [True, False]),  # what was written is not what was chosen
        (9.0, 4.5, [False, True]),  # what was chosen is worth nothing
        (math.nan, 0.04, [False, False]),
    ],
)
def test_a_child_has_to_follow_its_parent(kl, unhealed, passes):
    assert [check.ok for check in checks.check_follows(of_a_language_model(kl), unhealed)] == passes


def test_a_wrong_model_of_random_weights_does_not_follow_either(pico, some_rows):
    """Their KL is small, as all random models are alike: it has grown too much all the same."""
    folder = pico("llama")
    model, rounded = load_stock(folder), load_stock(folder)
    wrong = {name: load_stock(folder) for name in ("shuffled", "swapped", "another's head")}
    with torch.no_grad():
        for matrix in (p for p in rounded.parameters() if p.ndim == 2):
            step = matrix.abs().amax(dim=1, keepdim=True) / 7
            matrix.copy_((matrix / step).round() * step)
        for matrix in (p for p in wrong["shuffled"].parameters() if p.ndim == 2):
            order = torch.randperm(matrix.numel(), generator=torch.Generator().manual_seed(0))
            matrix.copy_(matrix.flatten()[order].view_as(matrix))
        layers = wrong["swapped"].model.layers
        layers[0], layers[2] = layers[2], layers[0]
        wrong["another's head"].lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    right = agree(model, rounded, some_rows)
    assert all(check.ok for check in checks.check_follows(right, right.kl))
    for other in wrong.values():
        assert not all(check.ok for check in checks.check_follows(agree(model, other, some_rows), right.kl))


def test_read_layer_by_layer_the_same_numbers_come_out_and_the_model_is_read_once(pico, some_rows):
    heard: list[int] = []
    whole = load_stock(pico("llama"))
    streamed = Streamed(Walk(Checkpoint(pico("llama"))), on_layer=heard.append)
    streamed.read(torch.from_numpy(some_rows.ids[:, :-1]))
    assert loss(streamed, some_rows) == loss(whole, some_rows)
    assert agree(streamed, streamed, some_rows).kl == 0.0
    assert agree(whole, streamed, some_rows).kl == pytest.approx(0.0, abs=1e-9)
    assert heard == [1, 2, 3]
    streamed.read(torch.from_numpy(some_rows.ids[:1, :-1]))
    assert loss(streamed, some_rows) == loss(whole, some_rows), "kept for other rows"


def test_the_likeliest_token_is_compared_whatever_the_model_says_of_ends_and_penalties(pico):
    model, ids = load_stock(pico("llama")), torch.arange(24)[None]
    expected = []
    for _ in range(6):
        expected.append(
            int(model(torch.cat([ids, torch.tensor([expected]).long().view(1, -1)], 1)).logits[0, -1].argmax())
        )
    own = model.generation_config
    own.update(eos_token_id=expected[1], repetition_penalty=9.0, min_new_tokens=3, suppress_tokens=expected[2:3])
    told: list[int] = []
    assert checks.generate(model, ids, 6, on_token=told.append)[0].tolist() == expected
    assert told == list(range(7)) and model.generation_config is own


# -------------------------------------------------------------------------------------------------------- tokenizer


def test_the_child_has_the_whole_tokenizer(finished):
    model, out, _, report = finished
    assert load_tokenizer(out).eos_token_id == load_tokenizer(model).eos_token_id == 302
    assert {check["name"]: check["ok"] for check in report["verified"]["checks"]}["tokenizer as the parent's"]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: (out / "added_tokens.json").unlink(), "vocabulary"),
        (lambda out: edit(out / "added_tokens.json", **{"<|four|>": 303}), "vocabulary"),
        (lambda out: edit(out / "tokenizer_config.json", chat_template="{{ other }}"), "another chat template"),
        (lambda out: edit(out / "tokenizer_config.json", eos_token="<|two|>"), "another set of special tokens"),
        (lambda out: (out / "merges.txt").write_text("#version: 0.2\n"), "another text of a probe"),
        (lambda out: edit(out / "generation_config.json", eos_token_id=[0, 302]), "another generation_config.json"),
        (lambda out: edit(out / "config.json", eos_token_id=301), "another end in config.json"),
    ],
)
def test_another_tokenizer_is_found(finished, tmp_path, change, said):
    model, out, *_ = finished
    assert checks.check_tokenizer(model, out).ok
    change(shutil.copytree(out, tmp_path / "child"))
    found = checks.check_tokenizer(model, tmp_path / "child")
    assert not found.ok and said in found.found


def test_a_live_model_brings_its_way_of_generating_along(pico, tmp_path):
    from pennyweight import api

    model = load_model(pico("llama"))
    model.generation_config.eos_token_id = [0, 7]
    folder = api._written(model, load_tokenizer(pico("llama")), tmp_path / "parent")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 7]


# ----------------------------------------------------------------------------------------------- what is moved, where


def test_the_config_says_in_which_type_weights_were_written(finished):
    model, out, *_ = finished
    assert Checkpoint(model).config["dtype"] == "float32"
    assert Checkpoint(out).config["dtype"] == "bfloat16" and "torch_dtype" not in Checkpoint(out).config


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {"emptied": lambda path: path.write_bytes(b""), "removed": Path.unlink, "flipped": flip}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_candidate_is_packed_and_verified_again(how, finished):
    """Whatever befell its files after they were made: the same command, the same folder."""
    model, out, wanted, _ = finished
    before, run = digests(out), out.with_name("out.run")
    with open_job(model, out, wanted) as job:
        for path in sorted((run / "candidate").iterdir()):
            sound = path.read_bytes()
            assert job.store.folder_digests("folder/candidate", run / "candidate") is not None
            DAMAGE[how](path)
            assert job.store.folder_digests("folder/candidate", run / "candidate") is None, path.name
            path.write_bytes(sound)
    DAMAGE[how](run / "candidate" / "model.safetensors")
    shutil.rmtree(out)
    with open_job(model, out, wanted) as job:
        run_job(job)
    assert digests(out) == before
    assert all(check.ok for check in checks.check_folder(out, 4))


def test_what_changes_while_it_is_moved_is_not_moved(finished, tmp_path):
    candidate = finished[1].with_name("out.run") / "candidate"
    known = places.hashes(candidate)
    copy = shutil.copytree(candidate, tmp_path / "candidate")
    flip(copy / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"model\.safetensors is not what was written there"):
        places.publish(tmp_path / "out", copy, known, {})
    (copy / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"model\.safetensors is not what was written there"):
        places.publish(tmp_path / "out", copy, known, {})
    assert not (tmp_path / "out").exists()
    places.publish(tmp_path / "out", candidate, known, {"more.txt": b"1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidate", "out"]
    assert places.hashes(tmp_path / "out").keys() == {*known, "more.txt", places.LIST}


@pytest.fixture
def old_and_new(tmp_path) -> tuple[Path, Path]:
    """A folder of ours, and what is to replace it."""
    (tmp_path / "source").mkdir()
    for content in ("old", "new"):
        (tmp_path / "source" / "weights").write_text(content)
        if content == "old":
            places.publish(tmp_path / "out", tmp_path / "source", places.hashes(tmp_path / "source"), {})
    return tmp_path / "out", tmp_path / "source"


@pytest.mark.parametrize("stopped_at", range(1, 12))
def test_killed_at_any_moment_the_old_or_the_new_folder_is_whole(stopped_at, old_and_new, monkeypatch):
    out, source = old_and_new
    left = stopped_at

    def killed_at(function):
        def called(*arguments, **named):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return called

    with monkeypatch.context() as at:
        for name in ("rename", "unlink", "rmdir", "mkdir", "write_bytes"):
            at.setattr(Path, name, killed_at(getattr(Path, name)))
        at.setattr(shutil, "copyfile", killed_at(shutil.copyfile))
        try:
            places.publish(out, source, places.hashes(source), {"page": b"page"})
        except KeyboardInterrupt:
            pass
        else:
            assert left > 0, "a step that was to be interrupted swallowed it"
    whole = [
        (folder / "weights").read_text()
        for folder in (out, *places.beside(out).values())
        if (folder / "weights").exists() and (folder / places.LIST).exists()
    ]
    assert "old" in whole or (out / "weights").read_text() == "new"
    places.publish(out, source, places.hashes(source), {"page": b"page"})
    assert (out / "weights").read_text() == "new" and (out / "page").read_text() == "page"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("name", ["thesis.txt", "notes/thesis.txt", "weights/thesis.txt", "link", "empty"])
@pytest.mark.parametrize("end", ["", ".rejected", ".partial", ".replaced"])
def test_only_what_penny_wrote_is_replaced(name, end, old_and_new):
    out, source = old_and_new
    theirs = out.with_name(out.name + end)
    if end:
        shutil.copytree(out, theirs)
    if name == "link":
        (theirs / "link").symlink_to(source)
    elif name == "empty":
        (theirs / "empty").mkdir()
    else:
        if name.startswith("weights"):
            (theirs / "weights").unlink()
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).write_text("three years of work")
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}, which penny did not write"):
        outputs.may_write(source, out, out.with_name("run"), "builtin")
    if end != ".rejected":
        with pytest.raises(ValueError, match="which penny did not write"):
            places.publish(out, source, places.hashes(source), {})
    assert sorted(out.parent.rglob("*")) == before


def test_what_was_changed_is_not_replaced_and_a_list_of_nobody_s_is_no_list(old_and_new):
    out, source = old_and_new
    (out / "weights").write_text("tuned")
    with pytest.raises(ValueError, match="weights was changed since penny wrote it"):
        outputs.may_write(source, out, out.with_name("run"), "builtin")
    (out / places.LIST).write_text("my sums\n")
    with pytest.raises(ValueError, match="is not a list of SHA-256 and names"):
        places.replaceable(out)
    (out / places.LIST).unlink()
    (out / "penny.json").write_text("{}")
    with pytest.raises(ValueError, match="was not made by penny"):
        places.replaceable(out)
    assert (out / "weights").read_text() == "tuned"
    places.replaceable(out.with_name("nothing"))
    out.with_name("empty").mkdir()
    places.replaceable(out.with_name("empty"))
    with pytest.raises(ValueError, match="is not a folder"):
        places.replaceable(out / "weights")


@pytest.fixture
def rooms(tmp_path, monkeypatch) -> Path:
    """A model, a text and an earlier run, and links to them."""
    monkeypatch.chdir(tmp_path)
    for name in ("model/inner", "text", "run"):
        Path(name).mkdir(parents=True)
    Path("run/run.sqlite").touch()
    Path("text/a.txt").write_text("a")
    for name in ("model", "text", "run"):
        Path(f"to-{name}").symlink_to(name)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "out", "run", "text", "said"),
    [
        ("model", "model", "r", "builtin", "--out model is the model"),
        ("model", "to-model", "r", "builtin", "is the model"),
        ("to-model", "model", "r", "builtin", "is the model"),
        ("model", "./text/../model/", "r", "builtin", "is the model"),
        ("model", "model/small", "r", "builtin", "lies in the model"),
        ("model", "to-model/small", "r", "builtin", "lies in the model"),
        ("model/inner", "model", "r", "builtin", "the model model/inner lies in --out model"),
        ("model.rejected", "model", "r", "builtin", "is the model"),
        ("model.partial", "model", "r", "builtin", "is the model"),
        ("model", "text", "r", "text", "is the text"),
        ("model", "o", "r", "o/text", "the text o/text lies in --out"),
        ("model", "text/small", "r", "text", "lies in the text"),
        ("model", "o", "o", "builtin", "the run folder o is --out"),
        ("model", "o", "o/run", "builtin", "the run folder o/run lies in --out"),
        ("model", "run/o", "run", "builtin", "--out run/o lies in the run folder"),
        ("model", "o", "to-model", "builtin", "the run folder to-model is the model"),
        ("model", "o", "text", "text", "the run folder text is the text"),
        ("run/built", "o", "run", "builtin", "the model run/built lies in the run folder"),
        ("model", "o", "text", "builtin", "text holds a.txt and was not made by penny"),
        ("model", "o", "text/a.txt", "builtin", "is not a folder"),
    ],
)
def test_no_output_is_an_input(rooms, model, out, run, text, said):  # noqa: F811
    for name in (model, text if text != "builtin" else "text"):
        Path(name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError) as caught:
        outputs.may_write(Path(model), Path(out), Path(run), text)
    assert said in str(caught.value)


def test_letters_of_another_case_are_told_by_the_file_system(rooms, monkeypatch):
    """Where MODEL is model, exists and samefile say so; a file system that tells them apart has two folders."""
    outputs.may_write(Path("model"), Path("MODEL"), Path("r"), "builtin")
    exists, same = Path.exists, Path.samefile
    monkeypatch.setattr(Path, "exists", lambda self: exists(Path(str(self).lower())))
    monkeypatch.setattr(Path, "samefile", lambda self, other: same(Path(str(self).lower()), str(other).lower()))
    with pytest.raises(ValueError, match="--out MODEL is the model"):
        places.apart(Path("MODEL"), "--out", {"the model": Path("model")})


def test_a_live_model_may_lie_in_its_run_folder(rooms):
    Path("r/parent").mkdir(parents=True)
    Path("r/parent/checksums.json").touch()
    outputs.may_write(Path("r/parent"), Path("o"), Path("r"), "builtin")
    outputs.may_write(Path("model"), Path("to-out"), Path("run"), "builtin")


def test_a_link_to_a_folder_stays_one(old_and_new):
    out, source = old_and_new
    link = out.with_name("link")
    link.symlink_to(out)
    places.publish(link, source, places.hashes(source), {})
    assert link.is_symlink() and (out / "weights").read_text() == "new"
    assert outputs.run_folder(link, None) == out.with_name("out.run")


@pytest.mark.parametrize(
    "command",
    [
        ("fit", "MODEL", "--weights", "50%", "--out", "MODEL"),
        ("fit", "MODEL", "--weights", "50%", "--out", "MODEL/../model/."),
        ("demo", "--model", "MODEL", "--out", "MODEL"),
        ("machine", "MODEL", "--save", "MODEL/config.json"),
        ("train", "RECIPE", "--books", "MODEL", "--out", "MODEL"),
        ("train", "RECIPE", "--books", "BOOKS", "--out", "MODEL"),
        ("report", "MODEL", "--out", "MODEL/config.json"),
    ],
)
def test_no_command_writes_into_its_input(command, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    (model / "report.json").write_text("{}")
    places_of = {
        "MODEL": str(model),
        "RECIPE": str(Path(__file__).parent.parent / "recipes" / "reference-dense.yaml"),
        "BOOKS": str(tmp_path),
    }
    before = places.hashes(tmp_path)
    done = penny(*(functools.reduce(lambda a, name: a.replace(name, places_of[name]), places_of, a) for a in command))
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 + (command[0] == "demo"), done.output
    assert places.hashes(tmp_path) == before


# ------------------------------------------------------------------------------------------------------ eval and check


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_models_compute_in_what_the_processor_has(fast, dtype, pico, monkeypatch, tmp_path):
    from pennyweight import api
    from pennyweight.evals import loss as losses

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert load.compute_dtype() == load_model(pico("llama")).dtype == api.load(pico("llama"))[0].dtype == dtype
    used = []
    monkeypatch.setattr(losses, "loss", lambda model, *_, **__: used.append(model.dtype) or losses.Loss(1.0, 1, 1))
    (tmp_path / "a.txt").write_text("ordinary words, one after the other " * 40)
    done = penny("eval", pico("llama"), "--text", tmp_path, "--context-tokens", 16, "--rows", 1)
    assert done.exit_code == 0 and used == [dtype], done.output


def test_progress_is_told_row_by_row(pico, some_rows):
    told: list[int] = []

    class Heard(Silent):
        def advance(self, done: int, **figures: float) -> None:
            told.append(done)

    model = load_stock(pico("llama"))
    loss(model, some_rows, listen=Heard())
    agree(model, model, some_rows, listen=Heard())
    assert told == [1, 2, 3, 4] * 2
    told.clear()
    sample.rows(model, load_tokenizer(pico("llama")), 5, 3, seed=0, batch=2, listen=Heard())
    assert told == [2, 4, 6, 8, 10, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "GGUF"), "version 0 at byte 4"),
        (("check", "GGUF"), "version 0 at byte 4"),
        (("eval", "MODEL", "--against", "GGUF"), "version 0 at byte 4"),
        (("eval", "MISSING"), "nowhere does not exist"),
        (("check", "MISSING"), "nowhere does not exist"),
        (("eval", "MODEL", "--context-tokens", 257, "--text", "TEXT"), "takes up to 256 tokens"),
        (("eval", "FOREIGN", "--context-tokens", 16, "--text", "TEXT"), "vocabulary ends at 199"),
        (("check", "BROKEN"), "penny.json"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_line(arguments, said, pico, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("ordinary words, one after the other " * 400)
    broken = shutil.copytree(pico("llama"), tmp_path / "broken")
    (broken / "penny.json").write_text('{"layout": [], "parent": {"config": 5}}')
    named = {
        "MODEL": pico("llama"),
        "GGUF": tmp_path / "model.gguf",
        "MISSING": tmp_path / "nowhere",
        "TEXT": tmp_path / "text",
        "FOREIGN": pico("llama", vocab_size=200),
        "BROKEN": broken,
    }
    done = penny(*(named.get(str(a), a) for a in arguments))
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert sum(line.startswith("penny: ") for line in done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", [("eval", "--rows"), ("eval", "--context-tokens"), ("check", "--tokens")])
def test_counts_are_at_least_one(option, pico):
    assert penny(option[0], pico("llama"), option[1], 0).exit_code == 2


@pytest.mark.parametrize(
    "card",
    [
        "[]",
        "null",
        '{"layout": {}}',
        '{"layout": {}, "parent": {"config": {}}}',
        '{"layout": {"0.ffn": 5}, "parent": {"config": CONFIG}}',
        '{"layout": {"0.fnn": {}}, "parent": {"config": CONFIG}}',
        '{"layout": {"99.ffn": {"noop": {}}}, "parent": {"config": CONFIG}}',
        '{"layout": {"0.ffn": {"magic": {}}}, "parent": {"config": CONFIG}}',
        '{"layout": {"0.ffn": {"ffn_width": {"width": "wide"}}}, "parent": {"config": CONFIG}}',
        '{"layout": {"0.ffn": {"ffn_width": {"height": 5}}}, "parent": {"config": CONFIG}}',
        '{"layout": {"0.mixer": {"kv_heads": {"heads": 0}}}, "parent": {"config": CONFIG}}',
    ],
)
def test_a_penny_json_of_wrong_types_is_an_error_in_one_line(card, pico, tmp_path):
    path = tmp_path / "penny.json"
    path.write_text(card.replace("CONFIG", (pico("llama") / "config.json").read_text()))
    with pytest.raises(ValueError) as caught:
        checks._promised(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_folder_of_another_maker_is_checked_without_a_card(pico):
    done = penny("check", pico("qwen3"), "--tokens", 4)
    assert done.exit_code == 0 and "slots as chosen" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(("2 of 2 passed", "1 of 1 passed, 1 not run"))


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[" * 99999,
        '{"query": 5, "choices": ["a"], "gold": 0}',
        '{"query": "a", "choices": [], "gold": 0}',
        '{"query": "a", "choices": ["a"], "gold": "0.5"}',
        '{"query": "a", "choices": ["a"], "gold": 1}',
        '{"context_options": "ab", "continuation": "c", "gold": 0}',
        '{"context": ["a"], "continuation": "c"}',
    ],
)
def test_an_item_of_wrong_types_is_named_with_its_line(line, tmp_path):
    from pennyweight.evals import tasks

    path = tmp_path / "items.jsonl"
    path.write_text('{"context": "2+2=", "continuation": "4"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"items\.jsonl, line 2"):
        list(tasks._items(path, 9))


def test_a_task_begins_as_the_tokenizer_begins_a_text(pico, monkeypatch):
    """No BOS where the tokenizer adds none; only what follows nothing at all is given one."""
    from pennyweight.evals import tasks

    tokenizer, seen = load_tokenizer(pico("llama")), []

    class Model:
        config = SimpleNamespace(max_position_embeddings=64)

        def __call__(self, ids, **_):
            seen.append(ids[0].tolist())
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 300))

    tasks._score(Model(), tokenizer, "import", " os")
    tasks._score(Model(), tokenizer, "", "os")
    whole = tokenizer("import os")["input_ids"]
    assert tokenizer.bos_token_id == 0 and seen[0] == whole[:-1]
    assert seen[1] == [0, *tokenizer("os")["input_ids"][:-1]]
