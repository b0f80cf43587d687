"""Every fault that was met on other people's files, models and clients, as a case with inputs made on the spot; then
generated inputs for every reader and for the server.

A case states what is right. It runs in a process of its own: a hang, a crash or too much memory fails it alone.
`--only WORDS` runs the cases whose row contains them and nothing else, `--no-cases` the generated inputs alone;
`--inputs` says how many there are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _bench
import _cases
import _pico
from _cases import case, fine, inside, penny, refused

FIT = ["--context-tokens", "32", "--calibration-rows", "2", "--score-rows", "2", "--held-out-rows", "2"]
FIT += ["--heal-tokens", "0", "--local-tokens", "0", "--machine", "m2-max"]


# ---------------------------------------------------------------------------------------------- what both sides compute


def _error(folder: Path) -> float:
    """Relative difference (2-norm) of the engine's logits from those that transformers computes."""
    import torch
    from transformers import AutoModelForCausalLM

    from pennyweight.runtime.engine import Engine

    ids = [(7 * i) % 300 for i in range(24)]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    found = torch.from_numpy(Engine(folder, context=32, threads=1, cache="float32").logits(ids))
    return float((found - expected).norm() / expected.norm())


def same_as_transformers(folder: Path) -> None:
    error = inside(lambda: _error(folder))
    assert error < 1e-3, f"the engine's logits are off by {error:.2g}"


def texts(here: Path) -> Path:
    """A file of text for fits."""
    path = here / "text.txt"
    if not path.exists():
        path.write_text("\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(400)))
    return path


def fit(model: Path, out: Path, *more: Any, **settings: Any) -> _cases.Said:
    return penny("fit", model, "--out", out, "--text", texts(out.parent), *FIT, *more, seconds=120, **settings)


def agreement(parent: Path, child: Path) -> float:
    """Share of equal first choices, both as pennyweight and transformers load them."""

    def compute() -> float:
        import torch
        from transformers import AutoModelForCausalLM

        from pennyweight.live.load import load_model

        ids = torch.arange(200).mul(7).remainder(300).view(4, 50)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)(ids).logits.argmax(-1)
            found = load_model(child, dtype=torch.float32)(ids).logits.argmax(-1)
        return float((expected == found).float().mean())

    return inside(compute)


# --------------------------------------------------------------------------- another model than the one asked for


