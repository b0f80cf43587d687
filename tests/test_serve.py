"""The server, over real sockets: OpenAI's client understands it, limits hold, nothing is left behind."""

from __future__ import annotations

import collections
import copy
import errno
import functools
import gc
import json
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
import httpx2 as httpx
import openai

from pennyweight.disk.tokenizer import GenerationConfig
from pennyweight.runtime.generate import Batch, Request
from pennyweight.runtime.model import open_model
from pennyweight.runtime.sample import Sampling
from pennyweight.serve.app import create_app
from pennyweight.serve.connections import Server, room
from pennyweight.serve.guard import Limits, Refused
from pennyweight.serve.protocol import Chat, Completion, read
from pennyweight.serve.worker import Worker

# A busy machine may take longer over an answer than a client waits by itself.
get, post, streaming = (functools.partial(call, timeout=60) for call in (httpx.get, httpx.post, httpx.stream))
STARTED: dict[str, Server] = {}  # by address
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[say]"


@pytest.fixture(scope="module")
def model(pico):
    opened = open_model(pico("qwen3"), threads=1)
    opened.tokenizer.chat_template = TEMPLATE
    return replace(opened, stop=frozenset())  # a random model ends anywhere; tests want full lengths


@contextmanager
def serving(model, *, places=4, most_waiting=64, limits=Limits()):  # noqa: B008  (frozen)
    worker = Worker(Batch(model.engine, places=places), most_waiting=most_waiting)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = STARTED[address] = Server(create_app(model, worker, limits), listening, patience=5)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield address, worker
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not worker.alive


@pytest.fixture(scope="module")
def running(model):
    with serving(model) as (address, worker):
        yield address, worker


@pytest.fixture(scope="module")
def address(running):
    return running[0]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def alone(model, prompt: list[int], tokens: int) -> str:
    batch = Batch(model.engine, places=1)
    text = batch.submit(Request(prompt, tokens))
    while batch.busy:
        batch.step()
    return model.tokenizer.decode(text.answer)


