"""Does the server hold under load, and among hostile clients?

`penny serve` runs as a process of its own with the shipped model. First 200 clients at once on loopback, more than may
be answered or wait at a time. Every client asks until it is answered: 429 means to try again, anything else but 200 is
an error, and so is an answer of another length than was asked for. Afterwards the same load again, several times:
resident memory must stay where the first load left it. Streams and whole answers, and clients that leave in the middle,
are mixed in.

Then 40 ordinary clients by turns alone and beside one hostile client of each kind: those ask as fast as they can for
what takes long to read or makes no sense, come under another name, or hold connections and are silent. Ordinary answers
may take half as long again, and /health has to answer at once all the time. Hostile clients and the one that asks for
/health have processes of their own: what is measured is the server, not how clients share an interpreter.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil

import _bench
import _reference

CLIENTS = 200
ORDINARY = 40
ROUNDS = {"quick": 3, "full": 10}
TURNS = {"quick": 3, "full": 8}
TOKENS = 24
SILENT = 100  # connections of each client that holds them and says nothing

HOSTILE = {
    "a book": {"prompt": "a " * 490_000},
    "100,000 stop strings": {"prompt": "a", "stop": ["a"] * 100_000},
    "200,000 prompts": {"prompt": ["a"] * 200_000},
    "240,000 fractions": {"prompt": [1.5] * 240_000},
    "240,000 tokens": {"prompt": [5] * 240_000},
    "tokens that are not there": {"prompt": [[5], [-1] * 9, [2**40] * 9]},
    "half a character": {"prompt": "\ud800"},
    "a penalty of nothing": {"prompt": "a", "repetition_penalty": 0.001},
    "a key nobody knows": {"prompt": "a", "x" * 900_000: 1},
}
"""What hostile clients ask for."""


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
            found |= among_hostile(address, TURNS["quick" if options.quick else "full"])
            found["rss_growth_among_hostile"] = psutil.Process(process.pid).memory_info().rss / found["rss_bytes"] - 1
            process.terminate()
            found["exit_code"] = process.wait(timeout=30)
        finally:
            process.kill()
    bars = [
        _bench.bar("errors", found["errors"], "==", 0),
        _bench.bar("growth of resident memory", found["rss_growth"], "<=", 0.03),
        _bench.bar("errors among hostile clients", found["errors_among_hostile"], "==", 0),
        _bench.bar("p95 among hostile clients by p95 alone", found["p95_among_hostile_by_alone"], "<=", 1.5),
        _bench.bar("slowest /health in seconds", found["health_worst_seconds"], "<=", 0.1),
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


def measure(address: str, process: subprocess.Popen[bytes], rounds: int) -> dict[str, Any]:
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


def among_hostile(address: str, turns: int) -> dict[str, Any]:
    """Seconds of answers to ordinary clients, alone and beside hostile ones by turns, and of /health all the time."""
    spawn = multiprocessing.get_context("spawn")
    over, attack, health, answered = spawn.Event(), spawn.Event(), spawn.Queue(), spawn.Queue()
    helpers = [
        spawn.Process(target=ask_for_health, args=(address, attack, over, health)),
        spawn.Process(target=be_hostile, args=(address, attack, over, answered)),
    ]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    errors: list[str] = []

    def client(number: int) -> list[float]:
        mine = []
        for turn in range(3):
            body = {"prompt": f"def task_{number}_{turn}(", "max_tokens": TOKENS, "seed": number, "stream": turn == 0}
            started = time.monotonic()
            said = once(connections, body, False)
            errors.extend([said] if said else [])
            mine.append(time.monotonic() - started)
        return mine

    for helper in helpers:
        helper.start()
    limits = httpx.Limits(max_connections=ORDINARY, max_keepalive_connections=ORDINARY)
    with httpx.Client(base_url=address, limits=limits, timeout=120, verify=False) as connections:
        health.get()  # the first of them: both have started
        answered.get()
        for turn in range(2 * turns):
            hostile = turn % 2 == 1
            (attack.set if hostile else attack.clear)()
            time.sleep(1.0)
            with ThreadPoolExecutor(ORDINARY) as pool:
                for mine in pool.map(client, range(ORDINARY)):
                    seconds[hostile] += mine
            print(
                f"{'among hostile' if hostile else 'alone'}: p95 {np.quantile(seconds[hostile], 0.95):.3f} s",
                flush=True,
            )
    over.set()
    waited, counts = health.get(), answered.get()
    for helper in helpers:
        helper.join()
    for said in sorted(set(errors))[:5]:
        print(said)
    for kind, statuses in counts.items():
        print(f"{kind}: {statuses}")
    wrong = sum(count for kind in counts for status, count in counts[kind].items() if not status.startswith("4"))
    alone, among = (float(np.quantile(seconds[hostile], 0.95)) for hostile in (False, True))
    return {
        "errors_among_hostile": len(errors) + wrong,
        "hostile_requests": sum(sum(statuses.values()) for statuses in counts.values()),
        "p50_alone_seconds": float(np.quantile(seconds[False], 0.5)),
        "p50_among_hostile_seconds": float(np.quantile(seconds[True], 0.5)),
        "p95_alone_seconds": alone,
        "p95_among_hostile_seconds": among,
        "p95_among_hostile_by_alone": among / alone,
        "health_requests": len(waited),
        "health_p99_seconds": float(np.quantile([one for _, one in waited], 0.99)),
        "health_worst_alone_seconds": max(one for hostile, one in waited if not hostile),
        "health_worst_seconds": max(one for _, one in waited),
    }


def ask_for_health(address: str, attack: Any, over: Any, told: Any) -> None:
    """In a process of its own: ask every 20 ms, tell how long each answer took and whether others were hostile then."""
    told.put(0.0)
    seconds: list[tuple[bool, float]] = []
    host, port = address.removeprefix("http://").split(":")
    while not over.is_set():
        started = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as asking:
            asking.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            said = b"".join(iter(lambda: asking.recv(4096), b""))
        seconds.append((attack.is_set(), time.monotonic() - started if b" 200 " in said else 60.0))
        time.sleep(0.02)
    told.put(seconds)


def be_hostile(address: str, attack: Any, over: Any, told: Any) -> None:
    """In a process of its own: one client of each kind, as fast as each can, while `attack` is set. Tells how often
    each was answered how."""
    told.put(0)
    host, port = address.removeprefix("http://").split(":")
    place, counts = (host, int(port)), {}

    def ask(kind: str, raw: bytes) -> None:
        counts[kind] = {}
        while not over.is_set():
            if not attack.wait(0.1):
                continue
            status = "none"
            with contextlib.suppress(OSError), socket.create_connection(place, timeout=30) as client:
                client.sendall(raw)
                status = [*client.recv(4096).split(b" "), b"none"][1].decode()
            counts[kind][status] = counts[kind].get(status, 0) + 1

    def be_silent(raw: bytes) -> None:
        while not over.is_set():
            held: list[socket.socket] = []
            while attack.wait(0.1) and not over.is_set():
                with contextlib.suppress(OSError):
                    if len(held) < SILENT:
                        held.append(socket.create_connection(place, timeout=1))
                        held[-1].sendall(raw)
                    else:
                        time.sleep(1.0)
                        for client in list(held):
                            try:
                                client.sendall(b"x")
                            except OSError:
                                client.close()
                                held.remove(client)
            for client in held:
                client.close()

    head = "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n"
    bodies = {kind: json.dumps(body, separators=(",", ":")).encode() for kind, body in HOSTILE.items()}
    asks = {kind: head.format("localhost", len(body)).encode() + body for kind, body in bodies.items()}
    asks["a deep list"] = head.format("localhost", 900_000).encode() + b"[" * 900_000
    asks["another name"] = b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    asks["no request"] = b"\x16\x03\x01 hello\r\n\r\n"
    silent = [b"", b"POST /v1/completions HTTP/1.1\r\nX: ", head.format("localhost", 900_000).encode()]
    clients = [threading.Thread(target=ask, args=each) for each in asks.items()]
    clients += [threading.Thread(target=be_silent, args=(raw,)) for raw in silent]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    told.put(counts)


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
