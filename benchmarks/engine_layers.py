"""A decode step takes no longer than it did before the engine ran blocks, and computes the same bits.

This checkout's engine beside that of an older commit, which is built once into the cache: one token after a text of
128, in a model of 1.24 B random weights in Llama-3.2-1B's shapes (4 bits by rows, groups of 64, the embedding too) and
in the shipped reference model. Two processes take turns; a round is a burst of steps of each, whose first does not
count. Where its pages fall moves a process by some percent, so there are several pairs of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import _bench
from streaming import SHAPE

LENGTH = 128
BAR = 0.98
GROUP = 64


def built(commit: str) -> Path:
    """The package of a commit with its native module, installed in a folder of its own. Made once."""
    git = ("git", "-C", str(_bench.REPOSITORY))
    full = subprocess.run([*git, "rev-parse", f"{commit}^{{commit}}"], capture_output=True, text=True, check=True)
    out = _bench.work_folder("engine_layers") / full.stdout.strip()
    if out.exists():
        return out
    print(f"building {commit} in {out}", flush=True)
    staged = out.with_suffix(".partial")
    shutil.rmtree(staged, ignore_errors=True)
    source = staged / "source"
    source.mkdir(parents=True)
    archive = subprocess.run([*git, "archive", full.stdout.strip()], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(staged / "site"))
    subprocess.run([*pip, str(source)], check=True)
    (staged / "site").rename(out)
    shutil.rmtree(staged)
    return out


def random_model() -> Path:
    """Packed integers of compressed-tensors with random codes, written as any version reads them. Made once."""
    out = _bench.work_folder("engine_layers") / "llama-1b-int4"
    if out.exists():
        return out
    import torch
    from safetensors.torch import save_file

    hidden, width, layers = (SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    queries, values = (SHAPE["head_dim"] * SHAPE[f"num_{name}_heads"] for name in ("attention", "key_value"))
    matrices = {"model.embed_tokens": (SHAPE["vocab_size"], hidden)}
    tensors = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    for layer in (f"model.layers.{i}" for i in range(layers)):
        of = {"q": (queries, hidden), "k": (values, hidden), "v": (values, hidden), "o": (hidden, queries)}
        matrices |= {f"{layer}.self_attn.{name}_proj": shape for name, shape in of.items()}
        of = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        matrices |= {f"{layer}.mlp.{name}_proj": shape for name, shape in of.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    few = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0)).int()
    for name, (rows, columns) in matrices.items():
        codes = few.repeat(-(-rows * columns // 8 // len(few)))[: rows * columns // 8]
        tensors[f"{name}.weight_packed"] = codes.view(rows, columns // 8)
        tensors[f"{name}.weight_scale"] = torch.full((rows, columns // GROUP), 0.02 / 4.6, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
    staged = out.with_suffix(".partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    save_file(tensors, staged / "model.safetensors")
    (staged / "config.json").write_text(json.dumps(SHAPE))
    return staged.rename(out)


class Worker:
    """A version of the engine that waits between commands; `package` "" is the installed one."""

    def __init__(self, package: Path | str, model: Path, threads: int) -> None:
        script = Path(__file__).with_name("_engine_worker.py")
        command = [sys.executable, str(script), str(package), str(model), str(threads), str(LENGTH)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()  # it has loaded the model

    def ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(before: Path, model: Path, threads: int, *, pairs: int, rounds: int, steps: int) -> dict[str, Any]:
    ids = [int(i) for i in np.random.default_rng(0).integers(1, 256, 16)]
    digests: set[str] = set()
    seconds: dict[str, list[list[float]]] = {"before": [], "now": []}
    for _ in range(pairs):
        workers = {"before": Worker(before, model, threads), "now": Worker("", model, threads)}
        digests |= {worker.ask(logits=ids)["digest"] for worker in workers.values()}
        for turn in range(rounds):
            for name in sorted(workers, reverse=bool(turn % 2)):
                seconds[name].append(workers[name].ask(steps=1 + steps)["seconds"][1:])
        for worker in workers.values():
            worker.close()
    found: dict[str, Any] = {"same_bits": len(digests) == 1}
    for name, values in seconds.items():
        found[name] = {f"p{round(100 * q):02}": float(np.quantile(values, q)) for q in (0.05, 0.5)}
        print(f"  {name:6} p50 {found[name]['p50'] * 1e3:8.4f} ms  p05 {found[name]['p05'] * 1e3:8.4f} ms", flush=True)
    found |= {p: found["before"][p] / found["now"][p] for p in ("p50", "p05")}
    each = np.median(seconds["before"], axis=1) / np.median(seconds["now"], axis=1)
    found["quartiles"] = [float(np.quantile(each, q)) for q in (0.25, 0.75)]
    low, high = found["quartiles"]
    print(f"  before / now: p50 {found['p50']:.4f}, p05 {found['p05']:.4f}; half of the rounds {low:.4f} to {high:.4f}")
    return found


def main() -> int:
    options = _bench.parser(__doc__)
    options.add_argument("--before", default="a13f930", help="the commit to compare with")
    arguments = options.parse_args()
    before, large = built(arguments.before), random_model()
    reference = _bench.REPOSITORY / "src" / "pennyweight" / "data" / "reference-dense"
    keys: dict[str, Any] = {"before": arguments.before}
    bars = []
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        for name, model, rounds, steps in (("1b", large, 12, 8), ("reference", reference, 60, 64)):
            print(f"\n{name}, {threads} threads", flush=True)
            pairs, rounds = (2, rounds // 4) if arguments.quick else (6, rounds)
            found = measure(before, model, threads, pairs=pairs, rounds=rounds, steps=steps)
            keys[f"{name} {threads}t"] = found
            bars.append(_bench.bar(f"{name} {threads}t: steps before / now, medians", found["p50"], ">=", BAR))
            bars.append(_bench.bar(f"{name} {threads}t: same bits", int(found["same_bits"]), "==", 1))
    return _bench.finish("engine_layers", arguments.quick, keys, bars)


if __name__ == "__main__":
    raise SystemExit(main())
