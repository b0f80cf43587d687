"""A model that is not ours, end to end: stories260K, converted to a Llama folder and fitted to 40 % of its bytes.

stories260K (github.com/karpathy/llama2.c, doc/stories260K.md) is a Llama 2 of 260 000 weights that tells children's
stories. Its file is not in transformers' format, so three things are shown before anything is made smaller. The
tokenizer built here gives the ids that llama2.c's own greedy merge gives, on real stories and on odd strings. Greedy
text of the converted weights begins as published. Bits per byte on stories come within 0.02 of what the README of the
data folder measured with other code; it does not say on which stories, the first 20 as they stand agree to 0.0005.

Then `penny fit` runs as a user would run it, on the other stories. The result is held against the budget, against every
check of the job, and against the parent on those first 20, which neither calibration nor healing has seen. Sizes are
odd: a hidden size of 64, and an FFN of 172 channels, a multiple of none of the int4 groups. What each axis still offers
is printed.

Without the data folder ($PENNY_DATA) there is no model, and the script says so.
"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import _bench
from pennyweight import families, kinds, variants
from pennyweight.disk.checkpoint import safetensors_bytes
from pennyweight.disk.model_config import read_config
from pennyweight.disk.tokenizer import load_tokenizer
from pennyweight.evals.loss import loss
from pennyweight.live.load import load_model
from pennyweight.texts import Document, rows

SCRIPT = "foreign"
DOCUMENTED_BPB = 0.927  # README of the data folder
PUBLISHED = (  # doc/stories260K.md: what the model says at temperature 0 after BOS
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do."
)
ODD = (
    "",
    " ",
    "  two  spaces ",
    "naïve café, 15 °C …",
    "a fox 🦊 in 漢字",
    "......!!!???",
    "aaaaaaaaa",
    "tab\there\n\n\nend",
)
BOS, EOS = 1, 2
SHARE = "40%"
HELD_OUT = 20  # stories
CONTEXT = 512
EFFORT = {  # stories that both tokenizers read, rows that score, tokens that heal
    "quick": {"compared": 40, "score_rows": 4, "local_tokens": 20_000, "whole_tokens": 30_000},
    "full": {"compared": 200, "score_rows": 8, "local_tokens": 60_000, "whole_tokens": 600_000},
}


# ---------------------------------------------------------------------------------------------------- the tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, as bytes, and the score that says which merge comes first."""

    tokens: tuple[bytes, ...]
    scores: tuple[float, ...]


def read_vocabulary(path: Path) -> Vocabulary:
    """tok512.bin: int32 longest token, then for each token a float32 score, an int32 length and the bytes."""
    raw, at, tokens, scores = path.read_bytes(), 4, [], []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    return Vocabulary(tuple(tokens), tuple(scores))


def encode(text: str, vocabulary: Vocabulary) -> list[int]:
    """Ids as llama2.c's `encode` finds them: a space in front, characters or else their bytes, and then merges of the
    neighbours whose union has the highest score, the leftmost first, until no union is a token."""
    known = {token: i for i, token in enumerate(vocabulary.tokens)}
    ids: list[int] = []
    for character in " " + text if text else "":
        raw = character.encode()
        ids += [known[raw]] if raw in known else [byte + 3 for byte in raw]
    while True:
        unions = [known.get(vocabulary.tokens[a] + vocabulary.tokens[b]) for a, b in itertools.pairwise(ids)]
        found = [(-vocabulary.scores[union], i, union) for i, union in enumerate(unions) if union is not None]
        if not found:
            return ids
        _, i, union = min(found)
        ids[i : i + 2] = [union]


def save_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """The same as a BPE of the tokenizers library: every way to split a token in two tokens is a merge, ranked by the
    score of the union."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(token.decode() for token in vocabulary.tokens[3:])]
    ids = {name: i for i, name in enumerate(names)}
    plain = range(3 + 256, len(names))  # neither special nor a byte
    splits = [(i, names[i][:cut], names[i][cut:]) for i in plain for cut in range(1, len(names[i]))]
    splits.sort(key=lambda split: -vocabulary.scores[split[0]])
    merges = [(left, right) for _, left, right in splits if left in ids and right in ids]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------- the model


def save_model(path: Path, folder: Path) -> None:
    """stories260K.bin as a bfloat16 LlamaForCausalLM with a tied head.

    Seven int32 of shape, then float32: embedding, attention norms, q, k, v, o, FFN norms, w1, w2, w3, final norm, each
    for all layers at once. llama2.c turns neighbouring pairs of a head's values, transformers pairs half a head apart.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    raw = path.read_bytes()
    hidden, inner, layers, heads, kv_heads, vocabulary, context = struct.unpack_from("<7i", raw)
    head_dim = hidden // heads
    flat, at = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += int(np.prod(shape))
        return flat[at - int(np.prod(shape)) : at].view(shape)

    def half_split(rotated: torch.Tensor) -> torch.Tensor:
        return rotated.unflatten(1, (-1, head_dim // 2, 2)).transpose(2, 3).flatten(1, 3)

    embedding = take(vocabulary, hidden)
    per_layer = {
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": half_split(take(layers, hidden, hidden)),
        "self_attn.k_proj": half_split(take(layers, kv_heads * head_dim, hidden)),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, hidden),
        "self_attn.o_proj": take(layers, hidden, hidden),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, inner, hidden),
        "mlp.down_proj": take(layers, hidden, inner),
        "mlp.up_proj": take(layers, inner, hidden),
    }
    state = {
        f"model.layers.{layer}.{name}.weight": tensor[layer]
        for name, tensor in per_layer.items()
        for layer in range(layers)
    }
    state |= {"model.embed_tokens.weight": embedding, "model.norm.weight": take(hidden), "lm_head.weight": embedding}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------------- measure


