"""penny fit, penny quantize, penny demo, penny train: jobs that make models."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pennyweight import variants
from pennyweight.cli._common import DEFAULT_AXES, Json, Model, app, errors, located, own_stdout, quiet_libraries, say

if TYPE_CHECKING:
    from pennyweight.config import FitConfig

_QUANTISES = "bits,mixed_bits"
_SCORE_ROWS, _HELD_OUT_ROWS = 4, 8  # of `quantize`: what is measured takes as long as what is made


@app.command()
def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the result.")],
    memory: Annotated[str | None, typer.Option(help="Weights + KV cache + work space, e.g. 3GiB.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Bytes of the weight files: 700MB, or a share of the parent's in 16 bits: 22%."),
    ] = None,
    ttft: Annotated[str | None, typer.Option(help="Time to first token, e.g. 800ms.")] = None,
    tpot: Annotated[str | None, typer.Option(help="Time per output token, e.g. 40ms.")] = None,
    throughput: Annotated[str | None, typer.Option(help="Generated tokens per second, e.g. 500tok/s.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt tokens of the workload.")] = None,
    new: Annotated[str | None, typer.Option(help="Generated tokens of the workload.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once; with --throughput the most that may be.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Tokens that memory is reserved for, per sequence.")] = None,
    cache: Annotated[str | None, typer.Option(help="Keys and values: float16, int8 or float32.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="A workload served as well, with its own bounds: prompt=2k,new=64,concurrency=8,ttft=2s. Repeatable."
        ),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated, of {', '.join(variants.order())}; by default {DEFAULT_AXES}."),
    ] = None,
    text: Annotated[str | None, typer.Option(help='"builtin", "parent", or a text file or folder.')] = None,
    context_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens per row of calibration text.")] = None,
    calibration_rows: Annotated[int | None, typer.Option(min=1)] = None,
    score_rows: Annotated[int | None, typer.Option(min=1)] = None,
    held_out_rows: Annotated[int | None, typer.Option(min=1)] = None,
    metric: Annotated[str | None, typer.Option(help="kl, lm, cosine or nmse; error: no child is run.")] = None,
    race: Annotated[
        bool | None,
        typer.Option("--race/--no-race", help="Score on all of the text only what may be chosen (metric kl)."),
    ] = None,
    search: Annotated[str | None, typer.Option(help="mip, greedy, uniform, random or evolve.")] = None,
    search_seed: Annotated[int | None, typer.Option(min=0, help="Of searches that draw; default: --seed.")] = None,
    solutions: Annotated[int | None, typer.Option(min=1, help="How many different solutions to list.")] = None,
    min_different: Annotated[int | None, typer.Option(min=1, help="Slots in which solutions must differ.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="Solve also for BOUND=VALUE, e.g. weights=30%. Repeatable.")
    ] = None,
    heal_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens of whole-model distillation; 0 for none.")
    ] = None,
    library_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens per variant of distillation before it is scored; 0 for none.")
    ] = None,
    local_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens per block of local distillation; 0 for none.")
    ] = None,
    fit_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens that blocks are fitted in sequence on; 0 for none.")
    ] = None,
    machine: Annotated[str | None, typer.Option(help='"this", a shipped machine or a JSON file.')] = None,
    prices: Annotated[str | None, typer.Option(help="computed or measured.")] = None,
    max_ram: Annotated[str | None, typer.Option(help="Memory the job may plan with, e.g. 8GiB or 50%.")] = None,
    max_disk: Annotated[str | None, typer.Option(help="Most that the run folder may take, e.g. 5GiB.")] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0, help="Do less of what takes long, to be done in so many hours on this machine."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    config: Annotated[Path | None, typer.Option(help="YAML file with the same keys; flags win.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; default <out>.run.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Deals out the rows of text.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan only; leaves nothing behind.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the effective config and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Make the model that fits a budget best, and check it."""
    with errors(resumes=True):
        from pennyweight.config import FitConfig, asked, merged, read

        base = read(config) if config is not None else FitConfig()
        effective = merged(
            base,
            {
                **asked(
                    memory=memory,
                    weights=weights,
                    ttft=ttft,
                    tpot=tpot,
                    throughput=throughput,
                    prompt=prompt,
                    new=new,
                    concurrency=concurrency,
                    context=context,
                    cache=cache,
                    axes=axes,
                    machine=machine,
                    also=also,
                ),
                "data": {
                    "text": text,
                    "context": context_tokens,
                    "calibration_rows": calibration_rows,
                    "score_rows": score_rows,
                    "held_out_rows": held_out_rows,
                },
                "heal": {
                    "whole_tokens": heal_tokens,
                    "local_tokens": local_tokens,
                    "fit_tokens": fit_tokens,
                    "library_tokens": library_tokens,
                },
                "metric": metric,
                "race": race,
                "hours": hours,
                "search": search,
                "search_seed": search_seed,
                "solutions": solutions,
                "min_different": min_different,
                "sweep": None if sweep is None else tuple(sweep),
                "prices": prices,
                "max_ram": max_ram,
                "max_disk": max_disk,
                "seed": seed,
            },
        )
        effective.check()
        if print_config:
            import yaml

            print(yaml.safe_dump(effective.model_dump(mode="json"), sort_keys=False), end="")
            return
        _fit(model, out, effective, run=run, engine=engine, dry_run=dry_run, as_json=as_json)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the result.")],
    bits: Annotated[int | None, typer.Option(min=1, max=8, help="Every matrix of the blocks in so many bits.")] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(min=1, max=8, help="With --bits: of embedding and head; by default 8.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Or a mix of bits for these bytes: 700MB, or a share of the parent's in 16 bits: 30%."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=1, help="With --bits: most columns that share a scale; by default 32.")
    ] = None,
    axes: Annotated[str | None, typer.Option(help=f"What a mix is of; by default {_QUANTISES}.")] = None,
    text: Annotated[str | None, typer.Option(help='"builtin", "parent", or a text file or folder.')] = None,
    context_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens per row of calibration text.")] = None,
    calibration_rows: Annotated[int | None, typer.Option(min=1)] = None,
    held_out_rows: Annotated[int | None, typer.Option(min=1)] = None,
    max_ram: Annotated[
        str | None, typer.Option(help="Memory the job may take: a size, or a share of this machine's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; by default OUT.run.")] = None,
    as_json: Json = False,
) -> None:
    """Keep a model in fewer bits, within minutes: no child is run to choose, nothing is trained."""
    with errors(resumes=True):
        from pennyweight.config import FitConfig, merged

        if (bits is None) == (weights is None):
            raise ValueError("give either --bits, the same for every matrix, or --weights, what a mix may take")
        if bits is None and (group, embedding_bits) != (None, None):
            raise ValueError("--group and --embedding-bits go with --bits; a mix chooses its own")
        wanted = {
            "budget": {"weights": weights},
            "uniform": None if bits is None else {"bits": bits, "group": group, "embedding_bits": embedding_bits},
            "axes": tuple((axes or (_QUANTISES if bits is None else _offering(bits, embedding_bits))).split(",")),
            "metric": "error",
            "heal": {"whole_tokens": 0, "local_tokens": 0},
            "data": {
                "text": text,
                "context": context_tokens,
                "calibration_rows": calibration_rows,
                "score_rows": _SCORE_ROWS,
                "held_out_rows": held_out_rows or _HELD_OUT_ROWS,
            },
            "max_ram": max_ram,
            "seed": seed,
        }
        effective = merged(FitConfig(), wanted)
        effective.check()
        _fit(model, out, effective, run=run, engine="local", dry_run=False, as_json=as_json)


