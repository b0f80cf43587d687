"""The main job: a model and a budget in, the model that fits best out.

    plan     what the model is, what each slot may become, whether the budget can be met at all
    stats    one calibration pass over the parent
    score    replace-1-block: what each choice alone costs in quality
    solve    the exact best choice per slot within the budget (and the other budgets of a sweep)
    build    the child in 16 bits
    heal     distillation, block by block and whole
    pack     fewer bits where chosen; the folder that is shipped
    verify   open it again and hold it against every promise
    report   report.json, report.html, model card

Each stage leaves its result in the run folder; a stopped job goes on where it was, to the same result.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from pennyweight import executor, kinds, offers, score, stats, texts, units, verify
from pennyweight.checkpoint import Checkpoint, Writer
from pennyweight.config import FitConfig
from pennyweight.cost import Budget, Machine, Seconds, Workload, computed, figures, total, workspace_bytes
from pennyweight.evals.agree import agree
from pennyweight.evals.loss import loss
from pennyweight.events import Listener, Silent
from pennyweight.families._decoder import Parts, tensor_names, with_shapes
from pennyweight.heal._schedule import JUDGES
from pennyweight.heterogeneous import load_model
from pennyweight.library import Library
from pennyweight.offers import Offer
from pennyweight.search._problem import Infeasible, Solution
from pennyweight.slots import (
    PARENT,
    Attention,
    Choice,
    GatedMLP,
    Shape,
    Slot,
    layout_from_json,
    layout_to_json,
    reshape_all,
)
from pennyweight.store import Store
from pennyweight.walk import Walk, apply, run_layer


@dataclass
class Job:
    """One run: everything the stages share. Made by `open_job`."""

    model: Path
    out: Path
    config: FitConfig
    engine: executor.Engine
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
    def shapes(self) -> dict[Slot, Shape]:
        return kinds.family_of(self.checkpoint.config["model_type"]).slots(self.checkpoint.config)

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
    def text(self) -> Text:
        return read_text(self)

    @cached_property
    def scratch(self) -> Path:
        folder = self.store.folder / "work"
        folder.mkdir(exist_ok=True)
        return folder


@dataclass(frozen=True)
class Text:
    """Rows for each purpose; no row serves two, and `held_out` comes from documents nothing else has seen."""

    calibration: texts.Rows
    score: texts.Rows
    heal: texts.Rows
    held_out: texts.Rows


def compute_dtype(wanted: str) -> torch.dtype:
    """bfloat16 arithmetic where the processor has it, else float32."""
    if wanted == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bfloat16" if fast else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def open_job(
    model: Path,
    out: Path,
    config: FitConfig,
    *,
    run: Path | None = None,
    engine: executor.Engine = "local",
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
    if out.exists() and not (out / "penny.json").exists():
        raise ValueError(f"{out} exists and was not made by penny; choose another --out or move it away")
    walk_check = Walk(checkpoint)
    tokenizer = load_tokenizer(model)
    folder = run or out.with_name(out.name + ".run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RuntimeError(f"cannot create the run folder {folder}: {err}") from err
    documents = None if config.data.text in ("builtin", "parent") else texts.from_path(Path(config.data.text))
    identity = {
        "model": checkpoint.fingerprint(),
        "text": texts.fingerprint(texts.stdlib(held_out=False) if documents is None else documents),
        "config": config.model_dump(mode="json"),
        "out": str(out.resolve()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compute": str(compute_dtype(config.compute)),
    }
    job = Job(model, out, config, engine, listen or Silent(), checkpoint, Store(folder, identity), tokenizer)
    assert walk_check.shapes == job.shapes
    return job


def load_tokenizer(model: Path) -> Any:
    """Raises ValueError if the folder's tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as err:
        raise ValueError(
            f"{model} has no tokenizer that transformers can load ({err}); copy tokenizer.json beside the weights"
        ) from err


