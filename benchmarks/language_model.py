"""Is the shipped reference model a language model? Bits per byte on unseen books and code, against a 4-gram.

The 4-gram is interpolated modified Kneser-Ney (`_kneser_ney.py`), trained on the tokens the model was trained on: the
same tokenizer, the recipe's training documents, a separator before each. Both predict the same held-out tokens, in
rows of 512. A row starts with one token of context for the model; the 4-gram also sees the two before it.

The model computes in float32 here, from the bf16 weights of its folder.
Without the folder of books ($PENNY_DATA) nothing can be measured, and the script says so.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoTokenizer

import _bench
import _kneser_ney
from pennyweight import texts
from pennyweight.evals.loss import Loss, loss
from pennyweight.live.load import load_model
from pennyweight.texts import Document, Rows
from pennyweight.train import Recipe, read_documents

SCRIPT = "language_model"
RECIPE = _bench.REPOSITORY / "recipes" / "reference-dense.yaml"
MODEL = _bench.REPOSITORY / "src" / "pennyweight" / "data" / "reference-dense"
ROWS = {"quick": {"books": 16, "code": 16}, "full": {"books": 400, "code": sys.maxsize}}  # maxsize: all
HISTORY = 3  # words a 4-gram looks back
SAMPLES = (  # prompt, temperature; 0 is greedy
    ("It was already dark when the stranger", 0.0),
    ("It was already dark when the stranger", 0.8),
    ('def read(path):\n    """', 0.8),
)


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="a transformers folder (default: the shipped model)")
    options = parser.parse_args()
    data = _bench.data_folder()
    if data is None:
        return _bench.skip(SCRIPT, options.quick, "no books: name their folder in PENNY_DATA")
    if not (options.model / "config.json").exists():
        parser.error(f"{options.model} holds no config.json; give --model the folder of a transformers model")
    recipe = Recipe(**yaml.safe_load(RECIPE.read_text()))
    documents = read_documents(recipe, data / "text" / "gutenberg")
    documents["held_out_code"] = list(texts.stdlib(held_out=True))
    keys = _measure(options.model, documents, recipe.context, quick=options.quick)
    return _bench.finish(SCRIPT, options.quick, keys, [_bench.bar("books_margin", keys["books_margin"], ">=", 0.08)])


def _measure(folder: Path, documents: dict[str, list[Document]], context: int, *, quick: bool) -> dict[str, Any]:
    """The keys of the closing line; prints samples on the way."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder, dtype=torch.float32)
    _print_samples(model, tokenizer)
    held_out = {
        name: _with_history(texts.rows(documents[f"held_out_{name}"], tokenizer, context)) for name in ("books", "code")
    }
    mode = "quick" if quick else "full"
    four_gram, cached = _four_gram_bits_per_byte(documents, tokenizer, held_out, may_be_cached=quick)
    keys: dict[str, Any] = {"cached": cached}
    for name, rows in held_out.items():
        ours, theirs = _model_bits_per_byte(model, rows.take(ROWS[mode][name])), four_gram[mode][name]
        keys |= {f"{name}_bpb_model": ours, f"{name}_bpb_4gram": theirs, f"{name}_margin": 1 - ours / theirs}
    keys["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    keys["same_training_text"] = _same_training_text(folder, documents["train"])
    return keys


def _with_history(rows: Rows) -> Rows:
    """Rows with the two tokens before each in front: ids (n, 2 + context + 1). Before the text stand separators."""
    before = np.concatenate([np.full((1, HISTORY - 1), rows.ids[0, 0]), rows.ids[:-1, -HISTORY:-1]])
    return Rows(np.concatenate([before, rows.ids], axis=1), rows.scored, rows.nbytes)


def _model_bits_per_byte(model: Any, rows: Rows) -> float:
    started = time.perf_counter()
    found = loss(model, Rows(rows.ids[:, HISTORY - 1 :], rows.scored, rows.nbytes))
    print(f"model: {found.tokens:,} targets in {time.perf_counter() - started:.1f} s", flush=True)
    return found.bits_per_byte


def _four_gram_bits_per_byte(
    documents: dict[str, list[Document]], tokenizer: Any, held_out: dict[str, Rows], *, may_be_cached: bool
) -> tuple[dict[str, Any], bool]:
    """{mode: {name: bits per byte}}, and whether it was kept by an earlier run.

    Both modes at once: scoring costs little beside training, and a full run leaves what a quick one needs.
    """
    inputs = [Document("tokenizer", tokenizer.backend_tokenizer.to_str())]
    inputs += [document for name in sorted(documents) for document in documents[name]]
    inputs_hash = texts.fingerprint(inputs)
    kept = _bench.cached(SCRIPT, inputs_hash) if may_be_cached else None
    if kept is not None:
        return kept, True
    four_gram = _trained_four_gram(documents["train"], tokenizer)
    found = {
        mode: {name: _four_gram_loss(four_gram, held_out[name].take(counts[name])).bits_per_byte for name in counts}
        for mode, counts in ROWS.items()
    }
    _bench.remember(SCRIPT, inputs_hash, found)
    return found, False


def _trained_four_gram(documents: list[Document], tokenizer: Any) -> _kneser_ney.KneserNey:
    started = time.perf_counter()
    stream = _stream(documents, tokenizer)
    tokenised = time.perf_counter()
    four_gram = _kneser_ney.fit(stream, len(tokenizer), order=HISTORY + 1)
    grams = ", ".join(f"{len(order.grams):,}" for order in four_gram.orders)
    print(
        f"4-gram: {len(stream):,} tokens in {tokenised - started:.1f} s give {grams} n-grams of order 1 to 4", end=" "
    )
    print(f"in {time.perf_counter() - tokenised:.1f} s", flush=True)
    return four_gram


def _four_gram_loss(four_gram: _kneser_ney.KneserNey, rows: Rows) -> Loss:
    windows = np.lib.stride_tricks.sliding_window_view(rows.ids, HISTORY + 1, axis=1)  # (n, context, 4)
    nats = -np.log(_kneser_ney.probabilities(four_gram, windows[rows.scored]))
    return Loss(float(nats.sum()), len(nats), int(rows.nbytes.sum()))


def _stream(documents: list[Document], tokenizer: Any) -> np.ndarray:
    """All documents as one stream of tokens, a separator before each: what `penny train` cuts its rows from."""
    parts = []
    for document in documents:
        parts.append([texts.separator_id(tokenizer)])
        parts.append(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"])
    return np.concatenate([np.asarray(part, np.uint16) for part in parts])


def _same_training_text(folder: Path, documents: list[Document]) -> bool | None:
    """Whether the 4-gram read what the model was trained on, by the model's own record; None if it has none."""
    record = folder / "provenance.json"
    if not record.exists():
        return None
    return json.loads(record.read_text())["train_text_sha256"] == texts.fingerprint(documents)


def _print_samples(model: Any, tokenizer: Any) -> None:
    separator = texts.separator_id(tokenizer)
    for prompt, temperature in SAMPLES:
        ids = torch.tensor([[separator, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, pad_token_id=separator, **how)
        print(f"--- temperature {temperature}\n{tokenizer.decode(out[0, 1:])}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