def _offering(bits: int, embedding_bits: int | None) -> str:
    """The axes of uniform bits: other widths than 4 and 8 are no usual wish."""
    few, mid = ({bits, embedding_bits} & set(widths) for widths in ((1, 2, 3), (5, 6)))
    return ",".join(("bits", *(("few_bits",) if few else ()), *(("mid_bits",) if mid else ())))


def _fit(
    model: str, out: Path, config: FitConfig, *, run: Path | None, engine: str, dry_run: bool, as_json: bool
) -> None:
    quiet_libraries()
    from pennyweight.job.job import open_job
    from pennyweight.job.plan import plan as job_plan
    from pennyweight.job.run import run_job
    from pennyweight.report import summary
    from pennyweight.runs import allocator
    from pennyweight.runs.progress import Terminal
    from pennyweight.runs.space import full_disk_is_one_error

    if not any(config.budget.model_dump().values()) and config.uniform is None:
        raise ValueError("a budget is needed: at least one of --memory, --weights, --ttft, --tpot, --throughput")
    parent = located(model)
    with (
        _one_at_a_time(),
        Terminal() as listen,
        full_disk_is_one_error(),
        open_job(parent, out, config, run=run, where=engine, listen=listen, dry=dry_run) as job,
    ):
        if job.fits_whole:  # otherwise memory is what is short, not time
            allocator.keep_freed_memory()
        with own_stdout():
            made = job_plan(job) if dry_run else run_job(job)
    if dry_run:
        print(json.dumps(made, indent=None if as_json else 1))
        return
    if as_json:
        print(json.dumps(made))
    else:
        print(summary.render(made))
    print(out)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """A second start of a job leaves in one line, and can be made again later."""
    from pennyweight.runs.lock import Held

    try:
        yield
    except Held as err:
        say(str(err))
        raise typer.Exit(75) from err


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path(".demo/model"),
    weights: Annotated[str, typer.Option(help="Budget as a share of the parent's bytes.")] = "22%",
    model: Annotated[str | None, typer.Option(help="Another model, as of fit; default: the shipped one.")] = None,
) -> None:
    """The whole job on the model that ships with pennyweight: about 4 minutes on 2 cores, offline."""
    with errors(resumes=True):
        from pennyweight.config import FitConfig, merged

        parent = model or str(Path(__file__).parents[1] / "data" / "reference-dense")
        settings = {
            "budget": {"weights": weights},
            "sweep": tuple(f"weights={share}%" for share in (18, 25, 30, 40, 60)),
            "heal": {"local_tokens": 30_000, "whole_tokens": 80_000},
        }
        print(f"fitting {Path(parent).name} to {weights} of its bytes", file=sys.stderr)
        _fit(parent, out, merged(FitConfig(), settings), run=None, engine="local", dry_run=False, as_json=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe of kind train (recipes/*.yaml).")],
    books: Annotated[Path, typer.Option(help="Folder of the books the recipe names.")],
    out: Annotated[Path, typer.Option(help="Run folder; the model is written to OUT/model.")],
) -> None:
    """Train a small reference model from a recipe; goes on where it stopped."""
    with errors(resumes=True):
        from pennyweight.disk import reading
        from pennyweight.runs import allocator
        from pennyweight.runs.progress import Terminal
        from pennyweight.runs.space import full_disk_is_one_error
        from pennyweight.train import Recipe
        from pennyweight.train import train as run

        allocator.keep_freed_memory()
        wanted = reading.yaml_file(recipe, Recipe)
        with _one_at_a_time(), Terminal() as listen, full_disk_is_one_error():
            made = run(wanted, books=books, out=out, listen=listen)
        print(made)
