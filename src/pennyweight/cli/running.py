"""penny run, penny serve, penny bench: a model at work in the native engine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from pennyweight.cli._common import Json, Model, app, errors, located, quiet_libraries, say


@dataclass(frozen=True)
class EngineOptions:
    """What every command that starts an engine takes: Engine's settings by their names there."""

    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: one per core.")] = 0
    force_threads: Annotated[
        bool, typer.Option("--force-threads", help="Start so many threads even where there are fewer processors.")
    ] = False
    cache: Annotated[
        str,
        typer.Option(
            help="How keys and values are kept: float16, float32, or int8: half the memory, for a KL of 0.001 to 0.004 "
            "nats a token where it was measured."
        ),
    ] = "float16"
    kernels: Annotated[
        str, typer.Option(help='An instruction set by name (avx512, avx2, neon, scalar), or "best".')
    ] = "best"
    sparsity: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of input channels left out, instead of what the model's blocks say; 0: none."
        ),
    ] = None
    mapped: Annotated[
        bool,
        typer.Option(
            "--mmap",
            help="Leave weights in their file where that lies in the order of the kernels: starts sooner, is slower.",
        ),
    ] = False


def _takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command EngineOptions' options in place of its parameter `engine`."""
    own, more = signature(command, eval_str=True), signature(EngineOptions, eval_str=True)

    def run_command(**given: Any) -> None:
        options = EngineOptions(**{name: given.pop(name) for name in more.parameters})
        command(**given, engine=options)

    parameters = [p for p in own.parameters.values() if p.name != "engine"] + list(more.parameters.values())
    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
    run_command.__name__, run_command.__doc__ = command.__name__, command.__doc__
    run_command.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(run_command)["__signature__"] = own.replace(parameters=parameters)  # what typer reads
    return run_command


@app.command()
@_takes_engine_options
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="0 always takes the likeliest token. This and the next four: by default as the model says.",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, max=100)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Ask in the model's chat template (default: where it has one).")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Most tokens of prompt and answer; 0: what both need.")] = 0,
    draft: Annotated[
        str | None, typer.Option(help="A smaller model of the same vocabulary, as MODEL, to guess ahead.")
    ] = None,
    lookup: Annotated[bool, typer.Option(help="Guess ahead what followed the same words before.")] = False,
    as_json: Json = False,
    *,
    engine: EngineOptions,
) -> None:
    """Continue a text, streaming."""
    with errors():
        quiet_libraries()
        from pennyweight.runtime.engine import Engine
        from pennyweight.runtime.generate import Batch, Request
        from pennyweight.runtime.model import open_model
        from pennyweight.runtime.sample import sampling_of
        from pennyweight.runtime.speculate import DraftModel, PromptLookup
        from pennyweight.runtime.words import Words

        place, draft_place = located(model), None if draft is None else located(draft)
        started = time.perf_counter()
        opened = open_model(place, **asdict(engine))
        _tell(opened.notes)
        loaded = time.perf_counter() - started
        sampling = sampling_of(
            opened.defaults,
            draws=False,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        text = sys.stdin.read() if prompt == "-" else prompt
        converses = chat if chat is not None else opened.converses
        ids = opened.chat([{"role": "user", "content": text}]) if converses else opened.encode(text)
        capacity = context or min(len(ids) + max_tokens, opened.engine.context)
        guesser = None
        if draft_place is not None:
            smaller = Engine(draft_place, **asdict(replace(engine, sparsity=None)))
            _tell(smaller.notes)
            if smaller.vocab_size != opened.engine.vocab_size:
                raise ValueError(
                    f"{draft} has {smaller.vocab_size} tokens, {model} {opened.engine.vocab_size}; a draft model needs "
                    "the same vocabulary"
                )
            guesser = lambda: DraftModel(smaller, min(capacity, smaller.context))  # noqa: E731
        elif lookup:
            guesser = PromptLookup
        batch = Batch(opened.engine, places=1, capacity=capacity, guesser=guesser)
        words = Words(opened.tokenizer, stop=stop or (), after=() if converses else ids, special=opened.special)
        request = batch.submit(Request(ids, max_tokens, sampling, opened.stop))
        started, first, steps = time.perf_counter(), 0.0, 0
        while batch.busy and not words.stopped:
            for _, tokens in batch.step():
                first = first or time.perf_counter() - started
                steps += 1
                _stream(words.push(tokens), as_json)
        _stream(words.end(), as_json)
        if request.error is not None:
            raise RuntimeError(str(request.error)) from request.error
        seconds = time.perf_counter() - started - first
        written = len(request.answer)
        figures = {
            "prompt_tokens": len(ids),
            "tokens": written,
            "load_seconds": round(loaded, 3),
            "ttft_seconds": round(first, 4),
            "tokens_per_second": round((written - 1) / seconds, 1) if written > 1 else None,
            "tokens_per_step": round(written / steps, 2) if steps else None,
        }
        if as_json:
            finish = "stop" if words.stopped else request.finish
            print(json.dumps({"text": words.text, "finish": finish, **figures}))
        else:
            print()
            print("  ".join(f"{name} {value}" for name, value in figures.items()), file=sys.stderr)


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        say(note)


def _stream(text: str, as_json: bool) -> None:
    if text and not as_json:
        print(text, end="", flush=True)


@app.command()
@_takes_engine_options
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 256,
    new: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Json = False,
    *,
    engine: EngineOptions,
) -> None:
    """Time to first token, time per token, and how much of this machine's memory bandwidth that is."""
    with errors():
        quiet_libraries()
        from pennyweight.model.demand import Workload
        from pennyweight.prices import measure
        from pennyweight.runtime.bench import bench as run_bench
        from pennyweight.runtime.engine import Engine
        from pennyweight.units import show_bytes, show_seconds

        opened = Engine(located(model), context=prompt + new, **asdict(engine))
        _tell(opened.notes)
        found = run_bench(opened, Workload(prompt=prompt, new=new, concurrency=concurrency), repeats=repeats)
        bandwidth = measure.machine().bandwidth
        share = found.bytes_per_step / found.tpot_p05 / bandwidth
        if as_json:
            print(json.dumps({**found.to_json(), "bandwidth": bandwidth, "bandwidth_share": share}))
            return
        print(f"engine      {found.kernels}, {found.threads} threads, {engine.cache} keys and values")
        first, each, best = (show_seconds(s) for s in (found.ttft, found.tpot, found.tpot_p05))
        peak, read = show_bytes(found.peak_rss_bytes), show_bytes(found.bytes_per_step)
        print(f"prompt      {found.prefill_tokens_per_second:.0f} tokens/s, first token of {prompt} after {first}")
        print(f"writing     {found.writing_tokens_per_second:.1f} tokens/s; a token takes {each} (p05 {best})")
        print(f"throughput  {found.tokens_per_second:.1f} tokens/s written, reading the prompts included")
        print(f"memory      {peak} at most; {read} read per step, {share:.0%} of {bandwidth / 1e9:.0f} GB/s")
        joules = found.joules_per_token
        print(f"energy      {f'{joules:.3g} J per token ({found.energy})' if joules is not None else found.energy}")


