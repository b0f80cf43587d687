"""Where a job writes: nothing of that may be what it reads, nothing there may be somebody else's, and what is moved
into place is what was made."""

from __future__ import annotations

import os
from pathlib import Path

from pennyweight.disk import places
from pennyweight.disk.checkpoint import CHECKSUMS

LIVE = "parent"
"""A live model is written here in its run folder, and read from there."""


def run_folder(out: Path, run: Path | None) -> Path:
    """The run folder of a job: the one asked for, or OUT.run."""
    real = Path(os.path.realpath(out))
    return run or real.with_name(real.name + ".run")


def may_write(model: Path, out: Path, run: Path, text: str) -> None:
    """Raises ValueError, before anything is written, if `out`, the run folder or a neighbour that a job uses is the
    model or the text, lies in one or holds one, or holds what penny did not write."""
    inputs = {"the model": model}
    if text not in ("builtin", "parent"):
        inputs["the text"] = Path(text)
    beside = places.beside(out)
    for place in (out, *beside.values()):
        places.apart(place, "--out", inputs)
        places.apart(run, "the run folder", {"--out": place})
    if (run / LIVE).exists() and model.samefile(run / LIVE):
        del inputs["the model"]
    places.apart(run, "the run folder", inputs)
    for place in (out, beside["rejected"]):
        places.replaceable(place)
    for place in (beside["partial"], beside["replaced"]):
        places.replaceable(place, unchanged=False)
    is_run_folder(run)


def is_run_folder(run: Path) -> None:
    """Raises ValueError for what is no run folder. One that holds no more than a live model is."""
    written = (run / LIVE / CHECKSUMS).exists()
    places.begun(run, "run.sqlite", {LIVE, f"{LIVE}.replaced"} if written else {f"{LIVE}.partial"})
