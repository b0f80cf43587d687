"""What stands before the server's requests: keys, sizes, and refusals in OpenAI's shape."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """`key`: what clients have to present, if anything. `body_bytes`: of a request. `most_tokens`: of an answer."""

    key: str | None = None
    body_bytes: int = 2**20
    most_tokens: int = 4096


class Refused(Exception):
    """An error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refused:
    return Refused(400, message, "invalid_request_error", param=param, code=code)


def stopping() -> Refused:
    said = "the server is shutting down"
    return Refused(503, said, "server_error", code="shutting_down", headers={"Retry-After": "10"})


class Guard:
    """Keys and sizes, before anything is parsed. A body is read to its end here, counted as it comes: what a client
    says of its length may be missing or wrong."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        key, given = self.limits.key, headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if key is not None and not secrets.compare_digest(given, key.encode()):
            denied = Refused(401, "wrong or missing API key", "invalid_request_error", code="invalid_api_key")
            return await denied.response()(scope, receive, send)
        parts, size, more = [], 0, True
        told = headers.get(b"content-length", b"0")
        while more and size <= self.limits.body_bytes and not (told.isdigit() and int(told) > self.limits.body_bytes):
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
        if more or size > self.limits.body_bytes:
            said = f"a request has at most {self.limits.body_bytes} bytes"
            close = {"Connection": "close"}  # what is left of it is not read
            large = Refused(413, said, "invalid_request_error", code="request_too_large", headers=close)
            return await large.response()(scope, receive, send)
        whole: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def again() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            first, whole = whole, None
            return first

        return await self.app(scope, again, send)
