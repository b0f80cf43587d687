"""Few bits at equal bytes: KL to the parent of ours and of what people quantise with now.

The shipped model, all bytes of its matrices counted as a share of those in 16 bits; KL and bits per byte on rows that
nothing saw (half code, half books where the books are there), with the interval of 95 % of rows drawn anew. Everybody
that looks at text looks at the same. Nobody's child is healed.

    ours            penny fit, axes bits and trellis, at each of the shares
    llama.cpp       its quantiser with an importance matrix: every type from IQ2_M to Q5_K_M, with the mixtures it has
    llm-compressor  GPTQ, 4 bits in groups of 128 and 32, embedding left in 16 bits
    auto-round      4 and 3 bits in groups of 128 and 32, the same
    hqq             4 and 3 bits in groups of 64, the same

At each share, our KL is held against the lowest of those that are no larger. Peers stand in environments of their own
below ~/.cache/penny-envs ($PENNY_ENVS); what is not there is told as not run, with the command that builds it. A model
of 7 M parameters tells how our implementation does beside theirs, not what they do to a large one. With --quick two
shares, llama.cpp alone, fewer rows.
"""

from __future__ import annotations

import hashlib
import json
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
import _reference
from pennyweight.disk.checkpoint import safetensors_bytes
from pennyweight.evals.agree import compare
from pennyweight.live.load import load_model
from pennyweight.texts import Rows

SCRIPT = "peers_quant"
SHARES = (0.194, 0.20, 0.22, 0.244, 0.266, 0.30, 0.36)
ROWS, CHARACTERS = 64, 400_000
ENVIRONMENTS = Path(os.environ.get("PENNY_ENVS", Path.home() / ".cache" / "penny-envs"))
LLAMA = {  # numbers of llama.h
    "IQ2_S": 28,
    "IQ2_M": 29,
    "Q2_K": 10,
    "IQ3_XXS": 23,
    "IQ3_XS": 22,
    "Q3_K_S": 11,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "IQ4_XS": 30,
    "IQ4_NL": 25,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
}
PEERS = {
    "llm-compressor": ("llmcompressor datasets", ((4, 128), (4, 32)), 16),
    "auto-round": ("auto-round", ((4, 128), (4, 32), (3, 128), (3, 32)), 16),
    "hqq": ("hqq transformers", ((4, 64), (3, 64)), 32),
}
"""What pip installs, (bits, group), and bits of a group's scale and zero."""

Point = dict[str, Any]


class Judge:
    """The parent, and the rows that children are held against it on."""

    def __init__(self, model: Path, rows: Rows) -> None:
        self.parent, self.rows = load_model(model, dtype=torch.float32), rows

    def point(self, child: Any, nbytes: float, whole: float, seconds: float) -> Point:
        singles = [compare(self.parent, child, self.rows.pick(np.array([row]))) for row in range(len(self.rows.ids))]
        tokens = np.array([each.agreement.tokens for each in singles])
        kl = np.array([each.agreement.kl for each in singles]) * tokens
        taken = np.random.default_rng(0).integers(0, len(kl), (2000, len(kl)))
        drawn = kl[taken].sum(axis=1) / tokens[taken].sum(axis=1)
        bits = sum(each.child.nats for each in singles) / sum(each.parent.nats for each in singles)
        return {
            "share": round(nbytes / whole, 4),
            "kl": round(float(kl.sum() / tokens.sum()), 5),
            "interval": [round(float(each), 5) for each in np.quantile(drawn, (0.025, 0.975))],
            "bits_per_byte_over_parent": round(bits, 5),
            "seconds": round(seconds, 1),
        }


def matrices(model: Path) -> dict[str, tuple[int, ...]]:
    from pennyweight.disk.checkpoint import Checkpoint

    return {name: tuple(entry.shape) for name, entry in Checkpoint(model).entries.items()}


def ours(model: Path, share: float, work: Path, text: Path) -> tuple[Path, float]:
    out = work / f"ours-{share:.3f}"
    shutil.rmtree(out, ignore_errors=True)
    unhealed = ("--axes", "bits,trellis", "--heal-tokens", 0, "--local-tokens", 0, "--machine", "m2-max")
    command = [sys.executable, "-m", "pennyweight", "fit", model, "--out", out, "--run", work / "run", "--text", text]
    started = time.perf_counter()
    command += [*unhealed, "--weights", f"{share:.1%}"]
    made = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"penny fit at {share:.1%} ended with {made.returncode}: {made.stderr[-1000:]}")
    return out, time.perf_counter() - started


