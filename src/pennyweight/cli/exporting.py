"""penny export: a model as other programs read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pennyweight.cli._common import Json, Model, app, errors, located, quiet_libraries, say

if TYPE_CHECKING:
    from pennyweight.job.checks import Check

_TEXT = "Once upon a time there was a function that returned"
_TOKENS = 32
_EXACT, _ROUNDED = 1e-3, 0.2
"""Relative errors of logits that a file read back may have: sums in another order, and matrices that were rounded. A
wrong order of rows or a wrong norm is off by more than either."""


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    to: Annotated[str, typer.Option(help="What to write: gguf, for llama.cpp.")] = "gguf",
    rounded: Annotated[
        str | None,
        typer.Option(
            "--round", help="What becomes of matrices that the file has no type for: f16 or q8_0. Or refused."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model folder as one file for another program, to the bit where that is possible, and read it back."""
    with errors():
        quiet_libraries()
        from pennyweight.export.gguf import write
        from pennyweight.job.checks import VerificationFailed
        from pennyweight.runs.events import waiting
        from pennyweight.runs.progress import Terminal

        if to != "gguf":
            raise ValueError(f"--to {to}: there is gguf")
        with Terminal() as listen:
            begun = False

            def heard(done: int, total: int) -> None:
                nonlocal begun
                if not begun:
                    listen.begin("write", total=total, unit="tensors")
                begun = True
                listen.advance(done)

            place = located(model)
            written = write(place, out, rounded=rounded, heard=heard)
            listen.end()
            with waiting(listen, "read back"):
                checks = _compared(place, out, _ROUNDED if written.rounded else _EXACT)
        if any(check.failed for check in checks):
            out.unlink()
            raise VerificationFailed(checks)
        for check in checks:
            said = f"not run: {check.not_run}" if check.not_run else f"{check.found}, expected {check.expected}"
            say(f"{check.name}: {said}")
        types = ", ".join(f"{count} {name}" for name, count in written.types.items())
        say(f"{types}; {written.rounded} of them rounded, the others to the bit; {written.nbytes:,} bytes")
        told: dict[str, Any] = {"checks": [check.to_json() for check in checks], "types": dict(written.types)}
        if as_json:
            print(json.dumps({**told, "rounded": written.rounded, "bytes": written.nbytes}))
        else:
            print(out)


def _compared(folder: Path, file: Path, limit: float) -> list[Check]:
    from pennyweight.disk.tokenizer import encode, load_tokenizer
    from pennyweight.job.checks import Check
    from pennyweight.runtime.alike import compare
    from pennyweight.runtime.engine import NativeMissing
    from pennyweight.runtime.lower import NotRun

    names = "logits of the file read back, relative error", "greedy tokens of the file read back"
    wanted = f"at most {limit:g}"
    try:
        found = compare(folder, file, encode(load_tokenizer(folder), _TEXT), _TOKENS)
    except (NativeMissing, NotRun) as err:
        return [Check(name, False, wanted, None, not_run=str(err)) for name in names]
    greedy = Check(names[1], found.same == found.tokens or limit == _ROUNDED, found.tokens, found.same)
    return [Check(names[0], found.error <= limit, wanted, float(f"{found.error:.2g}")), greedy]
