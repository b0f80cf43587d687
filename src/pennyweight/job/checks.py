"""Open the finished folder again and hold it against what was promised. What fails ends the job with exit 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes
from pennyweight.disk.gguf.file import gguf_of
from pennyweight.disk.opened import generation_config, open_checkpoint, open_config, open_vocabulary
from pennyweight.disk.reading import json_file
from pennyweight.evals.agree import Agreement
from pennyweight.live import magnitudes
from pennyweight.live.load import load_model
from pennyweight.live.parts import parts_of
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
    tokens of each row are done.

    Always the likeliest token, whatever the model's own generation_config says of ends and penalties: what is compared
    with it is an argmax."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0),
            streamer=None if on_token is None else _Counter(on_token),
        )
    finally:
        model.generation_config = own
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


_PROBE = (
    "It costs 3.50 €, not £12,000.\n\n\tif x != None:\n        return [x*y for x in y]\r\n  naïve café cafe\u0301 ﬁ Ⅷ "
    "日本語 한국어 עברית العربية हिन्दी 👩\u200d👩\u200d👧 🇩🇪 \u00a0\u200b\ufeff\u2028 𝔘𝔫𝔦 <s></s> <|x|>"
)
"""Ordinary text and odd: what tokenizers normalise, split or take for tokens in different ways."""


def check_tokenizer(parent: Path, child: Path) -> Check:
    """Both folders' tokenizers, as transformers loads them, and the ids that end an answer are the same: vocabulary,
    special tokens, templates, and what a text becomes that is odd and holds every added token."""
    wanted, found = _words(parent), _words(child)
    differ = [name for name, value in wanted.items() if found[name] != value]
    said = f"another {', another '.join(differ)}" if differ else "the same"
    return Check("tokenizer as the parent's", not differ, "the same", said)


def _words(folder: Path) -> dict[str, Any]:
    """What makes two tokenizers one, by what it is called."""
    tokenizer = open_vocabulary(folder).tokenizer
    added = {str(id): repr(token) for id, token in tokenizer.added_tokens_decoder.items()}
    probe = _PROBE + "".join(f" a{token}{token} b" for token in tokenizer.get_added_vocab())
    return {
        "vocabulary": (len(tokenizer), tokenizer.get_vocab()),
        "set of added tokens": added,
        "set of special tokens": (tokenizer.special_tokens_map, tokenizer.all_special_ids),
        "chat template": tokenizer.chat_template,
        "text of a probe": [tokenizer(probe, add_special_tokens=own)["input_ids"] for own in (True, False)],
        "generation_config.json": generation_config(folder),
        "end in config.json": [open_config(folder).get(f"{name}_token_id") for name in ("bos", "eos", "pad")],
    }


_KL_NEAR = 0.5
_KL_GROWTH, _KL_SLACK = 3.0, 0.1


def check_follows(agreement: Agreement, unhealed: float) -> list[Check]:
    """Whether a child follows its parent, as transformers loads it, at all, and as it did before it was written.
    `unhealed`: KL in nats per token of the same choices in memory, on the scored text.

    No fixed number would do: a child of 20 % of the bytes may lose a nat, and a wrong model of a text full of blank
    lines still has the first choice in common at 9 % of the tokens. So both limits are measured in the same run.

    Blind: no distribution that is the same for every token is nearer to the parent than the parent's own mean, 3 nats
    and more away from a language model. Another's head, shuffled layers or noise for weights are confident of something
    else and further away; a child at any budget that leaves something of the parent is nearer. (Where the parent itself
    hardly looks at the context, as random weights do, 0.5 nats are near enough.)

    Grown: between the choices in memory and the folder lie building, healing, packing, writing and loading. Healing
    and GPTQ make KL smaller; rounding to 16 bits adds little, and held-out text is another text. What has grown to more
    than three times as much and 0.1 nats is not what was chosen. That finds a wrong model of random weights, too.
    """
    kl, found = agreement.kl, round(agreement.kl, 4)
    blind, grown = max(agreement.blind_kl, _KL_NEAR), _KL_GROWTH * unhealed + _KL_SLACK
    return [
        Check("nearer to the parent than any guess without context, KL", kl < blind, f"below {blind:.4f}", found),
        Check("KL to the parent as before healing and packing", kl <= grown, f"at most {grown:.4f}", found),
    ]


_ENGINE_ERROR = {"16 bits": 1e-3, "packed": 0.05}
"""Relative (2-norm). Before packed matrices activations are rounded to 8 bits: 1 % or so; a mistake is far off."""

_KEPT_NEAR = 0.02
"""Of shares of columns: a channel next to its threshold goes the other way when rounding moves it."""
_KEPT_NEAR_ANYWHERE = 0.25
"""Of the share asked for, on tokens that are no text: the tables are of text."""


def check_engine(folder: Path, ids: torch.Tensor, model: Any, *, near: float = 0.1) -> list[Check]:
    """The native engine computes, after every one of `ids` (tokens,), the logits of `model`, the same folder in
    transformers, float32. Where it leaves channels out, that is with none left out on both sides; and a text behind its
    first, whole tokens keeps the share that the tables of transformers keep, which is within `near` of the one that
    config.json asks for. Not run where there is no engine, or none for such a model; any other error is a failure."""
    from pennyweight.runtime.engine import Engine, NativeMissing
    from pennyweight.runtime.lower import NotRun

    name = "logits in the native engine, relative error"
    walk = Walk(open_checkpoint(folder))
    stored = {way for slot in walk.shapes for way in walk.stored(slot)}
    packed = gguf_of(folder) is not None or stored != {BFLOAT16}
    limit = _ENGINE_ERROR["packed" if packed else "16 bits"]
    with torch.no_grad():
        with magnitudes.whole(model):
            logits = model(ids[None]).logits[0].float()
        kept = magnitudes.kept(model, ids[None])
    try:
        engine = Engine(folder, context=len(ids), cache="float32")
        found = torch.from_numpy(engine.logits([int(i) for i in ids]))
        share = _share_read(engine, ids) if kept else 1.0
    except (NativeMissing, NotRun) as err:
        return [Check(name, False, f"at most {limit}", None, not_run=str(err))]
    except (RuntimeError, ValueError) as err:
        return [Check(name, False, f"at most {limit}", f"{type(err).__name__}: {err}")]
    error = float((found - logits).norm() / logits.norm())
    checks = [Check(name, error <= limit, f"at most {limit}", round(error, 6))]
    if kept:
        counts = [(*kept[module], len(matrices), module.left_out) for module, matrices in _thinned(walk, model)]
        seen = _bounds([(channels, total, count) for channels, total, count, _ in counts])
        asked = _bounds([(total * (1 - left_out), total, count) for _, total, count, left_out in counts])
        ok = all(low - most <= share <= high + most for (low, high), most in ((seen, _KEPT_NEAR), (asked, near)))
        said = f"{seen[0]:.3f} to {seen[1]:.3f} as in transformers, {asked[0]:.3f} to {asked[1]:.3f} asked for"
        checks.append(Check("share of the columns that the native engine reads", ok, said, round(share, 4)))
    return checks


def _share_read(engine: Any, ids: torch.Tensor) -> float:
    """Of the columns of matrices that leave some out, those that are read of a text behind its first, whole tokens."""
    from pennyweight.runtime.engine import Row

    sequence, whole = engine.open(len(ids)), magnitudes.DENSE_TOKENS
    rows = [Row(sequence, i, int(token), False, i >= whole) for i, token in enumerate(ids)]
    engine.step(rows[:whole])
    share = 0.0
    for start in range(whole, len(rows), engine.max_rows):
        part = rows[start : start + engine.max_rows]
        engine.step(part)
        share += engine.kept_share * len(part) / (len(rows) - whole)
    return share


def _thinned(walk: Walk, model: Any) -> list[tuple[Any, list[Any]]]:
    """Every module of a model that leaves channels of its input out, and the matrices that read these."""
    parts = parts_of(model, {slot: block for slot, block in walk.blocks.items() if slot.layer is not None})
    sparse = [own for own in parts.values() if getattr(own.shape, "sparsity", None) is not None]
    found = [own.reading(activation) for own in sparse for activation in ("input", "inner")]
    return [(module, readers) for module, readers in found if module.left_out > 0]


def _bounds(counts: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Least and largest share of columns, of (kept, all, matrices that read them): the engine counts columns of a
    matrix, and matrices that lie one under the other as one, which depends on their sizes."""
    ordered = sorted(counts, key=lambda own: own[0] / own[1])
    shares = []
    for cut in range(len(ordered) + 1):
        for before in (True, False):
            times = [count if (i < cut) == before else 1 for i, (_, _, count) in enumerate(ordered)]
            part, whole = (sum(n * own[i] for n, own in zip(times, ordered, strict=True)) for i in (0, 1))
            shares.append(part / whole)
    return min(shares), max(shares)


