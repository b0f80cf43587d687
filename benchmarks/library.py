"""Is it worth training variants before they are judged?

Children of the shipped model at 80, 65 and 50 % of its bytes, structural axes only, chosen by the exact search. *raw*:
variants are scored as least squares makes them, the child is healed. *trained*: every variant learns first (the
library), is scored as it is then, and the child starts from it. Both spend the same on training: what the library took
is given to the raw child's healing. Work is counted in tokens through one block; a token of whole-model healing goes
through all of them.

KL to the parent is measured on rows that nothing saw (half code, half books where the books are there), before healing
and after it. And scores are held against the truth: single variants, healed, by rank. Seeds deal out the rows of text.
A run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from scipy.stats import spearmanr

import _bench
import _reference
from pennyweight.config import FitConfig, merged
from pennyweight.evals.agree import agree
from pennyweight.heal.library import STRETCHES
from pennyweight.job.children import build, heal
from pennyweight.job.gather import gather_stats, score_choices, scores, singles
from pennyweight.job.job import Job, open_job
from pennyweight.job.library import learns, train_library
from pennyweight.live.load import load_model
from pennyweight.model.choices import Choice, Layout
from pennyweight.model.slots import Slot
from pennyweight.runs.progress import Terminal
from pennyweight.search import mip

SHARES = (0.80, 0.65, 0.50)
SEEDS = (0, 1, 2)
LIBRARY_TOKENS = 41_000
LOCAL_TOKENS, WHOLE_TOKENS = 60_000, 300_000
SINGLES, SINGLE_TOKENS = 24, 60_000
ROWS = 64


class Results:
    """Numbers by name in a file; what is there is not measured again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._known:
            self._known[name] = measure()
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(self._known, indent=1))
            partial.replace(self._file)
            print(f"{name}: {self._known[name]:.5g}", flush=True)
        return self._known[name]


class Arm:
    """The shipped model scored one way with the text that one seed deals out, and children chosen from the scores."""

    def __init__(self, model: Path, folder: Path, text: Path, seed: int, library_tokens: int) -> None:
        self.model, self.folder, self._text, self._seed = model, folder, text, seed
        self.job = self._job(folder, library=library_tokens, local=LOCAL_TOKENS, whole=WHOLE_TOKENS)
        gather_stats(self.job)
        train_library(self.job)
        score_choices(self.job)

    def _job(self, folder: Path, *, library: int, local: int, whole: int) -> Job:
        given = {
            "budget": {"weights": "100%"},
            "machine": "m2-max",
            "axes": list(_reference.STRUCTURAL),
            "seed": self._seed,
            "data": {"text": str(self._text), "score_rows": 8, "rows_per_chunk": 2},
            "heal": {"library_tokens": library, "local_tokens": local, "whole_tokens": whole},
        }
        return open_job(self.model, folder / "out", merged(FitConfig(), given), run=folder / "run", listen=Terminal())

    def layout(self, share: float) -> Layout:
        problem, table = _reference.budget_problem(self.job, _reference.STRUCTURAL, share)
        return _reference.layout(table, mip.solve(problem).choice)

    def child(self, layout: Layout, name: str) -> Path:
        folder = self.folder / name / "built"
        return folder if (folder / "config.json").exists() else build(self.job, layout, folder)

    def healed(self, layout: Layout, name: str, *, local: int, whole: int) -> Path:
        """The child healed in a run folder of its own."""
        folder = self.folder / name
        if (folder / "healed" / "config.json").exists():
            return folder / "healed"
        with self._job(folder, library=0, local=local, whole=whole) as own:
            return heal(own, layout, self.child(layout, name), folder / "healed")

    @property
    def work(self) -> int:
        """Tokens that the library took, through one block each."""
        told = self.job.store.values("library/", dict[str, list[float]]).values()
        stretches = sum(sum(STRETCHES[: len(losses) - 1]) for slot in told for losses in slot.values())
        return round(stretches * LIBRARY_TOKENS)


