"""A prompt of 512 tokens: how fast it is read, beside llama.cpp on the same cores and the same q4_0 file.

The 1.24 B model of random weights of decode.py. Our sparse model reads its prompt with all columns, from the same
zigzag bytes that it decodes from; its time is shown, the bar is for the file both engines share. Measured in turn.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import _bench
import _decoding
import _llama

TOKENS = 512
SHARE = 0.5


def main() -> int:
    arguments = _bench.parser(__doc__).parse_args()
    if _llama.folder() is None:
        return _bench.skip("prefill", arguments.quick, _llama.MISSING)
    if arguments.quick and not _decoding.sparse_folder("1b", SHARE).exists():
        return _bench.skip("prefill", True, "the 1 B models are made by a full run, in some minutes")
    ggml, keys, bars = _llama.Ggml(), {}, []
    files = {kind: _decoding.gguf("1b", kind, ggml) for kind in ("q4_0", "q4_K")}
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        if arguments.quick and threads == 1:
            continue
        variants: dict[str, Any] = {
            "dense": _decoding.Ours(files["q4_0"], threads=threads),
            "zigzag": _decoding.Ours(_decoding.sparse("1b", SHARE), threads=threads),
        }
        for kind, path in files.items():
            variants[f"llama.cpp {kind}"] = _decoding.theirs(path, threads=threads)
        ids = _decoding.prompt(variants["dense"].engine.vocab_size, TOKENS)
        prompts, _ = _decoding.in_turn(variants, ids, rounds=2 if arguments.quick else 4, new=1)
        print(f"\n{TOKENS} tokens, {threads} threads")
        best = {name: min(seconds) for name, seconds in prompts.items()}
        for name, seconds in prompts.items():
            middle = float(np.median(seconds))
            print(f"  {name:16} {TOKENS / best[name]:7.1f} tok/s at best, {TOKENS / middle:7.1f} in the middle")
        keys[f"{threads}t"] = {name: TOKENS / value for name, value in best.items()}
        theirs = min(value for name, value in best.items() if name.startswith("llama"))
        bars.append(_bench.bar(f"{threads}t: over the faster of llama.cpp's", theirs / best["dense"], ">=", 0.9))
        for each in variants.values():
            each.close()
    return _bench.finish("prefill", arguments.quick, keys, bars)


if __name__ == "__main__":
    raise SystemExit(main())
