"""Damaged and hostile model files end in one line: no traceback, no hang, no memory beyond what the bytes warrant.

Small models of every family, packed and sparse children and GGUF files among them, are damaged in every file that is
read: values of config.json, index, checksums and safetensors headers replaced by what nobody expects, bytes flipped,
files cut, swapped for folders, pipes and sparse terabytes. Each is then planned, walked, lowered into the engine and
run, in processes of limited memory, five seconds of a processor a case. Right is a model that runs or ValueError or
FileNotFoundError in one line. A config.json that still runs computes what transformers computes with it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench
import _random_model

CASES, QUICK_CASES = 20_000, 400
SECONDS = 5
EXTRA_BYTES = 2**30  # of address space, beyond what the libraries take
IDS = [1, 7, 3, 250, 11, 5, 90, 2, 8, 44]

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "bfloat16",
}
SLIDES = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **SLIDES},
    "qwen3": {"model_type": "qwen3", "attention_bias": False, **SLIDES},
    "olmo2": {"model_type": "olmo2", "attention_bias": False},
    "child": {
        "model_type": "llama",
        "intermediate_size": 0,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "replace_with_linear": [],
        "sparsity": {},
        "per_layer_config": {
            "0": {"skip": ["attention"], "num_key_value_heads": 0, "intermediate_size": 64},
            "1": {
                "sliding_window": 4,
                "num_key_value_heads": 1,
                "replace_with_linear": ["mlp"],
                "intermediate_size": 0,
                "sparsity": {"attention": {"entering": 0.5, "inner": 0.25, "weighted": True}},
            },
        },
    },
}
COMPARED = ("llama", "qwen2", "qwen3", "olmo2", "sharded")
"""Models that transformers loads by itself."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 0.5, 1.0, -0.0, 1e-320, 1e308, 10**400, 2**31 - 1, 2**31, 2**40, 2**63),
    *("", "8", "A", "silu", "relu", "gelu", "sliding_attention", "full_attention", "BF16", "F32", "I64", "\ud800"),
    *("yarn", "linear", "dynamic", "llama3", "longrope", "../x", "/etc/passwd", "x" * 5000, "0", "1", "skip"),
    *([], {}, [[]], [1], ["A", 6 * 10**9], [0, 8], {"0": {}}, {"a": {"b": []}}, [None], ["attention", "mlp"]),
    *(float("nan"), float("inf"), [[[[[[]]]]]], {"rope_type": "default"}, {"0": {"skip": ["attention"]}}),
]
KEYS = (
    *("head_dim", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "attention_bias"),
    *("mlp_bias", "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
    *("per_layer_config", "quantization_config", "skip", "sparsity", "replace_with_linear", "num_labels", "id2label"),
    *("attribute_map", "auto_map", "is_causal", "transformers_weights", "torch_dtype", "__class__", "__dict__"),
    *("to_dict", "eos_token_id", "bos_token_id", "attn_implementation", "output_attentions", "factor", "truncate"),
)


# ---------------------------------------------------------------------------------------------------- what is damaged


def models(folder: Path) -> dict[str, Path]:
    """Sound models, by name: folders, children with packed matrices, GGUF files."""
    from safetensors.torch import load_file, save_file

    made = {}
    for name, differs in MODELS.items():
        made[name] = _random_model.write({**SHAPE, **differs}, folder / name, shard_bytes=2**28)
        (made[name] / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
        (made[name] / "checksums.json").unlink()
    made["sharded"] = _random_model.write({**SHAPE, **MODELS["qwen3"]}, folder / "sharded", shard_bytes=2**15)
    for name, stored in (
        ("packed", ("packed_int", (4, 32))),
        ("planes", ("planes", (6, 32))),
        ("zigzag", ("zigzag", ())),
    ):
        made[name] = Path(shutil.copytree(made["child" if name == "zigzag" else "llama"], folder / name))
        tensors = load_file(made[name] / "model.safetensors")
        save_file(_packed(tensors, *stored), made[name] / "model.safetensors", metadata={"format": "pt"})
    for family in ("llama", "qwen3"):
        made[f"gguf {family}"] = _gguf(family, folder)
    return made


def _packed(tensors: dict[str, Any], room: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Every matrix of the layers in another format, of random codes."""
    import torch

    from pennyweight import formats, kinds

    module, out = kinds.load("formats", room), {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or ".layers." not in name:
            out[name] = tensor
            continue
        made = module.random(*tensor.shape, module.Spec(*arguments), torch.Generator().manual_seed(0), 2**20)
        out |= {formats.on_disk(name, suffix): part.contiguous() for suffix, part in made.items()}
    return out


def _gguf(family: str, folder: Path) -> Path:
    import gguf
    import numpy as np

    config = {**SHAPE, **MODELS[family]}
    path = folder / f"{family}.gguf"
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    alphabet = [chr(33 + i) for i in range(94)]
    writer.add_token_list([*alphabet, "!!"])
    writer.add_token_types([1] * 95)
    writer.add_token_merges(["! !"])
    from pennyweight import families

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 2)
    for block in families.blocks(config).values():
        for name, weight in block.tensors().items():
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None, name
            values = np.random.default_rng(0).standard_normal(weight.shape).astype(np.float32) * 0.02
            quantised = len(weight.shape) > 1 and weight.shape[-1] % 32 == 0 and "down" not in name
            kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
            writer.add_tensor(stored, gguf.quantize(values, kind) if quantised else values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --------------------------------------------------------------------------------------------------------------- damage


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value with one or two places replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, places = value, []
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            places.append((at, key))
            if rng.random() < 0.5:
                break
            at = at[key]
        if not places:
            return rng.choice(VALUES)
        parent, key = places[-1]
        what = rng.random()
        if what < 0.55:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.7:
            del parent[key]
        elif what < 0.85 and isinstance(parent, dict):
            parent[rng.choice((*KEYS, *SHAPE))] = copy.deepcopy(rng.choice(VALUES))
        elif isinstance(parent, dict):
            parent[rng.choice(list(parent))] = copy.deepcopy(parent[key])
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(rng.choice(VALUES)))
    return value


def flipped(raw: bytes, rng: random.Random, most: int) -> bytes:
    """Bytes changed within the first `most`: single bits, whole numbers, pieces gone or doubled."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(1, min(most, len(out))))
        what = rng.random()
        if what < 0.4 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif what < 0.7:
            number = rng.choice((0, 1, 8, 9, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
            out[at : at + 8] = struct.pack("<Q", number)[: rng.choice((4, 8))]
        elif what < 0.8:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif what < 0.9:
            out[at:at] = out[at : at + rng.choice((1, 4, 8, 100))]
        else:
            del out[rng.randrange(max(1, len(out))) :]
    return bytes(out)


def damage(path: Path, rng: random.Random) -> str:
    """Change a model in place; returns what was changed."""
    if path.suffix == ".gguf":
        raw = path.read_bytes()
        path.write_bytes(flipped(raw, rng, rng.choice((200, 3000, len(raw)))))
        return "gguf bytes"
    weights = sorted(path.glob("*.safetensors"))
    what = rng.choices(("config", "header", "index", "other", "bytes", "kind"), (10, 5, 3, 1, 3, 1))[0]
    if what == "config":
        (path / "config.json").write_text(_json(edited(json.loads((path / "config.json").read_text()), rng)))
    elif what == "header":
        file = rng.choice(weights)
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = _json(edited(json.loads(raw[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    elif what == "index":
        index = path / "model.safetensors.index.json"
        said = json.loads(index.read_text()) if index.exists() else {"weight_map": {"a": "model.safetensors"}}
        index.write_text(_json(edited(said, rng)))
        if rng.random() < 0.3 and len(weights) == 1:
            weights[0].rename(path / "model-00001-of-00001.safetensors")
    elif what == "other":
        name, said = rng.choice((("checksums.json", {"model.norm.weight": "00"}), ("generation_config.json", {})))
        (path / name).write_text(_json(edited(said or {"eos_token_id": [0], "top_k": 3}, rng)))
    elif what == "bytes":
        file = rng.choice((*weights, path / "config.json"))
        file.write_bytes(flipped(raw := file.read_bytes(), rng, rng.choice((3000, len(raw)))))
    else:
        file = rng.choice((*weights, path / "config.json", path / "generation_config.json"))
        file.unlink(missing_ok=True)
        made = rng.randrange(5)
        if made == 0:
            os.mkfifo(file)
        elif made == 1:
            file.mkdir()
        elif made == 2:
            with file.open("wb") as sparse:
                sparse.truncate(2**40)
        elif made == 3:
            file.symlink_to(file.name)
        return ("pipe", "folder", "sparse file", "link to itself", "gone")[made]
    return what


def _json(value: Any) -> str:
    return json.dumps(value).replace('"\\\\ud800"', '"\\ud800"')


# ---------------------------------------------------------------------------------------------------- what is run


def opened(path: Path, name: str, what: str, rng: random.Random) -> None:
    """Plan, walk and run a model that was made of the sound one called `name`. Raises what is told of it."""
    import torch

    from pennyweight.disk.checkpoint import Checkpoint
    from pennyweight.disk.model_config import read_config
    from pennyweight.live.load import load_model
    from pennyweight.live.streamed import Streamed
    from pennyweight.live.walk import Walk
    from pennyweight.model.demand import Budget, Workload
    from pennyweight.prices import planning
    from pennyweight.prices.machine import Machine
    from pennyweight.runtime.engine import Engine

    if path.suffix == ".gguf":
        Engine(path, threads=1, context=64, mapped=rng.random() < 0.3).logits(IDS)
        return
    if what == "config" and rng.random() < 0.3:
        planning.plan(read_config(path), Workload(prompt=8, new=8), Machine.load("h100"), Budget(), ("bits",))
    walk = Walk(Checkpoint(path))
    with torch.no_grad():
        logits = Streamed(walk)(torch.tensor([IDS])).logits[0]
    run = Engine(path, threads=1, context=64, cache="float32", mapped=rng.random() < 0.3).logits(IDS)
    if rng.random() < 0.05:
        load_model(path)
    finite = bool(torch.isfinite(logits).all())
    if finite and not (run == run).all():
        raise AssertionError("the engine computes NaN, the walk does not")
    if what == "config" and finite and name in COMPARED and "per_layer_config" not in walk.checkpoint.config.said:
        _compare(path, logits)


def _compare(path: Path, logits: Any) -> None:
    """Raises AssertionError if transformers loads another model from the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # it has its own: a number of labels keeps it busy for minutes
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
        )
        with torch.no_grad():
            theirs = model.eval()(torch.tensor([IDS]), use_cache=False).logits[0]
    except (Exception, _Late):  # it may refuse what we run, never the other way round with other numbers
        return
    finally:
        with contextlib.suppress(_Late):  # one that was on its way
            signal.setitimer(signal.ITIMER_PROF, 0)
    if not torch.allclose(theirs, logits, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise AssertionError("transformers computes something else from the same folder")


def case(number: int, sound: dict[str, Path], work: Path) -> tuple[str, str]:
    """Damage a model, open it: (what was damaged, "" or what went wrong)."""
    rng = random.Random(number)
    name = rng.choice(sorted(sound))
    target = work / ("model.gguf" if sound[name].suffix else "model")
    if sound[name].suffix:
        shutil.copyfile(sound[name], target)
    else:
        shutil.copytree(sound[name], target)
    what = damage(target, rng)
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            opened(target, name, what, rng)
            return f"{what}: runs", ""
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (ValueError, FileNotFoundError) as err:
        said = str(err)
        wrong = "\n" in said or len(said) > 1000 or type(err).__module__.startswith("pydantic")
        return f"{what}: refused", f"{name}, {what}: {type(err).__name__} {said[:300]!r}" if wrong else ""
    except BaseException as err:  # whatever it is, it is a fault to be told
        if isinstance(err, KeyboardInterrupt):
            raise
        where = "".join(traceback.format_tb(err.__traceback__)[-3:])
        return f"{what}: fault", f"{name}, {what}: {type(err).__name__} {str(err)[:300]}\n{where}"
    finally:
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)


class _Late(BaseException):
    """Five seconds are over."""


def _late(*_: Any) -> None:
    raise _Late(f"not done after {SECONDS} s")


def _worker(numbers: list[int], sound: dict[str, Path], pipe: Any) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name, path in sound.items():  # loads all that takes address space, and time, once
        opened(path, name, "config", random.Random(0))
    signal.signal(signal.SIGPROF, _late)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as work:
        for number in numbers:
            pipe.send((number, None, None))
            pipe.send((number, *case(number, sound, Path(work))))
    pipe.send(None)


def main(count: int, *, first: int = 0, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Try so many cases; `tell` hears of every fault. Returns counts and faults."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        sound = models(Path(folder))
        left, began = list(range(first, first + count)), time.monotonic()
        while left:
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=_worker, args=(left[:2000], sound, theirs))
            process.start()
            theirs.close()
            now, done = left[0], []
            try:
                while ours.poll(120 if not done else 4 * SECONDS) and (message := ours.recv()) is not None:
                    now, what, wrong = message
                    if what is None:
                        continue
                    done.append(now)
                    counts[what] += 1
                    if wrong:
                        faults.append(f"case {now}: {wrong}")
                        tell(faults[-1])
                else:
                    if len(done) < len(left[:2000]):
                        raise EOFError
            except EOFError:
                process.kill()
                done.append(now)
                faults.append(f"case {now}: the process died or hung")
                tell(faults[-1])
            process.join()
            left = left[len(done) :]
            tried = count - len(left)
            seconds = (time.monotonic() - began) * len(left) / tried
            tell(f"{tried} of {count} damaged files, {seconds / 60:.0f} min to go")
    return {"cases": count, "counts": dict(sorted(counts.items())), "faults": faults}


if __name__ == "__main__":
    parser = _bench.parser(__doc__)
    parser.add_argument("--cases", type=int, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the number of the first; each case is made from its own")
    options = parser.parse_args()
    found = main(options.cases or (QUICK_CASES if options.quick else CASES), first=options.first)
    for what, times in found["counts"].items():
        print(f"{times:7} {what}")
    bars = [_bench.bar("faults", len(found["faults"]), "==", 0)]
    sys.exit(_bench.finish("fuzz_files", options.quick, {"cases": found["cases"], "counts": found["counts"]}, bars))