class _Parent(BaseModel):
    config: dict[str, Any]


class _Card(BaseModel):
    """What `check_folder` reads of penny.json."""

    layout: dict[str, dict[str, dict[str, Any]]]
    parent: _Parent


def _promised(path: Path) -> Shapes:
    """The shapes that penny.json promises. Raises ValueError if it says nothing that a child could be."""
    from pennyweight import families
    from pennyweight.variants import layout_from_json, reshape_all

    card = json_file(path, _Card)
    try:
        shapes, layout = families.shapes(card.parent.config), layout_from_json(card.layout)
        unknown = [str(slot) for slot in layout if slot not in shapes]
        if unknown:
            raise ValueError(f"the parent has no {unknown[0]}")
        return reshape_all(shapes, layout)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as err:
        raise ValueError(f"{path} does not describe a child: {type(err).__name__}: {err}") from err


def check_folder(folder: Path, tokens: int, *, listen: Listener | None = None) -> list[Check]:
    """What can be checked of a finished folder alone: its slots against penny.json (folders of other makers have none),
    equal greedy tokens from transformers and from the layer-by-layer walk, both in float32, and the same logits in the
    native engine. Raises ValueError or FileNotFoundError for what is not a model folder."""
    from pennyweight.live.streamed import Streamed

    listen = listen or Silent()
    walk = Walk(open_checkpoint(folder))
    checks = []
    if (folder / "penny.json").exists():
        with waiting(listen, "slots"):
            checks.append(check_shapes(folder, _promised(folder / "penny.json")))
    ids = torch.arange(24).mul(7919).remainder(walk.checkpoint.config["vocab_size"]).view(1, -1)
    with waiting(listen, "load model"):
        model = load_model(folder, dtype=torch.float32)
    listen.begin("greedy tokens", total=tokens, unit="tokens")
    generated = generate(model, ids, tokens, on_token=listen.advance)
    listen.end()
    whole = torch.cat([ids, generated], dim=1)
    listen.begin("layer by layer", total=walk.layers, unit="layers")
    logits = Streamed(walk, on_layer=listen.advance)(whole).logits
    listen.end()
    with waiting(listen, "native engine"):
        engine = check_engine(folder, whole[0], model, near=_KEPT_NEAR_ANYWHERE)
    same = int((generated == logits[:, ids.shape[1] - 1 : -1].argmax(dim=-1)).sum())
    return [
        *checks,
        Check("greedy tokens, transformers and layer by layer", same == tokens, tokens, same),
        *engine,
    ]