def read_text(job: Job) -> Text:
    """Tokenise and deal out rows. Raises ValueError if there is too little text or a token outside the vocabulary."""
    data, seed = job.config.data, job.config.seed
    context = min(data.context, job.checkpoint.config.get("max_position_embeddings", data.context))
    if data.text == "parent":
        rows, count = _sampled(job, context), job.config.data.sampled_rows
        held, seen = rows.pick(np.arange(data.held_out_rows)), rows.pick(np.arange(data.held_out_rows, count))
    elif data.text == "builtin":
        documents = list(texts.stdlib(held_out=False))
        shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
        seen = texts.rows(shuffled, job.tokenizer, context, most=_rows_needed(job.config, context))
        held = texts.rows(texts.stdlib(held_out=True), job.tokenizer, context).take(data.held_out_rows)
    else:
        rows = texts.rows(texts.from_path(Path(data.text)), job.tokenizer, context)
        tenth = np.arange(len(rows.ids)) % 10 == 9
        held, seen = rows.pick(np.flatnonzero(tenth)).take(data.held_out_rows), rows.pick(np.flatnonzero(~tenth))
    vocabulary = job.checkpoint.config["vocab_size"]
    highest = max(int(seen.ids.max()), int(held.ids.max()) if len(held.ids) else 0)
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {highest}, the model's vocabulary ends at {vocabulary - 1}; "
            "they do not belong together"
        )
    need = data.calibration_rows + data.score_rows + 1
    if len(seen.ids) < need or not len(held.ids):
        raise ValueError(
            f"the text gives {len(seen.ids)} rows of {context} tokens for calibration and scoring and {len(held.ids)} "
            f"held out; {need} and 1 are needed. Give more text or a smaller --context-tokens"
        )
    order = np.random.default_rng(seed).permutation(len(seen.ids))
    cuts = np.cumsum([data.calibration_rows, data.score_rows])
    calibration, scoring, healing = (seen.pick(part) for part in np.split(order, cuts))
    return Text(calibration, scoring, healing, held)


def _rows_needed(config: FitConfig, context: int) -> int:
    """Rows for calibration, scoring and healing, the ones that judge healing included."""
    heal, data = config.heal, config.data
    healing = -(-max(heal.local_tokens, heal.whole_tokens) // context) + JUDGES
    return data.calibration_rows + data.score_rows + healing + 1


def _sampled(job: Job, context: int) -> texts.Rows:
    """Rows drawn from the parent, kept in the run folder: sampling takes minutes."""
    from pennyweight.evals import sample

    if job.store.get("sampled") is None:
        count = job.config.data.sampled_rows
        job.listen.begin("sample", total=count, unit="rows")
        parent = load_model(job.model)
        drawn = sample.rows(parent, job.tokenizer, count, context, seed=job.config.seed)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(drawn).items()}
        job.store.put_tensors("sampled", tensors)
        job.listen.end()
    kept = {name: tensor.numpy() for name, tensor in job.store.tensors("sampled").items()}
    return texts.Rows(**kept)


# ---------------------------------------------------------------------------------------------------------- plan


def plan(job: Job) -> dict[str, Any]:
    """Check that the budget can be met and say what the job will do. Raises Infeasible before any work."""
    context = min(
        job.config.data.context, job.checkpoint.config.get("max_position_embeddings", job.config.data.context)
    )
    singles = {
        slot: offers.single_choices(shape, job.config.axes, scored_tokens=context) for slot, shape in job.shapes.items()
    }
    seconds, how = prices(job)
    free = {slot: {choice.key(): 0.0 for choice in found} for slot, found in singles.items()}
    offered = {
        slot: offers.undominated(offers.offers(slot, shape, free[slot], job.workload, seconds))
        for slot, shape in job.shapes.items()
    }
    try:
        kinds.load("search", "mip").solve(offers.problem(offered, job.shapes, job.budget, job.workload))
    except Infeasible as err:
        raise offers.in_users_words(err, job.shapes, job.budget, job.workload) from None
    parent = figures(total(job.shapes, job.workload, seconds), job.workload, workspace_bytes(job.shapes, job.workload))
    disk = _disk_bytes(job, context)
    if disk > job.store.free_bytes():
        raise ValueError(
            f"the run folder {job.store.folder} needs about {units.show_bytes(disk)}, its disk has "
            f"{units.show_bytes(job.store.free_bytes())} left; free some or choose another --run"
        )
    return {
        "disk_bytes": disk,
        "parent": parent,
        "prices": how,
        "choices": sum(len(found) for found in singles.values()),
        "slots": len(job.shapes),
        "dtype": str(job.dtype),
    }