def test_chat_whole_and_streamed(client, model):
    messages = [{"role": "user", "content": "hello"}]
    ask = {"model": model.name, "messages": messages, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    said = whole.choices[0].message.content
    assert said == alone(model, model.chat(messages), 20)
    assert whole.choices[0].finish_reason == "length" and whole.object == "chat.completion"
    assert whole.usage.completion_tokens == 20 and whole.usage.prompt_tokens == len(model.chat(messages))
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_completions_of_several_prompts(client, model):
    found = client.completions.create(
        model=model.name, prompt=["hello", "import"], max_tokens=9, temperature=0, n=2, extra_body={"top_k": 5}
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    expected = [alone(model, model.encode(text), 9) for text in ("hello", "import")]
    assert [choice.text for choice in found.choices] == [expected[0]] * 2 + [expected[1]] * 2
    ids = client.completions.create(model=model.name, prompt=[1, 2, 3], max_tokens=4, temperature=0)
    assert ids.choices[0].text == alone(model, [1, 2, 3], 4) and ids.usage.prompt_tokens == 3


def test_seeds_and_stop_strings(client, model):
    ask = {"model": model.name, "prompt": "hello", "max_tokens": 30, "temperature": 1.0}
    one, two, other = (client.completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert one == two != other
    stop = one[5:8]
    stopped = client.completions.create(**ask, seed=1, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == one[: one.index(stop)]


def test_the_stream_is_plain_sse(address, model):
    body = {"model": model.name, "prompt": "hello", "max_tokens": 5, "stream": True}
    with streaming("POST", f"{address}/v1/completions", json=body) as response:
        raw = response.read().decode()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = raw.split("\n\n")
    assert events[-1] == "" and all(event.startswith("data: ") for event in events[:-1])
    assert events[-2] == "data: [DONE]"
    assert all(json.loads(event[6:])["object"] == "text_completion" for event in events[:-2])


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a " * 400}, 400, "fit"),
        ("/v1/completions", {"prompt": [999]}, 400, "vocabulary"),
        ("/v1/completions", {"prompt": []}, 400, "empty"),
        ("/v1/completions", {}, 400, "prompt: Field required"),
        ("/v1/completions", [], 400, "not a JSON object"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 1.0}, 400, "repetition_penalty"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ("/v1/embeddings", {}, 404, "there is no POST"),
    ],
)
def test_errors_have_openais_shape(address, path, body, status, said):
    response = post(address + path, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"{no", b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}"])
def test_malformed_json_is_an_error_too(address, body):
    response = post(f"{address}/v1/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def refused(address: str, more: dict, *, chat: bool = False) -> dict:
    """What a request with these keys is told; it is a 400 in few words."""
    path, ask = "completions", {"prompt": "a", "max_tokens": 2}
    if chat:
        path, ask = "chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    response = post(f"{address}/v1/{path}", content=json.dumps({**ask, **more}, separators=(",", ":")))
    assert response.status_code == 400 and len(response.content) < 1500, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("grammar", "root ::= 'a'"),
        ("tool_choice", "required"),
        ("tools", [{}]),
        ("functions", [{}]),
        ("logprobs", True),
        ("logprobs", 3),
        ("top_logprobs", 2),
        ("logit_bias", {"5": 1}),
        ("best_of", 3),
        ("echo", True),
        ("frequency_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("typical_p", 0.5),
        ("mirostat", 2),
        ("skip_special_tokens", False),
        ("made_up", 0),
        ("made_up", False),
        ("x" * 100_000, 1),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_not_done_is_refused_by_name(address, name, value, chat):
    said = refused(address, {name: value}, chat=chat)
    assert said["code"] == "unsupported_parameter" and said["param"][:50] == name[:50]
    assert name[:50] in said["message"]


def test_each_kind_of_request_has_its_own_keys(address):
    assert refused(address, {"messages": []})["param"] == "messages"
    assert refused(address, {"chat_template_kwargs": {}})["param"] == "chat_template_kwargs"
    assert refused(address, {"prompt": "a"}, chat=True)["param"] == "prompt"
    called = [{"role": "assistant", "content": "a", "tool_calls": [{}]}]
    said = refused(address, {"messages": called}, chat=True)
    assert said["code"] == "unsupported_parameter" and said["param"] == "messages.0.tool_calls"
    assert refused(address, {"stream_options": {"include_everything": True}})["code"] == "unsupported_parameter"


def test_what_means_nothing_changes_nothing(address, model):
    """null, a client's defaults, and keys that do not concern the answer."""
    off = {"tools": [], "tool_choice": "none", "logprobs": 0, "top_logprobs": 0, "logit_bias": {}, "best_of": 1}
    off |= {"presence_penalty": 0.0, "frequency_penalty": 0, "echo": False, "suffix": "", "top_k": -1, "seed": -1}
    off |= {"response_format": {"type": "text"}, "grammar": "", "typical_p": 1.0, "repeat_last_n": -1, "functions": []}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "cache_prompt": True}
    names = ("model", "n", "top_p", "min_p", "repetition_penalty", "stop", "stream", "stream_options", "guided_json")
    null = dict.fromkeys((*names, "max_completion_tokens", "chat_template_kwargs", "stop_token_ids", "made_up"))
    ask = {"max_tokens": 8, "temperature": 0}
    said = post(f"{address}/v1/completions", json={"prompt": "a", **ask, **off, **harmless, **null})
    assert said.status_code == 200, said.text
    assert said.json()["choices"][0]["text"] == alone(model, model.encode("a"), 8)
    messages = [{"role": "user", "content": "a", "name": None, "tool_calls": None, "refusal": None}]
    said = post(
        f"{address}/v1/chat/completions", json={"messages": messages, **ask, **off, **null, "tool_choice": "auto"}
    )
    assert said.json()["choices"][0]["message"]["content"] == alone(model, model.chat(messages[:1]), 8)
    assert post(f"{address}/v1/completions", json={"prompt": "a", "n": 2, "best_of": 2}).status_code == 200


def test_other_servers_names_for_the_same_things(address):
    ask = {"prompt": "hello", "temperature": 0}
    text = lambda more: post(f"{address}/v1/completions", json={**ask, **more}).json()["choices"][0]["text"]  # noqa: E731
    ours = text({"max_tokens": 12, "repetition_penalty": 3})
    assert ours == text({"n_predict": 12, "repeat_penalty": 3}) == text({"num_predict": 12, "repeat_penalty": 3})
    assert ours != text({"max_tokens": 12})
    assert "say the same thing" in refused(address, {"n_predict": 5})["message"]
    whole = post(f"{address}/v1/completions", json={**ask, "n_predict": -1}).json()["usage"]
    assert whole["total_tokens"] == 256, "as many as fit"


def test_answers_end_at_given_tokens_and_not_too_soon(model):
    prompt, stop = [7, 250, 3], frozenset()
    free = alone_ids(model, prompt, 20)
    for ends in (stop, frozenset(free[2:3])):
        with serving(replace(model, stop=ends)) as (address, _):
            ask = {"prompt": prompt, "max_tokens": 20, "temperature": 0}

            def tokens(**more):
                found = post(f"{address}/v1/completions", json={**ask, **more}).json()  # noqa: B023
                return found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]

            own = free.index(free[2]) if ends else 20
            assert tokens() == (own, "stop" if ends else "length")
            assert tokens(ignore_eos=True) == (20, "length")
            at = free.index(free[6])
            assert tokens(ignore_eos=True, stop_token_ids=[free[6]]) == (at, "stop")
            longer, _ = tokens(stop_token_ids=[free[0]], min_tokens=15)
            assert tokens(stop_token_ids=[free[0]]) == (0, "stop") and longer >= 15
            assert refused(address, {"min_tokens": 3})["param"] == "min_tokens"
            for wrong in (-1, 300, 2**40):
                said = refused(address, {"stop_token_ids": [wrong]})
                assert said["code"] == "invalid_token" and str(wrong) in said["message"]


def alone_ids(model, prompt: list[int], tokens: int) -> list[int]:
    batch = Batch(model.engine, places=1)
    text = batch.submit(Request(prompt, tokens))
    while batch.busy:
        batch.step()
    return text.answer


def test_a_stop_string_may_be_a_special_token_that_nothing_names_as_an_end(model):
    """Random models say anything: the first token of an answer is made a special one."""
    free = alone_ids(model, [7, 250, 3], 6)
    tokenizer = copy.deepcopy(model.tokenizer)
    name = tokenizer.convert_ids_to_tokens(free[1])
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    with serving(replace(model, tokenizer=tokenizer)) as (address, _):
        ask = {"prompt": [7, 250, 3], "max_tokens": 6, "temperature": 0, "stop": [name]}
        found = post(f"{address}/v1/completions", json=ask).json()["choices"][0]
    assert found["finish_reason"] == "stop" and found["text"] == tokenizer.decode(free[:1])


def test_arguments_of_the_template_reach_it(address, model):
    model.tokenizer.chat_template = "{{ tone | default('plain') }}: {{ messages[0].content }}"
    try:
        ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
        for arguments, prompt in (({}, "plain: hi"), ({"tone": "kind"}, "kind: hi"), ({"tone": None}, "None: hi")):
            found = post(f"{address}/v1/chat/completions", json={**ask, "chat_template_kwargs": arguments}).json()
            assert found["choices"][0]["message"]["content"] == alone(model, model.encode(prompt), 6)
        said = refused(address, {"chat_template_kwargs": {"messages": []}}, chat=True)
        assert "messages cannot be an argument" in said["message"]
        model.tokenizer.chat_template = "{{ raise_exception('one at a time') }}"
        assert "one at a time" in refused(address, {}, chat=True)["message"]
    finally:
        model.tokenizer.chat_template = TEMPLATE


def test_what_a_request_does_not_say_is_as_the_model_says(model):
    greedy = replace(model, defaults=GenerationConfig(do_sample=False, repetition_penalty=3))
    penalised = Sampling(repetition_penalty=3)
    with serving(greedy) as (address, _):
        said = post(f"{address}/v1/completions", json={"prompt": [5], "max_tokens": 20}).json()
        plain = {"prompt": [5], "max_tokens": 20, "repetition_penalty": 1}
        other = post(f"{address}/v1/completions", json=plain).json()
    batch = Batch(model.engine, places=1)
    texts = [batch.submit(Request([5], 20, sampling)) for sampling in (penalised, Sampling())]
    while batch.busy:
        batch.step()
    expected = [model.tokenizer.decode(text.answer) for text in texts]
    assert [said["choices"][0]["text"], other["choices"][0]["text"]] == expected and expected[0] != expected[1]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"prompt": "a " * 400}, "context_length_exceeded"),
        ({"prompt": "a " * 400_000}, "context_length_exceeded"),
        ({"prompt": [5] * 256}, "context_length_exceeded"),
        ({"prompt": [5] * 5000}, "context_length_exceeded"),
        ({"prompt": [5] * 300_000}, "too_many_values"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [[]]}, "invalid_prompt"),
        ({"prompt": [300]}, "invalid_prompt"),
        ({"prompt": [[5], [-1] * 9]}, "invalid_prompt"),
        ({"prompt": [[5], [2**40] * 9]}, "invalid_prompt"),
        ({"prompt": [5, -(2**70)]}, "invalid_prompt"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": ["a", "\ud800"]}, None),
        ({"prompt": ["a"] * 5000}, "too_many_prompts"),
        ({"prompt": ["a"] * 200_000}, "too_many_values"),
        ({"prompt": ["a"] * 40, "n": 8}, "too_many_prompts"),
        ({"prompt": [1.5] * 240_000}, "too_many_values"),
        ({"prompt": [True, 1]}, None),
        ({"prompt": 5}, None),
        ({"prompt": [["a"]]}, None),
        ({"repetition_penalty": 0.005}, None),
        ({"repetition_penalty": 1e-300}, None),
        ({"temperature": float("nan")}, None),
        ({"temperature": float("inf")}, None),
        ({"top_p": float("nan")}, None),
        ({"stop": ["a"] * 100_000}, "too_many_values"),
        ({"stop": ["a"] * 1000}, None),
        ({"stop": ["a"] * 5}, None),
        ({"stop": "a" * 100_000}, None),
        ({"stop": [5]}, None),
        ({"stop": 5}, None),
        ({"stop_token_ids": [1] * 65}, None),
        ({"model": 5}, None),
        ({"n": 9}, None),
        ({"max_tokens": 0}, None),
        ({"seed": 0.5}, None),
    ],
)
def test_what_makes_no_sense_is_a_400_and_leaves_nothing_behind(running, more, code):
    address, worker = running
    said = refused(address, more)
    assert said["code"] == code and worker.pending == 0


