"""What stands before the server's requests: names, keys, sizes, and refusals in OpenAI's shape."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REFUSALS = frozenset((400, 401, 403, 404, 405, 408, 413))
_SHOWN = 500  # characters of a message: what a client sent may stand in it


@dataclass(frozen=True)
class Limits:
    """`key`: what clients have to present, if anything. `hosts`: names by which the server may be called beside those
    of this machine for itself, in lower case; 0.0.0.0 and :: add every address at which it is reached. `body_bytes`: of
    a request, whose bytes may be `silence` seconds apart and which takes `body_seconds` in all. `most_tokens`: of an
    answer. `stops`, `stop_characters`: stop strings and their length. `refusal_seconds`: what a refusal takes while
    others are being answered, or `refusal_share` times what it took to find out, if that is more, so that who asks in a
    loop for what is not done takes little time from them."""

    key: str | None = None
    hosts: frozenset[str] = frozenset()
    body_bytes: int = 2**20
    silence: float = 10.0
    body_seconds: float = 60.0
    most_tokens: int = 4096
    stops: int = 4
    stop_characters: int = 256
    refusal_seconds: float = 0.5
    refusal_share: float = 4.0

    def __post_init__(self) -> None:
        """Raises ValueError for a key that would let everybody in."""
        if self.key is not None and not self.key.strip():
            raise ValueError("the API key is empty, which would let everybody in; give one, or none at all")

    def may_be_called(self, name: str, address: str) -> bool:
        """Whether a request that came in at `address` may call the server so. Otherwise anybody's page that lets its
        own name point to this machine would read whatever the server says."""
        if name in self.hosts or name == "localhost":
            return True
        called, anywhere = _ip(name), any(ip is not None and ip.is_unspecified for ip in map(_ip, self.hosts))
        return called is not None and (called.is_loopback or (anywhere and called == _ip(address)))


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
        self.body = {
            "error": {"message": _shown(message), "type": kind, "param": param and _shown(param), "code": code}
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def _shown(text: str) -> str:
    """Bounded, and what can be sent: half of a surrogate pair cannot."""
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return text.encode(errors="replace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refused:
    return Refused(400, message, "invalid_request_error", param=param, code=code)


def unsupported(name: str, more: str = "") -> Refused:
    return invalid(f"{name} is not supported by this server{more}", name, "unsupported_parameter")


def busy(waiting: int) -> Refused:
    said = f"{waiting} requests are being answered or wait; try again in a moment"
    return Refused(429, said, "rate_limit_error", code="queue_full", headers={"Retry-After": "1"})


def stopping() -> Refused:
    said = "the server is shutting down"
    return Refused(503, said, "server_error", code="shutting_down", headers={"Retry-After": "10"})


class Guard:
    """Names, keys and sizes, before anything is parsed. A body is read to its end here, counted as it comes: what a
    client says of its length may be missing or wrong."""

    def __init__(self, app: ASGIApp, limits: Limits, busy: Callable[[], bool]) -> None:
        """`busy`: whether anybody is being answered."""
        self.app, self.limits, self.busy = app, limits, busy
        self._key = None if limits.key is None else limits.key.encode(errors="surrogateescape")
        self._line = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        loop = asyncio.get_running_loop()
        began = loop.time()

        async def unhurried(message: Message) -> None:
            if message.get("status", 0) in _REFUSALS and self.busy():
                took = loop.time() - began
                await asyncio.sleep(max(self.limits.refusal_seconds, self.limits.refusal_share * took))
            await send(message)

        try:
            self._check_names(scope)
            if not scope["path"].startswith("/v1/"):
                return await self.app(scope, receive, unhurried)
            self._check_key(scope)
            await self._turn()
            body = await self._body(scope, receive)
            began = loop.time()
        except Refused as err:
            return await err.response()(scope, receive, unhurried)
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def again() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            first, whole = whole, None
            return first

        return None if body is None else await self.app(scope, again, unhurried)

    async def _turn(self) -> None:
        """Requests begin one by one, a round of the event loop each: what takes no time (/health, tokens of answers)
        does not wait until all of forty that came together have begun."""
        async with self._line:
            await asyncio.sleep(0)

    def _check_names(self, scope: Scope) -> None:
        address = (scope.get("server") or ("", None))[0]
        given = {kind: _values(scope, kind) for kind in (b"host", b"origin")}
        names = [_name_of(value) for value in given[b"host"]] or [""]
        names += [_origin_of(value) for value in given[b"origin"]]
        for name in names:
            if not self.limits.may_be_called(name, address):
                said = f"this server does not answer to {name!r}; start it with --allow-host if it should"
                raise Refused(403, said, "invalid_request_error", code="host_not_allowed")

    def _check_key(self, scope: Scope) -> None:
        given = b"".join(_values(scope, b"authorization")[:1]).removeprefix(b"Bearer ")
        if self._key is not None and not secrets.compare_digest(given, self._key):
            raise Refused(401, "wrong or missing API key", "invalid_request_error", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of a request, or None if the client has gone."""
        limits, parts, size, more = self.limits, [], 0, True
        told = b"".join(_values(scope, b"content-length")[:1])[:18]  # as many digits as make a number quickly
        close = {"Connection": "close"}  # what is left of it is not read
        deadline = asyncio.get_running_loop().time() + limits.body_seconds
        while more and size <= limits.body_bytes and not (told.isdigit() and int(told) > limits.body_bytes):
            try:
                until = min(deadline, asyncio.get_running_loop().time() + limits.silence)
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                said = f"the request was not there after {limits.body_seconds:g} s, or {limits.silence:g} s of silence"
                late = Refused(408, said, "invalid_request_error", code="request_timeout", headers=close)
                raise late from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
        if more or size > limits.body_bytes:
            said = f"a request has at most {limits.body_bytes} bytes"
            raise Refused(413, said, "invalid_request_error", code="request_too_large", headers=close)
        return b"".join(parts)


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _name_of(host: bytes) -> str:
    """The name in a Host header, without its port; what is malformed is no name of ours."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        name, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = text.partition(":")
    return name.removesuffix(".") if not port or port.isdigit() else text


def _origin_of(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1")).hostname or "null"
    except ValueError:
        return "null"


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
