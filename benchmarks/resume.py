"""A fit that is killed, started twice, short of disk or whose run folder is damaged ends with the right bytes, or says
in one line why not.

A small random model is fitted with every axis, both kinds of healing and int4 packing, by the command a user would
type. First it runs undisturbed. Then

    kills     it runs elsewhere, each time killed with SIGKILL after a random delay, until it has been killed as often
              as wanted
    pairs     the same command is started twice at once: one does the work, the other leaves with exit code 75 and one
              line that says who is at it
    fills     on a small disk of its own (tmpfs, which takes root) something else takes all the room after a random
              delay: exit code 75, and once there is room the same command goes on
    damage    in a run folder, finished or of a killed run, one file is cut, emptied, removed or has one bit flipped

and every folder that comes out is compared, file by file. Only what tells the time may differ: timings, and the page
drawn from them.
"""

from __future__ import annotations

import contextlib
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
FULL = {"kills": 20, "pairs": 20, "fills": 20, "damaged": 40}
QUICK = {"kills": 2, "pairs": 1, "fills": 2, "damaged": 4}
GOES_ON = 75
_STAGE = re.compile(r"^([a-z ]+): ", re.MULTILINE)
_HELD = re.compile(r"^penny: .* is worked on by process \d+ on \S+ since .*$", re.MULTILINE)
_FULL = re.compile(r"^penny: the disk is full .*$", re.MULTILINE)


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
        if path.name == "SHA256SUMS":
            raw = "".join(line for line in raw.decode().splitlines(True) if " report." not in line).encode()
        if path.name != "report.html":
            found[path.name] = hashlib.sha256(raw).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("timings", "seconds", "out")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


class Bench:
    """The undisturbed run, and what is held against it."""

    def __init__(self) -> None:
        self.work = _bench.work_folder("resume")
        self.model = _random_model.write(SHAPE, self.work / "pico", shard_bytes=10**6)
        self.runs = self.work / "runs"
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir()
        self.config = self.runs / "fit.yaml"
        self.config.write_text(json.dumps(SETTINGS))  # JSON is YAML
        self.reference = self.runs / "reference" / "child"
        self.reference.parent.mkdir()
        self.seconds = finish(self.command(self.reference), self.runs / "reference.log")
        self.wanted = digest(self.reference)
        self.draw = random.Random(0)
        self.stopped: list[Path] = []  # run folders of killed runs
        print(f"undisturbed: {self.seconds:.0f} s, {len(self.wanted)} files", flush=True)

    def command(self, out: Path) -> list[str]:
        return command(self.model, out, self.config)

    def same(self, what: str, out: Path) -> bool:
        found = digest(out)
        differing = sorted(n for n in self.wanted.keys() | found.keys() if self.wanted.get(n) != found.get(n))
        print(f"{what}: differs in {', '.join(differing) or 'nothing'}", flush=True)
        return not differing

    def kills(self, count: int) -> dict[str, Any]:
        killed = jobs = identical = 0
        stages: Counter[str] = Counter()
        while killed < count:
            folder = self.runs / f"killed-{jobs}"
            folder.mkdir()
            out, log, jobs = folder / "child", folder / "log", jobs + 1
            while killed < count:
                log.unlink(missing_ok=True)
                process = start(self.command(out), log)
                try:
                    process.wait(self.draw.uniform(0, 0.7 * self.seconds))
                    break  # it was faster
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                if out.exists() and digest(out) != self.wanted:
                    print(f"after kill {killed + 1} there is a folder that looks finished and is not")
                    break
                killed += 1
                stages[stage(log.read_text())] += 1
                if (folder / "child.run").exists():
                    self.stopped.append(shutil.copytree(folder / "child.run", self.runs / f"stopped-{killed}"))
            if not out.exists():
                finish(self.command(out), log)
            identical += self.same(f"run {jobs}, {killed} kills so far", out)
        return {"kills": killed, "jobs": jobs, "identical": identical, "stages_hit": dict(stages)}

    def pairs(self, count: int) -> dict[str, Any]:
        """Two starts at once. Right: at least one finishes, another one left in one line, and the bytes are those."""
        right = left = 0
        for number in range(count):
            folder = self.runs / f"pair-{number}"
            folder.mkdir()
            logs = [folder / f"log-{i}" for i in range(2)]
            if number % 3 == 2 and self.stopped:  # where somebody stopped before
                shutil.copytree(self.draw.choice(self.stopped), folder / "child.run")
            processes = [start(self.command(folder / "child"), log) for log in logs]
            codes = [process.wait() for process in processes]
            told = [_HELD.search(log.read_text()) for log in logs]
            left += codes.count(GOES_ON)
            ways = set(zip(codes, (said is not None for said in told), strict=True))
            right += (
                0 in codes
                and ways <= {(0, False), (GOES_ON, True)}
                and self.same(f"pair {number}, exit codes {codes}", folder / "child")
            )
            shutil.rmtree(folder)
        return {"pairs": count, "pairs_right": right, "pairs_of_which_one_left": left}

    def fills(self, count: int) -> dict[str, Any]:
        disk = self.runs / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            print(f"no small disk can be made here: {mounted.stderr.decode().strip()}")
            return {"fills": None}
        try:
            return self._fills(count, disk)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def _fills(self, count: int, disk: Path) -> dict[str, Any]:
        filled = jobs = identical = other = 0
        stages: Counter[str] = Counter()
        log, filler, out = self.runs / "disk.log", disk / "somebody-else", disk / "child"
        while filled < count:
            jobs += 1
            while filled < count:
                log.unlink(missing_ok=True)
                process = start(self.command(out), log)
                try:
                    process.wait(self.draw.uniform(0, 0.7 * self.seconds))
                    break  # it was faster
                except subprocess.TimeoutExpired:
                    fill(filler)
                code = process.wait()
                filler.unlink()
                if code == 0:
                    break  # it had nothing left to write
                said = log.read_text()
                wrong = code != GOES_ON or _FULL.search(said) is None or "Traceback" in said
                if wrong:
                    print(f"full disk {filled}: exit code {code}: {said[-600:]}")
                other += wrong
                filled += 1
                stages[stage(said)] += 1
            if not out.exists():
                finish(self.command(out), log)
            identical += self.same(f"disk {jobs}, full {filled} times so far", out)
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        found = {"fills": filled, "fill_jobs": jobs, "fill_jobs_identical": identical}
        return {**found, "fills_told_otherwise": other, "fill_stages": dict(stages)}

    def damage(self, count: int) -> dict[str, Any]:
        """One file of a run folder each. Right: the wanted bytes, or no folder and one line."""
        results: Counter[str] = Counter()
        finished = self.reference.with_name("child.run")
        for number in range(count):
            folder = self.runs / f"damaged-{number}"
            folder.mkdir()
            source = finished if number % 2 == 0 or not self.stopped else self.draw.choice(self.stopped)
            run = shutil.copytree(source, folder / "child.run")
            files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "lock")
            shipped = [path for path in files if path.parent.name == "candidate"]
            path = self.draw.choice(shipped if number % 4 == 0 and shipped else files)
            how = self.draw.choice(("cut", "emptied", "removed", "flipped"))
            spoil(path, how, self.draw)
            log = folder / "log"
            code, said = start(self.command(folder / "child"), log).wait(), log.read_text()
            what = f"{path.relative_to(run)} {how}"
            if "Traceback" in said:
                results["traceback"] += 1
                print(f"{what}: traceback\n{said[-2000:]}", flush=True)
            elif code == 0:
                results["right" if self.same(what, folder / "child") else "wrong"] += 1
            elif (folder / "child").exists() or len([line for line in said.splitlines() if "penny: " in line]) != 1:
                results["wrong"] += 1
                print(f"{what}: exit code {code}\n{said[-2000:]}", flush=True)
            else:
                results["refused"] += 1
                print(f"{what}: refused: {said.splitlines()[-1]}", flush=True)
            shutil.rmtree(folder)
        return {"damaged": count, "damaged_results": dict(results)}