def _disk_bytes(job: Job, context: int) -> int:
    """About what the run folder grows to: statistics (twice while they are merged), cached states, child folders."""
    wanted = {name for axis in job.config.axes for name in kinds.load("variants", axis).STATS}
    moments = 0
    for shape in job.shapes.values():
        if isinstance(shape, Attention):
            moments += 2 * shape.hidden_size**2 + (shape.num_heads * shape.head_dim) ** 2
        elif isinstance(shape, GatedMLP):
            moments += 2 * shape.hidden_size**2 + (shape.intermediate_size**2 if "down_moment" in wanted else 0)
    rows = job.config.data.score_rows + job.config.data.calibration_rows
    states = rows * context * job.checkpoint.config["hidden_size"] * (job.checkpoint.config["num_hidden_layers"] + 1)
    return 4 * (2 * moments + states) + 3 * job.checkpoint.weight_bytes


def prices(job: Job) -> tuple[Seconds, str]:
    """Seconds per slot, and in words where they come from."""
    config = job.config
    if config.machine != "this":
        machine = Machine.load(config.machine)
        return computed(machine), f"computed for {machine.name}: {machine.source}"
    known = job.store.get("machine")
    if known is None:
        from pennyweight import measure

        known = asdict(measure.machine())
        job.store.put("machine", known)
    machine = Machine(**known)
    if config.prices == "computed":
        return computed(machine), f"computed from this machine's bandwidth and arithmetic ({machine.name})"
    return measured_prices(job), f"measured on this machine ({machine.name}) in transformers, block by block"


def measured_prices(job: Job) -> Seconds:
    """Block times of this machine; each shape is measured once per machine and workload and remembered."""
    from pennyweight import measure

    wanted = offers.all_shapes(job.shapes, job.config.axes, scored_tokens=job.config.data.context)
    cache = measure.cache_folder() / "latencies.json"
    found = measure.latencies(job.checkpoint.config, job.shapes, wanted, job.workload, cache=cache, listen=job.listen)
    return found.seconds()


# --------------------------------------------------------------------------------------------------------- stats


def gather_stats(job: Job) -> None:
    """One calibration pass; one file of statistics per layer in the store."""
    layers = job.checkpoint.config["num_hidden_layers"]
    if all(job.store.get(f"stats/{layer}") for layer in range(layers)):
        return
    wanted = {name for axis in job.config.axes for name in kinds.load("variants", axis).STATS}
    chunks = _chunks(job, job.text.calibration)
    tasks = [
        (job.model, chunk.ids[:, :-1], tuple(sorted(wanted)), job.scratch, index, job.dtype)
        for index, chunk in enumerate(chunks)
    ]
    job.listen.begin("stats", total=len(tasks) * layers, unit="layers")
    tokens = done = 0
    ran = executor.run(stats.calibrate_chunk, tasks, job.engine, on_tick=lambda n: job.listen.advance(done + n))
    for count in ran:
        tokens, done = tokens + count, done + layers
        job.listen.advance(done)
    for layer in range(layers):
        if not job.store.get(f"stats/{layer}"):
            job.store.put_tensors(f"stats/{layer}", stats.merge(job.scratch, len(tasks), layer, tokens))
        for index in range(len(tasks)):
            stats.partial_path(job.scratch, index, layer).unlink(missing_ok=True)
    job.listen.end()


def _chunks(job: Job, rows: texts.Rows) -> list[texts.Rows]:
    size = job.config.data.rows_per_chunk
    return [rows.pick(np.arange(start, min(start + size, len(rows.ids)))) for start in range(0, len(rows.ids), size)]


# --------------------------------------------------------------------------------------------------------- score


def score_choices(job: Job) -> None:
    """All replace-1-block scores, `score/<chunk>/<group>` in the store: {slot: {choice key: sums}}."""
    context = job.text.score.ids.shape[1] - 1
    singles = {
        slot: offers.single_choices(shape, job.config.axes, scored_tokens=context) for slot, shape in job.shapes.items()
    }
    chunks = _chunks(job, job.text.score)
    hidden_bytes = 4 * job.config.data.rows_per_chunk * context * job.checkpoint.config["hidden_size"]
    groups = score.jobs(
        {slot: found for slot, found in singles.items() if found},
        hidden_bytes,
        units.parse_bytes(job.config.max_pending),
    )
    todo = [(c, g) for c in range(len(chunks)) for g in range(len(groups)) if job.store.get(f"score/{c}/{g}") is None]
    if not todo:
        return
    needed = sorted({c for c, _ in todo})
    for _ in executor.run(
        score.parent_chunk, [(job.model, chunks[c].ids, job.scratch, c, job.dtype) for c in needed], job.engine
    ):
        pass
    files = {layer: job.store.path(f"stats/{layer}") for layer in range(job.checkpoint.config["num_hidden_layers"])}
    tasks = [(job.model, chunks[c].ids, chunks[c].scored, job.scratch, c, groups[g], files, job.dtype) for c, g in todo]
    choices = [sum(len(found) for _, found in groups[g].slots) for _, g in todo]
    listen_total = sum(choices)
    job.listen.begin("score", total=listen_total, unit="variants")
    done = 0
    ran = executor.run(score.score_chunk, tasks, job.engine, on_tick=lambda n: job.listen.advance(done + n))
    for (c, g), count, result in zip(todo, choices, ran, strict=True):
        job.store.put(f"score/{c}/{g}", result)
        done += count
        job.listen.advance(done)
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.listen.end()


