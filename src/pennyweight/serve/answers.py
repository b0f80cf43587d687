"""Answers on their way to clients: from the worker's thread into the event loop, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from pennyweight.runtime.generate import Request as Wanted
from pennyweight.runtime.generate import TooLong
from pennyweight.runtime.model import Model
from pennyweight.runtime.sample import sampling_of
from pennyweight.runtime.words import Words
from pennyweight.serve.guard import Limits, Refused, busy, invalid, stopping
from pennyweight.serve.protocol import LARGE_BYTES, A, Ask, Chat, plain, prompts, read
from pennyweight.serve.worker import Full, Stopping, Worker

PATIENCE = 5.0
"""Seconds that answers get to end once the server is told to stop."""
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """What /metrics tells."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("penny_requests", "Requests by outcome.", ["outcome"], registry=self.registry)
        self.prompt = Counter("penny_prompt_tokens", "Prompt tokens.", registry=self.registry)
        self.tokens = Counter("penny_generated_tokens", "Generated tokens.", registry=self.registry)
        pending = Gauge("penny_requests_pending", "Requests waiting or being answered.", registry=self.registry)
        pending.set_function(lambda: worker.pending)
        self.first = Histogram("penny_ttft_seconds", "Time to first token.", registry=self.registry, buckets=_SECONDS)
        self.whole = Histogram("penny_request_seconds", "Time to last token.", registry=self.registry, buckets=_SECONDS)


