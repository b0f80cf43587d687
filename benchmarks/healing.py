"""How much of what a smaller child lost does distillation win back?

The exact search's child at 65 % of the parent's bytes, structural axes only, healed block by block, whole, and both.
Lost = child's bits per byte before healing minus the parent's, on rows that nothing saw (half code, half books where
the books are there); won back = the share of it that healing removes. Healing reads training text of the same kinds.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import _bench
import _reference
from pennyweight.config import merged
from pennyweight.evals.loss import loss
from pennyweight.job.children import build, heal
from pennyweight.job.job import Job, open_job
from pennyweight.live.load import load_model
from pennyweight.model.choices import Layout
from pennyweight.runs.progress import Terminal
from pennyweight.search import mip

SHARE = 0.65
TOKENS = {"local": 200_000, "whole": 1_000_000}
ROWS = 64


def healed(job: Job, layout: Layout, built: Path, text: Path, ways: tuple[str, ...]) -> Path:
    """The child healed on `text` in the given ways, in a run folder of its own."""
    name = "-".join(ways)
    config = merged(
        job.config,
        {
            "data": {"text": str(text)},
            "heal": {f"{way}_tokens": TOKENS[way] if way in ways else 0 for way in ("local", "whole")},
        },
    )
    folder = built.parent / name
    own = open_job(job.model, folder / "out", config, run=folder / "run", listen=Terminal())
    return heal(own, layout, built, folder / "healed")


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    inputs = f"{options.model.resolve()} {SHARE} {TOKENS} {ROWS}"
    found = _bench.cached("healing", inputs) if options.quick else measure(options.model)
    if found is None:
        return _bench.skip("healing", options.quick, "a full run takes half an hour; none was made with this code")
    _bench.remember("healing", inputs, found)
    bars = [_bench.bar("share won back by both", found["won_back"]["both"], ">=", 0.5)]
    return _bench.finish("healing", options.quick, found, bars)


def measure(model: Path) -> dict[str, dict[str, float]]:
    """Bits per byte of parent and children, and the shares won back."""
    job = _reference.scored(model)
    problem, table = _reference.budget_problem(job, _reference.STRUCTURAL, SHARE)
    layout = _reference.layout(table, mip.solve(problem).choice)
    work = _bench.work_folder("healing") / "run"
    shutil.rmtree(work, ignore_errors=True)
    built = build(job, layout, work / "built")
    text = _reference.training_text(work / "text", characters=4 * TOKENS["whole"])
    measured = _reference.held_out(job, ROWS)

    def bits(folder: Path) -> float:
        return loss(load_model(folder), measured).bits_per_byte

    bpb = {"parent": bits(model), "unhealed": bits(built)}
    for name, ways in (("local", ("local",)), ("whole", ("whole",)), ("both", ("local", "whole"))):
        bpb[name] = bits(healed(job, layout, built, text, ways))
        print(f"{name:<8} {bpb[name]:.4f} bits per byte (parent {bpb['parent']:.4f}, unhealed {bpb['unhealed']:.4f})")
    lost = bpb["unhealed"] - bpb["parent"]
    won = {name: (bpb["unhealed"] - bpb[name]) / lost for name in ("local", "whole", "both")}
    return {"bits_per_byte": bpb, "won_back": won, "tokens": {k: float(v) for k, v in TOKENS.items()}}


if __name__ == "__main__":
    sys.exit(main())
