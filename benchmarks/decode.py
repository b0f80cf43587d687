"""Tokens per second, one text at a time: our engine dense and sparse beside llama.cpp, on the same cores.

A model of 1.24 B random weights in Llama-3.2-1B's shapes and the shipped reference model. Dense is the very same q4_0
file in both engines (4.5 bits per weight); llama.cpp also runs q4_K (4.5 bits), and the faster of its two is what bars
are held against. Sparse blocks are zigzag of 4.25 bits that leave out half of their input channels. Measured in turn,
a few tokens of each; p05 is what the machine can do, p50 what it did. Sparse tokens read more or fewer columns, so that
the fastest of them say too much: there each token counts as it was at best in all rounds, and their mean is held
against llama.cpp's, provided that they read the share of columns that was asked for. Random weights say nothing of
quality. Weights lie in huge pages on both sides.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import _bench
import _decoding
import _llama

KINDS = ("q4_0", "q4_K")
SHARE = 0.5
KEPT_NEAR = 0.03
NEW = 16  # tokens, the same ones in every round


def measure(name: str, threads: int, ggml: _llama.Ggml, rounds: int) -> dict[str, Any]:
    files = {kind: _decoding.gguf(name, kind, ggml) for kind in KINDS}
    sparse = _decoding.sparse(name, SHARE)
    variants: dict[str, Any] = {
        "dense": _decoding.Ours(files["q4_0"], threads=threads),
        "sparse": _decoding.Ours(sparse, threads=threads),
    }
    for kind in KINDS:
        variants[f"llama.cpp {kind}"] = _decoding.theirs(files[kind], threads=threads)
    vocabulary = variants["dense"].engine.vocab_size
    _, tokens = _decoding.in_turn(variants, _decoding.prompt(vocabulary, 64), rounds=rounds, new=NEW)
    found: dict[str, Any] = {}
    for variant, seconds in tokens.items():
        p05, p50 = (float(np.quantile(seconds, q)) for q in (0.05, 0.5))
        best = float(np.reshape(seconds, (rounds, NEW)).min(axis=0).mean())
        found[variant] = {"p05": p05, "p50": p50, "best": best}
        print(f"  {variant:16} {1 / p50:8.1f} tok/s  p50 {p50 * 1e3:8.3f} ms  p05 {p05 * 1e3:8.3f} ms", flush=True)
    dense = variants["dense"].engine
    before = dense.spent
    variants["dense"].write(16)
    products, attention, everything = (after - start for after, start in zip(dense.spent, before, strict=True))
    found["overhead"] = 1 - (products + attention) / everything
    found["kept_share"] = float(np.mean(variants["sparse"].kept[-NEW:]))
    found["bytes_per_token"] = dense.bytes_read_per_token
    for each in variants.values():
        each.close()
    return found


def main() -> int:
    arguments = _bench.parser(__doc__).parse_args()
    if _llama.folder() is None:
        return _bench.skip("decode", arguments.quick, _llama.MISSING)
    if arguments.quick and not _decoding.sparse_folder("1b", SHARE).exists():
        return _bench.skip("decode", True, "the 1 B models are made by a full run, in some minutes")
    ggml, keys, bars = _llama.Ggml(), {}, []
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        for name, rounds in (("1b", 3 if arguments.quick else 12), ("reference", 20 if arguments.quick else 100)):
            print(f"\n{name}, {threads} threads", flush=True)
            found = keys[f"{name} {threads}t"] = measure(name, threads, ggml, rounds)
            print(
                f"  outside products and attention {found['overhead']:.1%}; sparse read {found['kept_share']:.0%} of "
                "its columns"
            )
            dense, sparse = (
                min(found[f"llama.cpp {kind}"][how] for kind in KINDS) / found[variant][how]
                for variant, how in (("dense", "p05"), ("sparse", "best"))
            )
            label = f"{name} {threads}t"
            bars.append(_bench.bar(f"{label}: dense over llama.cpp", dense, ">=", 1.25 if name == "1b" else 1.5))
            if name == "1b":
                bars.append(_bench.bar(f"{label}: sparse over llama.cpp", sparse, ">=", 2.0))
                off = abs(found["kept_share"] - (1 - SHARE))
                bars.append(_bench.bar(f"{label}: share of columns read, off its target", off, "<=", KEPT_NEAR))
                bars.append(_bench.bar(f"{label}: overhead", found["overhead"], "<=", 0.05))
    return _bench.finish("decode", arguments.quick, keys, bars)


if __name__ == "__main__":
    raise SystemExit(main())
