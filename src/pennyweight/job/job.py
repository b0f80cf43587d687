"""One run of the main job: what all its stages share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from pennyweight import families, texts, units
from pennyweight.config import FitConfig
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.tokenizer import load_tokenizer
from pennyweight.job import outputs
from pennyweight.job import text as _text
from pennyweight.live.load import compute_dtype
from pennyweight.live.walk import Walk
from pennyweight.model.blocks import Block
from pennyweight.model.demand import Budget, Workload
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot
from pennyweight.runs import executor
from pennyweight.runs.events import Listener, Silent, waiting
from pennyweight.runs.store import Store


@dataclass
class Job:
    """One run: everything the stages share. Made by `open_job`."""

    model: Path
    out: Path
    config: FitConfig
    where: executor.Where
    listen: Listener
    checkpoint: Checkpoint
    store: Store
    tokenizer: Any

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
    def budget(self) -> Budget:
        return self.config.budget.resolve(parent_bytes=self.checkpoint.weight_bytes)

    @cached_property
    def max_ram(self) -> int:
        return units.parse_bytes(self.config.max_ram, whole=psutil.virtual_memory().total)

    @cached_property
    def text(self) -> _text.Text:
        return _text.read(self.checkpoint, self.tokenizer, self.config, self.store, self.listen)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of text."""
        wanted = self.config.data.context
        return min(wanted, self.checkpoint.config.get("max_position_embeddings", wanted))

    @property
    def fits_whole(self) -> bool:
        """Whether whole models may be loaded: two of them in float32 and room to work, 5 times the parent's bytes."""
        return 5 * self.checkpoint.weight_bytes < self.max_ram

    @cached_property
    def scratch(self) -> Path:
        folder = self.store.folder / "work"
        folder.mkdir(exist_ok=True)
        return folder


def open_job(
    model: Path,
    out: Path,
    config: FitConfig,
    *,
    run: Path | None = None,
    where: executor.Where = "local",
    listen: Listener | None = None,
) -> Job:
    """Check every input that can be checked without work and open the run folder.

    Raises FileNotFoundError or ValueError for wrong input, RuntimeError for a folder that cannot be written.
    """
    config.check()
    checkpoint = Checkpoint(model)
    if "quantization_config" in checkpoint.config:
        raise ValueError(
            f"{model} is quantised already; start from its 16-bit original, so that every slot can choose its bits"
        )
    folder = outputs.run_folder(out, run)
    outputs.may_write(model, out, folder, config.data.text)
    walk_check = Walk(checkpoint)
    tokenizer = load_tokenizer(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RuntimeError(f"cannot create the run folder {folder}: {err}") from err
    documents = None if config.data.text in ("builtin", "parent") else texts.from_path(Path(config.data.text))
    listen = listen or Silent()
    with waiting(listen, "read inputs"):  # every byte of them
        fingerprints = {
            "model": checkpoint.fingerprint(),
            "text": texts.fingerprint(texts.stdlib(held_out=False) if documents is None else documents),
        }
    identity = {
        **fingerprints,
        "config": config.model_dump(mode="json"),
        "out": str(out.resolve()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compute": str(compute_dtype(config.compute)),
    }
    job = Job(model, out, config, where, listen, checkpoint, Store(folder, identity), tokenizer)
    assert walk_check.shapes == job.shapes
    return job
