"""`penny quantize` is quick, and what it leaves to a search is told.

SmolLM2-135M (and, without --quick, Qwen2.5-Coder-1.5B) to 4 bits as a user would: seconds from the command to the
verified folder, perplexity and bits per byte on held-out text beside the parent's. The bars on seconds are for two idle
cores with AVX2.

What searching brings: at the bytes of the uniform child, a mix by second moments (`penny quantize --weights`) and the
mix that replace-1-block chooses (`penny fit --axes bits`), nothing healed, on the same held-out rows. With --quick
on the model that ships; else on SmolLM2 as well, which takes hours.

Peers, each in an environment of its own below ~/.cache/penny-envs ($PENNY_ENVS): auto-round and llm-compressor at
4 bits in groups of 32 and 128, calibrated on the kind of text that ours is, embeddings left in 16 bits as they do. What
is not there is told as not run, with the command that builds it. The child is also exported and continued by llama.cpp,
where that was built.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import _bench
import _llama
import real_models
from pennyweight import families, texts
from pennyweight.disk.checkpoint import safetensors_bytes
from pennyweight.disk.model_config import read_config
from pennyweight.disk.tokenizer import encode, load_tokenizer
from pennyweight.evals.agree import compare
from pennyweight.live.load import load_model
from pennyweight.prices import planning
from pennyweight.runtime.alike import compare as alike
from pennyweight.texts import Rows

SCRIPT = "quantize"
SHIPPED = _bench.REPOSITORY / "src" / "pennyweight" / "data" / "reference-dense"
MOST_SECONDS = {"smollm2": 180, "qwen-coder": 1500}
ENVIRONMENTS = Path(os.environ.get("PENNY_ENVS", Path.home() / ".cache" / "penny-envs"))
PEERS = {"auto-round": "auto-round", "llm-compressor": "llmcompressor datasets"}
CONTEXT, TEXT = 512, "def fibonacci(n):\n    "


def penny(*arguments: Any) -> float:
    """Seconds of a command. Raises RuntimeError with its last words if it fails."""
    started = time.perf_counter()
    made = subprocess.run(
        [sys.executable, "-m", "pennyweight", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise RuntimeError(f"penny {arguments[0]} ended with {made.returncode}: {made.stderr[-400:]}")
    return time.perf_counter() - started


def quantize(model: Path, out: Path, *options: Any, command: str = "quantize") -> float:
    """A child, made anew; its seconds."""
    for place in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(place, ignore_errors=True)
    return penny(command, model, "--out", out, *options)


def quality(parent: Any, folder: Path, rows: Rows) -> dict[str, float]:
    """A child beside its parent on the same rows."""
    found = compare(parent, load_model(folder, dtype=torch.float32), rows)
    return {
        "bytes": safetensors_bytes(folder),
        "bits_per_byte": round(found.child.bits_per_byte, 4),
        "perplexity": round(found.child.perplexity, 3),
        "parent_perplexity": round(found.parent.perplexity, 3),
        "kl": round(found.agreement.kl, 4),
    }


def told(name: str, seconds: float, found: dict[str, float]) -> dict[str, float]:
    print(
        f"{name:<44} {seconds:7.0f} s  {found['bytes'] / 1e6:7.1f} MB  {found['bits_per_byte']:.4f} bits per byte  "
        f"perplexity {found['perplexity']:.2f}  KL {found['kl']:.4f}",
        flush=True,
    )
    return {"seconds": round(seconds, 1), **found}


def searched(model: Path, work: Path, parent: Any, rows: Rows, uniform: Path) -> dict[str, Any]:
    """At the bytes of the uniform child: the mix by second moments and the searched one."""
    share = safetensors_bytes(uniform)
    mixed = quantize(model, work / "mixed", "--weights", share)
    ways: dict[str, Any] = {
        "mix by second moments": told("mix by second moments", mixed, quality(parent, work / "mixed", rows))
    }
    unhealed = ("--axes", "bits", "--heal-tokens", 0, "--local-tokens", 0, "--weights", share)
    seconds = quantize(model, work / "searched", *unhealed, command="fit")
    ways["searched"] = told("searched, bits axis", seconds, quality(parent, work / "searched", rows))
    best = min(way["perplexity"] for name, way in ways.items() if name != "searched")
    ways["gain_of_searching"] = round(best / ways["searched"]["perplexity"] - 1, 4)
    print(f"the search's gain in perplexity over the quick mix at equal bytes: {ways['gain_of_searching']:+.2%}")
    return ways


def peers(model: Path, work: Path, parent: Any, rows: Rows) -> dict[str, Any]:
    documents = work / "calibration.jsonl"
    documents.write_text("".join(json.dumps(text) + "\n" for _, text in zip(range(400), _calibration(), strict=False)))
    found: dict[str, Any] = {}
    for peer, packages in PEERS.items():
        python = ENVIRONMENTS / peer / "bin" / "python"
        if not python.exists():
            found[peer] = "not run"
            command = f"python3.11 -m venv {python.parents[1]} && {python.parent}/pip install {packages}"
            print(f"{peer}: not run; build it once: {command}", flush=True)
            continue
        for group in (32, 128):
            name, out = f"{peer}, 4 bits in groups of {group}", work / f"{peer}-{group}"
            shutil.rmtree(out, ignore_errors=True)
            script = Path(__file__).with_name("_quantize_peer.py")
            made = subprocess.run(
                [python, script, peer, model, out, "4", str(group), documents],
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode:
                found[name] = f"failed: {made.stderr[-300:]}"
                print(f"{name}: {found[name]}", flush=True)
                continue
            seconds = json.loads(made.stdout.splitlines()[-1])["seconds"]
            found[name] = told(name, seconds, quality(parent, out, rows) | {"bytes": peer_bytes(model, group)})
    return found


def peer_bytes(model: Path, group: int) -> int:
    """Of blocks in 4 bits with a 16-bit scale for every group, embedding and head in 16: a folder of unpacked weights
    does not tell."""
    shapes = families.shapes(read_config(model))
    blocks = sum(
        w.parameters for slot, s in shapes.items() if slot.layer is not None for w in s.weights() if w.is_matrix
    )
    return int(planning.stored_bytes(shapes, 16) - blocks * (2 - (4 + 16 / group) / 8))


def _calibration() -> Any:
    return (document.text for document in texts.stdlib(held_out=False))


def exported(child: Path, work: Path) -> dict[str, Any]:
    """The child as GGUF: our engine on both, and llama.cpp's greedy tokens where it was built."""
    file = work / "child.gguf"
    file.unlink(missing_ok=True)
    penny("export", child, "--to", "gguf", "--out", file)
    ids = encode(load_tokenizer(child), TEXT)
    same = alike(child, file, ids, 24)
    found: dict[str, Any] = {"bytes": file.stat().st_size, "logits_error": same.error, "greedy_same": same.same}
    if _llama.folder() is None:
        print(_llama.MISSING)
        return {**found, "llama.cpp": "not run"}
    worker = _llama.Worker(file, context=256, threads=2)
    theirs, tokens = worker.logits(ids), worker.greedy(ids, 24)
    worker.close()
    from pennyweight.runtime.engine import Engine

    ours = Engine(file, context=256, cache="float32").logits(ids)
    log_p, log_q = (torch.from_numpy(np.asarray(each)).log_softmax(-1) for each in (theirs, ours))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    print(f"exported: llama.cpp continues {load_tokenizer(child).decode(tokens)!r}; KL to our engine {kl:.2g}")
    return {**found, "llama.cpp_kl": round(kl, 6)}


