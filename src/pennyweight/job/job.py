"""One run of the main job: what all its stages share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from pennyweight import families, texts, units
from pennyweight.config import FitConfig
from pennyweight.disk.opened import Readable, open_checkpoint, open_vocabulary
from pennyweight.job import hours, outputs
from pennyweight.job import text as _text
from pennyweight.job.hours import InTime
from pennyweight.live.load import compute_dtype
from pennyweight.live.walk import Walk
from pennyweight.model.blocks import Block
from pennyweight.model.demand import Budget, Demand, Workload
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot
from pennyweight.prices import planning
from pennyweight.runs import executor
from pennyweight.runs.events import Listener, Silent, waiting
from pennyweight.runs.lock import Lock
from pennyweight.runs.scratch import Remembered
from pennyweight.runs.store import Store

_BESIDE_THE_WEIGHTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)
"""What decides a text's tokens, and what goes along with the child."""


@dataclass
class Job:
    """One run: everything the stages share. Made by `open_job`; a context at whose end it lets go of the run folder."""

    model: Path
    out: Path
    config: FitConfig
    run: Path
    where: executor.Where
    listen: Listener
    checkpoint: Readable
    tokenizer: Any
    origin: Mapping[str, Any]
    dry: bool = False
    lock: Lock | None = None
    in_time: InTime | None = None
    planned: dict[str, Any] | None = None
    """What the plan said before the run folder was made."""
    codes_seen: set[str] = field(default_factory=set)
    """Files of codes that this process has found whole."""

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if "store" in self.__dict__:
            self.store.close()
            del self.store
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    @property
    def unopened(self) -> bool:
        """Whether the run folder has not been looked at: it is not there, or this is a dry run."""
        return "store" not in self.__dict__

    @cached_property
    def store(self) -> Store:
        """The run folder, opened or made when it is first asked for. Raises ValueError if it was begun with another
        origin, Held if another process works on it."""
        assert not self.dry, "a dry run leaves nothing behind"
        self.lock = self.lock or Lock(self.run)
        store = Store(self.run, self.origin)
        if self.in_time is not None:
            store.put("hours", asdict(self.in_time))
        return store

    @cached_property
    def walk(self) -> Walk:
        return Walk(self.checkpoint, dtype=self.dtype)

    @cached_property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.config.compute)

    @cached_property
    def blocks(self) -> dict[Slot, Block]:
        return families.blocks(self.checkpoint.config)

    @cached_property
    def shapes(self) -> dict[Slot, Shape]:
        return {slot: block.shape for slot, block in self.blocks.items()}

    @cached_property
    def workload(self) -> Workload:
        return self.config.workload.resolve()

    @cached_property
    def parent_bytes(self) -> int:
        """Of the parent's weights in 16 bits, whatever they are stored in: what shares of a budget are shares of."""
        return planning.stored_bytes(self.shapes, 16)

    @cached_property
    def budget(self) -> Budget:
        return self.config.budget.resolve(parent_bytes=self.parent_bytes)

    @cached_property
    def also(self) -> tuple[Demand, ...]:
        """What has to be met beside the budget of the first workload."""
        return tuple(demand.resolve(parent_bytes=self.parent_bytes) for demand in self.config.also)

    def swept(self, bound: str) -> Budget:
        """The budget with one bound another."""
        return self.config.budget.swept(bound).resolve(parent_bytes=self.parent_bytes)

    @cached_property
    def max_ram(self) -> int:
        return units.parse_bytes(self.config.max_ram, whole=psutil.virtual_memory().total)

    @cached_property
    def text(self) -> _text.Text:
        return _text.read(self.checkpoint, self.tokenizer, self.config, self.store, self.listen)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of text."""
        return _text.row_tokens(self.checkpoint.config, self.config)

    @property
    def fits_whole(self) -> bool:
        """Whether whole models may be loaded: two in float32 and room to work, 5 times the parent in 16 bits."""
        return 5 * self.parent_bytes < self.max_ram

    @property
    def scratch(self) -> Path:
        """For what a stopped stage goes on from."""
        folder = self.store.folder / "work"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def codes(self) -> Path:
        """The folder of codes that quantisers found (judge/codes.py)."""
        return self.run / "codes"

    @property
    def library(self) -> Path | None:
        """The folder of variants that were trained before they were scored; None if none are to be."""
        return self.run / "library" if self.config.heal.library_tokens else None

    @property
    def found_codes(self) -> Remembered:
        return Remembered(self.codes)


def open_job(
    model: Path,
    out: Path,
    config: FitConfig,
    *,
    run: Path | None = None,
    where: str = "local",
    listen: Listener | None = None,
    dry: bool = False,
    lock: Lock | None = None,
) -> Job:
    """Check every input that can be checked without work and open the run folder, if there is one; it is made when
    something is put into it. `dry`: nothing will be, and it is not looked at. `lock`: the run folder's, if the caller
    holds it already.

    Raises FileNotFoundError or ValueError for wrong input, RuntimeError for a folder that cannot be written, Held if
    another process works on it.
    """
    config.check()
    engine = executor.named(where)
    folder = outputs.run_folder(out, run)
    checkpoint = open_checkpoint(model)
    listen, in_time = listen or Silent(), None
    if config.hours is not None:
        in_time = hours.in_time(config, checkpoint.config, Store.peek(folder, "hours"), listen)
        config = in_time.applied(config)
    if "quantization_config" in checkpoint.config:
        raise ValueError(
            f"{model} is quantised already; start from its 16-bit original, so that every slot can choose its bits"
        )
    outputs.may_write(model, out, folder, config.data.text)
    if not dry and lock is None and folder.exists():
        lock = Lock(folder)  # before anything that takes time
    walk_check = Walk(checkpoint)
    tokenizer = open_vocabulary(model).tokenizer
    documents = None if config.data.text in ("builtin", "parent") else texts.from_path(Path(config.data.text))
    with waiting(listen, "read inputs"):  # every byte of them
        origin = {
            "model": checkpoint.fingerprint(),
            "tokenizer": _digests(model),
            "text": _text.origin(checkpoint.config, config, documents),
            "seed": config.seed,
            "versions": {name: version(name) for name in ("pennyweight", "tokenizers", "torch", "transformers")},
            # Sums depend on how they are split, and products on the instructions.
            "arithmetic": {
                "dtype": str(compute_dtype(config.compute)),
                "instructions": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
        }
    job = Job(model, out, config, folder, engine, listen, checkpoint, tokenizer, origin, dry, lock, in_time)
    assert walk_check.shapes == job.shapes
    if not dry and folder.exists():
        try:
            _ = job.store  # another run's folder is refused now
        except BaseException:
            job.close()
            raise
    return job


def _digests(model: Path) -> dict[str, str]:
    """{name: SHA-256} of the small files beside the weights that a run goes by."""
    paths = {path for pattern in _BESIDE_THE_WEIGHTS for path in model.glob(pattern) if path.is_file()}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}
