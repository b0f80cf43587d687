"""The thread that owns an engine: requests come in from anywhere, tokens go out as they are written."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pennyweight.runtime.generate import Batch, Request, Text


class Full(RuntimeError):
    """More requests wait than the queue takes."""


class Stopping(RuntimeError):
    """No more requests are taken, and those that take too long are given up."""


@dataclass
class Ticket:
    """A request that was handed in. `on_tokens(tokens, finish)` is called from the worker's thread; finish is None
    until the end, then "stop", "length" or an exception."""

    request: Request
    on_tokens: Callable[[list[int], str | Exception | None], None]
    text: Text | None = None
    cancelled: bool = False


class Worker:
    """Runs a batch as long as there is something to write, and sleeps otherwise."""

    def __init__(self, batch: Batch, *, most_waiting: int = 64) -> None:
        self.batch, self.most_waiting = batch, most_waiting
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._open: list[Ticket] = []
        self._pending = 0
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="penny-worker", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait or are being answered."""
        return self._pending

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request, on_tokens: Callable[[list[int], str | Exception | None], None]) -> Ticket:
        """Raises Full if too many wait, Stopping after `stop`, ValueError if the batch could never answer it."""
        self.batch.check(request)
        with self._lock:
            if self._stopping:
                raise Stopping("the server is shutting down")
            if self._pending >= self.most_waiting + self.batch.places:
                raise Full(f"{self._pending} requests are being answered or wait; try again in a moment")
            self._pending += 1
        ticket = Ticket(request, on_tokens)
        self._inbox.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody listens any more; its place goes to the next."""
        ticket.cancelled = True
        self._inbox.put(None)

    def stop(self, *, patience: float = 5.0) -> None:
        """Take no more requests, let those that are being answered end for `patience` seconds, then give up on them."""
        with self._lock:
            self._stopping = True
        deadline = time.monotonic() + patience
        while self._pending and time.monotonic() < deadline:
            time.sleep(0.01)
        for ticket in list(self._open):
            ticket.cancelled = True
        self._inbox.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not (self._stopping and not self._pending):
            self._collect(block=not self.batch.busy)
            for ticket in [ticket for ticket in self._open if ticket.cancelled]:
                if ticket.text is not None:
                    self.batch.cancel(ticket.text)
                self._done(ticket)
            try:
                stepped = self.batch.step() if self.batch.busy else []
            except Exception as err:  # whatever it is, those who wait for it must hear
                for ticket in list(self._open):
                    if ticket.text is not None:
                        self.batch.cancel(ticket.text)
                    ticket.on_tokens([], err)
                    self._done(ticket)
                continue
            by_text = {id(ticket.text): ticket for ticket in self._open}
            for text, tokens in stepped:
                ticket = by_text[id(text)]
                ticket.on_tokens(tokens, text.error or text.finish)
                if text.finish is not None:
                    self._done(ticket)

    def _collect(self, *, block: bool) -> None:
        """Take what came in; with nothing to do, wait for it."""
        while True:
            try:
                ticket: Any = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if ticket is not None:
                self._open.append(ticket)
                try:
                    ticket.text = self.batch.submit(ticket.request)
                except Exception as err:  # this thread ends for nobody's request
                    ticket.on_tokens([], err)
                    self._done(ticket)

    def _done(self, ticket: Ticket) -> None:
        self._open.remove(ticket)
        with self._lock:
            self._pending -= 1