@app.command()
@_takes_engine_options
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients may call the server; may be given several times.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="PENNY_API_KEY", help="Clients have to present this key.")] = None,
    places: Annotated[int, typer.Option(min=1, max=1024, help="Texts written at once.")] = 8,
    most_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    context: Annotated[
        int, typer.Option(min=0, help="Tokens of a text, prompt included; 0: what the model allows.")
    ] = 0,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "1MB",
    lookup: Annotated[bool, typer.Option(help="Guess ahead what followed the same words before.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Serve a model as OpenAI's API does, with a chat page at /. Ctrl-C gives answers a few seconds to end."""
    with errors(), contextlib.suppress(KeyboardInterrupt), _listening(host, port) as listening:
        quiet_libraries()
        from pennyweight.runtime.generate import Batch
        from pennyweight.runtime.model import open_model
        from pennyweight.runtime.speculate import PromptLookup
        from pennyweight.serve.answers import PATIENCE
        from pennyweight.serve.app import create_app
        from pennyweight.serve.connections import Server
        from pennyweight.serve.guard import Limits
        from pennyweight.serve.worker import Worker
        from pennyweight.units import parse_bytes

        if key is None:  # an empty variable counts as none to typer, and somebody meant to set a key
            key = os.environ.get("PENNY_API_KEY")
        bound = listening.getsockname()
        names = frozenset(name.lower() for name in (host, bound[0], *(allow_host or ())))
        limits = Limits(key=key, hosts=names, body_bytes=parse_bytes(max_body))
        opened = open_model(located(model), context=context or None, **asdict(engine))
        _tell(opened.notes)
        batch = Batch(opened.engine, places=places, guesser=PromptLookup if lookup else None)
        app = create_app(opened, Worker(batch, most_waiting=most_waiting), limits)
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}"
        print(f"{opened.name} at {address}/v1, chat page at {address}/", flush=True)
        Server(app, listening, patience=int(PATIENCE) + 4).run()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens before the model is read, which takes a while: nobody else can have the port meanwhile."""
    if not host:
        raise ValueError("--host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 lets others in")
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(512)
    except OSError as err:
        made.close()
        raise ValueError(f"cannot listen on {host}:{port}: {err.strerror}; --port picks another") from err
    return made
