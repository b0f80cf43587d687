"""Tokenizers and chat templates are other people's programs: what they raise is one line, what they take is bounded."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from pennyweight.disk.templates import Templates
from pennyweight.disk.tokenizer import added, converse, encode, load_tokenizer, read_generation_config

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "“hé” <b>&amp;</b>\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and?"},
]
CHATML = """{%- if enable_thinking is defined and not enable_thinking -%}quick {% endif %}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{# note #}\nb\n",
    "breaks": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ messages[0].content | e }}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys([1, 2]) }}{{ messages[::-1][0].content }}{{ strftime_now('%Y') }}",
    "given": "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ nothing }}",
}


@pytest.fixture(scope="module")
def templates():
    return Templates()


def tokenizer(file: Path, template: str | None = None, **more: Any) -> Any:
    made = PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|endoftext|>", bos_token="<|endoftext|>", **more
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}], ids=["plain", "told"])
def test_templates_say_what_they_say_in_transformers(templates, tokenizer_file, template, arguments):
    made = tokenizer(tokenizer_file, template)
    expected = made.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **arguments)
    assert converse(made, templates, MESSAGES, arguments) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses this conversation: roles must alternate"),
        ("{% for m in messages %}", "fails: Unexpected end of template"),
        ("{{ messages[0].content.x.y }}", "fails: 'str object' has no attribute 'x'"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ ().__class__.__bases__ }}", "fails: access to attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "fails: a namespace cannot hold '_x'"),
        ("{{ 'x' * 3000000000 }}", "needs more than 512 MiB of memory"),
        ("{{ '%3000000000d' % 1 }}", "needs more than 512 MiB of memory"),
        ("{{ messages[0].content.center(10 ** 10) }}", "needs more than 512 MiB of memory"),
        ("{% set ns = namespace(s='x') %}{% for _ in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "512 MiB"),
        ("{% for _ in range(99999) %}{{ 'x' * 999999 }}{% endfor %}", "writes more than 4194304 characters"),
        ("{{ range(10 ** 9) | list }}", "fails: Range too big"),
    ],
)
def test_what_a_template_does_wrong_is_said_in_one_line(templates, tokenizer_file, template, said):
    started = time.monotonic()
    with pytest.raises(ValueError) as err:
        converse(tokenizer(tokenizer_file, template), templates, MESSAGES, {})
    assert said.lower() in str(err.value).lower() and "\n" not in str(err.value) and len(str(err.value)) < 500
    assert time.monotonic() - started < 20
    assert templates.render("{{ a }}", {"a": "still there"}) == "still there"


@pytest.mark.parametrize("template", ["{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3, "{{ 7 ** (9 ** 9) }}"])
def test_a_template_that_does_not_end_is_ended(templates, template):
    """In a loop, and within one operation that nothing in its process could interrupt."""
    with pytest.raises(ValueError, match=r"more than 2 s of processor time"):
        templates.render(template, {})
    assert templates.render("{{ a }}", {"a": "another process"}) == "another process"


def test_nobody_takes_the_place_of_the_conversation(templates, tokenizer_file):
    for name in ("messages", "add_generation_prompt", "tools"):
        with pytest.raises(ValueError, match=f"{name} cannot be an argument"):
            converse(tokenizer(tokenizer_file, CHATML), templates, MESSAGES, {name: []})


def test_several_templates_need_a_default(templates, tokenizer_file):
    made = tokenizer(tokenizer_file, {"default": "usual", "tool_use": "tools"})
    assert converse(made, templates, MESSAGES, {}) == "usual"
    made.chat_template = {"one": "", "two": ""}
    with pytest.raises(ValueError, match=r"the chat template cannot be used: .*no default"):
        converse(made, templates, MESSAGES, {})


@pytest.mark.parametrize("text", ["\ud800", "a\udcff", "\udc00\ud800"])
def test_half_a_character_is_no_text(tokenizer_file, text):
    with pytest.raises(ValueError, match=r"the text is not Unicode: character \d is half a pair"):
        encode(tokenizer(tokenizer_file), text)


class Panic(BaseException):
    """As Rust's code raises it."""


@pytest.mark.parametrize("error", [Panic("no such\ntoken"), TypeError("no such token"), OverflowError("no such token")])
def test_whatever_a_tokenizer_raises_is_one_line(error):
    class Broken:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            raise error

    with pytest.raises(ValueError, match="the tokenizer cannot read this text: no such token"):
        encode(Broken(), "a")
    with pytest.raises(ValueError, match="the tokenizer cannot read a letter: no such token"):
        added(Broken())


def test_an_interrupt_is_nobodys_error():
    class Interrupted:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(Interrupted(), "a")


@pytest.mark.parametrize(("form", "before"), [("$A", ()), ("<|endoftext|> $A", (0,)), ("$A <|endoftext|>", ())])
def test_what_a_tokenizer_adds_is_not_what_it_names(tokenizer_file, form, before):
    inner = Tokenizer.from_file(str(tokenizer_file))
    inner.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<|endoftext|>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert made.bos_token_id == 0 and added(made)[0] == list(before)


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(pico, tmp_path):
    """A folder whose tokenizer may be broken."""
    made = tmp_path / "model"
    shutil.copytree(pico("llama"), made, ignore=shutil.ignore_patterns("*.safetensors"))
    return made


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def of_a_later_version(folder: Path) -> None:
    changed(folder / "tokenizer.json", pre_tokenizer={"type": "Clairvoyant"})


def with_code(folder: Path) -> None:
    changed(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "mine.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Mine: pass\n"
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (of_a_later_version, "may be newer than the installed transformers and tokenizers"),
        (with_code, "a tokenizer that is Python code of its own (auto_map), which is not run"),
        (lambda folder: (folder / "tokenizer.json").write_text("null"), "no tokenizer that transformers can load"),
        (lambda folder: (folder / "tokenizer.json").write_text(""), "no tokenizer that transformers can load"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "no tokenizer that transformers can load"),
        (lambda folder: changed(folder / "tokenizer_config.json", bos_token=5), "Special token bos_token"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(folder, broken, said, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    broken(folder)
    with pytest.raises(ValueError) as err:
        load_tokenizer(folder)
    assert said in str(err.value) and str(folder) in str(err.value)
    assert "\n" not in str(err.value) and len(str(err.value)) < 700
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("text", ["[]", '{"temperature": -1}', '{"top_p": "most"}', '{"eos_token_id": "x"}', "{"])
def test_a_generation_config_that_makes_no_sense_is_one_line(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json") as err:
        read_generation_config(folder)
    assert "\n" not in str(err.value)


def test_a_generation_config_may_be_missing_or_say_little(folder):
    assert read_generation_config(folder).ends == [0]
    (folder / "generation_config.json").write_text('{"top_k": 5, "eos_token_id": [1, 2], "transformers_version": "9"}')
    found = read_generation_config(folder)
    assert found.top_k == 5 and found.ends == [1, 2] and found.temperature is None
    (folder / "generation_config.json").unlink()
    assert read_generation_config(folder).ends == []