def main() -> int:
    options = _bench.parser(__doc__).parse_args()
    work, bars, keys = _bench.work_folder(SCRIPT), [], {}
    models = {"reference-dense": SHIPPED, "smollm2": real_models.folder("smollm2")}
    if not options.quick:
        models["qwen-coder"] = real_models.folder("qwen-coder")
    for name, model in models.items():
        if model is None:
            keys[name] = "not run"
            continue
        print(f"\n{name}", flush=True)
        place = work / name
        place.mkdir(exist_ok=True)
        seconds = quantize(model, place / "uniform", "--bits", 4)
        rows = texts.rows(texts.stdlib(held_out=True), load_tokenizer(model), CONTEXT).take(8 if options.quick else 32)
        parent = load_model(model, dtype=torch.float32)
        keys[name] = {"uniform": told("uniform, 4 bits", seconds, quality(parent, place / "uniform", rows))}
        if name in MOST_SECONDS:
            bars.append(_bench.bar(f"{name} to 4 bits, seconds", round(seconds, 1), "<=", MOST_SECONDS[name]))
        if name == "reference-dense" or (name == "smollm2" and not options.quick):
            keys[name] |= searched(model, place, parent, rows, place / "uniform")
        if name == "smollm2":
            keys[name] |= {"peers": peers(model, place, parent, rows), "exported": exported(place / "uniform", place)}
    assert all(math.isfinite(bar["value"]) for bar in bars)
    return _bench.finish(SCRIPT, options.quick, keys, bars)


if __name__ == "__main__":
    sys.exit(main())
