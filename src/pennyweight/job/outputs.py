"""Where a job writes: nothing of that may be what it reads, nothing there may be somebody else's, and what is moved
into place is what was made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pennyweight.disk import places
from pennyweight.disk.checkpoint import CHECKSUMS
from pennyweight.runs.lock import LOCK

if TYPE_CHECKING:
    pass

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
    """Raises ValueError if there is something that is no run folder; nothing, an empty one and one that holds no more
    than a live model are."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} exists and is not a folder; choose another --run")
    if (run / "run.sqlite").exists():
        return
    ours = {LIVE, f"{LIVE}.replaced"} if (run / LIVE / CHECKSUMS).exists() else {f"{LIVE}.partial"}
    foreign = [path.name for path in sorted(run.glob("*")) if path.name not in {*ours, LOCK}]
    if foreign:
        raise ValueError(f"{run} holds {foreign[0]} and was not made by penny; choose another --run or move it away")