def scores(job: Job) -> dict[Slot, dict[str, dict[str, float]]]:
    """{slot: {choice key: {metric: mean}}} over all chunks, summed in a fixed order."""
    sums: dict[Slot, dict[str, dict[str, float]]] = {}
    for key in sorted(job.store.keys("score/"), key=lambda k: tuple(int(n) for n in k.split("/")[1:])):
        for slot, found in job.store.get(key).items():
            for choice, values in found.items():
                into = sums.setdefault(Slot.parse(slot), {}).setdefault(choice, dict.fromkeys(values, 0.0))
                for name, value in values.items():
                    into[name] += value
    return {slot: {choice: score.mean(values) for choice, values in found.items()} for slot, found in sums.items()}


# --------------------------------------------------------------------------------------------------------- solve


@dataclass(frozen=True)
class Chosen:
    """A solved budget: the choice of every slot, the workload it was solved for, and the solver's own account."""

    layout: dict[Slot, Choice]
    workload: Workload
    solution: Solution
    predicted: dict[str, float]  # in the words of Budget, and `score`

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": layout_to_json(self.layout),
            "workload": asdict(self.workload),
            "predicted": self.predicted,
            "optimal": self.solution.optimal,
            "seconds": self.solution.seconds,
        }


def solve(job: Job, budget: Budget, *, solutions: int = 1) -> list[Chosen]:
    """The best layouts within a budget, best first. Each differs from those before in `min_different` slots.

    Under a throughput bound the workload's concurrency is the most that may run at once: every power of two up to it
    is tried, since a lighter model affords a larger batch, and the best kept. Raises Infeasible.
    """
    most = job.workload.concurrency
    grid = [most]
    if budget.tokens_per_second is not None and job.config.prices == "computed":
        grid = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
    best: list[Chosen] = []
    failed: Infeasible | None = None
    for concurrency in grid:
        try:
            found = _solve_at(job, budget, _with_concurrency(job.workload, concurrency), solutions)
        except Infeasible as err:
            failed = err
            continue
        if not best or found[0].solution.score < best[0].solution.score:
            best = found
    if not best:
        assert failed is not None
        raise failed
    return best


def _with_concurrency(workload: Workload, concurrency: int) -> Workload:
    return Workload(**{**asdict(workload), "concurrency": concurrency})


def offered(job: Job, workload: Workload, seconds: Seconds) -> dict[Slot, list[Offer]]:
    """Every slot's offers, scored. For the best solution alone undominated ones are enough; the runners-up may need
    an offer that is worse than the one the best took."""
    scored = scores(job)
    table = {
        slot: offers.offers(
            slot, shape, {k: v[job.config.metric] for k, v in scored.get(slot, {}).items()}, workload, seconds
        )
        for slot, shape in job.shapes.items()
    }
    return table if job.config.solutions > 1 else {slot: offers.undominated(row) for slot, row in table.items()}


def _solve_at(job: Job, budget: Budget, workload: Workload, solutions: int) -> list[Chosen]:
    seconds, _ = prices(job)
    table, scored = offered(job, workload, seconds), scores(job)
    search = kinds.load("search", job.config.search)
    found: list[Chosen] = []
    for _ in range(solutions):
        problem = offers.problem(
            table,
            job.shapes,
            budget,
            workload,
            different_from=[chosen.solution.choice for chosen in found],
            min_different=job.config.min_different,
        )
        try:
            extra = {"evaluate": _true_kl(job, table)} if job.config.search == "evolve" else {}
            solution = search.solve(problem, seed=job.config.seed, **extra)
        except Infeasible as err:
            if found:
                break
            raise offers.in_users_words(err, job.shapes, budget, workload) from None
        picked = {slot: row[v] for (slot, row), v in zip(table.items(), solution.choice, strict=True)}
        shapes = {slot: offer.shape for slot, offer in picked.items()}
        predicted = figures(total(shapes, workload, seconds), workload, workspace_bytes(job.shapes, workload))
        predicted["file_bytes"] = sum(offer.file_bytes for offer in picked.values()) + offers.FILE_OVERHEAD
        predicted["score"] = solution.score
        predicted["lm"] = sum(
            scored[slot][Choice((spec,)).key()]["lm"] for slot, offer in picked.items() for spec in offer.choice.specs
        )
        layout = {slot: offer.choice for slot, offer in picked.items() if offer.choice}
        found.append(Chosen(layout, workload, solution, predicted))
    return found


