"""Turn a run's report into what people read: report.json, report.html, a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pennyweight.disk import places
from pennyweight.report import card, html
from pennyweight.report._facts import tally
from pennyweight.report._told import read

__all__ = ["draw", "tally", "write"]


def draw(folder: Path, out: Path | None = None) -> Path:
    """Draw report.html of a finished folder again, or write the page to `out`. Returns where it is.

    Raises FileNotFoundError or ValueError for a folder without a sound report, ValueError if `out` is another of its
    files.
    """
    source, own = folder / "report.json", folder / "report.html"
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a folder made by penny fit")
    page = own if out is None else out
    for path in folder.rglob("*"):
        if path.is_file() and page.exists() and page.samefile(path) and path.name != own.name:
            raise ValueError(f"--out {page} is {path.name} of the model; choose another place")
    page.write_text(html.render(read(source)), encoding="utf-8")
    places.note(page)
    return page


def write(report: dict[str, Any], candidate: Path, known: Mapping[str, str], out: Path) -> Path:
    """Put the finished model folder at `out`: the files of `candidate`, whose SHA-256 are `known`, and the report. It
    appears there whole. Returns `out`. Raises as `places.publish` does."""
    pages = {
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.html": html.render(report),
        "README.md": card.render(report),
    }
    places.publish(out, candidate, known, {name: text.encode() for name, text in pages.items()})
    return out
