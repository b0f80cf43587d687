"""Generated inputs: damaged files for every reader (fuzz_files), requests by schema and against it, bytes that are no
HTTP, and files once more for the native module built with AddressSanitizer. Counts what is neither done nor refused."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import _pico

SLOW_SECONDS = 5.0
_WORDS = """
    model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p n seed stop stream
    stream_options presence_penalty frequency_penalty response_format repetition_penalty stop_token_ids
    ignore_eos min_tokens tools tool_choice logprobs top_logprobs logit_bias echo suffix best_of user metadata
    chat_template_kwargs repeat_penalty n_predict guided_json grammar role content
"""
_KEYS = tuple(_WORDS.split())


def everything(count: int, kept: Path) -> dict[str, Any]:
    """About `count` inputs in all: {"inputs", "bad", "examples", ...}. A part that ended with nothing bad is kept in a
    file named after `kept`, and not run again."""
    parts: dict[str, dict[str, Any]] = {}
    sizes = {files: count * 6 // 10, server: count * 4 // 10 + 1, under_asan: max(50, count // 100)}
    for run, size in sizes.items():
        name = run.__name__
        file = kept.with_name(f"{kept.name}-{name}-{size}.json")
        if file.exists():
            parts[name] = json.loads(file.read_text())
        else:
            print(f"{name}: {size} inputs", flush=True)
            parts[name] = run(size)
            if not parts[name]["bad"]:
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(parts[name]))
                partial.replace(file)
        print(f"{name}: {parts[name]['inputs']} inputs, {parts[name]['bad']} bad", flush=True)
    return {
        "inputs": sum(part["inputs"] for part in parts.values()),
        "bad": sum(part["bad"] for part in parts.values()),
        **parts,
    }


def files(count: int) -> dict[str, Any]:
    """Damaged files for every reader."""
    import fuzz_files

    damaged = fuzz_files.main(count)
    return {"inputs": damaged["cases"], "bad": len(damaged["faults"]), "examples": damaged["faults"][:10]}


def server(count: int) -> dict[str, Any]:
    """Requests to a server of a pico model, on loopback: a third from its own schema (schemathesis), a third of known
    keys with any values (hypothesis), a third raw bytes. Bad: status 500 and above, no answer within five seconds, a
    traceback in the log, a server that ended or that takes a gigabyte."""
    import httpx2 as httpx
    import schemathesis  # pyright: ignore[reportMissingImports]  # the extra `fuzz`
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        model = _pico.model(Path(folder) / "m", max_position_embeddings=64)
        command = (sys.executable, "-m", "pennyweight", "serve", str(model), "--port", str(port), "--threads", "1")
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        bad: list[str] = []
        done = 0
        address = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=address, timeout=SLOW_SECONDS) as client:
                _wait(client, process, log)

                def ask(method: str, path: str, content: bytes, headers: dict[str, str]) -> None:
                    nonlocal done
                    done += 1
                    try:
                        found = client.request(method, path, content=content, headers=headers)
                    except httpx.TransportError as err:
                        bad.append(f"{type(err).__name__}: {method} {path} {content[:200]!r}")
                        return
                    if found.status_code >= 500:
                        bad.append(f"{found.status_code}: {method} {path} {content[:200]!r} -> {found.text[:200]}")

                kept: dict[str, Any] = {
                    "deadline": None,
                    "database": None,
                    "suppress_health_check": list(HealthCheck),
                    "phases": (Phase.generate,),
                }
                junk = st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: (
                        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5)
                    ),
                    max_leaves=12,
                )
                sane = {"prompt": "abc", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
                bodies = st.dictionaries(st.sampled_from(_KEYS), junk, max_size=6)

                @settings(max_examples=count // 3, **kept)
                @given(body=bodies, chat=st.booleans(), whole=st.booleans())
                def any_values(body: dict[str, Any], chat: bool, whole: bool) -> None:
                    needed = "messages" if chat else "prompt"
                    said = {needed: sane[needed], "max_tokens": 2, **body} if whole else body
                    path = "/v1/chat/completions" if chat else "/v1/completions"
                    ask("POST", path, json.dumps(said).encode(), {"Content-Type": "application/json"})

                any_values()
                schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
                found: list[Any] = list(schema.get_all_operations())
                operations = [one.ok() for one in found]
                for operation in operations:

                    @settings(max_examples=max(1, count // 3 // len(operations)), **kept)
                    @given(case=operation.as_strategy())
                    def by_schema(case: Any) -> None:
                        made = case.as_transport_kwargs(base_url=address)
                        body = made.get("json")
                        content = json.dumps(body).encode() if body is not None else (made.get("data") or b"")
                        content = content if isinstance(content, bytes) else str(content).encode()
                        path = made["url"].removeprefix(address)
                        ask(made["method"], path, content, {"Content-Type": "application/json"})

                    by_schema()
                done += _raw(port, count - done, bad)  # an operation without parameters has few cases
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code != 200:
                        bad.append("/health is not well afterwards")
            if process.poll() is not None:
                bad.append(f"the server ended with {process.returncode}")
            elif psutil.Process(process.pid).memory_info().rss > 2**30:
                bad.append(f"the server has {psutil.Process(process.pid).memory_info().rss >> 20} MiB")
        finally:
            process.kill()
            process.wait()
        if "Traceback" in log.read_text():
            bad.append(f"a traceback in the log: {log.read_text()[-500:]}")
    return {"inputs": done, "bad": len(bad), "examples": bad[:10]}


def _wait(client: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"penny serve ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(Exception):
            client.get("/health")
            return
        time.sleep(0.1)
    raise RuntimeError("penny serve did not answer within a minute")


def _raw(port: int, count: int, bad: list[str]) -> int:
    """Requests with bytes changed, dropped and doubled."""
    draw = random.Random(0)
    body = b'{"prompt": "abc", "max_tokens": 2, "stop": ["x"], "temperature": 0.5}'
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body
    for _ in range(count):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(raw))
            how = draw.randrange(4)
            if how == 0:
                raw[at] = draw.randrange(256)
            elif how == 1:
                del raw[at : at + draw.randint(1, 8)]
            elif how == 2:
                raw[at:at] = raw[at : at + draw.randint(1, 30)]
            else:
                raw[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=SLOW_SECONDS) as one:
                one.sendall(raw)
                one.shutdown(socket.SHUT_WR)
                first = one.recv(64)
        except OSError as err:
            if isinstance(err, TimeoutError):
                bad.append(f"no answer: {bytes(raw)[:200]!r}")
            continue
        status = first.split(b" ", 2)[1:2]
        if status and status[0].isdigit() and int(status[0]) >= 500:
            bad.append(f"{first[:20]!r}: {bytes(raw)[:300]!r}")
    return count


def under_asan(count: int) -> dict[str, Any]:
    """Damaged files through the native module built with AddressSanitizer, in a process of its own."""
    import asan

    environment = asan.environment()
    command = (sys.executable, str(Path(__file__).with_name("fuzz_files.py")), "--cases", str(count))
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    crashed = "AddressSanitizer" in found.stderr or "runtime error" in found.stderr
    bad = int(crashed or found.returncode != 0)
    return {"inputs": count, "bad": bad, "examples": [found.stderr[-500:], found.stdout[-500:]] if bad else []}


if __name__ == "__main__":
    print(json.dumps(server(int(sys.argv[1])), indent=1))
