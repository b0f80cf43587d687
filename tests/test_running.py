"""penny run, serve and bench from outside: what they take, what models are called, and how they end."""

from __future__ import annotations

import inspect
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.models import OptionInfo

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
import pennyweight
from pennyweight.cli import app
from pennyweight.runtime.model import open_model
from tests.gguf_files import convert
from tests.test_cli import penny

COMMANDS = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}


def numbers():
    """Every option of every command that is a number."""
    for name, callback in COMMANDS.items():
        for parameter in inspect.signature(callback, eval_str=True).parameters.values():
            kind, *more = get_args(parameter.annotation) or (parameter.annotation,)
            if {int, float} & {kind, *get_args(kind)}:
                yield name, parameter.name, next((one for one in more if isinstance(one, OptionInfo)), None)


def test_every_number_has_a_range():
    found = list(numbers())
    assert len(found) > 30
    assert [(command, option) for command, option, told in found if told is None or told.min is None] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "serve M --places 0",
        "serve M --port 99999",
        "serve M --port -1",
        "serve M --most-waiting -1",
        "bench M --repeats 0",
        "bench M --prompt 0",
        "bench M --sparsity 1.5",
        "run M a --max-tokens 0",
        "run M a --top-p 1.1",
        "run M a --seed -1",
        "run M a --threads -1",
        "eval M --rows 0",
        "check M --tokens 0",
        "fit M --out O --context-tokens 0",
        "machine --concurrency 0",
        "plan M --concurrency -1",
    ],
)
def test_a_number_outside_its_range_is_refused_before_anything_is_read(wrong, tmp_path):
    done = penny(*wrong.replace("M", str(tmp_path / "nothing")).split())
    assert done.exit_code == 2 and "Input should be" in done.stderr and wrong.split()[-2] in done.stderr


def test_the_version_is_told():
    assert penny("--version").stdout == f"pennyweight {pennyweight.__version__}\n"
    assert penny("-h").stdout == penny("--help").stdout and "--version" in penny("-h").stdout


# ------------------------------------------------------------------------------------------------------------- models


def opened(path):
    return open_model(path, threads=1, context=16)


def test_a_model_is_called_as_people_call_it(pico, tmp_path, monkeypatch):
    cached = tmp_path / "models--maker--small-1B--v2" / "snapshots" / "0123abcd"
    shutil.copytree(pico("llama"), cached)
    (tmp_path / "link").symlink_to(cached)
    assert opened(cached).name == "maker/small-1B--v2"
    assert opened(tmp_path / "link").name == "maker/small-1B--v2"
    (tmp_path / "mine").symlink_to(pico("llama"))
    assert opened(tmp_path / "mine").name == "mine"
    monkeypatch.chdir(cached)
    assert opened(Path()).name == "maker/small-1B--v2"
    assert opened(Path("..") / "0123abcd").name == "maker/small-1B--v2"
    assert opened(pico("llama")).name == "llama"


def test_a_folder_that_holds_one_gguf_file_is_that_file(pico, tmp_path):
    file, _ = convert(pico("llama"), tmp_path, "F16")
    folder = tmp_path / "only"
    folder.mkdir()
    file.rename(folder / "small.Q4.gguf")
    assert opened(folder).engine.vocab_size == 300 and opened(folder / "small.Q4.gguf").name == "small.Q4"
    shutil.copy(folder / "small.Q4.gguf", folder / "small.Q8.gguf")
    done = penny("run", folder, "a")
    assert done.exit_code == 2 and "holds 2 GGUF files; name one of them" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- run


@pytest.fixture
def folder(pico, tmp_path):
    return shutil.copytree(pico("qwen3"), tmp_path / "model")


def told(*arguments):
    done = penny("run", *arguments, "--threads", 1, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_run_draws_as_the_model_says_unless_told_otherwise(folder):
    greedy = told(folder, "hello", "--max-tokens", 12)["text"]
    (folder / "generation_config.json").write_text('{"temperature": 5.0, "top_k": 7}')
    assert told(folder, "hello", "--max-tokens", 12)["text"] == greedy, "do_sample is not there"
    (folder / "generation_config.json").write_text('{"temperature": 5.0, "top_k": 7, "do_sample": true}')
    drawn = told(folder, "hello", "--max-tokens", 12)["text"]
    given = told(folder, "hello", "--max-tokens", 12, "--temperature", 5, "--top-k", 7)["text"]
    assert drawn == given != greedy
    assert told(folder, "hello", "--max-tokens", 12, "--temperature", 0)["text"] == greedy
    (folder / "generation_config.json").write_text("[]")
    done = penny("run", folder, "hello")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and "generation_config.json" in done.stderr


def test_what_the_template_or_the_tokenizer_refuses_is_one_line(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only system prompts') }}")
    for arguments, said in (
        (("hello",), "only system prompts"),
        (("--no-chat", "a\udcff"), "is not Unicode: character 1"),
        (("\udcff",), "only system prompts"),
    ):
        done = penny("run", folder, *arguments)
        assert done.exit_code == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_run_begins_a_text_as_the_tokenizer_does(pico, folder):
    """One that names a BOS and does not add it adds none; prompts have as many tokens as transformers gives them."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder)
    assert made.bos_token_id == 0
    assert told(folder, "hello", "--max-tokens", 1)["prompt_tokens"] == len(made.encode("hello"))
    file = json.loads((folder / "tokenizer.json").read_text())
    begin = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    token = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    file["post_processor"] = {"type": "TemplateProcessing", "single": begin, "pair": begin}
    file["post_processor"]["special_tokens"] = {"<|endoftext|>": token}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    again = AutoTokenizer.from_pretrained(folder).encode("hello")
    assert again == [0, *made.encode("hello")]
    assert told(folder, "hello", "--max-tokens", 1)["prompt_tokens"] == len(again)


def test_run_ends_quietly_when_nobody_reads_any_more(pico):
    command = [sys.executable, "-m", "pennyweight", "run", str(pico("qwen3")), "hello"]
    command += ["--max-tokens", "200", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# -------------------------------------------------------------------------------------------------------------- serve


@pytest.mark.parametrize("key", [("--key", ""), ("--key", "  "), "environment"])
def test_an_empty_key_is_refused(pico, key, monkeypatch):
    if key == "environment":
        monkeypatch.setenv("PENNY_API_KEY", "")
    done = penny("serve", pico("qwen3"), "--port", 0, *(key if isinstance(key, tuple) else ()))
    assert done.exit_code == 2 and "the API key is empty" in done.stderr and not done.stdout


def test_a_port_is_taken_before_the_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = penny("serve", tmp_path / "nothing", "--port", taken.getsockname()[1])
    assert done.exit_code == 2 and "cannot listen on 127.0.0.1" in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) == 1
    for host in ("", "no such host"):
        done = penny("serve", tmp_path / "nothing", "--port", 0, "--host", host)
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1


def test_a_port_is_nobody_elses_while_the_model_is_read(pico, monkeypatch):
    """Two servers on one port: the second is told before either has said where it is."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    seen = []

    def meanwhile(*_, **__):
        seen.append(penny("serve", pico("qwen3"), "--port", port))
        raise ValueError("the first goes no further")

    monkeypatch.setattr("pennyweight.runtime.model.open_model", meanwhile)
    first = penny("serve", pico("qwen3"), "--port", port)
    assert "the first goes no further" in first.stderr
    assert seen[0].exit_code == 2 and "cannot listen" in seen[0].stderr and not seen[0].stdout
