"""Connections of the server: how many there may be, and how long one may be silent.

uvicorn takes every connection there is, waits for ever for the first request of one, and where no file descriptor is
left it says so thousands of times a second. Here connections are taken one by one as long as there is room; where
there is none, those that have asked nothing for a while make some, and others wait in the system's line.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 1024
"""Connections at once, where file descriptors allow so many."""
SPARE = 24
"""File descriptors that are left for everything else."""
HEAD_SECONDS = 10.0
"""From a connection, or the first byte of its next request, until the head of the request is there."""
KEPT_SECONDS = 60
"""That a connection is kept for another request."""
READ_SECONDS = 30.0
"""In which a client has to take something of what is sent to it."""
IDLE_SECONDS = 0.5
"""After which a connection that asks nothing may have to make room."""
LINGER_SECONDS = 2.0
"""In which a client may end sending what was refused before it was read."""
SIP_SECONDS = 0.005
"""From a part of that to the next one."""
REFUSAL_SECONDS = 0.5
"""That the answer to what is no HTTP takes while others are served."""
AGAIN_SECONDS = 0.5
"""Until connections are taken again when no file descriptor was left for one."""
TOGETHER = 16
"""Connections that begin in one round of the event loop."""
IN_LINE = 64
"""Connections that are taken from the system's line in one round."""
SWITCH_SECONDS = 0.001
"""After which a thread that computes lets another one have its turn. The event loop asks for one several times in
every round, and would wait Python's 5 ms each time while bodies are read."""
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def room() -> int:
    """How many connections the file descriptors of this process allow."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST
    return max(4, min(MOST, limit - len(list(Path("/dev/fd").iterdir())) - SPARE))


class _Parting:
    """A transport that its connection closes in its own way."""

    def __init__(self, transport: Any, close: Callable[[Any], None]) -> None:
        self._transport, self._close, self._closed = transport, close, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        again, self._closed = self._closed, True
        if again:
            self._transport.close()
        else:
            self._close(self._transport)

    def is_closing(self) -> bool:
        return self._closed or self._transport.is_closing()

    def gone(self) -> None:
        """The connection is lost. What goes in a circle is collected some ten thousand objects at once, and everybody
        waits for 50 ms meanwhile."""
        self._closed, self._close = True, _nothing


def _nothing(transport: Any) -> None:
    pass


class Connection(H11Protocol):
    """uvicorn's, but closed when a request does not come or what is sent is not read, and closed late where a client is
    still sending what was refused: a connection that is closed before all of it is read is reset, and the client never
    sees the answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Parting(transport, self._part))  # pyright: ignore[reportArgumentType]
        self._lingers: Any = None  # the transport
        self.since = self.loop.time()  # the last request was answered then
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        if self._lingers is not None:
            self._lingers.pause_reading()
            self.loop.call_later(SIP_SECONDS, self._lingers.resume_reading)
            return
        super().data_received(data)
        self._wait_for_head()

    def _part(self, transport: Any) -> None:
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            transport.close()
            return
        self._lingers = transport
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(LINGER_SECONDS, transport.abort)
        transport.write_eof()
        transport.resume_reading()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self.transport.gone()  # pyright: ignore[reportAttributeAccessIssue]

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP; not at once while others are served, or whoever sends it in a loop has most of the
        server's time."""
        if self.server_state.tasks:
            self.flow.pause_reading()
            self.loop.call_later(REFUSAL_SECONDS, self._refuse, msg)
        else:
            self._refuse(msg)

    def _refuse(self, msg: str) -> None:
        if not self.transport.is_closing():
            super().send_400_response(msg)

    @property
    def asks_nothing(self) -> bool:
        """Whether no whole request has come that is not answered yet."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _wait_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """Serves an application on a listening socket. Lets answers end, or tells who waits for them, before connections
    are closed."""

    def __init__(self, app: FastAPI, listening: socket.socket, *, patience: int) -> None:
        """`patience`: seconds that connections get to close once the application has ended its answers."""
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            log_level="error",
            timeout_keep_alive=KEPT_SECONDS,
            timeout_graceful_shutdown=patience,
        )
        super().__init__(config)
        self._listening, self._closing = listening, app.state.close
        self._accepting: asyncio.Task[None] | None = None
        self._line = deque[socket.socket]()
        self._joining: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=[])
        gc.collect()
        gc.freeze()  # a collection that looks at all of torch's modules again keeps everybody waiting a quarter second
        sys.setswitchinterval(SWITCH_SECONDS)
        self._listening.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(room()))
        self._accepting.add_done_callback(self._ended)

    async def shutdown(self, sockets: Any = None) -> None:
        await self._closing()
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
        for one in (self._listening, *self._line):
            one.close()
        await super().shutdown(sockets)
        gc.unfreeze()

    async def _accept(self, most: int) -> None:
        """Take connections as long as there is room, which those make that have asked nothing for a while. The newest
        and the oldest begin by turns: who comes behind three hundred others does not wait for all of them, and nobody
        for ever."""
        loop, told, line = asyncio.get_running_loop(), float("-inf"), self._line
        connections: set[Any] = self.server_state.connections
        while True:
            room = most - len(connections) - len(self._joining) - len(line)
            if not line and room <= 0:
                idle = [one for one in connections if one.asks_nothing and loop.time() - one.since > IDLE_SECONDS]
                if idle:
                    min(idle, key=lambda one: one.since).transport.abort()
                await asyncio.sleep(0 if idle else 0.02)
                continue
            try:
                if not line:
                    line.append((await loop.sock_accept(self._listening))[0])
                    room -= 1
            except ConnectionError:
                continue
            except OSError as err:
                if err.errno not in _SHORT:
                    raise
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    logging.getLogger("uvicorn.error").error("no new connections for now: %s", err.strerror)
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            line.extend(self._waiting(min(IN_LINE, room)))
            for number in range(min(TOGETHER, len(line))):
                joining = asyncio.create_task(self._join(line.popleft() if number % 2 else line.pop()))
                self._joining.add(joining)
                joining.add_done_callback(self._joining.discard)
            await asyncio.sleep(0)  # where the next is there already, accepting it does not give way

    async def _join(self, taken: socket.socket) -> None:
        try:
            # A body that goes out behind its head would wait for the client's acknowledgement, which takes 40 ms.
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, taken)
        except OSError:  # it has gone already
            taken.close()

    def _waiting(self, most: int) -> Iterator[socket.socket]:
        """Who else is in line: a round of the event loop for each would be slow. Why there is no next one, the next
        call of accept says."""
        with contextlib.suppress(OSError):
            for _ in range(most):
                taken, _ = self._listening.accept()
                taken.setblocking(False)
                yield taken

    def _ended(self, accepting: asyncio.Task[None]) -> None:
        """Without new connections there is nothing to do; `shutdown` says why."""
        self.should_exit = True

    def _protocol(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)
