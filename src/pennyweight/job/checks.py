"""Open the finished folder again and hold it against what was promised. What fails ends the job with exit 4."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.formats import _matrix
from pennyweight.live.load import load_model
from pennyweight.live.magnitudes import DENSE_TOKENS
from pennyweight.live.walk import Walk
from pennyweight.model.shapes import Noop, Shapes
from pennyweight.model.stored import BFLOAT16


@dataclass(frozen=True)
class Check:
    """One promise: what was asked, what came."""

    name: str
    ok: bool
    expected: Any
    found: Any

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class VerificationFailed(RuntimeError):
    """The written model is not what was promised; the message names every failed check."""

    def __init__(self, checks: list[Check]) -> None:
        self.checks = checks
        failed = [f"{c.name}: expected {c.expected}, found {c.found}" for c in checks if not c.ok]
        super().__init__("the written model failed verification: " + "; ".join(failed))


def check_bytes(folder: Path, limit: float | None, predicted: float) -> list[Check]:
    """File bytes within the limit, and not above what the search was told they would be."""
    found = safetensors_bytes(folder)
    checks = [Check("file bytes within prediction", found <= predicted, int(predicted), found)]
    if limit is not None:
        checks.append(Check("file bytes within budget", found <= limit, int(limit), found))
    return checks


@torch.no_grad()
def generate(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy continuation through transformers' generate and its KV cache. (rows, tokens)."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :]


def check_shapes(folder: Path, expected: Shapes) -> Check:
    """The folder's own config and tensors describe exactly these shapes, storage included."""
    walk = Walk(Checkpoint(folder))
    found = dict(walk.shapes)
    wrong = []
    for slot, shape in expected.items():
        stored = getattr(shape, "stored", BFLOAT16)
        if isinstance(shape, Noop) or stored == BFLOAT16:
            same = found[slot] == shape
        else:
            matrices = {weight.stored for weight in shape.weights() if len(weight.shape) > 1}
            same = type(found[slot]) is type(shape) and walk.stored(slot) == matrices
        if not same:
            wrong.append(str(slot))
    return Check(
        "slots as chosen",
        not wrong,
        "every slot",
        f"{len(expected) - len(wrong)} of {len(expected)}, wrong: {wrong[:5]}" if wrong else "every slot",
    )


def check_reload(folder: Path, memory_child: Any, prompts: torch.Tensor, tokens: int) -> Check:
    """The folder, reloaded by transformers, continues prompts with the same greedy tokens as the child in memory."""
    expected = generate(memory_child, prompts, tokens)
    found = generate(load_model(folder, dtype=torch.float32), prompts, tokens)
    same = int((expected == found).sum())
    return Check("greedy tokens after reloading in transformers", same == expected.numel(), expected.numel(), same)


_ENGINE_ERROR = {"16 bits": 1e-3, "packed": 0.05}
"""Relative (2-norm). Before packed matrices activations are rounded to 8 bits: 1 % or so; a mistake is far off."""


def check_engine(folder: Path, ids: torch.Tensor, logits: torch.Tensor) -> Check:
    """The native engine computes these logits (tokens, vocab_size) float32 after `ids` (tokens,), as far as no channels
    are left out. Where it cannot run the folder the check says why."""
    from pennyweight.runtime.engine import Engine
    from pennyweight.runtime.lower import NotRun

    name = "logits in the native engine, relative error"
    try:
        engine = Engine(folder, context=len(ids), cache="float32")
    except (RuntimeError, NotRun) as err:  # no native module, or for instance a rotary scaling it does not run
        return Check(name, True, "not run", str(err))
    shapes = Walk(Checkpoint(folder)).shapes.values()
    dense = DENSE_TOKENS if any(getattr(shape, "sparsity", None) for shape in shapes) else len(ids)
    found = torch.from_numpy(engine.logits([int(i) for i in ids[:dense]]))
    error = float((found - logits[:dense]).norm() / logits[:dense].norm())
    packed = any(tensor.endswith(_matrix.SUFFIXES) for tensor in Checkpoint(folder).entries)
    limit = _ENGINE_ERROR["packed" if packed else "16 bits"]
    return Check(name, error <= limit, f"at most {limit}", round(error, 6))


def check_folder(folder: Path, tokens: int) -> list[Check]:
    """What can be checked of a finished folder alone: its slots against penny.json, equal greedy tokens from
    transformers and from the layer-by-layer walk, both in float32, and the same logits in the native engine."""
    from pennyweight import families
    from pennyweight.disk.checkpoint import read_config
    from pennyweight.live.streamed import Streamed
    from pennyweight.variants import layout_from_json, reshape_all

    card = json.loads((folder / "penny.json").read_text()) if (folder / "penny.json").is_file() else None
    checks = []
    if card is not None:
        parent = card["parent"]["config"]
        layout = layout_from_json(card["layout"])
        checks.append(check_shapes(folder, reshape_all(families.shapes(parent), layout)))
    vocabulary = read_config(folder)["vocab_size"]
    ids = torch.arange(24).mul(7919).remainder(vocabulary).view(1, -1)
    generated = generate(load_model(folder, dtype=torch.float32), ids, tokens)
    streamed = Streamed(Walk(Checkpoint(folder)))
    whole = torch.cat([ids, generated], dim=1)
    logits = streamed(whole).logits
    same = int((generated == logits[:, ids.shape[1] - 1 : -1].argmax(dim=-1)).sum())
    return [
        *checks,
        Check("greedy tokens, transformers and layer by layer", same == tokens, tokens, same),
        check_engine(folder, whole[0], logits[0]),
    ]