def greedy(model: Any, tokenizer: Any, tokens: int) -> str:
    """What the model says after BOS."""
    start = torch.tensor([[BOS]])
    out = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def print_offers(model: Path) -> dict[str, dict[str, int]]:
    """How many options each axis has in a slot of each kind; their names are printed."""
    counts: dict[str, dict[str, int]] = {}
    for slot, shape in families.shapes(read_config(model)).items():
        if slot.layer in (None, 0):
            found = {axis: kinds.load("variants", axis).options(shape) for axis in variants.order()}
            counts[slot.kind] = {axis: len(options) for axis, options in found.items() if options}
            listed = "; ".join(f"{axis}: {', '.join(map(str, some))}" for axis, some in found.items() if some)
            print(f"{slot.kind:<6} {listed or 'nothing'}")
    return counts


def fit(model: Path, text: Path, work: Path, effort: dict[str, int]) -> tuple[dict[str, Any], float]:
    """(report, seconds) of one `penny fit` from scratch. Its result lies in `work / "small"`."""
    shutil.rmtree(work / "small", ignore_errors=True)
    shutil.rmtree(work / "small.run", ignore_errors=True)
    settings = {
        "machine": "m2-max",
        "data": {"context": CONTEXT, "score_rows": effort["score_rows"]},
        "heal": {  # a model this small gains more from many small steps
            "batch_rows": 1,
            "whole_lr": 2e-3,
            "local_tokens": effort["local_tokens"],
            "whole_tokens": effort["whole_tokens"],
        },
    }
    (work / "fit.yaml").write_text(yaml.safe_dump(settings))
    named = ("--out", work / "small", "--weights", SHARE, "--text", text, "--config", work / "fit.yaml")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pennyweight", "fit", model, *named], check=True)
    return json.loads((work / "small" / "report.json").read_text()), time.perf_counter() - started


def measure(data: Path, *, quick: bool) -> dict[str, Any]:
    """The keys of the closing line; prints offers and samples on the way."""
    effort, work, source = EFFORT["quick" if quick else "full"], _bench.work_folder(SCRIPT), data / "models/stories260K"
    parent, text = work / "stories260K", work / "text"
    shutil.rmtree(parent, ignore_errors=True)
    vocabulary = read_vocabulary(source / "tok512.bin")
    save_model(source / "stories260K.bin", parent)
    save_tokenizer(vocabulary, parent)
    with gzip.open(data / "text" / "tinystories" / "first800.jsonl.gz", "rt", encoding="utf-8") as lines:
        stories = [json.loads(line)["text"] for line in lines]
    text.mkdir(exist_ok=True)
    written = "".join(json.dumps({"text": story}) + "\n" for story in stories[HELD_OUT:])
    (text / "stories.jsonl").write_text(written, encoding="utf-8")

    tokenizer = load_tokenizer(parent)
    compared = (*ODD, *stories[: effort["compared"]])
    theirs = [encode(one, vocabulary) for one in compared]
    ours = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in compared]
    mismatches = sum(a != b for a, b in zip(ours, theirs, strict=True))
    print(f"tokenizer: {mismatches} mismatches in {len(compared)} texts, {sum(map(len, theirs)):,} tokens", flush=True)
    counts = print_offers(parent)

    report, seconds = fit(parent, text, work, effort)
    held_out = [Document(str(i), story) for i, story in enumerate(stories[:HELD_OUT])]
    held_out_rows = rows(held_out, tokenizer, CONTEXT)
    found: dict[str, Any] = {}
    for name, folder in (("parent", parent), ("child", work / "small")):
        model = load_model(folder, dtype=torch.float32)
        found[name] = loss(model, held_out_rows).bits_per_byte, greedy(model, tokenizer, 160)
        print(f"--- {name}, {found[name][0]:.4f} bits per byte, greedy:\n{found[name][1]}", flush=True)
    checks = report["verified"]["checks"]
    return {
        "bpb_parent": found["parent"][0],
        "bpb_child": found["child"][0],
        "documented_bpb": DOCUMENTED_BPB,
        "as_published": found["parent"][1].startswith(PUBLISHED),
        "parent_bytes": report["parent"]["bytes"],
        "budget_bytes": report["budget"]["weight_bytes"],
        "file_bytes": safetensors_bytes(work / "small"),
        "tokenizer_mismatches": mismatches,
        "options": counts,
        "unhealed_kl": report["unhealed"]["kl"],
        "checks": len(checks),
        "checks_passed": sum(check["ok"] for check in checks),
        "checks_not_run": sum(check["not_run"] is not None for check in checks),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    data = _bench.data_folder()
    if data is None:
        return _bench.skip(SCRIPT, quick, "no model: name the folder that holds models/stories260K in PENNY_DATA")
    found = measure(data, quick=quick)
    bars = [
        _bench.bar("bits per byte off the documented", abs(found["bpb_parent"] - DOCUMENTED_BPB), "<=", 0.02),
        _bench.bar("greedy text begins as published", int(found["as_published"]), "==", 1),
        _bench.bar("tokenizer mismatches", found["tokenizer_mismatches"], "==", 0),
        _bench.bar("file bytes over budget", found["file_bytes"] / found["budget_bytes"], "<=", 1.0),
        _bench.bar("child's bits per byte over parent's", found["bpb_child"] / found["bpb_parent"], "<=", 1.15),
        _bench.bar("checks failed", found["checks"] - found["checks_passed"] - found["checks_not_run"], "==", 0),
    ]
    return _bench.finish(SCRIPT, quick, found, bars)


if __name__ == "__main__":
    sys.exit(main())
