"""penny eval, penny check, penny report: what a finished model is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli._common import Json, Model, app, errors, located, quiet_libraries, table


@app.command("eval")
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The parent, as MODEL: adds KL and agreement.")] = None,
    text: Annotated[str, typer.Option(help='"builtin" or a text file or folder.')] = "builtin",
    rows: Annotated[int, typer.Option(min=1, help="Rows to measure.")] = 32,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; by default 512, or what the models take.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm_eval tasks or their YAML files, comma-separated (extra: eval).")
    ] = None,
    task_file: Annotated[
        list[Path] | None, typer.Option(help="Local multiple-choice or completion files (.jsonl, .jsonl.gz).")
    ] = None,
    task_items: Annotated[int, typer.Option(min=1, help="Items per task file.")] = 200,
    as_json: Json = False,
) -> None:
    """Bits per byte, perplexity, agreement with the parent, tasks."""
    with errors():
        quiet_libraries()
        from dataclasses import asdict

        from pennyweight import texts
        from pennyweight.disk.opened import open_checkpoint, open_vocabulary
        from pennyweight.evals import agree, loss
        from pennyweight.live.load import load_model
        from pennyweight.runs.events import waiting
        from pennyweight.runs.progress import Terminal

        place, parent_place = located(model), None if against is None else located(against)
        for folder in (place, parent_place):
            if folder is not None:
                open_checkpoint(folder)  # says in one line what is wrong with it, or what is meant instead
        with Terminal() as listen:
            with waiting(listen, "load model"):
                child, tokenizer = load_model(place), open_vocabulary(place).tokenizer
            longest = child.config.max_position_embeddings
            if (context_tokens or 0) > longest:
                raise ValueError(f"--context-tokens {context_tokens}: {model} takes up to {longest} tokens")
            with waiting(listen, "text"):
                documents = texts.stdlib(held_out=True) if text == "builtin" else texts.from_path(Path(text))
                measured = texts.rows(documents, tokenizer, context_tokens or min(512, longest)).take(rows)
                measured.hold_within(child.config.vocab_size)
            agreement = {}
            if parent_place is None:
                found = loss.loss(child, measured, listen=listen)
            else:
                with waiting(listen, "load parent"):
                    parent = load_model(parent_place)
                compared = agree.compare(parent, child, measured, listen=listen)
                found, agreement = compared.child, {"agreement": asdict(compared.agreement)}
            result: dict[str, Any] = {
                "bits_per_byte": found.bits_per_byte,
                "perplexity": found.perplexity,
                "tokens": found.tokens,
                **agreement,
            }
            if tasks or task_file:
                from pennyweight.evals import tasks as task_room

                result["tasks"] = {
                    path.name: asdict(task_room.local(child, tokenizer, path, items=task_items, listen=listen))
                    for path in task_file or []
                }
                if tasks:  # lm_eval draws its own progress
                    result["tasks"] |= task_room.harness(child, tokenizer, tasks.split(","), items=task_items)
        if as_json:
            print(json.dumps(result))
        else:
            table(result)


@app.command()
def check(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 16,
    as_json: Json = False,
) -> None:
    """Open a finished folder: sizes, slots, equal greedy tokens in transformers and layer by layer, and the engine."""
    with errors():
        quiet_libraries()
        from pennyweight.job.checks import check_folder
        from pennyweight.report import tally
        from pennyweight.runs.progress import Terminal

        folder = located(model)
        with Terminal() as listen:
            checks = check_folder(folder, tokens, listen=listen)
        if as_json:
            print(json.dumps([c.to_json() for c in checks]))
        else:
            for c in checks:
                if c.not_run is not None:
                    print(f"not run {c.name}: {c.not_run}")
                else:
                    print(f"{'ok  ' if c.ok else 'FAIL'} {c.name}: expected {c.expected}, found {c.found}")
            print(tally([c.to_json() for c in checks]))
        if any(c.failed for c in checks):
            raise typer.Exit(4)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A finished folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; default FOLDER/report.html.")] = None,
) -> None:
    """Draw report.html again from a folder's report.json."""
    with errors():
        from pennyweight.report import draw

        print(draw(folder, out))