class Answer:
    """One text on its way to a client."""

    def __init__(self, server: Answers, prompt: list[int], ask: Ask, number: int, most: int) -> None:
        model = server.model
        sampling = sampling_of(
            model.defaults,
            draws=True,
            seed=(secrets.randbits(31) if ask.seed is None else ask.seed % 2**31) + number,
            **{name: getattr(ask, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
        )
        stop = frozenset(ask.stop_token_ids) | (frozenset() if ask.ignore_eos else model.stop)
        wanted = Wanted(prompt, most, sampling, stop, ask.min_tokens)
        after = () if isinstance(ask, Chat) else prompt
        self.words = Words(model.tokenizer, stop=ask.stop, after=after, special=model.special, least=ask.min_tokens)
        self.queue = queue = asyncio.Queue[tuple[list[int], str | Exception | None]]()
        self.prompt, self.tokens, self.number, self.finish = prompt, 0, number, ""
        self._server, self._started = server, time.monotonic()
        loop = asyncio.get_running_loop()

        def hear(tokens: list[int], finish: str | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever listened
                loop.call_soon_threadsafe(queue.put_nowait, (tokens, finish))

        self._ticket = server.worker.submit(wanted, hear)
        server.live.add(self)

    def leave(self) -> None:
        """Nobody listens any more, or there is nothing more to hear: the place goes to someone else."""
        self._server.live.discard(self)
        self._server.worker.cancel(self._ticket)

    def give_up(self) -> None:
        """The server stops before the answer has ended."""
        self.queue.put_nowait(([], Stopping()))

    async def text(self) -> str:
        return "".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it comes; `finish` is set after the last. Raises Refused if the engine fails or the server stops."""
        metrics = self._server.metrics
        metrics.prompt.inc(len(self.prompt))
        try:
            while not self.finish:
                tokens, finish = await self.queue.get()
                if isinstance(finish, Stopping):
                    raise stopping()
                if isinstance(finish, Exception):
                    raise Refused(500, f"the engine stopped: {finish}", "server_error") from finish
                if tokens and not self.tokens:
                    metrics.first.observe(time.monotonic() - self._started)
                self.tokens += len(tokens)
                metrics.tokens.inc(len(tokens))
                piece = self.words.push(tokens)
                if self.words.stopped:
                    self.finish = "stop"
                elif finish is not None:
                    piece += self.words.end()
                    self.finish = "stop" if self.words.stopped else finish
                if piece:
                    yield piece
            metrics.requests.labels("answered").inc()
            metrics.whole.observe(time.monotonic() - self._started)
        finally:
            if not self.finish:
                metrics.requests.labels("abandoned").inc()
            self.leave()


class Answers:
    """All answers that one model's server is giving."""

    def __init__(self, model: Model, worker: Worker, limits: Limits) -> None:
        self.model, self.worker, self.limits = model, worker, limits
        self.metrics = Metrics(worker)
        self.created = int(time.time())
        self.live: set[Answer] = set()
        self.closing = False
        self._most = worker.most_waiting + worker.batch.places  # requests at once, in whatever state
        self._preparing = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="penny-prepare")
        self._large = asyncio.Lock()  # one of them at a time; small ones pass by

    async def close(self) -> None:
        """Take no more requests; answers get a while to end, and whoever waits then is told."""
        self.closing = True
        deadline = time.monotonic() + PATIENCE
        while self.live and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for answer in self.live:
            answer.give_up()
        self._threads.shutdown(wait=False)

    def check_name(self, name: str) -> None:
        if name and name != self.model.name:
            said = f"the model {name[:50]!r} does not exist; this server runs {self.model.name!r}"
            raise Refused(404, said, "invalid_request_error", param="model", code="model_not_found")

    async def reply(self, kind: type[A], request: Request) -> Response:
        """To a request of this kind. Raises Refused; nothing that was begun goes on then."""
        if self.closing:
            raise stopping()
        if self._preparing >= self._most:
            self.metrics.requests.labels("refused").inc()
            raise busy(self._preparing)
        body = await request.body()
        self._preparing += 1
        try:  # in a thread: it may take seconds, and meanwhile others want to hear something
            loop = asyncio.get_running_loop()
            async with self._large if len(body) > LARGE_BYTES else contextlib.nullcontext():
                ask, asked = await loop.run_in_executor(self._threads, self._prepare, kind, body)
        finally:
            self._preparing -= 1
        made: list[Answer] = []
        try:
            for prompt in asked:
                for _ in range(ask.n):
                    made.append(self._answer(prompt, ask, len(made)))
            return await self._respond(made, ask, request, chat=isinstance(ask, Chat))
        except BaseException:
            for answer in made:
                answer.leave()
            raise

    def _prepare(self, kind: type[A], body: bytes) -> tuple[A, list[list[int]]]:
        """What is asked for, and its prompts in tokens."""
        model, capacity = self.model, self.worker.batch.capacity
        ask = read(kind, body, self.limits, capacity)
        self.check_name(ask.model)
        if ask.n > self._most:
            raise invalid(f"n: at most {self._most} answers at once", "n")
        if ask.min_tokens > (ask.most or capacity):
            raise invalid("min_tokens is more than the most that may be written", "min_tokens")
        wrong = [token for token in ask.stop_token_ids if not 0 <= token < model.engine.vocab_size]
        if wrong:
            said = f"token {wrong[0]} is outside the vocabulary of {model.engine.vocab_size}"
            raise invalid(said, "stop_token_ids", "invalid_token")
        with _refusing("messages" if isinstance(ask, Chat) else "prompt"):
            if isinstance(ask, Chat):
                conversation = [plain(message) for message in ask.messages]
                asked = [model.chat(conversation, ask.chat_template_kwargs, capacity - 1)]
            else:
                given = prompts(ask.prompt, self._most // ask.n)
                asked = [model.encode(one, capacity - 1) if isinstance(one, str) else one for one in given]
            for prompt in asked:
                self.worker.batch.check(Wanted(prompt, 1))
        return ask, asked

    def _answer(self, prompt: list[int], ask: Ask, number: int) -> Answer:
        room = self.worker.batch.capacity - len(prompt)
        limit = min(self.limits.most_tokens, ask.most or room, max(1, room))
        try:
            return Answer(self, prompt, ask, number, limit)
        except Full as err:
            self.metrics.requests.labels("refused").inc()
            raise busy(self.worker.pending) from err
        except Stopping as err:
            raise stopping() from err

    async def _respond(self, answers: list[Answer], ask: Ask, request: Request, *, chat: bool) -> Response:
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.model.name,
        }
        if ask.stream:
            if chat:
                head["object"] = "chat.completion.chunk"
            usage = bool(ask.stream_options.include_usage)
            return _Stream(_events(head, answers, chat=chat, usage=usage), answers)
        texts = await _unless_gone(request, answers)
        choices: list[dict[str, Any]] = []
        for answer, text in zip(answers, texts, strict=True):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
            choices.append({"index": answer.number, **said, "logprobs": None, "finish_reason": answer.finish})
        return JSONResponse({**head, "choices": choices, "usage": _usage(answers)})


@contextlib.contextmanager
def _refusing(param: str) -> Iterator[None]:
    """What cannot be done is the client's mistake, told as such."""
    try:
        yield
    except TooLong as err:
        raise invalid(str(err), param, "context_length_exceeded") from err
    except ValueError as err:
        raise invalid(str(err), param, f"invalid_{param}") from err


class _Stream(EventSourceResponse):
    """Server-sent events whose answers are left whatever becomes of the client, even before the first event."""

    def __init__(self, events: AsyncIterator[str], answers: list[Answer]) -> None:
        # A stream ends with [DONE] or an error, also when the server stops: nobody cuts it before it is told to.
        super().__init__(events, sep="\n", shutdown_event=anyio.Event(), shutdown_grace_period=PATIENCE + 2)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.leave()


async def _unless_gone(request: Request, answers: list[Answer]) -> list[str]:
    """The texts of all answers; given up when the client hangs up. Raises Refused."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def listen() -> list[str]:
        return list(await asyncio.gather(*(answer.text() for answer in answers)))

    texts, gone = asyncio.create_task(listen()), asyncio.create_task(watch())
    try:
        await asyncio.wait((texts, gone), return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            raise Refused(499, "the client has closed the connection", "invalid_request_error")
        return await texts
    finally:
        texts.cancel()
        gone.cancel()
        await asyncio.gather(texts, gone, return_exceptions=True)
        for answer in answers:
            answer.leave()


async def _events(head: dict[str, Any], answers: list[Answer], *, chat: bool, usage: bool) -> AsyncIterator[str]:
    """Chunks of all answers as they come, then the usage if asked for, then [DONE]."""
    merged: asyncio.Queue[tuple[Answer, str | Exception | None]] = asyncio.Queue()

    async def follow(answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                merged.put_nowait((answer, piece))
            merged.put_nowait((answer, None))
        except Refused as err:
            merged.put_nowait((answer, err))

    def chunk(answer: Answer, said: dict[str, Any], finish: str | None) -> str:
        choice = {"index": answer.number, **said, "logprobs": None, "finish_reason": finish}
        return json.dumps({**head, "choices": [choice], **({"usage": None} if usage else {})}, ensure_ascii=False)

    tasks = [asyncio.create_task(follow(answer)) for answer in answers]
    try:
        for answer in answers if chat else ():
            yield chunk(answer, {"delta": {"role": "assistant", "content": ""}}, None)
        going = len(answers)
        while going:
            answer, piece = await merged.get()
            if isinstance(piece, Refused):
                yield json.dumps(piece.body)
                return
            if piece is None:
                going -= 1
                yield chunk(answer, {"delta": {}} if chat else {"text": ""}, answer.finish)
            else:
                yield chunk(answer, {"delta": {"content": piece}} if chat else {"text": str(piece)}, None)
        if usage:
            yield json.dumps({**head, "choices": [], "usage": _usage(answers)})
        yield "[DONE]"
    finally:
        for task in tasks:
            task.cancel()


def _usage(answers: list[Answer]) -> dict[str, int]:
    prompt = sum(len(answer.prompt) for answer in {id(a.prompt): a for a in answers}.values())
    written = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
