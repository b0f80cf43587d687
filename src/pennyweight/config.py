"""What a user asks of `penny fit`: one YAML file or the same keys as flags. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pennyweight import kinds, units, variants
from pennyweight.model.demand import Budget, Workload


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetConfig(_Strict):
    """Bounds as people write them; `weights` may be a share of the parent's 16-bit bytes."""

    memory: str | None = None
    weights: str | None = None
    ttft: str | None = None
    tpot: str | None = None
    throughput: str | None = None

    def resolve(self, *, parent_bytes: int) -> Budget:
        """Raises ValueError for text that is no size, time or rate."""
        return Budget(
            memory_bytes=None if self.memory is None else units.parse_bytes(self.memory),
            weight_bytes=None if self.weights is None else units.parse_bytes(self.weights, whole=parent_bytes),
            ttft_seconds=None if self.ttft is None else units.parse_seconds(self.ttft),
            tpot_seconds=None if self.tpot is None else units.parse_seconds(self.tpot),
            tokens_per_second=None if self.throughput is None else units.parse_rate(self.throughput),
        )


class WorkloadConfig(_Strict):
    """What has to be served; context 0 means prompt + new."""

    prompt: int = 256
    new: int = 128
    concurrency: int = 1
    context: int = 0

    def resolve(self) -> Workload:
        return Workload(**self.model_dump())


class DataConfig(_Strict):
    """Text. `text` is "builtin" (this Python's standard library and documentation), "parent" (sampled from the model
    itself, `sampled_rows` of them), or a file or folder. Rows are stretches of `context` tokens."""

    text: str = "builtin"
    context: int = Field(default=512, ge=16)
    calibration_rows: int = Field(default=16, ge=1)
    score_rows: int = Field(default=8, ge=1)
    held_out_rows: int = Field(default=16, ge=1)
    rows_per_chunk: int = Field(default=4, ge=1)
    sampled_rows: int = Field(default=256, ge=1)


class HealConfig(_Strict):
    """Distillation after building. Tokens are per slot for `local`, in all for `whole`; 0 leaves a stage out.

    Peak learning rates are chosen by the model's width and by how much it lost, unless given.
    """

    local_tokens: int = Field(default=60_000, ge=0)
    whole_tokens: int = Field(default=300_000, ge=0)
    local_lr: float | None = Field(default=None, gt=0)
    whole_lr: float | None = Field(default=None, gt=0)
    batch_rows: int = Field(default=2, ge=1)


class FitConfig(_Strict):
    """Everything that decides the result of a fit, except the model and its text.

    max_pending bounds the hidden states held while scoring; max_ram (a size, or a share of this machine's memory) says
    whether whole models may be loaded for healing and checking, or must be walked layer by layer.
    """

    budget: BudgetConfig = BudgetConfig()
    workload: WorkloadConfig = WorkloadConfig()
    data: DataConfig = DataConfig()
    heal: HealConfig = HealConfig()
    axes: tuple[str, ...] = Field(default_factory=variants.default)
    metric: Literal["kl", "lm", "cosine", "nmse"] = "kl"
    search: str = "mip"
    solutions: int = Field(default=1, ge=1)
    min_different: int = Field(default=1, ge=1)
    sweep: tuple[str, ...] = ()
    machine: str = "this"
    prices: Literal["computed", "measured"] = "computed"
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    max_pending: str = "1GiB"
    max_ram: str = "50%"
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for an axis or search that does not exist."""
        for axis in self.axes:
            kinds.load("variants", axis)
        kinds.load("search", self.search)
        if self.machine != "this" and self.prices == "measured":
            raise ValueError(f"prices of {self.machine} cannot be measured here; use --prices computed")


def read(path: Path) -> FitConfig:
    """Raises ValueError that names the file and every wrong key."""
    try:
        return FitConfig(**(yaml.safe_load(path.read_text()) or {}))
    except (yaml.YAMLError, ValidationError, TypeError) as err:
        raise ValueError(f"{path}: {err}") from err


def merged(base: FitConfig, changes: dict[str, Any]) -> FitConfig:
    """`base` with the given keys replaced; nested sections are given as dicts. None values change nothing."""
    data = base.model_dump()
    for key, value in changes.items():
        if isinstance(value, dict):
            data[key] |= {k: v for k, v in value.items() if v is not None}
        elif value is not None:
            data[key] = value
    try:
        return FitConfig(**data)
    except ValidationError as err:
        raise ValueError(str(err)) from err