class Llama:
    """llama.cpp's children of the model, read back into its parent's place by the ggml project's own reader."""

    def __init__(self, model: Path, work: Path, moments: dict[str, np.ndarray]) -> None:
        import gguf

        self._model, self._work = model, work
        self._config = json.loads((model / "config.json").read_text())
        arch = gguf.MODEL_ARCH[self._config["model_type"].upper()]
        self._names = gguf.get_tensor_name_map(arch, self._config["num_hidden_layers"])
        self._file = _llama.write_gguf(model, work / "parent.gguf", "f16", _llama.Ggml())
        np.savez(work / "imatrix.npz", **{self._stored(name): each for name, each in moments.items()})  # pyright: ignore

    def _stored(self, name: str) -> str:
        return self._names.get_name(name, (".weight", ".bias")) or name

    def child(self, kind: str) -> tuple[Any, int, float]:
        import gguf

        out = self._work / f"{kind}.gguf"
        script = Path(__file__).with_name("_llama_quantize.py")
        command = [_llama.python(), script, self._file, out, str(LLAMA[kind]), self._work / "imatrix.npz"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(made.stderr[-300:])
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
        child: Any = load_model(self._model, dtype=torch.float32)
        state = child.state_dict()
        with torch.no_grad():
            for name in matrices(self._model):
                tensor = tensors[self._stored(name)]
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                state[name].copy_(torch.from_numpy(np.array(values, np.float32)).view(state[name].shape))
        nbytes = sum(int(tensor.n_bytes) for tensor in tensors.values())
        return child, nbytes, json.loads(made.stdout.splitlines()[-1])["seconds"]


def moments(model: Path, text: Path, work: Path) -> dict[str, np.ndarray]:
    """Mean squares of what each matrix of a block multiplies, by the matrix' name."""
    from pennyweight.config import FitConfig, merged
    from pennyweight.job.gather import gather_stats
    from pennyweight.job.job import open_job

    given = {"budget": {"weights": "100%"}, "machine": "m2-max", "axes": ["bits"], "data": {"text": str(text)}}
    with open_job(model, work / "moments", merged(FitConfig(), given), run=work / "moments.run") as job:
        gather_stats(job)
        found = {}
        for slot, block in job.blocks.items():
            if slot.layer is None:
                continue
            tensors = job.store.tensors(f"stats/{slot.layer}")
            for name, weight in block.tensors().items():
                if weight.is_matrix:
                    moment = tensors[f"{slot.kind}.{block.shape.reads[weight.name]}_moment"]
                    found[name] = (moment if moment.dim() == 1 else moment.diagonal()).float().numpy().copy()
    return found


def peer_bytes(model: Path, bits: int, group: int, beside: int) -> float:
    """Of matrices of blocks in so many bits, with `beside` bits for every group; the rest in 16."""
    total = 0.0
    for name, shape in matrices(model).items():
        count = float(np.prod(shape))
        in_block = ".layers." in name and len(shape) == 2
        total += count * ((bits + beside / group) / 8 if in_block else 2)
    return total


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    shares = SHARES[1:4:2] if options.quick else SHARES
    version = hashlib.sha256(f"{_bench.package_hash()} {options.model.resolve()}".encode()).hexdigest()[:12]
    work = _bench.work_folder(SCRIPT) / version
    work.mkdir(exist_ok=True)
    text = work / "text"
    if not text.exists():
        _reference.training_text(text, characters=CHARACTERS)
    model, rows = options.model, _reference.held_out(_reference.opened(options.model), 16 if options.quick else ROWS)
    judge, whole = Judge(model, rows), 2.0 * sum(float(np.prod(shape)) for shape in matrices(model).values())
    points: dict[str, Point] = {}

    def told(name: str, point: Point) -> None:
        points[name] = point
        print(f"{name:<28} {json.dumps(point)}", flush=True)

    for share in shares:
        folder, seconds = ours(model, share, work, text)
        child = load_model(folder, dtype=torch.float32)
        told(f"ours at {share:.1%}", judge.point(child, safetensors_bytes(folder), whole, seconds))
    not_run: dict[str, str] = {}
    if _llama.folder() is None:
        not_run["llama.cpp"] = _llama.MISSING
    else:
        llama = Llama(model, work, moments(model, text, work))
        for kind in LLAMA:
            try:
                child, nbytes, seconds = llama.child(kind)
            except RuntimeError as err:
                not_run[kind] = str(err)
                continue
            told(f"llama.cpp {kind}", judge.point(child, nbytes, whole, seconds))
    for peer, (packages, settings, beside) in PEERS.items() if not options.quick else ():
        python = ENVIRONMENTS / peer / "bin" / "python"
        if not python.exists():
            not_run[peer] = f"python3.11 -m venv {python.parents[1]} && {python.parent}/pip install {packages}"
            continue
        documents = work / "documents.jsonl"
        documents.write_text("\n".join(json.dumps(each) for each in _documents(text)))
        for bits, group in settings:
            out = work / f"{peer}-{bits}-{group}"
            shutil.rmtree(out, ignore_errors=True)
            script = Path(__file__).with_name("_quantize_peer.py")
            command = [python, script, peer, model, out, str(bits), str(group), documents]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                not_run[f"{peer} {bits} bits, {group}"] = made.stderr[-300:]
                continue
            seconds = json.loads(made.stdout.splitlines()[-1])["seconds"]
            nbytes = peer_bytes(model, bits, group, beside)
            child = load_model(out, dtype=torch.float32)
            told(f"{peer} {bits} bits, groups of {group}", judge.point(child, nbytes, whole, seconds))
    for name, why in not_run.items():
        print(f"{name}: not run; {why}", flush=True)
    bars = []
    for share in shares:
        own = points[f"ours at {share:.1%}"]
        others = {n: p for n, p in points.items() if not n.startswith("ours") and p["share"] <= share * 1.005}
        if others:
            best = min(others, key=lambda name: others[name]["kl"])
            name = f"KL at {share:.1%} over that of {best}, the best that is no larger"
            bars.append(_bench.bar(name, round(own["kl"] / others[best]["kl"], 4), "<", 1.0))
    return _bench.finish(SCRIPT, options.quick, {"points": points, "not_run": not_run}, bars)


def _documents(text: Path) -> list[str]:
    lines = [line for file in sorted(text.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
