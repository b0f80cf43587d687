"""Training from a recipe: a run stopped at any step goes on to the same model; wrong books are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pennyweight import texts
from pennyweight.runs.events import Silent
from pennyweight.train import Recipe, train

BOOK = "The ship came in with the evening tide. " * 40 + "Nobody on the quay had seen her before.\n" * 40


class StopAt(Silent):
    """A listener that ends the process, as far as the trainer can tell, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def advance(self, done: int, **figures: float) -> None:
        if done == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def stdlib(*, held_out: bool) -> list[texts.Document]:
        return [
            texts.Document("code", "def sail(ship):\n    return ship.leave(tide='low')\n" * (20 if held_out else 60))
        ]

    monkeypatch.setattr(texts, "stdlib", stdlib)
    folder = tmp_path / "books"
    folder.mkdir()
    for title in ("seen", "kept"):
        (folder / f"{title}.txt").write_text(BOOK)
    return folder


def recipe() -> Recipe:
    sha256 = hashlib.sha256(BOOK.encode()).hexdigest()
    return Recipe.model_validate(
        {
            "kind": "train",
            "seed": 0,
            "model": {
                "model_type": "qwen3",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "tie_word_embeddings": True,
            },
            "vocab_size": 300,
            "context": 16,
            "schedule": {
                "tokens": 20 * 64,
                "batch_rows": 4,
                "warmup_tokens": 128,
                "decay_share": 0.5,
                "muon_lr": 0.02,
                "adamw_lr": 0.01,
                "weight_decay": 0.01,
            },
            "eval_rows": 4,
            "books": [
                {"title": "seen", "split": "train", "sha256": sha256},
                {"title": "kept", "split": "held_out", "sha256": sha256},
            ],
        }
    )


def test_stopped_training_goes_on_to_the_same_model(books: Path, tmp_path: Path) -> None:
    straight = train(recipe(), books=books, out=tmp_path / "straight", listen=Silent())
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), books=books, out=tmp_path / "stopped", listen=StopAt(10), checkpoint_s=0)
    resumed = train(recipe(), books=books, out=tmp_path / "stopped", listen=Silent(), checkpoint_s=0)

    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    last = [json.loads(line) for line in (tmp_path / "stopped" / "curve.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 20
    assert last["books_bits_per_byte"] < 8


def test_the_result_is_an_ordinary_folder_with_its_origin(books: Path, tmp_path: Path) -> None:
    folder = train(recipe(), books=books, out=tmp_path / "run", listen=Silent())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("The ship came in")["input_ids"]) == "The ship came in"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert {text["name"] for text in provenance["texts"]} == {"books/seen", "code"}
    assert "The ship" not in (folder / "provenance.json").read_text()


def test_other_books_and_other_recipes_are_refused(books: Path, tmp_path: Path) -> None:
    train(recipe(), books=books, out=tmp_path / "run", listen=Silent())
    with pytest.raises(ValueError, match="another recipe"):
        train(recipe().model_copy(update={"seed": 1}), books=books, out=tmp_path / "run", listen=Silent())
    (books / "seen.txt").write_text("Something else.")
    with pytest.raises(ValueError, match=r"seen\.txt has SHA-256 .* recipe was made with"):
        train(recipe(), books=books, out=tmp_path / "other", listen=Silent())
    (books / "seen.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"seen\.txt"):
        train(recipe(), books=books, out=tmp_path / "third", listen=Silent())