def stage(said: str) -> str:
    """The last one that a log tells of."""
    return next((name for name in reversed(_STAGE.findall(said)) if name != "penny"), "start")


def fill(path: Path) -> None:
    """Take all the room there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def spoil(path: Path, how: str, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "flipped" and raw:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes({"cut": raw[: draw.randrange(len(raw) + 1)], "emptied": b"", "flipped": raw}[how])


def measure(sizes: dict[str, int]) -> dict[str, Any]:
    bench = Bench()
    found = bench.kills(sizes["kills"])
    found |= bench.pairs(sizes["pairs"])
    found |= bench.fills(sizes["fills"])
    return found | bench.damage(sizes["damaged"])


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    inputs, sizes = json.dumps([SHAPE, SETTINGS]), QUICK if quick else FULL
    found = _bench.cached("resume", inputs) if quick else None
    if found is None:
        found = measure(sizes)
        if not quick:
            _bench.remember("resume", inputs, found)
    bad = sum(count for how, count in found["damaged_results"].items() if how in ("wrong", "traceback"))
    bars = [
        _bench.bar("kills at random moments", found["kills"], ">=", sizes["kills"]),
        _bench.bar("resumed runs that differ from the undisturbed one", found["jobs"] - found["identical"], "==", 0),
        _bench.bar("pairs started at once", found["pairs"], ">=", sizes["pairs"]),
        _bench.bar("pairs that came out wrong", found["pairs"] - found["pairs_right"], "==", 0),
        _bench.bar("run folders with one damaged file", found["damaged"], ">=", sizes["damaged"]),
        _bench.bar("damage shipped, or told by a traceback", bad, "==", 0),
    ]
    if found["fills"] is not None:
        wrong = found["fill_jobs"] - found["fill_jobs_identical"]
        bars += [
            _bench.bar("disks that filled up", found["fills"], ">=", sizes["fills"]),
            _bench.bar("full disks told otherwise than by exit code 75", found["fills_told_otherwise"], "==", 0),
            _bench.bar("runs that differ after the disk was full", wrong, "==", 0),
        ]
    return _bench.finish("resume", quick, found, bars)


if __name__ == "__main__":
    sys.exit(main())