@case("tied in config.json, another lm_head in the file: what transformers loads, or a refusal")
def tied_with_a_head(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", tie_word_embeddings=False))
    _pico.config_with(model, tie_word_embeddings=True)
    found = fit(model, here / "out", "--weights", "95%", "--axes", "bits")
    if found.code:
        refused(found, "lm_head", "embed")
    else:
        same_as_transformers(model)
        assert agreement(model, here / "out") > 0.5


@case("defaults are transformers' defaults: Qwen2 with a window and no max_window_layers")
def qwen2_windows(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", "qwen2"))
    _pico.config_with(model, use_sliding_window=True, sliding_window=8, layer_types=None, max_window_layers=None)
    same_as_transformers(model)


@case("every optional key of every family's config removed: the engine computes what transformers computes")
def optional_keys(here: Path) -> None:
    needed = {"model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    needed |= {"num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"}
    for family in _pico.SHAPES:
        model = inside(lambda family=family: _pico.model(here / family, family))
        original = (model / "config.json").read_text()

        def compute(model: Path = model, original: str = original) -> dict[str, float]:
            found = {}
            for key in sorted(set(json.loads(original)) - needed):
                _pico.config_with(model, **{key: None})
                found[key] = _error(model)
                (model / "config.json").write_text(original)
            return found

        wrong = {key: error for key, error in inside(compute, seconds=200).items() if not error < 1e-3}
        assert not wrong, f"{family}: without these keys the engine's logits are off by {wrong}"


@case("model_backup.safetensors of another model beside model.safetensors: ignored")
def backup_beside(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    other = inside(lambda: _pico.model(here / "other", gain=1.0))
    shutil.copy(other / "model.safetensors", model / "model_backup.safetensors")
    same_as_transformers(model)


@case("a stale index beside a whole model.safetensors: the whole file")
def stale_index(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    named = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(named))
    same_as_transformers(model)


@case("a tokenizer in vocab.json, merges.txt, added_tokens.json: the child's ids are the parent's")
def slow_tokenizer(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    _pico.tokenizer(model, slow=True)
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))

    def ids(folder: Path) -> Any:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(folder)
        return made.eos_token_id, made("a<|im_start|>b<unused>c<|im_end|>").input_ids

    assert inside(lambda: ids(model)) == inside(lambda: ids(here / "out"))


@case("--out is the model, by name, by a link, or inside it: exit 2, nothing changed")
def out_is_the_model(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    child = here / "child"
    fine(fit(model, child, "--weights", "60%", "--axes", "bits"))
    before = _digest(child)
    (here / "link").symlink_to(child)
    for out in (child, here / "link", here / "m" / ".." / "child"):
        refused(penny("fit", child, "--out", out, "--weights", "60%", "--text", texts(here), *FIT))
    before_model = _digest(model)
    for out in (model, model / "inside"):
        refused(penny("fit", model, "--out", out, "--weights", "60%", "--text", texts(here), *FIT))
    assert _digest(child) == before and _digest(model) == before_model


@case("a child that differs only by windows, in stock transformers: stops, or is right")
def windows_in_stock(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    # A window keeps room for the tokens of a step as well, so it pays where texts are longer than both together.
    load = ("--prompt", 16, "--new", 1200, "--context-tokens", 200)
    planned = fine(penny("plan", model, *load[:4], "--machine", "m2-max", "--json")).out
    whole = json.loads(planned)["figures"]["1"]["memory_bytes"]
    fine(fit(model, here / "out", "--memory", f"{int(whole) - 30_000}B", "--axes", "window", *load))

    def compute() -> bool:
        import torch
        from transformers import AutoModelForCausalLM

        from pennyweight.live.load import load_model

        ids = torch.arange(120).mul(7).remainder(300).view(1, -1)
        try:
            theirs = AutoModelForCausalLM.from_pretrained(here / "out", dtype=torch.float32)
        except Exception:
            return True
        with torch.no_grad():
            return torch.allclose(
                theirs(ids).logits, load_model(here / "out", dtype=torch.float32)(ids).logits, atol=1e-3
            )

    assert inside(compute), "loads and computes something else"


# ------------------------------------------------------------------------------ answers: run and GGUF vocabularies


@case("a stop string that is one special token which no config names: stops there")
def stop_at_special(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))

    def compute() -> tuple[list[int], str, bool]:
        from pennyweight.runtime.model import open_model
        from pennyweight.runtime.words import Words

        opened = open_model(model, threads=1)
        words = Words(opened.tokenizer, stop=["<|im_end|>"], special=opened.special)
        said = words.push(opened.tokenizer.encode("abc", add_special_tokens=False))
        said += words.push([2])
        said += words.push(opened.tokenizer.encode("def", add_special_tokens=False))
        return [], said, words.stopped

    _, said, stopped = inside(compute)
    assert stopped and said == "abc", f"said {said!r}, stopped {stopped}"


@case("GGUF whose <|im_end|> is NORMAL or USER_DEFINED: an end, not printed, one token in the template")
def gguf_turn_ends(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    for kind in (1, 4):
        file = _pico.gguf(model, here / f"{kind}.gguf", types={"<|im_end|>": kind, "<|im_start|>": kind})

        def compute(file: Path = file) -> Any:
            from pennyweight.runtime.model import open_model

            opened = open_model(file, threads=1)
            return opened.stop, opened.chat([{"role": "user", "content": "x"}]), opened.notes

        stop, ids, notes = inside(compute)
        assert 2 in stop, f"type {kind}: {stop} without <|im_end|>"
        assert ids[0] == 1 and 2 in ids, f"type {kind}: the template's markers are split: {ids[:8]}"
        assert any("im_end" in note for note in notes), f"nothing said of it: {notes}"


@case("a repeated token in a GGUF vocabulary: every id decodes to its text")
def gguf_repeated(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    file = _pico.gguf(model, here / "m.gguf")
    raw = file.read_bytes()
    at = raw.index(b"<pad0>")
    file.write_bytes(raw[:at] + b"<pad1>" + raw[at + 6 :])

    def compute() -> list[str]:
        from pennyweight.runtime.model import open_model

        tokenizer = open_model(file, threads=1).tokenizer
        first = len(_pico.SPECIAL) + 257
        return [tokenizer.decode([first]), tokenizer.decode([first + 1])]

    assert inside(compute) == ["<pad1>", "<pad1>"]


@case("a tokenizer that names a BOS and does not add it: folder and GGUF give the ids of transformers")
def no_bos(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    file = _pico.gguf(model, here / "m.gguf", more=lambda writer: writer.add_add_bos_token(False))

    def compute() -> Any:
        from transformers import AutoTokenizer

        from pennyweight.runtime.model import open_model

        theirs = AutoTokenizer.from_pretrained(model)("The capital").input_ids
        return (
            theirs,
            open_model(model, threads=1).encode("The capital"),
            open_model(file, threads=1).encode("The capital"),
        )

    theirs, folder, converted = inside(compute)
    assert theirs == folder == converted, f"{theirs} {folder} {converted}"


@case("sampling defaults of generation_config.json hold where a request says nothing")
def generation_defaults(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    said = {"do_sample": True, "temperature": 0.7, "top_k": 1, "eos_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(said))
    with server(model) as ask:
        body = {"prompt": "abc", "max_tokens": 12}
        drawn = {ask("/v1/completions", {**body, "seed": seed}).json()["choices"][0]["text"] for seed in range(6)}
        other = {ask("/v1/completions", {**body, "seed": s, "top_k": 0, "temperature": 2.0}).text for s in range(6)}
    assert len(drawn) == 1, f"top_k 1 of generation_config.json is not held: {len(drawn)} answers"
    assert len(other) > 1


@case("FP8 keys and values of a model with large key biases: KL at most 0.02")
def fp8_biases(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", "qwen2", gain=2.0, hidden_size=128, num_attention_heads=4))

    def compute() -> float:
        import numpy as np
        import torch
        from safetensors.torch import load_file, save_file

        from pennyweight.runtime.engine import Engine

        tensors = load_file(model / "model.safetensors")
        draw = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("k_proj.bias"):
                big = torch.rand(tensor.shape, generator=draw) < 0.1
                tensors[name] = (tensor + 40.0 * big * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        ids = [int(i) for i in torch.randint(0, 300, (200,), generator=draw)]
        logits = [
            torch.from_numpy(np.asarray(Engine(model, context=256, threads=1, cache=cache).logits(ids))).log_softmax(-1)
            for cache in ("float32", "fp8")
        ]
        return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())

    kl = inside(compute)
    assert kl <= 0.02, f"KL {kl:.3f}"


@case("keys beyond float16's range: the message names --cache float32, which is right")
def large_keys(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", "qwen2"))

    def grow() -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        for name in [name for name in tensors if "k_proj.bias" in name]:
            tensors[name] = torch.full_like(tensors[name], 1e6)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    inside(grow)
    refused(penny("run", model, "abc", "--no-chat", "--max-tokens", 4, "--threads", 1), "--cache float32")
    fine(penny("run", model, "abc", "--no-chat", "--max-tokens", 4, "--threads", 1, "--cache", "float32"))


@case("numeric options have ranges")
def ranges(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    wrong = [
        ("serve", model, "--places", 0),
        ("serve", model, "--places", -1),
        ("serve", model, "--port", 99999),
        ("serve", model, "--port", -1),
        ("serve", model, "--context", -5),
        ("serve", model, "--most-waiting", -1),
        ("bench", model, "--repeats", 0),
        ("bench", model, "--prompt", 0),
        ("bench", model, "--new", 0),
        ("bench", model, "--concurrency", 0),
        ("eval", model, "--rows", 0),
        ("eval", model, "--context-tokens", 0),
        ("check", model, "--tokens", 0),
        ("run", model, "x", "--threads", 4096),
        ("run", model, "x", "--threads", -1),
        ("run", model, "x", "--max-tokens", 0),
        ("run", model, "x", "--temperature", -1),
        ("run", model, "x", "--temperature", "nan"),
        ("run", model, "x", "--top-p", 2),
        ("run", model, "x", "--seed", -1),
        ("run", model, "x", "--context", -1),
        ("fit", model, "--out", here / "o", "--weights", "50%", "--solutions", 0),
        ("fit", model, "--out", here / "o", "--weights", "50%", "--calibration-rows", 0),
        ("fit", model, "--out", here / "o", "--weights", "50%", "--concurrency", 0),
        ("fit", model, "--out", here / "o", "--weights", "-5%"),
        ("plan", model, "--concurrency", 0),
        ("plan", model, "--prompt", "-3"),
    ]
    for arguments in wrong:
        found = penny(*arguments, seconds=20)
        assert found.code == 2 and "Traceback" not in found.err, f"{arguments[0]} {arguments[-2:]}: {found.said}"
    assert not (here / "o").exists() and not (here / "o.run").exists()


# --------------------------------------------------------------------------------------------------------- time lost


@case("every option is parsed before work")
def options_first(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    for wrong in (
        ("--sweep", "wait=30%"),
        ("--sweep", "weights=much"),
        ("--axes", "bits,Width"),
        ("--search", "best"),
        ("--metric", "luck"),
        ("--machine", "nowhere"),
        ("--max-ram", "plenty"),
        ("--text", here / "none.txt"),
        ("--tpot", "soon"),
    ):
        refused(penny("fit", model, "--out", here / "out", "--weights", "60%", *FIT, *wrong, seconds=20))
        assert not (here / "out.run").exists(), f"{wrong} left a run folder"


@case("a dry run leaves nothing; another budget goes on from the scores there are")
def dry_and_again(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits", "--dry-run"))
    assert not (here / "out.run").exists() and not (here / "out").exists()
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    first = _digest(here / "out")
    again = fine(fit(model, here / "out", "--weights", "40%", "--axes", "bits"))
    assert "score:" not in again.err or "100%" not in again.err.split("score:")[1][:40], "scored again"
    assert _digest(here / "out") != first
    fresh = fine(fit(model, here / "fresh", "--weights", "40%", "--axes", "bits"))
    assert fresh.code == 0 and _weights(here / "out") == _weights(here / "fresh"), "not what a new run makes"


@case("a run folder of another tokenizer is refused, with the first difference")
def other_tokenizer(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|im_start|>"', '"<|im_begin|>"'))
    refused(fit(model, here / "out", "--weights", "60%", "--axes", "bits"), "tokenizer")


@case("the same fit started twice at once: one waits or leaves with one line, the result is the same")
def twice(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "alone", "--weights", "60%", "--axes", "bits,ffn_width"))
    command = (sys.executable, "-m", "pennyweight", "fit", model, "--out", here / "both", "--text", texts(here), *FIT)
    command = (*map(str, command), "--weights", "60%", "--axes", "bits,ffn_width")
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(p.communicate(timeout=200)[1], p.returncode) for p in both]
    assert 0 in (code for _, code in ends), ends
    for err, code in ends:
        assert "Traceback" not in err and code in (0, 2, 75), (code, err[-300:])
    assert _weights(here / "both") == _weights(here / "alone")


@case("plan and fit read axes alike")
def axes_alike(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(penny("plan", model, "--weights", "60%", "--axes", "bits, ffn_width"))
    refused(penny("plan", model, "--weights", "60%", "--axes", "Bits"), "Bits")
    refused(fit(model, here / "out", "--weights", "60%", "--axes", "Bits"), "Bits")


@case("a float32 parent: plan and fit agree, and the child's config says bfloat16")
def float32_parent(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", dtype="float32"))
    planned = fine(penny("plan", model, "--weights", "60%"))
    assert "does not fit" not in planned.out, planned.out[-200:]
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    config = json.loads((here / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16", config.get("dtype")
    size, parent = _weight_bytes(here / "out"), _weight_bytes(model) / 2
    assert size <= 0.6 * parent * 1.02, f"{size} of {parent}: a share is of the parent's 16-bit bytes"


# ---------------------------------------------------------------------------------------- other people's exceptions


@case("a template that raises: its words, exit 2 or 400")
def template_raises(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    inside(lambda: _pico.tokenizer(model, template="{{ raise_exception('roles must alternate') }}"))
    refused(penny("run", model, "hello", "--threads", 1), "roles must alternate")
    with server(model) as ask:
        found = ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
        assert found.status_code == 400 and "roles must alternate" in found.text, found.text[:200]


@case("a lone surrogate in a prompt: exit 2 or 400")
def surrogate(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    refused(penny("run", model, "a\udcffb", "--no-chat", "--threads", 1))
    with server(model) as ask:
        found = ask("/v1/completions", raw=b'{"prompt": "\\ud800", "max_tokens": 2}')
        assert found.status_code == 400, found.text[:200]


@case("a tokenizer.json newer than the library, a generation_config.json that is []: one line")
def foreign_files(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    kept = (model / "tokenizer.json").read_text()
    said = json.loads(kept)
    said["model"]["type"] = "FutureBPE"
    (model / "tokenizer.json").write_text(json.dumps(said))
    refused(penny("run", model, "x", "--threads", 1), "tokenizer")
    (model / "tokenizer.json").write_text(kept)
    (model / "generation_config.json").write_text("[]")
    refused(penny("run", model, "x", "--threads", 1), "generation_config.json")


# ------------------------------------------------------------------------------------------------------------- small


@case("a broken pipe is quiet")
def broken_pipe(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    command = f"{sys.executable} -m pennyweight run {model} abc --no-chat --max-tokens 200 --threads 1 --temperature 1"
    found = subprocess.run(
        ["bash", "-c", f"{command} | head -c 5"], capture_output=True, text=True, errors="replace", timeout=60
    )
    assert "pipe" not in found.stderr.lower() and "Traceback" not in found.stderr, found.stderr[-200:]


@case("a folder of a hub cache and a link to it are called owner/model, another link by its own name")
def names(here: Path) -> None:
    snapshot = here / "models--owner--small" / "snapshots" / ("0" * 40)
    inside(lambda: _pico.model(snapshot))
    (here / "cached").symlink_to(snapshot)
    inside(lambda: _pico.model(here / "plain"))
    (here / "mine").symlink_to(here / "plain")

    def compute(path: Path) -> str:
        from pennyweight.runtime.model import open_model

        return open_model(path, threads=1).name

    assert inside(lambda: compute(snapshot)) == "owner/small"
    assert inside(lambda: compute(here / "cached")) == "owner/small"
    assert inside(lambda: compute(here / "mine")) == "mine"


@case("--version and -h")
def version(here: Path) -> None:
    assert any(c.isdigit() for c in fine(penny("--version")).out)
    for verb in ("", "run", "serve", "bench", "fit", "plan", "eval", "check", "report", "machine", "demo", "train"):
        assert "Usage" in fine(penny(*filter(None, (verb, "-h")))).out


@case("Ctrl-C in eval and check promises nothing")
def interrupted(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    for verb in ("eval", "check"):
        command = (sys.executable, "-m", "pennyweight", verb, str(model))
        started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(2.5)
        started.send_signal(signal.SIGINT)
        err = started.communicate(timeout=60)[1]
        assert started.returncode in (130, 0, -2), (verb, started.returncode, err[-200:])
        assert "goes on" not in err and "Traceback" not in err, (verb, err[-300:])


@case("a folder that holds one .gguf: that file")
def folder_of_gguf(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    (here / "g").mkdir()
    _pico.gguf(model, here / "g" / "m.gguf")
    fine(penny("run", here / "g", "abc", "--no-chat", "--max-tokens", 3, "--threads", 1))


@case("penny eval of a GGUF file explains, or works")
def eval_gguf(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    file = _pico.gguf(model, here / "m.gguf")
    for verb in ("eval", "check", "plan"):
        found = penny(verb, file)
        if found.code:
            refused(found, "GGUF")


@case("plan lists the KV cache up to what the model can, and says to what it shrinks")
def plan_says(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", max_position_embeddings=8192))
    found = fine(penny("plan", model, "--weights", "40%"))
    assert "131072" not in found.out, found.out
    verdict = found.out.splitlines()[-1]
    assert "shrink" not in verdict or any(c.isdigit() for c in verdict), verdict


# ----------------------------------------------------------------------------------------------------- hostile files


@case("auto_map and a .py file: never run, never asked")
def auto_map(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    (model / "evil.py").write_text(f"open({str(here / 'ran')!r}, 'w').write('x')\nclass T: pass\n")
    for name, key in (("tokenizer_config.json", ["evil.T", "evil.T"]), ("config.json", {"AutoConfig": "evil.T"})):
        path = model / name
        kept = path.read_text()
        said = {**json.loads(kept), "auto_map": {"AutoTokenizer": key} if isinstance(key, list) else key}
        if name == "tokenizer_config.json":
            said["tokenizer_class"] = "T"
        path.write_text(json.dumps(said))
        for verb in (("run", model, "x", "--max-tokens", 2, "--threads", 1), ("eval", model, "--rows", 1)):
            found = penny(*verb, stdin="y\ny\ny\n", seconds=60)
            assert "[y/N]" not in found.out + found.err, f"{name}: asked"
            assert "Traceback" not in found.err, found.said
        assert not (here / "ran").exists(), f"{name}: code of the folder ran"
        path.write_text(kept)


@case("a candidate that is damaged before it is moved into place: packed and verified again")
def damaged_candidate(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    good = _weights(here / "out")
    run = here / "out.run"
    candidates = sorted(p.parent for p in run.rglob("penny.json"))
    assert candidates, "no candidate is kept in the run folder"
    for name in ("model.safetensors", "config.json", "penny.json", "tokenizer.json"):
        for how in ("empty", "remove", "flip"):
            path = candidates[0] / name
            shutil.rmtree(here / "out", ignore_errors=True)
            if how == "empty":
                path.write_bytes(b"")
            elif how == "remove":
                path.unlink(missing_ok=True)
            elif path.exists() and path.stat().st_size:
                raw = bytearray(path.read_bytes())
                raw[len(raw) // 2] ^= 1
                path.write_bytes(raw)
            found = fit(model, here / "out", "--weights", "60%", "--axes", "bits")
            if found.code:
                refused(found)
            else:
                assert _weights(here / "out") == good, f"{name} {how}: another child"
                fine(penny("run", here / "out", "x", "--no-chat", "--max-tokens", 2, "--threads", 1))


@case("context_length 2^24: memory for the capacity in use")
def long_context(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    _pico.config_with(model, max_position_embeddings=2**24)
    for more in ((), ("--context", 64)):
        found = penny(
            "run", model, "abc", "--no-chat", "--max-tokens", 3, "--threads", 1, *more, seconds=20, most=2**28
        )
        fine(found)
    _pico.gguf(model, here / "m.gguf")
    fine(penny("run", here / "m.gguf", "abc", "--no-chat", "--max-tokens", 3, "--threads", 1, seconds=20, most=2**28))


@case("sizes in config.json that its files do not warrant: one line, no memory, no hang")
def absurd_sizes(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    for key, value in (
        ("num_hidden_layers", 2**40),
        ("num_hidden_layers", 10**6),
        ("num_key_value_heads", 2**40),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 2**31),
        ("hidden_size", 2**40),
        ("vocab_size", 2**40),
        ("intermediate_size", -1),
        ("head_dim", 0),
        ("max_position_embeddings", "many"),
        ("rms_norm_eps", "small"),
        ("rope_parameters", []),
        ("rope_parameters", {"rope_type": "linear", "factor": "x", "rope_theta": None}),
        ("hidden_act", ["silu"]),
        ("tie_word_embeddings", "perhaps"),
        ("layer_types", [1, 2, 3]),
        ("per_layer_config", [1]),
        ("per_layer_config", {"0": 5}),
        ("per_layer_config", {"0": {"skip": 7}}),
        ("per_layer_config", {"0": {"intermediate_size": "x"}}),
        ("quantization_config", 5),
        ("quantization_config", {"config_groups": {"a": []}}),
        ("model_type", ["llama"]),
        ("eos_token_id", "end"),
    ):
        kept = (model / "config.json").read_text()
        _pico.config_with(model, **{key: value})
        for verb in (("run", model, "x", "--no-chat", "--max-tokens", 2, "--threads", 1), ("plan", model)):
            found = penny(*verb, seconds=20)
            assert found.code in (0, 2) and "Traceback" not in found.err, f"{key} = {value!r}: {verb[0]}: {found.said}"
            if found.code:
                refused(found)
        (model / "config.json").write_text(kept)


@case("sliding_window 2147483647: no window within the context")
def wide_window(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", "qwen2"))
    for wide in (2**31 - 1, 2**31, 2**40):
        _pico.config_with(model, use_sliding_window=True, sliding_window=wide, max_window_layers=0, layer_types=None)
        found = penny("run", model, "abc", "--no-chat", "--max-tokens", 3, "--threads", 1)
        assert found.code in (0, 2) and "Traceback" not in found.err, f"{wide}: {found.said}"
        if found.code == 0:
            same_as_transformers(model)


@case("a safetensors header that lies: one line, no memory")
def header_lies(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    file = model / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    first, second = [name for name in header if name != "__metadata__"][:2]

    def write(changed: Any) -> None:
        told = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(told)) + told + data)

    lies: list[Any] = [
        {**header, first: {**header[first], "shape": ["A", 6_000_000_000]}},
        {**header, first: {**header[first], "shape": [True, 2]}},
        {**header, first: {**header[first], "shape": [-1, -64]}},
        {**header, first: {**header[first], "shape": [2**62, 2**62]}},
        {**header, first: {**header[first], "shape": [64.0]}},
        {**header, first: {**header[first], "dtype": ["BF16"]}},
        {**header, first: {**header[first], "data_offsets": [0, 2**63]}},
        {**header, first: {**header[first], "data_offsets": ["0", "8"]}},
        {**header, first: header[second]},
        {**header, first: 5},
        {**header, "__metadata__": 5},
        [],
    ]
    for changed in lies:
        write(changed)
        for verb in (("run", model, "x", "--no-chat", "--max-tokens", 2, "--threads", 1), ("eval", model, "--rows", 1)):
            refused(penny(*verb, seconds=20))
    for content in (b"", b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 10**12) + b"{", raw[: len(raw) // 2]):
        file.write_bytes(content)
        refused(penny("run", model, "x", "--no-chat", "--threads", 1, seconds=20))
    file.unlink()
    os.mkfifo(file)
    refused(penny("run", model, "x", "--no-chat", "--threads", 1, seconds=20))
    refused(penny("eval", model, "--rows", 1, seconds=20))


@case("an index that names files outside, or tensors that no file has: refused; a hub cache's links stay allowed")
def index_outside(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    whole = model / "model.safetensors"
    names = json.loads(whole.read_bytes()[8 : 8 + struct.unpack("<Q", whole.read_bytes()[:8])[0]])
    names.pop("__metadata__", None)
    whole.rename(here / "outside.safetensors")
    index = model / "model.safetensors.index.json"
    for outside in ("../outside.safetensors", str(here / "outside.safetensors")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, outside)}))
        refused(penny("run", model, "x", "--no-chat", "--threads", 1))
    shutil.copy(here / "outside.safetensors", model / "model-00001-of-00001.safetensors")
    mapped = dict.fromkeys([*names, "model.layers.9.extra.weight"], "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    refused(penny("run", model, "x", "--no-chat", "--threads", 1))
    for wrong in ([], {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {}}):
        index.write_text(json.dumps(wrong))
        refused(penny("run", model, "x", "--no-chat", "--threads", 1))
    hub = here / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    for path in model.iterdir():
        shutil.copy(path, hub / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    fine(penny("run", snapshot, "x", "--no-chat", "--max-tokens", 2, "--threads", 1))


@case("pytorch_model.bin is never unpickled")
def pickles(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    (model / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(here / "ran"), "w"))

    def write() -> None:
        import torch

        torch.save({"x": Evil()}, model / "pytorch_model.bin")

    inside(write)
    for verb in (
        ("eval", model, "--rows", 1),
        ("check", model),
        ("run", model, "x"),
        ("fit", model, "--out", here / "o"),
    ):
        refused(penny(*verb, *(("--weights", "50%") if verb[0] == "fit" else ())))
    assert not (here / "ran").exists(), "unpickled"


@case("a row of the run's database that names a file outside: nothing outside is read or deleted")
def database_rows(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    thesis = here / "thesis.txt"
    thesis.write_text("years of work")
    with contextlib.closing(sqlite3.connect(here / "out.run" / "run.sqlite")) as database, database:
        (table,) = [r[0] for r in database.execute("select name from sqlite_master where type='table' and name='kept'")]
        outside = json.dumps({"file": "../../thesis.txt"})
        database.execute(f"update {table} set value = ? where value like '%\"file\"%'", (outside,))
    shutil.rmtree(here / "out")
    found = fit(model, here / "out", "--weights", "50%", "--axes", "bits")
    assert found.code in (0, 2) and "Traceback" not in found.err, found.said
    assert thesis.read_text() == "years of work"


@case("--out with a penny.json and a file of one's own: refused, nothing deleted")
def own_files(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    (here / "out" / "notes.md").write_text("mine")
    found = fit(model, here / "out", "--weights", "50%", "--axes", "bits")
    assert (here / "out" / "notes.md").read_text() == "mine", "deleted"
    refused(found, "notes.md")
    (here / "other").mkdir()
    (here / "other" / "penny.json").write_text("{}")
    (here / "other" / "mine.txt").write_text("mine")
    refused(fit(model, here / "other", "--weights", "50%", "--axes", "bits"))
    assert (here / "other" / "mine.txt").read_text() == "mine"


@case("the disk is full: 75, and the same command goes on to the same bytes")
def full_disk(here: Path) -> None:
    if os.geteuid():
        print("not run: mounting a small disk takes root")
        return
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "alone", "--weights", "60%", "--axes", "bits,ffn_width"))
    small, command = here / "small", ("fit", model, "--out", here / "out", "--run", here / "small" / "run")
    command += ("--text", texts(here), *FIT, "--weights", "60%", "--axes", "bits,ffn_width")
    small.mkdir()
    for size in ("900k", "64m"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=True)
        try:
            if size == "900k":  # which would never do
                refused(penny(*command, seconds=120), "disk")
                continue
            with contextlib.suppress(OSError), (small / "others").open("wb") as others:  # resume.py fills it on the way
                while others.write(bytes(2**16)):
                    others.flush()
            refused(penny(*command, seconds=120), "disk", code=75)
            (small / "others").unlink()
            fine(penny(*command, seconds=120))
            assert _weights(here / "out") == _weights(here / "alone")
        finally:
            subprocess.run(["umount", str(small)], check=True)


@case("wrong types in every file that is read: one line")
def wrong_types(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    fine(fit(model, here / "out", "--weights", "60%", "--axes", "bits"))
    junk: list[Any] = [
        [],
        {},
        5,
        "x",
        None,
        {"a": [1]},
        {"layout": 5},
        {"parent": []},
        {"layout": {"0.mixer": {"bits": 7}}},
    ]
    for name, verbs in (
        ("penny.json", (("check", "OUT"), ("report", "OUT"))),
        ("report.json", (("report", "OUT"),)),
        ("checksums.json", (("run", "OUT", "x", "--no-chat", "--max-tokens", 2, "--threads", 1),)),
        ("generation_config.json", (("run", "OUT", "x", "--no-chat", "--max-tokens", 2, "--threads", 1),)),
        ("tokenizer_config.json", (("run", "OUT", "x", "--no-chat", "--max-tokens", 2, "--threads", 1),)),
        ("tokenizer.json", (("run", "OUT", "x", "--no-chat", "--max-tokens", 2, "--threads", 1),)),
        ("config.json", (("run", "OUT", "x", "--no-chat", "--threads", 1), ("plan", "OUT"), ("check", "OUT"))),
    ):
        path = here / "out" / name
        kept = path.read_bytes() if path.exists() else None
        for value in junk:
            path.write_text(json.dumps(value))
            for verb in verbs:
                found = penny(*(here / "out" if word == "OUT" else word for word in verb), seconds=40)
                assert found.code in (0, 2, 4), f"{name} = {value!r}, {verb[0]}: {found.said}"
                assert "Traceback" not in found.err, f"{name} = {value!r}, {verb[0]}: {found.err.splitlines()[-1]}"
        path.unlink() if kept is None else path.write_bytes(kept)
    for value in junk:
        path = here / "machine.json"
        path.write_text(json.dumps(value))
        refused(penny("plan", model, "--machine", path))
        recipe = here / "fit.yaml"
        recipe.write_text(json.dumps(value))
        if value:
            refused(penny("fit", model, "--out", here / "o2", "--config", recipe, "--weights", "50%"))
    for version in (1, 99):
        file = here / "v.gguf"
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 1, 1))
        refused(penny("run", file, "x"))


@case("a tokenizer with one token of 400,000 characters; a template with nested loops, or a string of 3e9")
def heavy_tokenizers(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    kept = (model / "tokenizer.json").read_text()
    said = json.loads(kept)
    said["added_tokens"].append({**said["added_tokens"][-1], "id": 300, "content": "a" * 400_000})
    (model / "tokenizer.json").write_text(json.dumps(said))
    found = penny("run", model, "aaaa", "--no-chat", "--max-tokens", 4, "--threads", 1, seconds=30)
    assert found.code in (0, 2) and "Traceback" not in found.err, found.said
    (model / "tokenizer.json").write_text(kept)
    for template in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x" + "{% endfor %}" * 3,
        "{{ 'x' * 3000000000 }}",
        "{% set n = namespace(s='xxxxxxxxxx') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ '%3000000000d' % 5 }}",
        "{{ 'x'.ljust(3000000000) }}",
        "{{ 2 ** 9999999999 }}",
    ):
        inside(lambda template=template: _pico.tokenizer(model, template=template))
        refused(penny("run", model, "x", "--threads", 1, "--max-tokens", 2, seconds=30))


# ------------------------------------------------------------------------------------------------------------ server


@contextlib.contextmanager
def server(model: Path, *more: Any, **environment: str) -> Iterator[Any]:
    """A server of the model; yields ask(path, body) -> response."""
    import httpx2 as httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (sys.executable, "-m", "pennyweight", "serve", str(model), "--port", str(port), "--threads", "1")
    process = subprocess.Popen(
        (*command, *map(str, more)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    address = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=address, timeout=60)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(f"the server ended: {process.stdout.read().decode()[-300:]}")  # type: ignore[union-attr]
            with contextlib.suppress(httpx.TransportError):
                client.get("/health")
                break
            time.sleep(0.1)

        def ask(path: str, body: Any = None, *, raw: bytes | None = None, headers: Any = None) -> Any:
            if body is None and raw is None:
                return client.get(path, headers=headers)
            content = json.dumps(body).encode() if raw is None else raw
            return client.post(path, content=content, headers={"Content-Type": "application/json", **(headers or {})})

        ask.port = port  # type: ignore[attr-defined]
        ask.process = process  # type: ignore[attr-defined]
        yield ask
    finally:
        process.kill()
        process.wait()
        client.close()


def same_key(found: Any, status: int, *words: str) -> None:
    text = found.text
    assert found.status_code == status, f"{found.status_code}: {text[:200]}"
    for word in words:
        assert word in text, f"{word!r} is not in {text[:300]}"


@case("request keys are done or refused by name; null is absent, -1 is off, 1 is 1")
def request_keys(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    base = {"prompt": "abc", "max_tokens": 4}
    with server(model) as ask:
        for key, value in {
            "guided_json": {"type": "object"},
            "grammar": "root ::= x",
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "logprobs": 3,
            "best_of": 4,
            "never_heard_of": 1,
            "mirostat": 2,
        }.items():
            same_key(ask("/v1/completions", {**base, key: value}), 400, key)
        for key, value in {
            "top_k": None,
            "min_p": None,
            "repetition_penalty": None,
            "model": None,
            "logprobs": None,
            "best_of": 1,
            "n": None,
            "stop": None,
            "stream": None,
            "temperature": None,
            "user": "me",
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [5],
            "repeat_penalty": 1.1,
        }.items():
            same_key(ask("/v1/completions", {**base, key: value}), 200)
        same_key(ask("/v1/completions", {**base, "top_k": -1}), 200)
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        same_key(ask("/v1/chat/completions", {**chat, "chat_template_kwargs": {"enable_thinking": False}}), 200)
        same_key(ask("/v1/chat/completions", {**chat, "logprobs": False}), 200)
        bad = ask("/v1/completions", {"prompt": [[5], [10**6]], "max_tokens": 2})
        same_key(bad, 400)
        assert "context_length_exceeded" not in bad.text, bad.text
        same_key(ask("/v1/completions", {"prompt": [], "max_tokens": 2}), 400)
        assert "context_length_exceeded" not in ask("/v1/completions", {"prompt": []}).text
        same_key(ask("/v1/completions", {"prompt": [5] * 4000, "max_tokens": 2}), 400, "context_length_exceeded")
        all_ids = ask("/v1/completions", {**base, "max_tokens": 30, "temperature": 0, "ignore_eos": True}).json()
        assert all_ids["usage"]["completion_tokens"] == 30
        ends = []
        for first in range(0, 320, 64):  # as many as a request may name; one of the five lists has the first choice
            stops = {"max_tokens": 30, "temperature": 0, "stop_token_ids": list(range(first, first + 64))}
            ends.append(ask("/v1/completions", {**base, **stops}).json()["usage"]["completion_tokens"])
        assert min(ends) <= 1, ends


@case("template arguments of a request reach the template")
def template_arguments(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    inside(lambda: _pico.tokenizer(model, template="{{ 'a' * (count or 1) }}"))
    with server(model) as ask:
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        found = ask("/v1/chat/completions", {**chat, "chat_template_kwargs": {"count": 7}})
        same_key(found, 200)
        assert found.json()["usage"]["prompt_tokens"] == 7, found.text


@case("a foreign Host or Origin: 403")
def foreign_host(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    with server(model) as ask:
        for headers in (
            {"Host": f"evil.example:{ask.port}"},
            {"Origin": "http://evil.example"},
            {"Host": "evil.example"},
        ):
            for path in ("/v1/models", "/", "/metrics"):
                same_key(ask(path, headers=headers), 403)
        for host in (f"localhost:{ask.port}", f"127.0.0.1:{ask.port}", f"[::1]:{ask.port}"):
            same_key(ask("/v1/models", headers={"Host": host}), 200)


@case("an empty key is refused")
def empty_key(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    refused(penny("serve", model, "--key", "", seconds=20), "key")
    refused(penny("serve", model, seconds=20, PENNY_API_KEY=""), "key")


@case("bodies that would keep the event loop: 400 in time, /health within 100 ms meanwhile")
def heavy_bodies(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    import threading

    bodies = {
        "stops": {"prompt": "x", "stop": ["s"] * 100_000},
        "prompts": {"prompt": ["x"] * 200_000},
        "floats": {"prompt": [1.5] * 240_000},
        "text": {"prompt": "a b " * 240_000, "max_tokens": 1},
        "chat": {"messages": [{"role": "user", "content": "a b " * 240_000}], "max_tokens": 1},
        "long stop": {"prompt": "x", "stop": "s" * 900_000},
        "messages": {"messages": [{"role": "user", "content": "x"}] * 20_000},
    }
    with server(model) as ask:
        import httpx2 as httpx

        worst, done = [0.0], threading.Event()

        def watch() -> None:
            with httpx.Client(base_url=f"http://127.0.0.1:{ask.port}", timeout=30) as client:
                while not done.is_set():
                    started = time.monotonic()
                    client.get("/health")
                    worst[0] = max(worst[0], time.monotonic() - started)
                    time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for name, body in bodies.items():
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            started = time.monotonic()
            found = ask(path, body)
            spent = time.monotonic() - started
            assert found.status_code in (400, 413, 422), f"{name}: {found.status_code}"
            assert len(found.text) < 4000, f"{name}: an error of {len(found.text)} characters"
            assert spent < 10, f"{name}: {spent:.1f} s"
        done.set()
        watcher.join()
        assert worst[0] < 0.1 * _slack(), f"/health took {worst[0] * 1000:.0f} ms"


def _slack() -> float:
    """How much later than asked this machine wakes a sleeper now, at least 1: a busy one is not the server's fault."""
    late = []
    for _ in range(20):
        started = time.monotonic()
        time.sleep(0.005)
        late.append(time.monotonic() - started)
    return max(1.0, max(late) / 0.02)


@case("requests that fail midway: 400, and what they began is given back")
def given_back(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    with server(model, "--places", 2, "--most-waiting", 20) as ask:
        for _ in range(60):
            for body in (
                {"prompt": [[5], [-1] * 9], "max_tokens": 200},
                {"prompt": [[5], [2**40]], "max_tokens": 200},
                {"prompt": [-1] * 9},
                {"prompt": "x", "repetition_penalty": 0.0},
                {"prompt": "x", "repetition_penalty": 0.001},
                {"prompt": "x", "temperature": float("nan")},
            ):
                found = ask("/v1/completions", raw=json.dumps(body).encode())
                assert found.status_code == 400, f"{body}: {found.status_code} {found.text[:150]}"
        same_key(ask("/v1/completions", {"prompt": "x", "max_tokens": 2}), 200)
        metrics = ask("/metrics").text
        assert "penny_requests_pending 0.0" in metrics, [line for line in metrics.splitlines() if "pending" in line]


@case("a key with a bad byte: 401")
def bad_key(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    with server(model, "--key", "secret") as ask:
        with socket.create_connection(("127.0.0.1", ask.port), timeout=10) as raw:
            raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
            first = raw.recv(200)
        assert b" 401 " in first or b" 400 " in first, first
        same_key(ask("/v1/models", headers={"Authorization": "Bearer secret"}), 200)


@case("two servers on one port: the second says so before it prints an address")
def one_port(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    with server(model) as ask:
        found = penny("serve", model, "--port", ask.port, seconds=30)
        refused(found, str(ask.port))
        assert "http" not in found.out, found.out


@case("slow clients and many connections: limited, said once, others answered")
def slow_clients(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m"))
    command = [
        "bash",
        "-c",
        f"ulimit -n 96; exec {sys.executable} -m pennyweight serve {model} --port PORT --threads 1",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = here / "log"
    with log.open("w") as sink:
        command[-1] = command[-1].replace("PORT", str(port))
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    held: list[socket.socket] = []
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as one:
                one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if one.recv(10):
                    break
            time.sleep(0.1)
        for _ in range(200):
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", port), timeout=2)
                one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
                held.append(one)
        answered = False
        deadline = time.monotonic() + 60
        while not answered and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answered = b"200" in one.recv(100)
            time.sleep(0.5)
        assert answered, "nobody else is answered within a minute"
        assert process.poll() is None
        lines = log.read_text().splitlines()
        assert len(lines) < 50, f"{len(lines)} lines of log"
        assert not any("Traceback" in line for line in lines), "a traceback in the log"
    finally:
        for one in held:
            one.close()
        process.kill()
        process.wait()


@case("the chat page drops the empty turn of an error")
def chat_page(here: Path) -> None:
    page = (_bench.REPOSITORY / "src" / "pennyweight" / "serve" / "chat.html").read_text()
    assert "catch" in page and "pop()" in page, "an answer that failed stays in the conversation"


# ------------------------------------------------------------------------------------------------------- real models


@case("kill -9 while scoring: what was scored is not scored again")
def killed_scoring(here: Path) -> None:
    model = inside(lambda: _pico.model(here / "m", num_hidden_layers=8))
    more = ("--weights", "60%", "--axes", "bits,ffn_width,kv_heads,noop")
    command = (
        sys.executable,
        "-m",
        "pennyweight",
        "fit",
        model,
        "--out",
        here / "out",
        "--text",
        texts(here),
        *FIT,
        *more,
    )
    for _ in range(40):
        process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        lines = []
        for line in process.stderr:  # type: ignore[union-attr]
            lines.append(line)
            if "score:" in line and len(lines) > 3:
                process.kill()
                break
        process.wait()
        if process.returncode == 0:
            break
    fine(fit(model, here / "out", *more))
    fine(fit(model, here / "alone", *more))
    assert _weights(here / "out") == _weights(here / "alone"), "another result"


# -------------------------------------------------------------------------------------------------------------------


def _digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose row contains this")
    parser.add_argument("--inputs", type=int, default=None, help="generated inputs (default 100000, quick 2000)")
    parser.add_argument("--no-cases", action="store_true", help="generated inputs alone")
    options = parser.parse_args()
    if not options.only and importlib.util.find_spec("schemathesis") is None:
        raise SystemExit("requests are drawn by schemathesis: pip install -e '.[fuzz]', or ask for cases (--only)")
    os.environ["PENNY_CACHE"] = str(_bench.work_folder("faults"))  # nobody's measurements are read or written
    _cases.prepare()
    wrong: dict[str, str] = {}
    count = 0
    for row, problem in () if options.no_cases else _cases.run_all(options.only):
        count += 1
        print(
            f"{'ok   ' if problem is None else 'WRONG'} {row}" + (f"\n      {problem}" if problem else ""), flush=True
        )
        if problem is not None:
            wrong[row] = problem
    bars = [_bench.bar("cases that are wrong", len(wrong), "==", 0)]
    found: dict[str, Any] = {"cases": count, "wrong": wrong}
    if not options.only:
        import _fuzz

        inputs = options.inputs or (2_000 if options.quick else 100_000)
        fuzzed = _fuzz.everything(inputs, _bench.work_folder("faults") / _bench.package_hash()[:12])
        found["fuzzed"] = fuzzed
        bars.append(_bench.bar("generated inputs", fuzzed["inputs"], ">=", inputs))
        bars.append(_bench.bar("tracebacks, crashes, hangs, 5xx, memory", fuzzed["bad"], "==", 0))
    return _bench.finish("faults", options.quick, found, bars)


if __name__ == "__main__":
    raise SystemExit(main())