def fits_whole(job: Job) -> bool:
    """Whether whole models may be loaded: two of them in float32 and room to work, 5 times the parent's bytes."""
    return 5 * job.checkpoint.weight_bytes < job.max_ram


def library(job: Job, rows: texts.Rows) -> Library:
    """Children of the job's parent in memory, measured on `rows`. Needs the stats stage. Raises ValueError if the
    parent does not fit --max-ram."""
    if not fits_whole(job):
        raise ValueError(
            f"trying whole children needs the model in memory; --max-ram {job.config.max_ram} is too small"
        )
    return Library(job.walk, lambda layer: job.store.tensors(f"stats/{layer}"), rows)


def _true_kl(job: Job, table: Mapping[Slot, Sequence[Offer]]) -> Callable[[tuple[int, ...]], float]:
    """What the evolutionary search minimises: the child's measured KL on the scored rows."""
    made = library(job, job.text.score)

    def evaluate(choice: tuple[int, ...]) -> float:
        picked = {slot: row[v].choice for (slot, row), v in zip(table.items(), choice, strict=True)}
        return made.measure(picked)["kl"]

    return evaluate


@torch.no_grad()
def measure_unhealed(job: Job, layout: Mapping[Slot, Choice]) -> dict[str, float]:
    """What the scores predicted a sum of, measured together: the parent with every choice applied as it was when it
    was scored, on the same rows. {metric: mean}; all zero for the parent's layout."""
    rows = job.text.score
    ids, scored = torch.from_numpy(rows.ids), torch.from_numpy(rows.scored)
    positions = job.walk.positions(ids.shape[1] - 1)
    walk, embed = job.walk, Slot("embed")
    with stats.autocast(job.dtype):
        embedding = walk.embedding()
        parent = embedding(ids[:, :-1]).float()
        apply(Parts(embedding, "embed", job.shapes[embed]), layout.get(embed, PARENT), stats.SlotStats({}))
        child = embedding(ids[:, :-1]).float()
        del embedding
        job.listen.begin("measure child", total=walk.layers, unit="layers")
        for index in range(walk.layers):
            layer = walk.layer(index)
            parent = torch.cat([run_layer(layer, part, positions) for part in parent.split(4)])
            tensors = job.store.tensors(f"stats/{index}")
            for slot in (Slot("mixer", index), Slot("ffn", index)):
                apply(walk.parts(layer, slot), layout.get(slot, PARENT), stats.of_slot(tensors, slot.kind))
            child = torch.cat([run_layer(layer, part, positions) for part in child.split(4)])
            job.listen.advance(index + 1)
        job.listen.end()
        last = embed if walk.tied else Slot("head")
        sums = score.compare(walk, parent, [(last, layout.get(last, PARENT), child)], ids[:, 1:], scored)
    return score.mean(next(iter(sums[str(last)].values())))


# --------------------------------------------------------------------------------------------------------- build


@torch.no_grad()
def build(job: Job, layout: Mapping[Slot, Choice], folder: Path) -> Path:
    """Write the child in 16 bits: every slot's structural choice applied, matrices not yet quantised."""
    walk = job.walk
    shapes = reshape_all(job.shapes, {slot: choice.structural() for slot, choice in layout.items()})
    writer = Writer(folder)
    writer.add("model.embed_tokens.weight", walk.embedding().weight.bfloat16())
    job.listen.begin("build", total=walk.layers, unit="layers")
    for index in range(walk.layers):
        layer = walk.layer(index)
        slots = [Slot("mixer", index), Slot("ffn", index)]
        needed = any(layout.get(slot, PARENT).structural() for slot in slots)
        tensors = job.store.tensors(f"stats/{index}") if needed else {}
        for slot in slots:
            apply(walk.parts(layer, slot), layout.get(slot, PARENT).structural(), stats.of_slot(tensors, slot.kind))
            prefix = f"model.layers.{index}."
            for name in tensor_names(slot, shapes[slot]).values():
                writer.add(name, layer.get_parameter(name.removeprefix(prefix)).bfloat16())
        job.listen.advance(index + 1)
    writer.add("model.norm.weight", walk.norm().get_parameter("weight").bfloat16())
    if not walk.tied:
        writer.add("lm_head.weight", walk.head().weight.bfloat16())
    job.listen.end()
    return writer.finish(with_shapes(job.checkpoint.config, shapes), like=job.model)


