"""`kill -9` at any moment, and the same command goes on to the identical result.

A small random model is fitted with every axis, both kinds of healing and int4 packing, by the command a user would
type. First it runs undisturbed. Then it runs again and again elsewhere, each time killed with SIGKILL after a random
delay, until it has been killed as often as wanted; a run that reaches its end before its delay is over is compared,
file by file, and another one is begun. Only what tells the time may differ: timings, and the page drawn from them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _bench
import _random_model

SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
SETTINGS = {
    "budget": {"weights": "21%"},
    "data": {"context": 128, "calibration_rows": 8, "score_rows": 8, "held_out_rows": 8, "rows_per_chunk": 2},
    "heal": {"local_tokens": 16_384, "whole_tokens": 65_536, "batch_rows": 4},
    "machine": "m2-max",
    "sweep": ["weights=40%"],
}
KILLS, QUICK_KILLS = 20, 2
_STAGE = re.compile(r"^([a-z ]+): ", re.MULTILINE)


def command(model: Path, out: Path, config: Path) -> list[str]:
    return [sys.executable, "-m", "pennyweight", "fit", str(model), "--out", str(out), "--config", str(config)]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(arguments, stdout=sink, stderr=subprocess.STDOUT)


def finish(arguments: list[str], log: Path) -> float:
    """Run to the end; returns seconds."""
    started = time.monotonic()
    if code := start(arguments, log).wait():
        print(log.read_text()[-3000:])
        raise SystemExit(f"penny fit ended with exit code {code}")
    return time.monotonic() - started


def digest(out: Path) -> dict[str, str]:
    """{file: SHA-256} of a finished folder; of the report only what does not tell the time or the folder's place."""
    found = {}
    for path in sorted(out.iterdir()):
        raw = path.read_bytes()
        if path.name == "report.json":
            raw = json.dumps(_timeless(json.loads(raw)), sort_keys=True).encode()
        if path.name != "report.html":
            found[path.name] = hashlib.sha256(raw).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("timings", "seconds", "out")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def measure(kills: int) -> dict[str, Any]:
    """Reference run, then runs killed at random until `kills` have been."""
    work = _bench.work_folder("resume")
    model = _random_model.write(SHAPE, work / "pico", shard_bytes=10**6)
    shutil.rmtree(work / "runs", ignore_errors=True)
    (work / "runs").mkdir()
    config = work / "runs" / "fit.yaml"
    config.write_text(json.dumps(SETTINGS))  # JSON is YAML
    reference = work / "runs" / "reference" / "child"
    reference.parent.mkdir()
    seconds = finish(command(model, reference, config), work / "runs" / "reference.log")
    wanted = digest(reference)
    print(f"undisturbed: {seconds:.0f} s, {len(wanted)} files", flush=True)

    draw = random.Random(0)
    killed = jobs = identical = 0
    stages: Counter[str] = Counter()
    while killed < kills:
        folder = work / "runs" / f"killed-{jobs}"
        folder.mkdir()
        out, log, jobs = folder / "child", folder / "log", jobs + 1
        arguments = command(model, out, config)
        while killed < kills:
            log.unlink(missing_ok=True)
            process = start(arguments, log)
            try:
                process.wait(draw.uniform(0, 0.7 * seconds))
                break  # it was faster
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            if out.exists() and digest(out) != wanted:
                print(f"after kill {killed + 1} there is a folder that looks finished and is not")
                break
            killed += 1
            said = _STAGE.findall(log.read_text())
            stages[said[-1] if said else "start"] += 1
        if not out.exists():
            finish(arguments, log)
        found = digest(out)
        identical += found == wanted
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        print(f"run {jobs}: {killed} kills so far, differs in: {', '.join(differing) or 'nothing'}", flush=True)
    return {"kills": killed, "jobs": jobs, "identical": identical, "stages_hit": dict(stages)}


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    inputs = json.dumps([SHAPE, SETTINGS])
    found = _bench.cached("resume", inputs) if quick else None
    if found is None:
        found = measure(QUICK_KILLS if quick else KILLS)
        if not quick:
            _bench.remember("resume", inputs, found)
    bars = [
        _bench.bar("kills at random moments", found["kills"], ">=", QUICK_KILLS if quick else KILLS),
        _bench.bar("resumed runs that differ from the undisturbed one", found["jobs"] - found["identical"], "==", 0),
    ]
    return _bench.finish("resume", quick, found, bars)


if __name__ == "__main__":
    sys.exit(main())
