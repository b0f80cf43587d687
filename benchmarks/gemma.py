"""Gemma 3 270M from its GGUF file means here what it means in llama.cpp.

20 prompts of text are read by both, with keys and values in float16: KL(llama.cpp || penny) a token has a bar. Both
round activations to 8 bits, llama.cpp in blocks of 256 and penny of 32, so that KL is about the sum of what both lose;
what each loses is told by the engine with the file's weights and all activations in float32, and has bars as well. Each
of 32 greedy tokens of llama.cpp has to be penny's too, or a tie: penny's logit of it is within 0.1 of its largest.
Prompts are shorter than the windows.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import _bench
import _llama
import real_models
from pennyweight import _native
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.model import open_model
from pennyweight.runtime.sources.gguf import GgufSource

PROMPTS, TOKENS, ANSWER, THREADS = 20, 48, 32, 2
KL, TIE = 0.005, 0.1
TEXT = ("docs/how-it-works.md", "README.md")


class Exact(GgufSource):
    """A file whose matrices are the floats that it says, to the bit."""

    def matrix(self, name: str) -> Any:
        values = self._checkpoint.read(name).float().numpy()
        return _native.Matrix.wide(values.view(np.uint8), _native.Float.float32, False)


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    file = real_models.path("gemma3")
    if file is None:
        return _bench.skip("gemma", quick, "the model has not been fetched")
    if _llama.folder() is None:
        return _bench.skip("gemma", quick, _llama.MISSING)
    count = 5 if quick else PROMPTS
    opened = open_model(file, threads=THREADS, context=512)
    text = "\n".join((_bench.REPOSITORY / name).read_text() for name in TEXT)
    step = len(text) // count
    prompts = [opened.encode(text[i * step : i * step + 8 * TOKENS])[:TOKENS] for i in range(count)]
    theirs = _llama.Worker(file, context=512, threads=THREADS)
    if theirs.vocabulary != len(opened.engine.logits(prompts[0][:1])[0]):
        raise RuntimeError("llama.cpp reads another vocabulary")
    found = [compare(opened.engine, theirs, prompt) for prompt in prompts]
    theirs.close()
    exact = Engine(Exact(file), threads=THREADS, context=512, cache="float32")
    for one, prompt in zip(found, prompts, strict=True):
        wanted = exact.logits(prompt)
        one["ours"], one["theirs"] = divergence(wanted, one.pop("penny")), divergence(wanted, one.pop("llama"))
    kl, ours, others = (float(np.mean([one[key] for one in found])) for key in ("kl", "ours", "theirs"))
    equal, tied, other = (sum(one[key] for one in found) for key in ("equal", "tied", "other"))
    for i, one in enumerate(found):
        told = f"KL to float32 {one['ours']:.5f}, llama.cpp's {one['theirs']:.5f}, to each other {one['kl']:.5f}"
        print(f"prompt {i:2}  {told}  greedy equal {one['equal']:2}, ties {one['tied']}, other {one['other']}")
    print(f"KL to float32 {ours:.5f} a token, llama.cpp's {others:.5f}, llama.cpp's to penny {kl:.5f}")
    print(f"of {count * ANSWER} greedy tokens {equal} equal, {tied} ties, {other} others")
    bars = [
        _bench.bar("KL(llama.cpp || penny), nats a token", kl, "<=", KL),
        _bench.bar("KL(float32 || penny), nats a token", ours, "<=", KL),
        _bench.bar("the same over KL(float32 || llama.cpp)", ours / others, "<=", 1.0),
        _bench.bar("greedy tokens that are neither equal nor ties", other, "==", 0),
    ]
    keys = {"model": file.name, "prompts": count, "tokens": TOKENS, "kl_to_llama": kl, "equal": equal, "ties": tied}
    return _bench.finish("gemma", quick, keys, bars)


def compare(engine: Any, theirs: _llama.Worker, prompt: list[int]) -> dict[str, Any]:
    """Logits and KL over a prompt, and how many greedy tokens behind it are equal, ties or others."""
    expected, ours = theirs.logits(prompt), engine.logits(prompt)
    answer = theirs.greedy(prompt, ANSWER)
    behind = engine.logits([*prompt, *answer])[len(prompt) - 1 : -1]
    short = behind.max(axis=1) - behind[np.arange(ANSWER), answer]
    equal, tied = int((short == 0).sum()), int(((short > 0) & (short < TIE)).sum())
    return {
        "llama": expected,
        "penny": ours,
        "kl": divergence(expected, ours),
        "equal": equal,
        "tied": tied,
        "other": ANSWER - equal - tied,
    }


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    """KL in nats a token."""
    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    sys.exit(main())
