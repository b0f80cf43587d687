"""Open the finished folder again and hold it against what was promised. What fails ends the job with exit 4."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.live.load import load_model
from pennyweight.live.magnitudes import DENSE_TOKENS
from pennyweight.live.walk import Walk
from pennyweight.model.shapes import Shapes
from pennyweight.model.stored import BFLOAT16
from pennyweight.runs.events import Listener, Silent, waiting


@dataclass(frozen=True)
class Check:
    """One promise: what was asked, what came. `ok`: it was checked and kept. `not_run`: why it could not be checked
    here; such a check has neither passed nor failed."""

    name: str
    ok: bool
    expected: Any
    found: Any
    not_run: str | None = None

    @property
    def failed(self) -> bool:
        return not self.ok and self.not_run is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class VerificationFailed(RuntimeError):
    """The written model is not what was promised; the message names every failed check."""

    def __init__(self, checks: list[Check]) -> None:
        self.checks = checks
        failed = [f"{c.name}: expected {c.expected}, found {c.found}" for c in checks if c.failed]
        super().__init__("the written model failed verification: " + "; ".join(failed))


def check_bytes(folder: Path, limit: float | None, predicted: float) -> list[Check]:
    """File bytes within the limit, and not above what the search was told they would be."""
    found = safetensors_bytes(folder)
    checks = [Check("file bytes within prediction", found <= predicted, int(predicted), found)]
    if limit is not None:
        checks.append(Check("file bytes within budget", found <= limit, int(limit), found))
    return checks


@torch.no_grad()
def generate(
    model: Any, ids: torch.Tensor, tokens: int, *, on_token: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Greedy continuation through transformers' generate and its KV cache. (rows, tokens). `on_token` hears how many
    tokens of each row are done."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=None if on_token is None else _Counter(on_token),
    )
    return out[:, ids.shape[1] :]


class _Counter:
    """Hears what transformers' generate gives a streamer: the prompt, then every token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._told, self._heard = on_token, 0

    def put(self, value: torch.Tensor) -> None:
        self._told(self._heard)
        self._heard += 1

    def end(self) -> None:
        pass


def check_shapes(folder: Path, expected: Shapes) -> Check:
    """The folder's own config and tensors describe exactly these shapes, storage included."""
    walk = Walk(Checkpoint(folder))
    found = dict(walk.shapes)
    wrong = []
    for slot, shape in expected.items():
        matrices = {weight.stored for weight in shape.weights() if weight.is_matrix}
        if matrices <= {BFLOAT16}:
            same = found[slot] == shape
        else:
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
    are left out. Not run where there is no engine, or none for such a model; any other error fails the check."""
    from pennyweight.runtime.engine import Engine, NativeMissing
    from pennyweight.runtime.lower import NotRun

    name = "logits in the native engine, relative error"
    walk = Walk(Checkpoint(folder))
    packed = any(stored != BFLOAT16 for slot in walk.shapes for stored in walk.stored(slot))
    limit = _ENGINE_ERROR["packed" if packed else "16 bits"]
    shapes = Walk(Checkpoint(folder)).shapes.values()
    dense = DENSE_TOKENS if any(getattr(shape, "sparsity", None) for shape in shapes) else len(ids)
    try:
        engine = Engine(folder, context=len(ids), cache="float32")
        found = torch.from_numpy(engine.logits([int(i) for i in ids[:dense]]))
    except (NativeMissing, NotRun) as err:
        return Check(name, False, f"at most {limit}", None, not_run=str(err))
    except (RuntimeError, ValueError) as err:
        return Check(name, False, f"at most {limit}", f"{type(err).__name__}: {err}")
    error = float((found - logits[:dense]).norm() / logits[:dense].norm())
    return Check(name, error <= limit, f"at most {limit}", round(error, 6))


def check_folder(folder: Path, tokens: int, *, listen: Listener | None = None) -> list[Check]:
    """What can be checked of a finished folder alone: its slots against penny.json, equal greedy tokens from
    transformers and from the layer-by-layer walk, both in float32, and the same logits in the native engine."""
    from pennyweight import families
    from pennyweight.disk.checkpoint import read_config
    from pennyweight.live.streamed import Streamed
    from pennyweight.variants import layout_from_json, reshape_all

    listen = listen or Silent()
    card = json.loads((folder / "penny.json").read_text()) if (folder / "penny.json").is_file() else None
    checks = []
    if card is not None:
        parent = card["parent"]["config"]
        layout = layout_from_json(card["layout"])
        with waiting(listen, "slots"):
            checks.append(check_shapes(folder, reshape_all(families.shapes(parent), layout)))
    vocabulary = read_config(folder)["vocab_size"]
    ids = torch.arange(24).mul(7919).remainder(vocabulary).view(1, -1)
    with waiting(listen, "load model"):
        model = load_model(folder, dtype=torch.float32)
    listen.begin("greedy tokens", total=tokens, unit="tokens")
    generated = generate(model, ids, tokens, on_token=listen.advance)
    listen.end()
    walk = Walk(Checkpoint(folder))
    whole = torch.cat([ids, generated], dim=1)
    listen.begin("layer by layer", total=walk.layers, unit="layers")
    logits = Streamed(walk, on_layer=listen.advance)(whole).logits
    listen.end()
    with waiting(listen, "native engine"):
        engine = check_engine(folder, whole[0], logits[0])
    same = int((generated == logits[:, ids.shape[1] - 1 : -1].argmax(dim=-1)).sum())
    return [
        *checks,
        Check("greedy tokens, transformers and layer by layer", same == tokens, tokens, same),
        engine,
    ]
