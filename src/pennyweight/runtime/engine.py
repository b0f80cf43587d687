"""A model, ready to run: the native engine behind a small face."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import psutil

from pennyweight.runtime.lower import lower
from pennyweight.runtime.sources.open import open_source
from pennyweight.runtime.sources.source import Source
from pennyweight.units import show_bytes


def processors() -> int:
    """Processors that this process may use, every hyper-thread one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once: more threads than that only wait for each other."""
    return max(1, min(processors(), psutil.cpu_count(logical=False) or processors()))


def _threads(wanted: int | None, force: bool) -> int:
    """None and 0 mean one per core. Raises ValueError below that, and above what there is unless forced."""
    if not wanted:
        return physical_cores()
    if wanted < 0:
        raise ValueError(f"{wanted} threads; at least 1, or 0 for one per core")
    if wanted > processors() and not force:
        raise ValueError(
            f"{wanted} threads on the {processors()} processors this process may use: they would only wait for each "
            "other. --force-threads starts them all the same"
        )
    return wanted


class NativeMissing(RuntimeError):
    """pennyweight was installed without its native half: nothing is wrong with the model."""


def native_module() -> Any:
    """Raises NativeMissing where the native module was not built, RuntimeError where it was and cannot be loaded."""
    try:
        return importlib.import_module("pennyweight._native")
    except ModuleNotFoundError as err:
        raise NativeMissing(
            "the native module is missing: pennyweight was installed without a C++ compiler. Install one (Debian: "
            "apt install g++) and then pennyweight again"
        ) from err
    except ImportError as err:
        raise RuntimeError(f"the native module cannot be loaded: {err}. Install pennyweight again") from err


_POOLS: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()


def shared_threads(count: int) -> Any:
    """The threads that all engines of this process with so many have between them: they end with the last of those.
    Threads stay behind when a process forks, so a child has its own."""
    key = (os.getpid(), max(1, count))
    pool = _POOLS.get(key)
    if pool is None:
        pool = _POOLS[key] = native_module().Threads(count)
    return pool


class Row(NamedTuple):
    """A token at a position of a sequence. `sparse`: matrices that have a threshold leave columns out for it."""

    sequence: int
    position: int
    token: int
    wants_logits: bool = True
    sparse: bool = False


class Engine:
    """Runs tokens of several sequences through one model.

    Every row is computed by the same operations in the same order whatever it shares a step with, so batching, chunked
    prompts and guessed tokens change no bit of the logits.
    """

    def __init__(
        self,
        model: Path | Source,
        *,
        context: int | None = None,
        threads: int | None = None,
        force_threads: bool = False,
        cache: str = "float16",
        kernels: str = "best",
        sparsity: float | None = None,
        mapped: bool = False,
    ) -> None:
        """`model`: a Hugging Face folder or a GGUF file; `context`: most tokens of a sequence; `threads`: None
        for one per core, more than there are processors only with `force_threads`; `cache`: float16, int8 or
        float32 keys and values; `kernels`: an instruction set of `_native.kernel_names()`; `sparsity`: the share of
        input channels that blocks leave out, instead of what the config says; `mapped`: matrices of a path that lie
        on disk as the engine reads them stay there. Raises NotRun for what the engine
        does not run, ValueError for damaged weights, NativeMissing where the native module was not built."""
        native, count = native_module(), _threads(threads, force_threads)
        source = open_source(Path(model), mapped=mapped) if isinstance(model, str | Path) else model
        self._model, self._rotary, said = lower(source, context=context, cache=cache, sparsity=sparsity)
        self.notes = (*source.notes, *said)  # what users should know about how the model was read
        self._native = native.Engine(self._model, shared_threads(count), kernels)
        self.vocab_size: int = self._model.vocabulary
        self.context: int = self._model.context
        self.max_rows: int = self._native.max_rows
        self.is_sparse: bool = self._model.is_sparse  # whether sparse rows are computed in another way than others

    @property
    def threads(self) -> int:
        return self._native.threads

    @property
    def kernels(self) -> str:
        return self._native.kernels

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices as they lie in memory."""
        return self._model.weight_bytes

    @property
    def kept_share(self) -> float:
        """Share of the columns that the sparse rows of the last step read; 1 if there were none."""
        kept, columns, _, _ = self._native.sparse
        return kept / columns if columns else 1.0

    def bytes_read(self, lengths: Sequence[int]) -> int:
        """Bytes that the last step read, if its rows were the next tokens of sequences of these lengths: matrices once
        for all rows, those that leave columns out again for each, and everybody's keys and values."""
        _, _, read, whole = self._native.sparse
        cached = sum(self.cache_bytes_of(length + 1) for length in lengths)
        return self.bytes_read_per_token - whole // max(1, len(lengths)) + read + cached

    @property
    def spent(self) -> tuple[float, float, float]:
        """Seconds that steps have spent so far in products, in attention, and in all, waits for other threads
        included. What is neither of the first two is norms, quantising of inputs, gates and the embedding."""
        return self._native.spent

    @property
    def bytes_read_per_token(self) -> int:
        """Bytes of the matrices one token has to go through: all but an embedding that is not the head as well."""
        return self._model.bytes_read_per_token

    def cache_bytes_of(self, tokens: int) -> int:
        """Bytes of keys and values that the next token of a text of so many tokens looks at."""
        return self._model.state_bytes(tokens)

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values of the open sequences."""
        return self._native.state_bytes

    def open(self, capacity: int) -> int:
        """Number of a new, empty sequence of up to `capacity` tokens, which takes memory as it grows. Raises ValueError
        beyond the context, and where all that sequences may grow to does not fit the memory that is free."""
        if 0 < capacity <= self.context:
            self._expect_room(capacity)
            for tables in self._rotary:
                tables.cover(capacity)
        return self._native.open(capacity)

    def _expect_room(self, capacity: int) -> None:
        needed, promised = self._model.reserved_bytes(capacity), self._native.unused_bytes
        free = psutil.virtual_memory().available
        if needed + promised > free:
            beside = f", {show_bytes(promised)} are promised to sequences that are open" if promised else ""
            raise ValueError(
                f"keys and values of a sequence of {capacity:,} tokens take {show_bytes(needed)}{beside}, and "
                f"{show_bytes(free)} of memory are free. Ask for a shorter context (--context), for fewer sequences at "
                "once, or for smaller keys and values (--cache)"
            )

    def trouble(self, sequence: int) -> str | None:
        """Why a model may have computed no number for a sequence, if its keys and values tell."""
        found = self._native.trouble(sequence)
        return f"{found}; --cache float32 holds it" if found else None

    def close(self, sequence: int) -> None:
        """Give a sequence's memory back."""
        self._native.close(sequence)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Make the first `tokens` tokens of `target` those of `source`, without running them. Raises ValueError where
        `source` cannot go back there or `target` has no room."""
        self._native.copy(source, target, tokens)

    def fill(self, sequence: int, tokens: int) -> None:
        """As if `tokens` tokens had been run, keys and values alike for all: to time what comes after a long text."""
        self._native.fill(sequence, tokens)

    def can_go_back(self, sequence: int, tokens: int) -> bool:
        """Whether a sequence may go on after its first `tokens`: what layers with a window wrote over is gone."""
        return self._native.can_go_back(sequence, tokens)

    def step(self, rows: Sequence[Row]) -> np.ndarray:
        """Run rows; returns the wanted logits (n, vocab_size) float32.

        Positions of a sequence come in order and without gaps; going back writes over what was there. Raises ValueError
        for a sequence, position or token that is not there, and where the sequence cannot go back.
        """
        table = np.asarray(rows, np.int32).reshape(-1, 5)
        logits = np.empty((int((table[:, 3] != 0).sum()), self.vocab_size), np.float32)
        self._native.step(table, logits)
        return logits

    def logits(self, ids: Sequence[int], *, sparse: bool = False) -> np.ndarray:
        """Logits after every token of a text (tokens, vocab_size) float32, from an empty cache."""
        sequence = self.open(len(ids))
        try:
            parts = []
            for start in range(0, len(ids), self.max_rows):
                chunk = ids[start : start + self.max_rows]
                rows = [Row(sequence, start + i, int(token), True, sparse) for i, token in enumerate(chunk)]
                parts.append(self.step(rows))
            return np.concatenate(parts)
        finally:
            self.close(sequence)