# ---------------------------------------------------------------------------------------------------------- heal


def heal(job: Job, layout: Mapping[Slot, Choice], built: Path, folder: Path) -> Path:
    """Distil the built child block by block, then whole; returns the folder of the healed child."""
    plan = job.config.heal
    changed = [slot for slot, choice in layout.items() if choice.structural()]
    ids = torch.from_numpy(job.text.heal.ids[:, :-1])
    if not changed or (plan.local_tokens == 0 and plan.whole_tokens == 0) or not len(ids):
        return built
    current = built
    if plan.local_tokens:
        current = _heal_local(job, changed, ids, built, folder.with_name(folder.name + "-blocks"))
    if plan.whole_tokens:
        current = _heal_whole(job, ids, current, folder)
    return current


def _heal_local(job: Job, changed: list[Slot], ids: torch.Tensor, built: Path, folder: Path) -> Path:
    from pennyweight.heal import local

    plan = job.config.heal
    rows = ids[: JUDGES + -(-plan.local_tokens // ids.shape[1])]
    child = Walk(Checkpoint(built), dtype=job.dtype)
    new = local.heal(
        job.walk,
        child,
        changed,
        rows,
        tokens=plan.local_tokens,
        lr=plan.local_lr,
        batch_rows=plan.batch_rows,
        store=job.store,
        listen=job.listen,
    )
    replaced = {
        f"model.layers.{slot.layer}.{name}": tensor for slot, tensors in new.items() for name, tensor in tensors.items()
    }
    writer = Writer(folder)
    for name in child.checkpoint.entries:
        writer.add(name, replaced[name] if name in replaced else child.checkpoint.read(name))
    return writer.finish(child.checkpoint.config, like=built)


def _heal_whole(job: Job, ids: torch.Tensor, built: Path, folder: Path) -> Path:
    from pennyweight.heal import whole

    needed = 10 * job.checkpoint.weight_bytes  # parent; child, its gradient and Adam's two moments in float32
    if needed > job.max_ram:
        raise ValueError(
            f"healing the whole model needs about {units.show_bytes(needed)} of memory and --max-ram allows "
            f"{units.show_bytes(job.max_ram)}; raise it or set --heal-tokens 0"
        )
    plan = job.config.heal
    parent = load_model(job.model, dtype=job.dtype).requires_grad_(False)
    child = load_model(built, dtype=torch.float32)
    whole.heal(
        parent,
        child,
        ids,
        tokens=plan.whole_tokens,
        lr=plan.whole_lr,
        batch_rows=plan.batch_rows,
        dtype=job.dtype,
        store=job.store,
        listen=job.listen,
    )
    checkpoint = Checkpoint(built)
    state = child.state_dict()
    writer = Writer(folder)
    for name in checkpoint.entries:
        writer.add(name, state[name].bfloat16())
    return writer.finish(checkpoint.config, like=built)


# --------------------------------------------------------------------------------------------- pack, verify, report


def run(job: Job) -> dict[str, Any]:
    """Run every stage that is not done yet; returns the report (also written to out/report.json).

    Raises Infeasible before any work if the budget cannot be met, VerificationFailed if the result is not what was
    promised; then the folder is kept as `<out>.rejected` for inspection.
    """
    timings = job.store.get("timings") or {}

    def stage(name: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - started, 2)
        job.store.put("timings", timings)
        return result

    if job.store.get("plan") is None:
        job.store.put("plan", stage("plan", lambda: plan(job)))
    stage("stats", lambda: gather_stats(job))
    stage("score", lambda: score_choices(job))
    if job.store.get("chosen") is None:
        job.store.put("chosen", stage("solve", lambda: _solve_all(job)))
    chosen = job.store.get("chosen")
    layout = layout_from_json(chosen["solutions"][0]["layout"])
    if job.store.get("unhealed") is None:
        job.store.put("unhealed", stage("solve", lambda: measure_unhealed(job, layout)))
    folders = job.store.folder
    built = _kept(job, "built", folders / "built", lambda to: stage("build", lambda: build(job, layout, to)))
    healed = job.store.get("healed")
    if healed is None or not Path(healed).exists():
        healed = str(stage("heal", lambda: heal(job, layout, built, folders / "healed")))
        job.store.put("healed", healed)
    from pennyweight.pack import pack

    candidate = folders / "candidate"
    child = Walk(Checkpoint(Path(healed)), dtype=job.dtype)
    if job.store.get("packed") is None or not candidate.exists():
        calibration = torch.from_numpy(job.text.calibration.ids[:, :-1])
        stage(
            "pack",
            lambda: pack(
                child,
                layout,
                calibration,
                candidate,
                files={"penny.json": _card(job, chosen)},
                store=job.store,
                listen=job.listen,
            ),
        )
        job.store.put("packed", True)
    if job.store.get("verified") is None:
        job.store.put("verified", stage("verify", lambda: _verify(job, layout, chosen, Path(healed), candidate)))
    verified = job.store.get("verified")
    failed = [verify.Check(**check) for check in verified["checks"] if not check["ok"]]
    if failed:
        rejected = job.out.with_name(job.out.name + ".rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        shutil.copytree(candidate, rejected)
        raise verify.VerificationFailed(failed)
    report = _report(job, chosen, verified, timings)
    from pennyweight.report import write

    stage("report", lambda: write(report, candidate, job.out))
    return report


def _kept(job: Job, key: str, folder: Path, make: Any) -> Path:
    """A folder that is made once; its name appears in the store only when it is complete."""
    if job.store.get(key) is None or not folder.exists():
        make(folder)
        job.store.put(key, folder.name)
    return folder


def _solve_all(job: Job) -> dict[str, Any]:
    """The asked budget, and every budget of the sweep from the same scores."""
    best = solve(job, job.budget, solutions=job.config.solutions)
    sweep = []
    for bounds in job.config.sweep:
        name, _, text = bounds.partition("=")
        if name not in type(job.config.budget).model_fields:
            raise ValueError(
                f"--sweep {bounds!r}: write BOUND=VALUE with one of {', '.join(type(job.config.budget).model_fields)}"
            )
        changed = job.config.budget.model_copy(update={name: text}).resolve(parent_bytes=job.checkpoint.weight_bytes)
        try:
            sweep.append({"budget": {name: text}, **solve(job, changed)[0].to_json()})
        except Infeasible as err:
            sweep.append({"budget": {name: text}, "infeasible": str(err)})
    return {"solutions": [chosen.to_json() for chosen in best], "sweep": sweep}


def _card(job: Job, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """penny.json: what was chosen and from what, for whoever opens the folder later."""
    import pennyweight

    return {
        "pennyweight": pennyweight.__version__,
        "layout": chosen["solutions"][0]["layout"],
        "predicted": chosen["solutions"][0]["predicted"],
        "parent": {
            "sha256": job.store.get("identity")["model"],
            "name": job.model.resolve().name,
            "config": job.checkpoint.config,
        },
        "text_sha256": job.store.get("identity")["text"],
        "config": job.config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _verify(
    job: Job, layout: Mapping[Slot, Choice], chosen: Mapping[str, Any], healed: Path, candidate: Path
) -> dict[str, Any]:
    from pennyweight.pack import dequantised
    from pennyweight.walk import Streamed

    job.listen.begin("verify", total=4, unit="checks")
    predicted = chosen["solutions"][0]["predicted"]
    checks = verify.check_bytes(candidate, job.budget.weight_bytes, predicted["file_bytes"])
    shapes = reshape_all(job.shapes, layout)
    checks.append(verify.check_shapes(candidate, shapes))
    job.listen.advance(1)
    whole = fits_whole(job)
    rows = job.text.held_out
    prompts = torch.from_numpy(rows.ids[: min(4, len(rows.ids)), :32])
    if whole:
        memory_child = dequantised(load_model(healed, dtype=torch.float32), job.store)
        checks.append(verify.check_reload(candidate, memory_child, prompts, 32))
        del memory_child
    else:
        short = prompts[:1]
        expected = Streamed(Walk(Checkpoint(candidate)))(short).logits.argmax(dim=-1)
        again = verify.stored_tokens(Walk(Checkpoint(healed)), job.store, short)
        same = int((expected == again).sum())
        checks.append(
            verify.Check(
                "next tokens of the written folder, walked layer by layer",
                same == expected.numel(),
                expected.numel(),
                same,
            )
        )
    job.listen.advance(2)

    def model(folder: Path) -> Any:
        return load_model(folder, dtype=torch.float32) if whole else Streamed(Walk(Checkpoint(folder), dtype=job.dtype))

    parent, child = model(job.model), model(candidate)
    batch = 8 if whole else len(rows.ids)
    quality = {
        "parent": asdict(loss(parent, rows, batch_size=batch)),
        "child": asdict(loss(child, rows, batch_size=batch)),
        "agreement": asdict(agree(parent, child, rows, batch_size=batch)),
    }
    job.listen.advance(3)
    samples, speed = {}, None
    if whole:
        from pennyweight.evals.speed import speed as measure_speed

        texts_of = lambda m: [job.tokenizer.decode(row) for row in verify.generate(m, prompts[:, :24], 48)]  # noqa: E731
        samples = {
            "prompts": [job.tokenizer.decode(row) for row in prompts[:, :24]],
            "parent": texts_of(parent),
            "child": texts_of(child),
        }
        if job.config.machine == "this":
            speed = {
                name: asdict(measure_speed(load_model(folder), job.workload, steps=20))
                for name, folder in (("parent", job.model), ("child", candidate))
            }
    job.listen.advance(4)
    job.listen.end()
    return {
        "checks": [check.to_json() for check in checks],
        "whole": whole,
        "quality": quality,
        "samples": samples,
        "speed": speed,
    }


def _report(
    job: Job, chosen: Mapping[str, Any], verified: Mapping[str, Any], timings: Mapping[str, float]
) -> dict[str, Any]:
    """Everything worth knowing about the run, as data; report/ turns it into pages."""
    import pennyweight

    layouts = [layout_from_json(solution["layout"]) for solution in chosen["solutions"]]
    layout, scored, shapes = layouts[0], scores(job), reshape_all(job.shapes, layouts[0])
    return {
        "model": str(job.model.resolve().name),
        "out": str(job.out),
        "budget": {k: v for k, v in asdict(job.budget).items() if v is not None},
        "workload": asdict(job.workload),
        "plan": job.store.get("plan"),
        "parent": {"bytes": job.checkpoint.weight_bytes, "figures": job.store.get("plan")["parent"]},
        "chosen": chosen,
        "slots": [
            {
                "slot": str(slot),
                "choice": str(layout.get(slot, PARENT)),
                "axes": layout.get(slot, PARENT).to_json(),
                "score": sum(
                    scored[slot][Choice((spec,)).key()][job.config.metric] for spec in layout.get(slot, PARENT).specs
                ),
                "bytes": offers.file_bytes(slot, shapes[slot]),
                "parent_bytes": offers.file_bytes(slot, job.shapes[slot]),
                "runners_up": [str(other.get(slot, PARENT)) for other in layouts[1:]],
            }
            for slot in job.shapes
        ],
        "metric": job.config.metric,
        "margins": margins(job),
        "unhealed": job.store.get("unhealed"),
        "verified": verified,
        "local_heal": {key.rsplit("/", 1)[1]: job.store.get(key) for key in job.store.keys("heal/local-loss/")},
        "whole_heal": job.store.get("heal/whole/losses") or [],
        "whole_heal_judged": job.store.get("heal/whole/judged"),
        "file_bytes": verify.safetensors_bytes(job.store.folder / "candidate"),
        "timings": dict(timings),
        "config": job.config.model_dump(mode="json"),
        "identity": job.store.get("identity"),
        "versions": {
            "pennyweight": pennyweight.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def margins(job: Job) -> dict[str, dict[str, float | None]]:
    """What each bound costs: the score if it alone were 5 % looser or tighter (None where that cannot be met)."""
    out: dict[str, dict[str, float | None]] = {}
    bounds = job.budget.bounds()
    for name, bound in bounds.items():
        out[name] = {}
        for label, factor in (("5% tighter", 0.95), ("as asked", 1.0), ("5% looser", 1.05)):
            factor = 2 - factor if name == "tokens_per_second" else factor
            try:
                value: Any = bound * factor
                changed = Budget(**{**bounds, name: int(value) if name.endswith("bytes") else value})  # type: ignore[arg-type]
                out[name][label] = solve(job, changed)[0].solution.score
            except Infeasible:
                out[name][label] = None
    return out
