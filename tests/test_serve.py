"""The server, over real sockets: OpenAI's client understands it, limits hold, nothing is left behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
import httpx2 as httpx
import openai

from pennyweight.runtime.generate import Batch, Request
from pennyweight.runtime.model import open_model
from pennyweight.serve.app import Server, create_app
from pennyweight.serve.guard import Limits
from pennyweight.serve.worker import Worker

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(create_app(model, worker, limits), port=port)
    STARTED[f"http://127.0.0.1:{port}"] = server
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", worker
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
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as response:
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
        ("/v1/completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 1.0}, 400, "repetition_penalty"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools"),
        ("/v1/embeddings", {}, 404, "there is no POST"),
    ],
)
def test_errors_have_openais_shape(address, path, body, status, said):
    response = httpx.post(address + path, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_malformed_json_is_an_error_too(address):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{address}/v1/completions", content=b"{no", headers=headers)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_models_health_metrics_page(address, client, model):
    assert [m.id for m in client.models.list()] == [model.name]
    assert client.models.retrieve(model.name).owned_by == "pennyweight"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    client.completions.create(model=model.name, prompt="a", max_tokens=1)
    metrics = httpx.get(f"{address}/metrics").text
    assert 'penny_requests_total{outcome="answered"}' in metrics and "penny_ttft_seconds_bucket" in metrics
    page = httpx.get(address + "/")
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
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as response:
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
            head = ("POST /v1/completions HTTP/1.1", "Host: a", "Content-Type: application/json")
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
        ask = lambda tokens, stream: httpx.post(  # noqa: E731
            url, json={"prompt": "a", "max_tokens": tokens, "stream": stream}, timeout=60
        )
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
        whole = httpx.post(f"{address}/v1/completions", json=ask)
        assert whole.status_code == 500 and "no number" in whole.json()["error"]["message"]
        events = httpx.post(f"{address}/v1/completions", json={**ask, "stream": True}).text
        assert "no number" in events and "[DONE]" not in events
        monkeypatch.undo()
        assert httpx.post(f"{address}/v1/completions", json=ask).status_code == 200


def test_what_is_not_there_has_openais_shape_too(address):
    for found in (httpx.get(f"{address}/v1/completions"), httpx.post(f"{address}/health"), httpx.get(f"{address}/v2")):
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
        assert httpx.post(url, json={"prompt": "a"}).status_code == 401
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        headers = {"authorization": "Bearer secret"}
        assert httpx.post(url, json={"prompt": "a", "max_tokens": 2}, headers=headers).status_code == 200
        assert httpx.post(url, json={"prompt": "a" * 3000}, headers=headers).status_code == 413
        # In chunks no length is told.
        large = json.dumps({"prompt": "a" * 3000, "max_tokens": 2}).encode()
        chunked = {**headers, "content-type": "application/json"}
        pieces = lambda data: (data[i : i + 500] for i in range(0, len(data), 500))  # noqa: E731
        assert httpx.post(url, content=pieces(large), headers=chunked).status_code == 413
        small = json.dumps({"prompt": "a" * 200, "max_tokens": 2}).encode()
        assert httpx.post(url, content=pieces(small), headers=chunked).status_code == 200
        body = {"prompt": "a", "max_tokens": 200}
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(httpx.post, url, json=body, headers=headers, timeout=60) for _ in range(8)]
        assert {one.result().status_code for one in asked} == {200, 429}
        assert all(one.result().headers["retry-after"] for one in asked if one.result().status_code == 429)


def test_a_broken_engine_tells_those_who_wait(model, monkeypatch):
    with serving(model) as (address, worker):
        monkeypatch.setattr(worker.batch.engine, "step", lambda rows: 1 / 0)
        response = httpx.post(f"{address}/v1/completions", json={"prompt": "a"})
        assert response.status_code == 500 and "division" in response.json()["error"]["message"]
        monkeypatch.undo()
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 200