def main() -> int:
    options = _reference.parser(__doc__).parse_args()
    inputs = f"{options.model.resolve()} {SHARES} {SEEDS} {LIBRARY_TOKENS} {LOCAL_TOKENS} {WHOLE_TOKENS} {ROWS}"
    found = _bench.cached("library", inputs) if options.quick else measure(options.model, inputs)
    if found is None:
        return _bench.skip("library", options.quick, "a full run takes hours; none was made with this code")
    _bench.remember("library", inputs, found)
    before, after, rank = found["before"], found["after"], found["rank"]
    bars = [
        _bench.bar(f"KL before healing, trained over raw, at {share}", before[share], "<=", 0.7)
        for share in ("65%", "50%")
    ]
    bars += [_bench.bar(f"KL after healing, trained over raw, at {s}", r, "<", 1.0) for s, r in after.items()]
    bars.append(
        _bench.bar("rank correlation with the truth, trained less raw", rank["trained"] - rank["raw"], ">", 0.0)
    )
    return _bench.finish("library", options.quick, found, bars)


def measure(model: Path, inputs: str) -> dict[str, dict[str, float]]:
    version = hashlib.sha256(f"{_bench.package_hash()} {inputs}".encode()).hexdigest()[:12]
    work = _bench.work_folder("library") / version
    work.mkdir(exist_ok=True)
    results = Results(work / "results.json")
    text = work / "text"
    if not text.exists():
        _reference.training_text(text, characters=8 * WHOLE_TOKENS)
    held_out = _reference.held_out(_reference.opened(model), ROWS)
    parent = load_model(model)

    def kl(folder: Path) -> float:
        return agree(parent, load_model(folder), held_out).kl

    ratios: dict[str, dict[str, list[float]]] = {"before": {}, "after": {}}
    arms: dict[str, Arm] = {}
    for seed in SEEDS:
        arms = {
            "trained": Arm(model, work / f"trained-{seed}", text, seed, LIBRARY_TOKENS),
            "raw": Arm(model, work / f"raw-{seed}", text, seed, 0),
        }
        blocks = sum(slot.layer is not None for slot in arms["raw"].job.shapes)
        spent = round(results.get(f"{seed} tokens of the library, through one block", lambda: arms["trained"].work))  # noqa: B023
        whole = {"trained": WHOLE_TOKENS, "raw": WHOLE_TOKENS + spent // blocks}
        for share in SHARES:
            said = f"{share:.0%}"
            for when in ("before", "after"):
                pair = {}
                for name, arm in arms.items():

                    def measured(arm=arm, name=name, when=when, share=share, said=said) -> float:
                        layout = arm.layout(share)
                        if when == "before":
                            return kl(arm.child(layout, said))
                        return kl(arm.healed(layout, said, local=LOCAL_TOKENS, whole=whole[name]))  # noqa: B023

                    pair[name] = results.get(f"{seed} {said} {name} {when} healing, KL", measured)
                ratios[when].setdefault(said, []).append(pair["trained"] / pair["raw"])
    rank = ranks(arms, results, kl)
    means = {when: {s: sum(each) / len(each) for s, each in found.items()} for when, found in ratios.items()}
    spread = {f"{s} {when}": max(e) - min(e) for when, found in ratios.items() for s, e in found.items()}
    return {**means, "spread": spread, "rank": rank}


def ranks(arms: dict[str, Arm], results: Results, kl: Callable[[Path], float]) -> dict[str, float]:
    """Spearman correlation of scores, raw and trained, with the KL of children of one variant each, healed."""
    raw = arms["raw"]
    every = [(slot, choice) for slot, offered in singles(raw.job).items() for choice in offered if learns(choice)]
    drawn = random.Random(0).sample(every, SINGLES)

    def truth(slot: Slot, choice: Choice) -> float:
        name = f"single-{slot}-{hashlib.sha256(choice.key().encode()).hexdigest()[:8]}"
        return kl(raw.healed({slot: choice}, name, local=SINGLE_TOKENS, whole=SINGLE_TOKENS))

    true = [
        results.get(f"{slot} {choice.key()} healed, KL", lambda s=slot, c=choice: truth(s, c)) for slot, choice in drawn
    ]
    found = {}
    for name, arm in arms.items():
        known = scores(arm.job)
        scored = [known[slot][choice.key()]["kl"] for slot, choice in drawn]
        found[name] = float(spearmanr(scored, true).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    return found


if __name__ == "__main__":
    sys.exit(main())