@pytest.mark.parametrize("text", ["a" * 900_000, 'say "hi", ' * 60_000, "\\" * 200_000, '"' * 300_000, "," * 500_000])
def test_a_body_that_is_mostly_text_is_not_taken_for_many_values(address, text):
    assert refused(address, {"prompt": text})["code"] == "context_length_exceeded"


def test_values_of_a_large_body_are_counted_to_the_last_one():
    most = 4 * 8 + 4096
    for count, said in ((most - 10, None), (2 * most, "too_many_values")):
        body = json.dumps({"prompt": [5] * count, "user": "a" * 2**16}).encode()
        try:
            code = read(Completion, body, Limits(), 8) and None
        except Refused as err:
            code = err.body["error"]["code"]
        assert code == said


def test_large_bodies_are_read_one_at_a_time_and_small_ones_pass(model, monkeypatch):
    """A second large body waits for the first, in no thread: a small one is answered meanwhile."""
    go_on, reading = threading.Event(), []

    def slow(kind, body, limits, context):
        if len(body) > 2**16:
            reading.append(len(body))
            assert go_on.wait(20)
        return read(kind, body, limits, context)

    monkeypatch.setattr("pennyweight.serve.answers.read", slow)
    large = {"prompt": "a", "max_tokens": 1, "user": "a" * 2**17}
    with serving(model) as (address, _), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, f"{address}/v1/completions", json=large) for _ in range(2)]
        while not reading:
            time.sleep(0.01)
        small = post(f"{address}/v1/completions", json={**large, "user": "a"}, timeout=20)
        assert small.status_code == 200 and len(reading) == 1
        go_on.set()
        assert [one.result().status_code for one in waiting] == [200, 200]


