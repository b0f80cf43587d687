"""A model larger than the memory it is worked on with: `penny fit` over a 1 B checkpoint of 2.5 GB in several shards.

The checkpoint has the shapes of Llama-3.2-1B and random weights: memory, time, bytes and resuming do not depend on
what the weights mean, quality does and is not looked at. The job runs as a process of its own, is killed once with
SIGKILL while it scores, and started again. Bars: peak resident memory, the budget, and that it resumes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _bench
import _random_model

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
BUDGET = "30%"
RSS_BAR = 2.5e9
SETTINGS = (
    *("--axes", "bits", "--weights", BUDGET, "--context-tokens", "128", "--machine", "m2-max", "--max-ram", "2500MB"),
    *(
        "--calibration-rows",
        "4",
        "--score-rows",
        "2",
        "--held-out-rows",
        "2",
        "--heal-tokens",
        "0",
        "--local-tokens",
        "0",
    ),
)


def fit(model: Path, out: Path, *, kill_when: str | None = None) -> tuple[int, int, float]:
    """(exit code, peak resident bytes, seconds) of one `penny fit`; killed when the log first says `kill_when`."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pennyweight", "fit", str(model), "--out", str(out), *SETTINGS]
    log = out.with_name("log.txt")
    with log.open("a") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        while kill_when is not None and process.poll() is None:
            time.sleep(0.5)
            if kill_when in log.read_text():
                process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0) if kill_when is None else (0, process.wait(), None)
    peak = 1024 * (usage.ru_maxrss if usage is not None else resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    code = os.waitstatus_to_exitcode(status) if usage is not None else status
    return code, peak, time.monotonic() - started


def measure(work: Path) -> dict[str, Any]:
    """Kill once, resume, finish; what the bars are about."""
    from pennyweight.disk.checkpoint import Checkpoint, safetensors_bytes

    model = _random_model.write(SHAPE, work / "llama-1b-random", shard_bytes=600 * 10**6)
    shutil.rmtree(work / "run", ignore_errors=True)
    (work / "run").mkdir()
    out = work / "run" / "small"
    killed, first_peak, first_seconds = fit(model, out, kill_when="stats: done")
    code, peak, seconds = fit(model, out)
    if code != 0:
        print((work / "run" / "log.txt").read_text()[-3000:])
        raise SystemExit(f"penny fit ended with exit code {code}")
    report = json.loads((out / "report.json").read_text())
    parent = Checkpoint(model).weight_bytes
    return {
        "peak_rss_bytes": max(peak, first_peak),
        "seconds": round(first_seconds + seconds, 1),
        "parent_bytes": parent,
        "budget_bytes": report["budget"]["weight_bytes"],
        "file_bytes": safetensors_bytes(out),
        "killed_with": killed,
        "resumed": killed == -signal.SIGKILL and all(c["ok"] or c["not_run"] for c in report["verified"]["checks"]),
    }


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    inputs = json.dumps([SHAPE, SETTINGS])
    found = _bench.cached("streaming", inputs) if quick else measure(_bench.work_folder("streaming"))
    if found is None:
        return _bench.skip(
            "streaming", quick, "a full run takes a quarter of an hour and has not been made with this code"
        )
    _bench.remember("streaming", inputs, found)
    bars = [
        _bench.bar("peak resident bytes", found["peak_rss_bytes"], "<=", RSS_BAR),
        _bench.bar("file bytes over budget", found["file_bytes"] / found["budget_bytes"], "<=", 1.0),
        _bench.bar("killed once and resumed", int(found["resumed"]), "==", 1),
    ]
    return _bench.finish("streaming", quick, found, bars)


if __name__ == "__main__":
    sys.exit(main())
