"""The command line: verbs in, pages and exit codes out. The only place that prints.

Exit codes: 0 done, 2 wrong input, 3 infeasible budget, 4 verification failed, 75 interrupted and resumable.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pennyweight

if TYPE_CHECKING:
    from pennyweight.config import FitConfig

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=pennyweight.__doc__)

DEFAULT_AXES = "noop,linear,kv_heads,ffn_width,window,bits"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Model = Annotated[Path, typer.Argument(help="A Hugging Face model folder.")]


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn what users can cause into one screen and an exit code; bugs keep their traceback."""
    from pennyweight.search._problem import Infeasible

    try:
        yield
    except Infeasible as err:
        _say(f"infeasible budget: {err}")
        raise typer.Exit(3) from err
    except KeyboardInterrupt as err:
        _say("interrupted; the same command goes on where it stopped")
        raise typer.Exit(75) from err
    except OSError as err:
        if err.errno == errno.ENOSPC:
            _say(f"the disk is full ({err.filename or 'while writing'}); free some space, the same command goes on")
            raise typer.Exit(75) from err
        _say(str(err))
        raise typer.Exit(2) from err
    except (ValueError, RuntimeError) as err:
        _say(str(err))
        raise typer.Exit(4 if type(err).__name__ == "VerificationFailed" else 2) from err


def _say(message: str) -> None:
    print(f"penny: {message}", file=sys.stderr)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A model folder or a config.json; weights are not read.")],
    against: Annotated[Path | None, typer.Option(help="A parent to compare with: folder or config.json.")] = None,
    memory: str | None = None,
    weights: str | None = None,
    ttft: str | None = None,
    tpot: str | None = None,
    throughput: str | None = None,
    prompt: str = "256",
    new: str = "128",
    concurrency: int = 1,
    context: str = "0",
    machine: Annotated[str, typer.Option(help="A shipped machine (penny machine --list) or a JSON file.")] = "h100",
    axes: str = DEFAULT_AXES,
    as_json: Json = False,
) -> None:
    """What a model needs and what would fit, from its config alone."""
    with _errors():
        from pennyweight import planning
        from pennyweight.checkpoint import read_config
        from pennyweight.config import BudgetConfig
        from pennyweight.cost import Machine, Workload
        from pennyweight.units import parse_count, show_bytes, show_seconds

        config = read_config(model)
        shapes = planning.slots(config)
        load = Workload(
            prompt=parse_count(prompt), new=parse_count(new), concurrency=concurrency, context=parse_count(context)
        )
        budget = BudgetConfig(memory=memory, weights=weights, ttft=ttft, tpot=tpot, throughput=throughput)
        device = Machine.load(machine)
        found = planning.plan(
            config, load, device, budget.resolve(parent_bytes=planning.stored_bytes(shapes, 16)), axes.split(",")
        )
        result = found.to_json()
        if against is not None:
            parent = planning.slots(read_config(against))
            result["against"] = {
                "parameters": planning.parameters(parent),
                "kv_bytes": {tokens: planning.sequence_kv_bytes(parent, tokens) for tokens in found.kv_bytes},
                "kv_saving": {tokens: planning.kv_saving(parent, shapes, tokens) for tokens in found.kv_bytes},
                "mean_kv_saving": planning.mean_kv_saving(parent, shapes, load),
            }
        if as_json:
            print(json.dumps(result))
            return
        print(f"parameters   {found.parameters / 1e9:.3f} B")
        print(
            "weights      "
            + "   ".join(f"{bits} bits {show_bytes(count)}" for bits, count in found.weight_bytes.items())
        )
        print(f"smallest     {show_bytes(found.smallest_bytes)} with every axis at its cheapest")
        for tokens, count in found.kv_bytes.items():
            line = f"KV cache     {tokens:>7} tokens  {count / 2**20:10.1f} MiB"
            if against is not None:
                beside = result["against"]
                line += f"   parent {beside['kv_bytes'][tokens] / 2**20:10.1f} MiB"
                line += f"   saved {beside['kv_saving'][tokens]:6.1%}"
            print(line)
        if against is not None:
            saved = result["against"]["mean_kv_saving"]
            print(f"KV cache     mean over {load.prompt}+{load.new} tokens: saved {saved:.1%} of the parent's")
        print(f"work space   {show_bytes(found.workspace_bytes)}")
        spent = found.figures
        times = f"TTFT {show_seconds(spent['ttft_seconds'])}   TPOT {show_seconds(spent['tpot_seconds'])}"
        rate = f"{spent['tokens_per_second']:.0f} tok/s"
        print(f"on {device.name}   memory {show_bytes(spent['memory_bytes'])}   {times}   {rate}   (computed)")
        print(f"verdict      {found.verdict}")


