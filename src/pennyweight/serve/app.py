"""An OpenAI-compatible server for one model: completions, chat, streaming, limits, metrics, a plain chat page.

What is asked for and cannot be done (tools, log probabilities, penalties by count) is refused by name rather than
ignored. One thread runs the engine; requests of many clients share its steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from pennyweight.runtime.model import Model
from pennyweight.serve import answers
from pennyweight.serve.guard import Guard, Limits, Refused, invalid
from pennyweight.serve.protocol import Chat, Completion, plain
from pennyweight.serve.worker import Worker


class Server(uvicorn.Server):
    """Lets answers end, or tells who waits for them, before connections are closed."""

    def __init__(self, app: FastAPI, **settings: Any) -> None:
        settings = {"log_level": "warning", "timeout_graceful_shutdown": int(answers.PATIENCE) + 4, **settings}
        super().__init__(uvicorn.Config(app, **settings))
        self._closing = app.state.close

    async def shutdown(self, sockets: Any = None) -> None:
        await self._closing()
        await super().shutdown(sockets)


def create_app(model: Model, worker: Worker, limits: Limits | None = None) -> FastAPI:
    """The application; its shutdown stops the worker."""
    server = answers.Answers(model, worker, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="pennyweight", lifespan=lifespan, docs_url=None, redoc_url=None)

    app.state.close = server.close
    app.add_middleware(Guard, limits=server.limits)

    @app.exception_handler(Refused)
    async def refused(request: Request, err: Refused) -> JSONResponse:
        return err.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, err: RequestValidationError) -> JSONResponse:
        first = err.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return invalid(f"{param or 'the body'}: {first['msg']}", param).response()

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, err: HTTPException) -> JSONResponse:
        said = {404: "there is no {} {} here", 405: "{} is not done at {}"}.get(err.status_code, str(err.detail))
        asked = said.format(request.method, request.url.path)
        return Refused(err.status_code, asked, "invalid_request_error", headers=dict(err.headers or {})).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, err: Exception) -> JSONResponse:
        return Refused(500, f"the server has failed: {err}", "server_error").response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        server.check_name(name)
        return described()

    def described() -> dict[str, Any]:
        known = {"id": model.name, "object": "model", "created": server.created, "owned_by": "pennyweight"}
        return {**known, "max_model_len": worker.batch.capacity, "chat": model.converses}

    @app.post("/v1/chat/completions")
    async def chat(ask: Chat, request: Request) -> Response:
        server.check(ask)
        try:
            prompt = model.chat([plain(message) for message in ask.messages])
        except ValueError as err:
            raise invalid(str(err), "messages") from err
        made = server.answers([prompt], ask, ask.max_completion_tokens or ask.max_tokens)
        return await server.respond(made, ask, request, chat=True)

    @app.post("/v1/completions")
    async def completions(ask: Completion, request: Request) -> Response:
        server.check(ask)
        given: list[Any] = ask.prompt if isinstance(ask.prompt, list) else [ask.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        if not given:
            raise invalid("the prompt is empty", "prompt")
        prompts = [model.encode(one) if isinstance(one, str) else one for one in given]
        return await server.respond(server.answers(prompts, ask, ask.max_tokens or 16), ask, request, chat=False)

    @app.get("/health")
    async def health() -> JSONResponse:
        well = worker.alive
        return JSONResponse({"status": "ok" if well else "the engine has stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse((resources.files("pennyweight.serve") / "chat.html").read_text(encoding="utf-8"))

    return app
