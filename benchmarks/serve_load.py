"""Does the server hold under load? 200 clients at once on loopback, more than may be answered or wait at a time.

`penny serve` runs as a process of its own with the shipped model. Every client asks until it is answered: 429 means to
try again, anything else but 200 is an error, and so is an answer of another length than was asked for. Afterwards the
same load again, several times: resident memory must stay where the first load left it. Streams and whole answers, and
clients that leave in the middle, are mixed in.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import psutil

import _bench
import _reference

CLIENTS = 200
ROUNDS = {"quick": 3, "full": 10}
TOKENS = 24


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (
        sys.executable,
        "-m",
        "pennyweight",
        "serve",
        str(options.model),
        "--port",
        str(port),
        "--context",
        "256",
    )
    log = _bench.work_folder("serve_load") / "log.txt"
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            found = measure(address, process, ROUNDS["quick" if options.quick else "full"])
            process.terminate()
            found["exit_code"] = process.wait(timeout=30)
        finally:
            process.kill()
    bars = [
        _bench.bar("errors", found["errors"], "==", 0),
        _bench.bar("growth of resident memory", found["rss_growth"], "<=", 0.03),
        _bench.bar("clean shutdown", int(found["exit_code"] in (0, -15)), "==", 1),
    ]
    return _bench.finish("serve_load", options.quick, found, bars)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers. Raises RuntimeError if it ends first."""
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"penny serve ended: {log.read_text()[-2000:]}")
        try:
            httpx.get(f"{address}/health", timeout=1)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("penny serve did not answer within a minute")


def measure(address: str, process: subprocess.Popen[bytes], rounds: int) -> dict[str, float]:
    """Run the load `rounds` times; seconds are of whole answers, waiting in line and trying again included."""
    seconds: list[float] = []
    errors: list[str] = []
    refused = [0]
    lock = threading.Lock()

    def client(number: int) -> None:
        rng = random.Random(number)
        stream, leaves = number % 2 == 0, number % 20 == 0
        body = {
            "prompt": f"def task_{number}(",
            "max_tokens": TOKENS,
            "temperature": 0.8,
            "seed": number,
            "stream": stream,
        }
        started = time.monotonic()
        while True:
            try:
                said = once(connections, body, leaves)
            except httpx.TransportError as err:
                said = repr(err)
            if said == "429":
                with lock:
                    refused[0] += 1
                time.sleep(0.3 + 0.7 * rng.random())
                continue
            with lock:
                if said:
                    errors.append(said)
                elif not leaves:
                    seconds.append(time.monotonic() - started)
            return

    resident, per_round = [], []
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    connections = httpx.Client(base_url=address, limits=limits, timeout=120, verify=False)
    for number in range(rounds):
        started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        per_round.append(time.monotonic() - started)
        time.sleep(0.5)
        resident.append(psutil.Process(process.pid).memory_info().rss)
        print(
            f"round {number}: {per_round[-1]:.1f} s, {resident[-1] / 2**20:.1f} MiB, {len(errors)} errors", flush=True
        )
    connections.close()
    for said in sorted(set(errors))[:5]:
        print(said)
    return {
        "clients": CLIENTS,
        "rounds": rounds,
        "errors": len(errors),
        "refused_and_tried_again": refused[0],
        "p50_seconds": float(np.quantile(seconds, 0.5)),
        "p95_seconds": float(np.quantile(seconds, 0.95)),
        "tokens_per_second": CLIENTS * TOKENS / min(per_round),
        "rss_bytes": resident[-1],
        "rss_growth": resident[-1] / resident[0] - 1,
    }


def once(connections: httpx.Client, body: dict[str, object], leaves: bool) -> str:
    """One request. "" if it went well, "429" if the queue was full, else what was wrong."""
    with connections.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = response.read().decode()
            return "429" if response.status_code == 429 else text
        if leaves:
            next(response.iter_raw())
            return ""
        raw = response.read().decode()
    if body["stream"]:
        events = [event.removeprefix("data: ") for event in raw.split("\n\n") if event]
        finish = json.loads(events[-2])["choices"][0]["finish_reason"] if len(events) > 1 else None
        return "" if events[-1] == "[DONE]" and finish in ("stop", "length") else f"stream ended with {events[-2:]}"
    usage = json.loads(raw)
    finish, written = usage["choices"][0]["finish_reason"], usage["usage"]["completion_tokens"]
    return "" if finish == "stop" or written == TOKENS else f"{written} tokens, finish {finish}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
