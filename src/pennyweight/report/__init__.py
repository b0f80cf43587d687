"""Turn a run's report into what people read: report.json, report.html, a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pennyweight.report import card, html
from pennyweight.report._facts import tally

__all__ = ["tally", "write"]


def write(report: dict[str, Any], candidate: Path, out: Path) -> Path:
    """Put the finished model folder at `out`, report included; it appears there whole. Returns `out`."""
    staged = out.with_name(out.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(candidate, staged)
    (staged / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (staged / "report.html").write_text(html.render(report), encoding="utf-8")
    (staged / "README.md").write_text(card.render(report), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    staged.replace(out)
    return out
