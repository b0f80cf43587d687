"""An OpenAI-compatible server for one model: completions, chat, streaming, limits, metrics, a plain chat page.

What is asked for and cannot be done (tools, log probabilities, penalties by count) is refused by name rather than
ignored. One thread runs the engine, and requests of many clients share its steps; two others read requests, so that the
event loop is never busy for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from pennyweight.runtime.model import Model
from pennyweight.serve import answers
from pennyweight.serve.guard import Guard, Limits, Refused
from pennyweight.serve.protocol import Chat, Completion
from pennyweight.serve.worker import Worker


def create_app(model: Model, worker: Worker, limits: Limits | None = None) -> FastAPI:
    """The application; its shutdown stops the worker."""
    server = answers.Answers(model, worker, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)

    # No pages about the API: FastAPI's load scripts from elsewhere.
    app = FastAPI(title="pennyweight", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.openapi = cache(lambda: _openapi(app))
    app.state.close = server.close
    app.add_middleware(Guard, limits=server.limits, busy=lambda: worker.pending > 0)

    @app.exception_handler(Refused)
    async def refused(request: Request, err: Refused) -> JSONResponse:
        return err.response()

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, err: HTTPException) -> JSONResponse:
        method, path = request.method, request.url.path
        told = {404: f"there is no {method} {path} here", 405: f"{method} is not done at {path}"}
        said = told.get(err.status_code, str(err.detail))
        return Refused(err.status_code, said, "invalid_request_error", headers=dict(err.headers or {})).response()

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
    async def chat(request: Request) -> Response:
        return await server.reply(Chat, request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server.reply(Completion, request)

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


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description at /openapi.json. Bodies are read off the event loop, so FastAPI does not know what they hold."""
    found = get_openapi(title=app.title, version=metadata.version("pennyweight"), routes=app.routes)
    for path, kind in (("/v1/chat/completions", Chat), ("/v1/completions", Completion)):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found["components"]["schemas"] |= schema.pop("$defs", {}) | {kind.__name__: schema}
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        found["paths"][path]["post"]["requestBody"] = {"required": True, "content": body}
    return found