@app.command()
def machine(
    model: Annotated[Path | None, typer.Argument(help="Also time the blocks this model could be made of.")] = None,
    axes: Annotated[str, typer.Option(help="Comma-separated axes.")] = DEFAULT_AXES,
    prompt: str = "256",
    new: str = "128",
    concurrency: int = 1,
    context: Annotated[str, typer.Option(help="Tokens of KV cache per sequence; 0: prompt + new.")] = "0",
    context_tokens: Annotated[int, typer.Option(help="Tokens per row of calibration text.")] = 512,
    again: Annotated[bool, typer.Option("--again", help="Forget earlier measurements.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the shipped machine descriptions.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the description to a JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this computer once: bandwidth, arithmetic, and the time of a model's possible blocks."""
    with _errors():
        from pennyweight.cost import Machine

        if listed:
            for name in Machine.shipped():
                print(name)
            return
        import dataclasses

        from pennyweight import measure

        found = measure.machine(again=again)
        result: dict[str, Any] = dataclasses.asdict(found)
        if save is not None:
            save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if model is not None:
            from pennyweight import offers, planning
            from pennyweight.checkpoint import read_config
            from pennyweight.cost import Workload
            from pennyweight.progress import Terminal
            from pennyweight.units import parse_count

            _quiet_libraries()
            config = read_config(model)
            shapes = planning.slots(config)
            load = Workload(
                prompt=parse_count(prompt), new=parse_count(new), concurrency=concurrency, context=parse_count(context)
            )
            cache = measure.cache_folder() / "latencies.json"
            if again:
                cache.unlink(missing_ok=True)
            wanted = offers.all_shapes(shapes, axes.split(","), scored_tokens=context_tokens)
            times = measure.latencies(config, shapes, wanted, load, cache=cache, listen=Terminal())
            result["blocks"] = [
                {"shape": str(shape), "prefill_seconds": prefill, "decode_seconds": decode}
                for shape, (prefill, decode) in times.blocks.items()
            ]
            result["rest"] = {"prefill_seconds": times.rest[0], "decode_seconds": times.rest[1]}
        if as_json:
            print(json.dumps(result))
            return
        print(found.name)
        print(f"memory     {found.memory_bytes / 2**30:.1f} GiB")
        print(f"bandwidth  {found.bandwidth / 1e9:.1f} GB/s")
        print(f"bfloat16   {found.flops / 1e9:.0f} GFLOP/s")
        for block in result.get("blocks", ()):
            prefill, decode = block["prefill_seconds"], block["decode_seconds"]
            print(f"prefill {1e3 * prefill:9.3f} ms   decode {1e3 * decode:8.4f} ms   {block['shape']}")
        if save is not None:
            print(save)


@app.command()
def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the result.")],
    memory: Annotated[str | None, typer.Option(help="Weights + KV cache + work space, e.g. 3GiB.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the weight files, e.g. 700MB, or a share of the parent: 22%.")
    ] = None,
    ttft: Annotated[str | None, typer.Option(help="Time to first token, e.g. 800ms.")] = None,
    tpot: Annotated[str | None, typer.Option(help="Time per output token, e.g. 40ms.")] = None,
    throughput: Annotated[str | None, typer.Option(help="Generated tokens per second, e.g. 500tok/s.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt tokens of the workload.")] = None,
    new: Annotated[str | None, typer.Option(help="Generated tokens of the workload.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Sequences at once.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens that memory is reserved for, per sequence.")] = None,
    axes: Annotated[
        str | None, typer.Option(help="Comma-separated: noop, linear, kv_heads, ffn_width, window, bits.")
    ] = None,
    text: Annotated[str | None, typer.Option(help='"builtin", "parent", or a text file or folder.')] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Tokens per row of calibration text.")] = None,
    calibration_rows: int | None = None,
    score_rows: int | None = None,
    held_out_rows: int | None = None,
    metric: Annotated[str | None, typer.Option(help="kl, lm, cosine or nmse.")] = None,
    search: Annotated[str | None, typer.Option(help="mip, greedy, uniform, random or evolve.")] = None,
    solutions: Annotated[int | None, typer.Option(help="How many different solutions to list.")] = None,
    min_different: Annotated[int | None, typer.Option(help="Slots in which solutions must differ.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="Solve also for BOUND=VALUE, e.g. weights=30%. Repeatable.")
    ] = None,
    heal_tokens: Annotated[int | None, typer.Option(help="Tokens of whole-model distillation; 0 for none.")] = None,
    local_tokens: Annotated[
        int | None, typer.Option(help="Tokens per block of local distillation; 0 for none.")
    ] = None,
    machine: Annotated[str | None, typer.Option(help='"this", a shipped machine or a JSON file.')] = None,
    prices: Annotated[str | None, typer.Option(help="computed or measured.")] = None,
    max_ram: Annotated[str | None, typer.Option(help="Memory the job may plan with, e.g. 8GiB or 50%.")] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    config: Annotated[Path | None, typer.Option(help="YAML file with the same keys; flags win.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; default <out>.run.")] = None,
    seed: int | None = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan only.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the effective config and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Make the model that fits a budget best, and check it."""
    with _errors():
        from pennyweight.config import FitConfig, merged, read
        from pennyweight.units import parse_count

        def count(value: str | None) -> int | None:
            return None if value is None else parse_count(value)

        base = read(config) if config is not None else FitConfig()
        effective = merged(
            base,
            {
                "budget": {"memory": memory, "weights": weights, "ttft": ttft, "tpot": tpot, "throughput": throughput},
                "workload": {
                    "prompt": count(prompt),
                    "new": count(new),
                    "concurrency": concurrency,
                    "context": count(context),
                },
                "data": {
                    "text": text,
                    "context": context_tokens,
                    "calibration_rows": calibration_rows,
                    "score_rows": score_rows,
                    "held_out_rows": held_out_rows,
                },
                "heal": {"whole_tokens": heal_tokens, "local_tokens": local_tokens},
                "axes": None if axes is None else tuple(axes.split(",")),
                "metric": metric,
                "search": search,
                "solutions": solutions,
                "min_different": min_different,
                "sweep": None if sweep is None else tuple(sweep),
                "machine": machine,
                "prices": prices,
                "max_ram": max_ram,
                "seed": seed,
            },
        )
        if print_config:
            import yaml

            print(yaml.safe_dump(effective.model_dump(mode="json"), sort_keys=False), end="")
            return
        _fit(model, out, effective, run=run, engine=engine, dry_run=dry_run, as_json=as_json)


def _fit(
    model: Path, out: Path, config: FitConfig, *, run: Path | None, engine: str, dry_run: bool, as_json: bool
) -> None:
    _quiet_libraries()
    from pennyweight import allocator
    from pennyweight.job import open_job
    from pennyweight.job.plan import plan as job_plan
    from pennyweight.job.run import run_job
    from pennyweight.progress import Terminal

    if not any(config.budget.model_dump().values()):
        raise ValueError("a budget is needed: at least one of --memory, --weights, --ttft, --tpot, --throughput")
    job = open_job(model, out, config, run=run, engine=engine, listen=Terminal())  # type: ignore[arg-type]
    if job.fits_whole:  # otherwise memory is what is short, not time
        allocator.keep_freed_memory()
    if dry_run:
        print(json.dumps(job_plan(job), indent=None if as_json else 1))
        return
    report = run_job(job)
    if as_json:
        print(json.dumps(report))
    else:
        _summary(report)
    print(out)


def _quiet_libraries() -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=UserWarning, module=r"transformers|torch")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _summary(report: dict[str, Any]) -> None:
    from pennyweight.units import show_bytes

    quality = report["verified"]["quality"]
    parent, child = (quality[name]["nats"] / math.log(2) / quality[name]["nbytes"] for name in ("parent", "child"))
    agreement = quality["agreement"]
    size, whole, checks = report["file_bytes"], report["parent"]["bytes"], report["verified"]["checks"]
    print(f"size       {show_bytes(size)}, {size / whole:.1%} of the parent's {show_bytes(whole)}")
    print(f"quality    {child:.4f} bits per byte on held-out text, parent {parent:.4f} ({child / parent - 1:+.2%})")
    print(f"agreement  KL {agreement['kl']:.4f} nats per token, same first choice {agreement['top1']:.1%}")
    print(f"checks     {sum(check['ok'] for check in checks)} of {len(checks)} passed")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path(".demo/model"),
    weights: Annotated[str, typer.Option(help="Budget as a share of the parent's bytes.")] = "22%",
    model: Annotated[Path | None, typer.Option(help="Another model folder; default: the shipped one.")] = None,
) -> None:
    """The whole job on the model that ships with pennyweight: about 4 minutes on 2 cores, offline."""
    with _errors():
        from pennyweight.config import FitConfig, merged

        parent = model or Path(__file__).parent / "data" / "reference-dense"
        settings = {
            "budget": {"weights": weights},
            "sweep": tuple(f"weights={share}%" for share in (18, 25, 30, 40, 60)),
            "heal": {"local_tokens": 30_000, "whole_tokens": 120_000},
        }
        print(f"fitting {parent.name} to {weights} of its bytes", file=sys.stderr)
        _fit(parent, out, merged(FitConfig(), settings), run=None, engine="local", dry_run=False, as_json=False)


@app.command("eval")
def evaluate(
    model: Model,
    against: Annotated[Path | None, typer.Option(help="The parent: adds KL and agreement.")] = None,
    text: Annotated[str, typer.Option(help='"builtin" or a text file or folder.')] = "builtin",
    rows: Annotated[int, typer.Option(help="Rows to measure.")] = 32,
    context_tokens: int = 512,
    tasks: Annotated[
        str | None, typer.Option(help="lm_eval tasks or their YAML files, comma-separated (extra: eval).")
    ] = None,
    task_file: Annotated[
        list[Path] | None, typer.Option(help="Local multiple-choice or completion files (.jsonl, .jsonl.gz).")
    ] = None,
    task_items: Annotated[int, typer.Option(help="Items per task file.")] = 200,
    as_json: Json = False,
) -> None:
    """Bits per byte, perplexity, agreement with the parent, tasks."""
    with _errors():
        _quiet_libraries()
        from dataclasses import asdict

        from pennyweight import texts
        from pennyweight.evals import agree, loss
        from pennyweight.heterogeneous import load_model
        from pennyweight.job import load_tokenizer

        child, tokenizer = load_model(model), load_tokenizer(model)
        documents = texts.stdlib(held_out=True) if text == "builtin" else texts.from_path(Path(text))
        measured = texts.rows(documents, tokenizer, context_tokens).take(rows)
        found = loss.loss(child, measured)
        result: dict[str, Any] = {
            "bits_per_byte": found.bits_per_byte,
            "perplexity": found.perplexity,
            "tokens": found.tokens,
        }
        if against is not None:
            result["agreement"] = asdict(agree.agree(load_model(against), child, measured))
        if tasks or task_file:
            from pennyweight.evals import tasks as task_room

            result["tasks"] = {
                path.name: asdict(task_room.local(child, tokenizer, path, items=task_items)) for path in task_file or []
            }
            if tasks:
                result["tasks"] |= task_room.harness(child, tokenizer, tasks.split(","), items=task_items)
        if as_json:
            print(json.dumps(result))
        else:
            _table(result)


def _table(values: dict[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _table(value, f"{prefix}{name}.")
        else:
            print(f"{prefix + name:<32} {value:.6g}" if isinstance(value, float) else f"{prefix + name:<32} {value}")


@app.command()
def check(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 16,
    as_json: Json = False,
) -> None:
    """Open a finished folder: sizes, slots, and equal greedy tokens in transformers and layer by layer."""
    with _errors():
        _quiet_libraries()
        from pennyweight.verify import check_folder

        checks = check_folder(model, tokens)
        if as_json:
            print(json.dumps([c.to_json() for c in checks]))
        for c in checks if not as_json else []:
            print(f"{'ok  ' if c.ok else 'FAIL'} {c.name}: expected {c.expected}, found {c.found}")
        if not all(c.ok for c in checks):
            raise typer.Exit(4)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A finished folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; default FOLDER/report.html.")] = None,
) -> None:
    """Draw report.html again from a folder's report.json."""
    with _errors():
        from pennyweight.report import html

        source = folder / "report.json"
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist; give a folder made by penny fit")
        page = out or folder / "report.html"
        page.write_text(html.render(json.loads(source.read_text())), encoding="utf-8")
        print(page)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe of kind train (recipes/*.yaml).")],
    books: Annotated[Path, typer.Option(help="Folder of the books the recipe names.")],
    out: Annotated[Path, typer.Option(help="Run folder; the model is written to OUT/model.")],
) -> None:
    """Train a small reference model from a recipe; goes on where it stopped."""
    with _errors():
        import yaml
        from pydantic import ValidationError

        from pennyweight import allocator
        from pennyweight.progress import Terminal
        from pennyweight.train import Recipe
        from pennyweight.train import train as run

        allocator.keep_freed_memory()
        try:
            wanted = Recipe(**yaml.safe_load(recipe.read_text()))
        except (yaml.YAMLError, ValidationError, TypeError) as err:
            raise ValueError(f"{recipe}: {err}") from err
        print(run(wanted, books=books, out=out, listen=Terminal()))


def main() -> None:
    """Entry point of the `penny` command."""
    app()
