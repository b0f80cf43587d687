"""What a user asks of `penny fit`: one YAML file or the same keys as flags. Unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pennyweight import kinds, units, variants
from pennyweight.disk import reading
from pennyweight.model.demand import Budget, Cache, Demand, Workload
from pennyweight.prices.machine import Machine


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
        """`parent_bytes`: of the parent's weights in 16 bits. Raises ValueError for text that is no size, time or
        rate."""
        return Budget(
            memory_bytes=None if self.memory is None else units.parse_bytes(self.memory),
            weight_bytes=None if self.weights is None else units.parse_bytes(self.weights, whole=parent_bytes),
            ttft_seconds=None if self.ttft is None else units.parse_seconds(self.ttft),
            tpot_seconds=None if self.tpot is None else units.parse_seconds(self.tpot),
            tokens_per_second=None if self.throughput is None else units.parse_rate(self.throughput),
        )

    def swept(self, bound: str) -> BudgetConfig:
        """With one bound another: "weights=30%". Raises ValueError for anything that is no bound of a budget."""
        name, equals, text = (part.strip() for part in bound.partition("="))
        if not equals or not text or name not in type(self).model_fields:
            raise ValueError(f"--sweep {bound!r}: write BOUND=VALUE with one of {', '.join(type(self).model_fields)}")
        return self.model_copy(update={name: text})


class WorkloadConfig(_Strict):
    """What has to be served; context 0 means prompt + new. Under a bound on throughput `concurrency` is the most that
    may run at once. `cache`: how the engine keeps keys and values."""

    prompt: int = 256
    new: int = 128
    concurrency: int = 1
    context: int = 0
    cache: Cache = "float16"

    def resolve(self) -> Workload:
        return Workload(**self.model_dump())


class DemandConfig(_Strict):
    """A workload served beside the first one, and its bounds."""

    budget: BudgetConfig = BudgetConfig()
    workload: WorkloadConfig = WorkloadConfig()

    def resolve(self, *, parent_bytes: int) -> Demand:
        """Raises ValueError as its parts do, and where nothing is bounded."""
        budget = self.budget.resolve(parent_bytes=parent_bytes)
        if not budget.bounds():
            raise ValueError(
                f"a workload beside the first needs a bound of its own: {', '.join(type(self.budget).model_fields)}"
            )
        return Demand(workload=self.workload.resolve(), budget=budget)

    @classmethod
    def read(cls, text: str) -> DemandConfig:
        """Of "prompt=2k,new=64,concurrency=8,ttft=900ms". Raises ValueError for what is no key or value of one."""
        parts: dict[str, dict[str, Any]] = {"budget": {}, "workload": {}}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            known = {**dict.fromkeys(BudgetConfig.model_fields, "budget")}
            known |= dict.fromkeys(WorkloadConfig.model_fields, "workload")
            if not equals or not value or name not in known:
                raise ValueError(
                    f"--also {item!r}: write NAME=VALUE, comma-separated, with names of {', '.join(known)}"
                )
            whole = known[name] == "workload" and name != "cache"
            parts[known[name]][name] = units.parse_count(value) if whole else value
        try:
            return cls(**parts)  # type: ignore[arg-type]
        except ValidationError as err:
            raise ValueError(f"--also {text!r}: {reading.first_error(err)}") from err


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
    """Distillation: `library` of every variant before it is scored, `local` of the child's blocks, `whole` of the
    child; between the last two `fit`, in closed form (heal/in_sequence.py). Tokens are per variant, per slot and in
    all; 0 leaves a stage out. None: as many as the others take, 32,768 at most.

    Peak learning rates are chosen by the model's width and by how much it lost, unless given.
    """

    library_tokens: int = Field(default=0, ge=0)
    local_tokens: int = Field(default=60_000, ge=0)
    fit_tokens: int | None = Field(default=None, ge=0)
    whole_tokens: int = Field(default=300_000, ge=0)
    local_lr: float | None = Field(default=None, gt=0)
    whole_lr: float | None = Field(default=None, gt=0)
    batch_rows: int = Field(default=2, ge=1)

    @property
    def fitted(self) -> int:
        """Tokens of the fit, as asked for or by default."""
        return min(32_768, max(self.local_tokens, self.whole_tokens)) if self.fit_tokens is None else self.fit_tokens


class UniformConfig(_Strict):
    """Every matrix of the blocks in the same bits instead of a search: in the fewest bits from `bits` up that a slot is
    offered, and the widest of its groups up to `group`.

    Embedding and head go by `embedding_bits`: every token passes them, and rounding to nearest is all that codes of an
    embedding can be found by.
    """

    bits: int = Field(ge=1)
    group: int = Field(default=32, ge=1)
    embedding_bits: int = Field(default=8, ge=1)


class FitConfig(_Strict):
    """Everything that decides the result of a fit, except the model and its text.

    A child keeps the bounds of `budget` while it serves `workload`, and those of each demand in `also` while it serves
    that one's workload.

    Scores are of children with one slot changed, compared by `metric`; "error" runs no child and goes by second moments
    (judge/moments.py), which only tells ways of storing apart. With `uniform` nothing is judged. With `race` a choice
    is scored on all of the text only as long as it may be chosen (job/race.py; the metric kl alone). With `hours`
    a job does less of what takes long, to be done in time on this machine (job/hours.py).

    `seed` deals out the rows of text; `search_seed` (None: the same) is that of searches which draw. max_pending bounds
    the hidden states held while scoring; max_ram (a size, or a share of this machine's memory) says whether whole
    models may be loaded for healing and checking, or must be walked layer by layer; max_disk bounds the run folder.
    """

    budget: BudgetConfig = BudgetConfig()
    workload: WorkloadConfig = WorkloadConfig()
    also: tuple[DemandConfig, ...] = ()
    data: DataConfig = DataConfig()
    heal: HealConfig = HealConfig()
    axes: tuple[str, ...] = Field(default_factory=variants.default)
    metric: Literal["kl", "lm", "cosine", "nmse", "error"] = "kl"
    uniform: UniformConfig | None = None
    race: bool = True
    hours: float | None = Field(default=None, gt=0)
    search: str = "mip"
    search_seed: int | None = Field(default=None, ge=0)
    solutions: int = Field(default=1, ge=1)
    min_different: int = Field(default=1, ge=1)
    sweep: tuple[str, ...] = ()
    machine: str = "this"
    prices: Literal["computed", "measured"] = "computed"
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    max_pending: str = "1GiB"
    max_ram: str = "50%"
    max_disk: str | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("axes")
    @classmethod
    def _in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Once each, without the spaces that a list on a command line may have."""
        return tuple(dict.fromkeys(name.strip() for name in names))

    @property
    def drawn_by(self) -> int:
        """The seed of searches."""
        return self.seed if self.search_seed is None else self.search_seed

    def check(self) -> None:
        """Look at everything that can be wrong before a model is read. Raises ValueError, naming what there is, for
        what does not exist or cannot be understood."""
        for axis in self.axes:
            kinds.load("variants", axis)
        kinds.load("search", self.search)
        if self.metric == "error" or self.uniform is not None:
            self._only_stores("--metric error" if self.uniform is None else "uniform bits")
        self.workload.resolve()
        share_of = 2**40  # of what is not known before the model is read
        for budget in (self.budget, *(self.budget.swept(bound) for bound in self.sweep)):
            budget.resolve(parent_bytes=share_of)
        for demand in self.also:
            demand.resolve(parent_bytes=share_of)
        for size, whole in ((self.max_pending, None), (self.max_ram, share_of), (self.max_disk, None)):
            if size is not None and units.parse_bytes(size, whole=whole) < 1:
                raise ValueError(f"{size!r} is no room to work in; give at least a byte")
        if self.machine != "this":
            Machine.load(self.machine)
            if self.prices == "measured":
                raise ValueError(f"prices of {self.machine} cannot be measured here; use --prices computed")

    def _only_stores(self, what: str) -> None:
        """Raises ValueError for an axis that does more than keep the same matrices in fewer bits."""
        other = [axis for axis in self.axes if not variants.only_quantises(axis)]
        if other:
            able = [axis for axis in variants.order() if variants.only_quantises(axis)]
            raise ValueError(f"{what} cannot judge the axis {other[0]}; choose --axes among {', '.join(able)}")


def asked(
    *,
    memory: str | None = None,
    weights: str | None = None,
    ttft: str | None = None,
    tpot: str | None = None,
    throughput: str | None = None,
    prompt: str | None = None,
    new: str | None = None,
    concurrency: int | None = None,
    context: str | None = None,
    cache: str | None = None,
    axes: str | None = None,
    machine: str | None = None,
    also: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What `penny plan` and `penny fit` are both asked on the command line, as changes for `merged`. Raises ValueError
    for text that is no number of tokens."""

    def count(text: str | None) -> int | None:
        return None if text is None else units.parse_count(text)

    return {
        "budget": {"memory": memory, "weights": weights, "ttft": ttft, "tpot": tpot, "throughput": throughput},
        "workload": {
            "prompt": count(prompt),
            "new": count(new),
            "concurrency": concurrency,
            "context": count(context),
            "cache": cache,
        },
        "axes": None if axes is None else tuple(axes.split(",")),
        "machine": machine,
        "also": tuple(DemandConfig.read(text).model_dump() for text in also) if also else None,
    }


def read(path: Path) -> FitConfig:
    """Raises FileNotFoundError, or ValueError that names the file and the first wrong key."""
    return reading.yaml_file(path, FitConfig)


def merged(base: FitConfig, changes: dict[str, Any]) -> FitConfig:
    """`base` with the given keys replaced; nested sections are given as dicts. None values change nothing. Raises
    ValueError in one line for what does not fit."""
    data = base.model_dump()
    for key, value in changes.items():
        if isinstance(value, dict):
            data[key] = (data[key] or {}) | {k: v for k, v in value.items() if v is not None}
        elif value is not None:
            data[key] = value
    try:
        return FitConfig(**data)
    except ValidationError as err:
        raise ValueError(reading.first_error(err)) from err