def test_a_server_leaves_collections_little_to_look_at(model):
    with serving(model) as (address, _):
        assert get(f"{address}/health").status_code == 200
        assert gc.get_freeze_count() > 10_000
        assert sys.getswitchinterval() <= 0.001


def test_a_model_called_by_half_a_character_is_refused(address):
    response = post(f"{address}/v1/completions", content=json.dumps({"prompt": "a", "model": "\ud800" * 5000}))
    assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(("count", "code"), [(300, "context_length_exceeded"), (30_000, "too_many_values")])
def test_hostile_conversations_are_a_400(address, count, code):
    assert refused(address, {"messages": [{"role": "user", "content": "a"}] * count}, chat=True)["code"] == code


def test_whatever_goes_wrong_what_was_begun_is_given_back(running, monkeypatch):
    """The third of three answers cannot be made: nobody writes the other two."""
    address, worker = running
    check, calls = worker.batch.check, []

    def third_time(request):
        calls.append(request)
        if len(calls) == 4:  # the prompt is checked once, and each answer when it is handed in
            raise MemoryError("no luck")
        check(request)

    monkeypatch.setattr(worker.batch, "check", third_time)
    response = post(f"{address}/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 200})
    assert response.status_code == 500 and "no luck" in response.json()["error"]["message"]
    monkeypatch.undo()
    assert empties(worker)


# ----------------------------------------------------------------------------------------------- strangers and hostiles


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:80"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "localhost:80@evil.example"}, 403),
        ({"host": "192.168.1.1"}, 403),
        ({"host": "[::1]evil"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://[evil"}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "LocalHost.:9"}, 200),
        ({"host": "127.0.0.1:5"}, 200),
        ({"host": "[::1]:5"}, 200),
        ({"host": "localhost", "origin": "http://127.0.0.1:3000"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/metrics"])
def test_who_calls_the_server_by_another_name_is_not_heard(address, path, headers, status):
    response = get(address + path, headers=headers)
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_more_names_may_be_given():
    limits = Limits(hosts=frozenset(("box.local", "0.0.0.0")))
    assert limits.may_be_called("box.local", "10.0.0.5") and limits.may_be_called("10.0.0.5", "10.0.0.5")
    assert limits.may_be_called("10.0.0.5", "::ffff:10.0.0.5")
    assert not limits.may_be_called("10.0.0.6", "10.0.0.5") and not limits.may_be_called("evil.example", "10.0.0.5")
    assert not Limits(hosts=frozenset(("10.0.0.5",))).may_be_called("10.0.0.7", "10.0.0.7")


def test_an_empty_key_is_none_and_a_strange_one_is_one(model):
    for empty in ("", " "):
        with pytest.raises(ValueError, match="key is empty"):
            Limits(key=empty)
    key = b"k\xff"  # as the command line hands it on
    with serving(model, limits=Limits(key=key.decode(errors="surrogateescape"))) as (address, _):
        for given, status in ((key, 200), (b"k", 401), (b"\xff\xfe", 401), ("k\udcff".encode("utf-8", "replace"), 401)):
            headers = [(b"authorization", b"Bearer " + given)]
            assert get(f"{address}/v1/models", headers=headers).status_code == status


def test_others_are_heard_while_a_text_is_read(model, monkeypatch):
    """Encoding lies outside the event loop: /health answers before a request whose encoding waits for it to."""
    heard = threading.Event()
    monkeypatch.setattr("pennyweight.disk.tokenizer.encode", lambda *_: [5] * heard.wait(20))
    with serving(model, places=1, most_waiting=1) as (address, _), ThreadPoolExecutor(3) as pool:
        ask = {"prompt": "a", "max_tokens": 2}
        asked = [pool.submit(post, f"{address}/v1/completions", json=ask) for _ in range(3)]
        refused = next(as_completed(asked, timeout=20))  # two are taken, whichever they are, and wait
        assert refused.result().status_code == 429
        assert get(f"{address}/health").status_code == 200
        heard.set()
        assert [one.result().status_code for one in asked if one is not refused] == [200, 200]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc", b"POST /v1/completions HTTP/1.1\r\n"])
def test_who_never_asks_is_not_waited_for(model, monkeypatch, sent):
    monkeypatch.setattr("pennyweight.serve.connections.HEAD_SECONDS", 0.2)
    with serving(model) as (address, _), connection(address) as slow:
        slow.sendall(sent)
        assert received(slow) == b""
        assert get(f"{address}/health").status_code == 200


def test_a_request_that_does_not_go_on_is_not_waited_for(model):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    for limits in (Limits(silence=0.2), Limits(body_seconds=0.2)):
        with serving(model, limits=limits) as (address, _), connection(address) as slow:
            slow.sendall(head + b'{"prompt"')
            said = received(slow)
            assert b" 408 " in said and b"request_timeout" in said


def test_who_does_not_read_is_not_written_to_for_ever(model, monkeypatch):
    monkeypatch.setattr("pennyweight.serve.connections.READ_SECONDS", 0.2)
    page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(model) as (address, _), connection(address) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(2)  # not every system tells who waits to send that the other end has gone
        with pytest.raises((ConnectionError, TimeoutError)):
            while True:  # pages that nobody reads
                slow.sendall(page * 50)
        assert not STARTED[address].server_state.connections


@contextmanager
def connection(address: str):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as made:
        yield made


def test_answers_do_not_wait_for_acknowledgements(address):
    with httpx.Client(base_url=address) as client:
        spent = []
        for _ in range(10):  # the first ones are acknowledged at once
            started = time.perf_counter()
            assert client.get("/health").status_code == 200
            spent.append(time.perf_counter() - started)
    assert min(spent[-5:]) < 0.03, spent


def test_a_client_that_still_sends_reads_why_it_was_refused(address):
    host, port = address.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(head + b" " * 100_000)
        time.sleep(0.2)  # it has answered
        for _ in range(39):
            client.sendall(b" " * 100_000)
        assert received(client).startswith(b"HTTP/1.1 413")


def test_a_client_that_sends_forever_is_cut_off(address, monkeypatch):
    monkeypatch.setattr("pennyweight.serve.connections.LINGER_SECONDS", 0.2)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000000\r\n\r\n")
        started = time.monotonic()
        with pytest.raises(OSError, match=r"reset|pipe"):
            while time.monotonic() < started + 4:
                client.sendall(b" " * 100_000)


def received(client: socket.socket) -> bytes:
    """All until the server closes the connection."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_idle_connections_make_room_and_busy_ones_do_not(model, monkeypatch):
    monkeypatch.setattr("pennyweight.serve.connections.MOST", 3)
    monkeypatch.setattr("pennyweight.serve.connections.IDLE_SECONDS", 0.05)
    with serving(model) as (address, worker), ExitStack() as stack:
        step = worker.batch.engine.step
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: (time.sleep(0.02), step(rows))[1])
        body = {"prompt": "a", "max_tokens": 60, "stream": True}
        stream = stack.enter_context(streaming("POST", f"{address}/v1/completions", json=body))
        idle = [stack.enter_context(connection(address)) for _ in range(6)]
        assert get(f"{address}/health", timeout=20).status_code == 200
        assert "[DONE]" in stream.read().decode()
        assert received(idle[0]) == b""


def test_who_comes_behind_many_silent_ones_does_not_wait_for_all_of_them(model, monkeypatch):
    """In the order of the line it would be the last."""
    begun = []
    begin = Server._join

    async def join(server, taken):
        begun.append(taken.getpeername())
        await begin(server, taken)

    monkeypatch.setattr(Server, "_join", join)
    with ExitStack() as stack:
        address, _ = stack.enter_context(serving(model))
        get(f"{address}/health")
        begun.clear()
        halted, go_on = threading.Event(), threading.Event()
        STARTED[address]._accepting.get_loop().call_soon_threadsafe(lambda: (halted.set(), go_on.wait(20)))
        assert halted.wait(20)
        for _ in range(100):
            stack.enter_context(connection(address))
        asking = stack.enter_context(connection(address))
        asking.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        go_on.set()
        assert b" 200 " in received(asking)
        assert begun.index(asking.getsockname()) < 50
        while len(begun) < 101:  # and nobody is left out
            time.sleep(0.01)


def test_what_a_request_leaves_is_freed_at_once(model):
    """Objects that hold each other wait for the collector, which stops everybody for as long as it takes."""
    with serving(model) as (address, _):
        for number in range(2):
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    assert post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
                time.sleep(0.2)
                kept = collections.Counter(type(one).__name__ for one in gc.get_objects())
            finally:
                gc.enable()
            if number:  # the first time, caches are filled
                for name in ("Connection", "RequestResponseCycle", "Answer", "Ticket", "Text"):
                    assert kept[name] < 20, name


def test_without_descriptors_one_line_is_said_and_connections_wait(model, monkeypatch, capsys):
    """As accept does it at their limit, here five times."""
    monkeypatch.setattr("pennyweight.serve.connections.AGAIN_SECONDS", 0.01)
    accept, left = socket.socket.accept, [errno.EMFILE] * 5

    def short(listening):
        if left:
            raise OSError(left.pop(), "Too many open files")
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", short)
    with serving(model) as (address, _):
        assert get(f"{address}/health", timeout=20).status_code == 200
    assert capsys.readouterr().err.splitlines() == ["ERROR:    no new connections for now: Too many open files"]


def test_there_are_as_many_connections_as_descriptors_allow(monkeypatch):
    used = len(list(Path("/dev/fd").iterdir()))
    monkeypatch.setattr("resource.getrlimit", lambda _: (used + 100, used + 100))
    assert 60 <= room() <= 80
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    assert room() >= 4
    monkeypatch.setattr("resource.getrlimit", lambda _: (2**20, 2**20))
    assert room() == 1024


def test_the_api_is_described_by_the_schema_that_is_read(address):
    described = get(f"{address}/openapi.json").json()
    schemas = described["components"]["schemas"]
    for path, name, kind in (("/v1/completions", "Completion", Completion), ("/v1/chat/completions", "Chat", Chat)):
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert schemas[name]["properties"].keys() == kind.model_fields.keys()
        assert schemas[name]["additionalProperties"] is False
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert {"Message", "StreamOptions"} <= referred <= schemas.keys()
    assert get(f"{address}/docs").status_code == get(f"{address}/redoc").status_code == 404


def test_models_health_metrics_page(address, client, model):
    assert [m.id for m in client.models.list()] == [model.name]
    assert client.models.retrieve(model.name).owned_by == "pennyweight"
    assert get(f"{address}/health").json() == {"status": "ok"}
    client.completions.create(model=model.name, prompt="a", max_tokens=1)
    metrics = get(f"{address}/metrics").text
    assert 'penny_requests_total{outcome="answered"}' in metrics and "penny_ttft_seconds_bucket" in metrics
    page = get(address + "/")
    assert "text/html" in page.headers["content-type"] and "/v1/chat/completions" in page.text


def test_many_at_once_say_what_each_says_alone(client, model):
    prompts = [f"{word} {i}" for i in range(6) for word in ("import", "hello", "def")]
    with ThreadPoolExecutor(18) as pool:
        ask = lambda p: client.completions.create(model=model.name, prompt=p, max_tokens=12, temperature=0)  # noqa: E731
        found = [reply.choices[0].text for reply in pool.map(ask, prompts)]
    assert found == [alone(model, model.encode(prompt), 12) for prompt in prompts]


def test_who_leaves_makes_room(running, model):
    address, worker = running
    body = {"prompt": "hello", "max_tokens": 200, "stream": True}
    with streaming("POST", f"{address}/v1/completions", json=body) as response:
        next(response.iter_text())
    assert empties(worker)


def empties(worker, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while worker.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    return worker.pending == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_before_anything_came_makes_room(model, stream, monkeypatch):
    """The answer would take minutes; the connection is closed while it is being written."""
    with serving(model, places=1) as (address, worker):
        step = worker.batch.engine.step
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: (time.sleep(0.3), step(rows))[1])
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "hello", "max_tokens": 200, "n": 3, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as client:
            head = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
            client.sendall("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body)
            deadline = time.monotonic() + 10
            while worker.pending < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert worker.pending == 3
        assert empties(worker)


def test_a_server_that_stops_tells_who_waits(model, monkeypatch):
    """Streams end with an error, not as if the answer were complete; whole answers are 503; so are new requests."""
    monkeypatch.setattr("pennyweight.serve.answers.PATIENCE", 0.8)
    with serving(model) as (address, worker):
        step = worker.batch.engine.step
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: (time.sleep(0.1), step(rows))[1])
        url = f"{address}/v1/completions"
        ask = lambda tokens, stream: post(url, json={"prompt": "a", "max_tokens": tokens, "stream": stream})  # noqa: E731
        with ThreadPoolExecutor(4) as pool:
            short, streamed = pool.submit(ask, 2, True), pool.submit(ask, 200, True)
            whole = pool.submit(ask, 200, False)
            while worker.pending < 3:
                time.sleep(0.01)
            stop_soon(address)
            time.sleep(0.2)
            late = ask(2, False)
            ended = [event for event in short.result().text.split("\n\n") if event]
            cut = [event for event in streamed.result().text.split("\n\n") if event]
        assert ended[-1] == "data: [DONE]"
        assert json.loads(cut[-1][6:])["error"]["code"] == "shutting_down" and "[DONE]" not in streamed.result().text
        assert whole.result().status_code == late.status_code == 503
        assert late.headers["retry-after"]


def stop_soon(address: str) -> None:
    STARTED[address].should_exit = True


def test_numbers_that_are_none_end_one_answer(model, monkeypatch):
    with serving(model) as (address, worker):
        step = worker.batch.engine.step
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: step(rows) * float("nan"))
        ask = {"prompt": "a", "max_tokens": 5}
        whole = post(f"{address}/v1/completions", json=ask)
        assert whole.status_code == 500 and "no number" in whole.json()["error"]["message"]
        events = post(f"{address}/v1/completions", json={**ask, "stream": True}).text
        assert "no number" in events and "[DONE]" not in events
        monkeypatch.undo()
        assert post(f"{address}/v1/completions", json=ask).status_code == 200


def test_what_is_not_there_has_openais_shape_too(address):
    for found in (get(f"{address}/v1/completions"), post(f"{address}/health"), get(f"{address}/v2")):
        assert found.status_code in (404, 405) and set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_developers_are_what_templates_call_system(client, model):
    create = client.chat.completions.create
    ask = {"model": model.name, "max_tokens": 8, "temperature": 0}
    replies = [create(**ask, messages=[{"role": role, "content": "be brief"}]) for role in ("developer", "system")]
    said = [reply.choices[0].message.content for reply in replies]
    assert said[0] == said[1] == alone(model, model.chat([{"role": "system", "content": "be brief"}]), 8)


def test_keys_sizes_and_queues_are_limited(model):
    limits = Limits(key="secret", body_bytes=2000)
    with serving(model, places=1, most_waiting=1, limits=limits) as (address, _):
        url = f"{address}/v1/completions"
        assert post(url, json={"prompt": "a"}).status_code == 401
        assert get(f"{address}/v1/models").status_code == 401
        assert get(f"{address}/health").status_code == 200
        headers = {"authorization": "Bearer secret"}
        assert post(url, json={"prompt": "a", "max_tokens": 2}, headers=headers).status_code == 200
        assert post(url, json={"prompt": "a" * 3000}, headers=headers).status_code == 413
        # In chunks no length is told.
        large = json.dumps({"prompt": "a" * 3000, "max_tokens": 2}).encode()
        chunked = {**headers, "content-type": "application/json"}
        pieces = lambda data: (data[i : i + 500] for i in range(0, len(data), 500))  # noqa: E731
        assert post(url, content=pieces(large), headers=chunked).status_code == 413
        small = json.dumps({"prompt": "a" * 200, "max_tokens": 2}).encode()
        assert post(url, content=pieces(small), headers=chunked).status_code == 200
        body = {"prompt": "a", "max_tokens": 200}
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(post, url, json=body, headers=headers) for _ in range(8)]
        assert {one.result().status_code for one in asked} == {200, 429}
        assert all(one.result().headers["retry-after"] for one in asked if one.result().status_code == 429)


def test_a_broken_engine_tells_those_who_wait(model, monkeypatch):
    with serving(model) as (address, worker):
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: 1 / 0)
        response = post(f"{address}/v1/completions", json={"prompt": "a"})
        assert response.status_code == 500 and "division" in response.json()["error"]["message"]
        monkeypatch.undo()
        assert post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_refusals_have_time_while_others_are_answered(model, monkeypatch):
    """At once where nobody waits: here a refusal would take longer than the test may."""
    with serving(model, limits=Limits(refusal_seconds=300)) as (address, _):
        assert refused(address, {"made_up": 1})["code"] == "unsupported_parameter"
    monkeypatch.setattr("pennyweight.serve.connections.REFUSAL_SECONDS", 0.3)
    with serving(model, limits=Limits(refusal_seconds=0.3)) as (address, worker):
        step = worker.batch.engine.step
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: (time.sleep(0.02), step(rows))[1])
        body = {"prompt": "a", "max_tokens": 200, "stream": True}
        with streaming("POST", f"{address}/v1/completions", json=body):
            for ask in (
                lambda: refused(address, {"made_up": 1}),
                lambda: get(f"{address}/v1/models", headers={"host": "evil.example"}),
                lambda: nonsense(address),
            ):
                started = time.monotonic()
                ask()
                assert time.monotonic() - started >= 0.3
        assert empties(worker)
        assert nonsense(address).startswith(b"HTTP/1.1 400")


def nonsense(address: str) -> bytes:
    with connection(address) as client:
        client.sendall(b"no HTTP\r\n\r\n")
        return received(client)
