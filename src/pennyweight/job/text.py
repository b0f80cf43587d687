"""Which rows of text serve which purpose: calibration, scoring, healing, and the last judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight import texts
from pennyweight.config import FitConfig
from pennyweight.disk.opened import Readable
from pennyweight.heal.schedule import JUDGES
from pennyweight.live.load import compute_dtype, load_model
from pennyweight.runs.events import Listener, waiting
from pennyweight.runs.store import Store


@dataclass(frozen=True)
class Text:
    """Rows for each purpose; no row serves two, and `held_out` comes from documents nothing else has seen."""

    calibration: texts.Rows
    score: texts.Rows
    heal: texts.Rows
    held_out: texts.Rows


def row_tokens(model: Mapping[str, Any], config: FitConfig) -> int:
    """Tokens of a row of text."""
    wanted = config.data.context
    return min(wanted, model.get("max_position_embeddings", wanted))


def score_parts(config: FitConfig, tokens: int) -> list[list[int]]:
    """Rows of the chunks in which text is scored, by parts: an eighth of it, what is left to a half, and the rest. All
    choices are scored on the first part, those that may be chosen on the others (job/race.py). It is one part where an
    eighth is too little to tell anything by. `tokens`: of a row."""
    data = config.data
    ends = (data.score_rows // 8, data.score_rows // 2, data.score_rows)
    if ends[0] * tokens < _LEAST_PART:
        ends = (data.score_rows,)
    sizes = (end - start for start, end in zip((0, *ends), ends, strict=False))
    return [[min(data.rows_per_chunk, size - at) for at in range(0, size, data.rows_per_chunk)] for size in sizes]


_LEAST_PART = 256
"""Tokens."""


def origin(model: Mapping[str, Any], config: FitConfig, documents: Sequence[texts.Document] | None) -> dict[str, Any]:
    """What decides the rows of calibration and scoring: the text itself, `documents` unless it is builtin or the
    parent's own, and how it is dealt out."""
    data = config.data
    found: dict[str, Any] = {
        "tokens": row_tokens(model, config),
        **data.model_dump(include={"calibration_rows", "score_rows", "rows_per_chunk"}),
        "scored_in": score_parts(config, row_tokens(model, config)),
    }
    if data.text == "parent":
        return {"from": "parent", **found, **data.model_dump(include={"sampled_rows", "held_out_rows"})}
    if documents is not None:
        return {"from": "files", "sha256": texts.fingerprint(documents), **found}
    rows = {"rows, those of healing included": _rows_needed(config, row_tokens(model, config))}
    return {"from": "builtin", "sha256": texts.fingerprint(texts.stdlib(held_out=False)), **found, **rows}


def read(checkpoint: Readable, tokenizer: Any, config: FitConfig, store: Store, listen: Listener) -> Text:
    """Tokenise and deal out rows. Raises ValueError if there is too little text or a token outside the vocabulary."""
    data, seed = config.data, config.seed
    context = row_tokens(checkpoint.config, config)
    if data.text == "parent":
        rows, count = _sampled(checkpoint, tokenizer, config, context, store, listen), data.sampled_rows
        held, seen = rows.pick(np.arange(data.held_out_rows)), rows.pick(np.arange(data.held_out_rows, count))
    elif data.text == "builtin":
        with waiting(listen, "text"):
            documents = list(texts.stdlib(held_out=False))
            shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
            seen = texts.rows(shuffled, tokenizer, context, most=_rows_needed(config, context))
            held = texts.rows(texts.stdlib(held_out=True), tokenizer, context).take(data.held_out_rows)
    else:
        with waiting(listen, "text"):
            rows = texts.rows(texts.from_path(Path(data.text)), tokenizer, context)
        tenth = np.arange(len(rows.ids)) % 10 == 9
        held, seen = rows.pick(np.flatnonzero(tenth)).take(data.held_out_rows), rows.pick(np.flatnonzero(~tenth))
    for part in (seen, held):
        part.hold_within(checkpoint.config["vocab_size"])
    need = data.calibration_rows + data.score_rows + 1
    if len(seen.ids) < need or not len(held.ids):
        raise ValueError(
            f"the text gives {len(seen.ids)} rows of {context} tokens for calibration and scoring and {len(held.ids)} "
            f"held out; {need} and 1 are needed. Give more text or a smaller --context-tokens"
        )
    order = np.random.default_rng(seed).permutation(len(seen.ids))
    cuts = np.cumsum([data.calibration_rows, data.score_rows])
    calibration, scoring, healing = (seen.pick(part) for part in np.split(order, cuts))
    return Text(calibration, scoring, healing, held)


def _rows_needed(config: FitConfig, context: int) -> int:
    """Rows for calibration, scoring and healing, the ones that judge healing included."""
    heal, data = config.heal, config.data
    most = max(heal.library_tokens, heal.local_tokens, heal.fitted, heal.whole_tokens)
    healing = -(-most // context) + JUDGES
    return data.calibration_rows + data.score_rows + healing + 1


def _sampled(
    checkpoint: Readable, tokenizer: Any, config: FitConfig, context: int, store: Store, listen: Listener
) -> texts.Rows:
    """Rows drawn from the parent, kept in the run folder: sampling takes minutes."""
    from pennyweight.evals import sample

    if store.get("sampled") is None:
        count = config.data.sampled_rows
        parent = load_model(checkpoint.path, dtype=compute_dtype(config.compute))
        drawn = sample.rows(parent, tokenizer, count, context, seed=config.seed, listen=listen)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(drawn).items()}
        store.put_tensors("sampled", tensors)
    kept = {name: tensor.numpy() for name, tensor in store.tensors("sampled").items()}
    return texts.Rows(**kept)
