"""The page and the model card, from hand-made reports: no model, no torch, no network."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from pennyweight.disk import places
from pennyweight.report import card, charts, draw, html, summary, write

VOID = {"meta", "br"}


def figures(**changes: float) -> dict[str, float]:
    return {
        "weight_bytes": 2.9e6,
        "memory_bytes": 7e6,
        "ttft_seconds": 0.01,
        "tpot_seconds": 2e-4,
        "tokens_per_second": 4000.0,
        **changes,
    }


def solution(layout: dict[str, Any], *, file_bytes: int, score: float) -> dict[str, Any]:
    return {
        "layout": layout,
        "workload": {"prompt": 256, "new": 128, "concurrency": 1, "context": 384},
        "predicted": figures(file_bytes=file_bytes, score=score),
        "optimal": True,
        "seconds": 0.02,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """Two layers; a sweep with two budgets that lead to one model and one that cannot be met."""
    bits = {"bits": {"bits": 4, "group": 64, "method": "gptq"}}
    layout = {"embed": bits, "0.ffn": {"ffn_width": {"width": 640}, **bits}, "1.mixer": {"noop": {}}}
    other = {**layout, "1.ffn": bits}
    return {
        "model": "pico",
        "out": "/somewhere/private/pico-small",
        "budget": {"weight_bytes": 3_300_000, "memory_bytes": 8_000_000},
        "plan": {
            "prices": "computed from this machine's bandwidth",
            "choices": 40,
            "slots": 7,
            "dtype": "torch.float32",
        },
        "parent": {"bytes": 15_000_000, "figures": figures(weight_bytes=15e6, memory_bytes=19e6)},
        "chosen": {
            "solutions": [
                solution(layout, file_bytes=3_290_000, score=0.02),
                solution(other, file_bytes=3_280_000, score=0.0203),
            ],
            "sweep": [
                {"budget": {"weights": "18%"}, **solution(layout, file_bytes=2_700_000, score=0.04)},
                {"budget": {"weights": "60%"}, **solution(layout, file_bytes=7_500_000, score=0.001)},
                {"budget": {"weights": "80%"}, **solution(layout, file_bytes=7_500_000, score=0.001)},
                {"budget": {"weights": "1%"}, "infeasible": "weight_bytes of 150000 cannot be met"},
            ],
        },
        "slots": [
            {
                "slot": "embed",
                "choice": "int4 g64",
                "axes": bits,
                "score": 0.012,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["int4 g64"],
            },
            {
                "slot": "0.mixer",
                "choice": "parent",
                "axes": {},
                "score": 0,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["parent"],
            },
            {
                "slot": "0.ffn",
                "choice": "ffn 640 + int4 g64 gptq",
                "axes": layout["0.ffn"],
                "score": 0.003,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["ffn 640 + int4 g64 gptq"],
            },
            {
                "slot": "1.mixer",
                "choice": "none",
                "axes": {"noop": {}},
                "score": 0.005,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["none"],
            },
            {
                "slot": "1.ffn",
                "choice": "parent",
                "axes": {},
                "score": 0,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["int4 g64"],
            },
            {
                "slot": "norm",
                "choice": "parent",
                "axes": {},
                "score": 0,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["parent"],
            },
            {
                "slot": "head",
                "choice": "parent",
                "axes": {},
                "score": 0,
                "bytes": 1000,
                "parent_bytes": 4096,
                "runners_up": ["parent"],
            },
        ],
        "metric": "kl",
        "workload": {"prompt": 256, "new": 128, "concurrency": 1, "context": 384},
        "margins": {
            "weight_bytes": {"5% tighter": None, "as asked": 0.02, "5% looser": 0.015},
            "memory_bytes": {"5% tighter": 0.02, "as asked": 0.02, "5% looser": 0.02},
        },
        "verified": {
            "checks": [{"name": "file bytes within budget", "ok": True, "expected": 3_300_000, "found": 3_280_000}],
            "whole": True,
            "quality": {
                "parent": {"nats": 33420.0, "tokens": 8192, "nbytes": 25533},
                "child": {"nats": 33540.0, "tokens": 8192, "nbytes": 25533},
                "agreement": {"kl": 0.03, "top1": 0.9, "tokens": 8192},
            },
            "samples": {
                "prompts": ["say <script>alert(1)</script>"],
                "parent": ["hello & good day"],
                "child": ["hello & goodbye"],
            },
            "speed": {
                "parent": {"ttft": 0.039, "tpot": 0.0118, "tokens_per_second": 84.7},
                "child": {"ttft": 0.037, "tpot": 0.0131, "tokens_per_second": 76.3},
            },
            "speed_how": "measured in the native engine, avx512 kernels on 2 threads",
        },
        "local_heal": {"0.ffn": [0.02, 0.01]},
        "whole_heal": [0.05, 0.2, 0.04],
        "whole_heal_judged": [0.06, 0.05],
        "file_bytes": 3_280_000,
        "timings": {"plan": 3.2, "score": 88.8},
        "config": {
            "budget": {"memory": "8MB", "weights": "22%", "ttft": None, "tpot": None, "throughput": None},
            "data": {"text": "builtin"},
            "heal": {"local_tokens": 60_000, "whole_tokens": 300_000},
            "axes": ["noop", "ffn_width", "bits"],
            "search": "mip",
            "prices": "computed",
        },
        "identity": {"model": "e5a6", "text": "240a", "torch": "2.13.0", "threads": 2, "compute": "torch.bfloat16"},
        "versions": {"pennyweight": "0.1.0", "torch": "2.13.0"},
    }


@pytest.fixture
def bare(report: dict[str, Any]) -> dict[str, Any]:
    """The least a run can leave: one budget, nothing healed, a parent too large to be loaded whole."""
    bare = copy.deepcopy(report)
    bare["chosen"] = {"solutions": bare["chosen"]["solutions"][:1], "sweep": []}
    bare["verified"] |= {
        "samples": {},
        "speed": None,
        "speed_how": "not measured: the prices are another machine's",
        "whole": False,
    }
    bare |= {"local_heal": {}, "whole_heal": []}
    bare["parent"]["bytes"] = 15_000_000_000
    return bare


class Page(HTMLParser):
    """Checks that tags close in order and gathers the text outside <style>."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_leads_with_the_verdict(report):
    text = Page(html.render(report)).text
    assert text.index("✓ budget kept") < text.index("What was chosen")
    assert "weights ≤ 22% of the parent's" in text and "memory ≤ 8MB" in text
    assert "21.9 %" in text and "+0.36 %" in text
    assert "1.5 × the predicted 0.02" in text


def test_the_page_stands_alone(report):
    assert not re.search(r"https?://|<script|<link|@import|url\(", html.render(report))


def test_text_of_models_is_escaped(report):
    report["model"] = "<b>pico</b>"
    page = html.render(report)
    assert "<script>alert" not in page and "<b>pico" not in page
    assert "say &lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_sample_is_marked_from_where_it_departs(report):
    assert "hello &amp; good<mark>bye</mark>" in html.render(report)


def test_the_map_shows_every_slot(report):
    page = html.render(report)
    assert page.count('class="cell') == len(report["slots"])
    assert "<span>ffn 640</span><span>int4 g64</span>" in page
    assert 'title="1.mixer: none\nscore 0.005, 25.0% of the sum\n1000 B of 4.00 KiB"' in page


def test_budgets_that_lead_to_one_model_share_a_mark(report):
    page = html.render(report)
    assert "60%…80%" in page and "60%, 80%: 50.0% of the bytes" in page
    assert "weight_bytes of 150000 cannot be met" in page


def test_margins_say_what_cannot_be_met_and_what_does_not_bind(report):
    text = Page(html.render(report)).text
    assert "cannot be met" in text and "0.015 (-25%)" in text
    assert "memory · does not bind" in text


def test_runners_up_name_the_slots_that_differ(report):
    assert re.search(r"\+0\.0003 .* 1 1\.ffn int4 g64", Page(html.render(report)).text)


def test_computed_times_are_called_a_roofline(report):
    assert "a roofline" in Page(html.render(report)).text
    report["config"]["prices"] = "measured"
    assert "a roofline" not in Page(html.render(report)).text


def test_it_is_said_how_times_were_measured_or_why_not(report, bare):
    assert "Times were measured in the native engine, avx512" in Page(html.render(report)).text
    assert "Times were not measured: the prices are another machine's" in Page(html.render(bare)).text


def test_healing_that_did_not_help_is_called_so(report):
    assert "did not help" not in html.render(report)
    report["whole_heal_judged"] = [0.04, 0.05]
    assert "did not help" in html.render(report)


def test_a_bare_report_says_what_is_missing(bare):
    text = Page(html.render(bare)).text
    assert "No other budget was solved" in text
    assert "Nothing was healed" in text
    assert "No samples" in text
    assert "Times were not measured" in text
    assert "Runners-up" not in text


def test_a_child_that_was_only_fitted_is_told_so(bare):
    bare["fitted"] = {"0.mixer": [0.02, 0.02], "0.ffn": [0.02, 0.01]}
    text = Page(html.render(bare)).text
    assert "Nothing was healed" not in text
    assert "matrices that 2 blocks write with were fitted" in text


def test_only_small_parents_get_the_warning(report, bare):
    assert all("fewer than 100 M parameters" in render(report) for render in (html.render, card.render))
    assert not any("fewer than 100 M parameters" in render(bare) for render in (html.render, card.render))


def test_a_broken_bound_is_called_broken(report):
    report["budget"]["memory_bytes"] = 6_000_000
    assert "✗ budget not kept" in html.render(report)
    assert "**not kept**" in card.render(report)


def test_measured_memory_stands_beside_what_was_computed(report):
    assert "(computed, not measured)" in summary.render(report)
    report["verified"]["memory"] = {"parent": 20 * 2**20, "child": 7 * 2**20}
    assert "(computed; 7.00 MiB at most were resident while it served)" in summary.render(report)
    assert "| memory | 20.00 MiB | 7.00 MiB |" in card.render(report)
    assert "20.00 MiB" in html.render(report)


def test_throughput_is_a_lower_bound(report):
    report["budget"] = {"tokens_per_second": 3000.0}
    report["config"]["budget"] = {"throughput": "3000tok/s"}
    report["margins"] = {"tokens_per_second": {"5% tighter": None, "as asked": 0.02, "5% looser": 0.02}}
    assert "throughput ≥ 3,000 tok/s: 4,000 tok/s" in Page(html.render(report)).text
    assert "throughput ≥ 3000tok/s: 4,000 tok/s (predicted; 76 tok/s measured" in card.render(report)
    assert "76 tok/s" in html.render(report).split("Throughput")[-1]
    report["workload"]["concurrency"] = 4
    assert "(predicted for 4 texts at once; 76 tok/s measured" in card.render(report)


@pytest.mark.parametrize("metric", ["lm", "cosine", "nmse"])
def test_other_metrics_are_not_passed_off_as_kl(report, metric):
    report["metric"] = metric
    text = Page(html.render(report)).text
    assert "the predicted 0.02" not in text and "Ring: measured" not in text
    assert ("Loss added" in text) == (metric == "lm")


def test_a_model_left_as_it_was_can_be_drawn(bare):
    for slot in bare["slots"]:
        slot |= {"choice": "parent", "axes": {}, "score": 0}
    bare["chosen"]["solutions"] = [solution({}, file_bytes=15_000_000_000, score=0.0)]
    bare["margins"] = {"weight_bytes": {"5% tighter": 0.1, "as asked": 0.0, "5% looser": 0.0}}
    assert "predicted 0" in Page(html.render(bare)).text
    assert "compressed-tensors" not in card.render(bare)


def test_the_card_has_a_header_and_says_how_to_load(report):
    text = card.render(report)
    assert text.startswith("---\nbase_model: pico\nlibrary_name: transformers\n")
    assert "model, tokenizer = pw.load(" in text
    assert "| file size | 14.31 MiB | 3.13 MiB | at most 3.14 MiB |" in text
    assert "| 0.ffn | ffn 640 + int4 g64 gptq | 0.003 |" in text
    assert "60,000 tokens" in text and "/somewhere/private" not in text


def test_the_card_of_a_bare_report(bare):
    text = card.render(bare)
    assert "Nothing was trained afterwards" in text
    assert "| time to first token |  |  | 10.00 ms |" in text


def test_write_leaves_a_whole_folder(report, tmp_path):
    candidate = tmp_path / "candidate"
    candidate.mkdir()
    (candidate / "config.json").write_text("{}")
    out = write(report, candidate, places.hashes(candidate), tmp_path / "out")
    written = ["README.md", "config.json", "report.html", "report.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*written, places.LIST])
    assert html.render(json.loads((out / "report.json").read_text())) == (out / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidate", "out"]
    places.replaceable(out)


def test_a_page_is_drawn_again_and_nothing_else_is_overwritten(report, tmp_path):
    (tmp_path / "candidate").mkdir()
    out = write(report, tmp_path / "candidate", {}, tmp_path / "out")
    page, files = (out / "report.html").read_text(), places.hashes(out)
    for place in (None, tmp_path / "page.html"):
        assert draw(out, place).read_text() == page
    assert places.hashes(out) == files
    (out / "report.json").write_text(json.dumps({**report, "model": "another"}))
    (tmp_path / "link.html").symlink_to(out / "README.md")
    for place, name in ((out / "report.json", "report.json"), (tmp_path / "link.html", "README.md")):
        with pytest.raises(ValueError, match=f"{place} is {name} of the model"):
            draw(out, place)
    draw(out)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    places.replaceable(out)  # a page that we drew again is still ours


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from leaves(value[key], (*path, key))


def test_a_report_of_wrong_types_is_an_error_in_one_line(report, tmp_path):
    """Every place of a report in turn is something else, or is missing."""
    path, wrong = tmp_path / "report.json", itertools.cycle([None, "x", -1, [], {}, True, 1e300, 0, "0.ffn", ...])
    path.write_text(json.dumps(report))
    draw(tmp_path)
    refused = 0
    places_once = {tuple("*" if isinstance(key, int) else key for key in way): way for way in leaves(report)}
    for place in places_once.values():
        changed, other = {"report": copy.deepcopy(report)}, next(wrong)
        *way, last = ("report", *place)
        holder: Any = functools.reduce(lambda value, key: value[key], way, changed)
        if other is ...:
            del holder[last]
        else:
            holder[last] = other
        path.write_text(json.dumps(changed.get("report")))
        try:
            draw(tmp_path)
        except ValueError as err:
            refused += 1
            assert str(err).startswith(str(path)) and "\n" not in str(err) and len(str(err)) < 400
    assert refused > 60


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1.0, 3.0], [1e-7, 1e3], [5.0, 5.0001]])
@pytest.mark.parametrize("log", [False, True])
def test_plots_stay_inside_their_frame(values, log):
    points = [charts.Point(index, value) for index, value in enumerate(values)]
    axes = charts.Axis("x", whole=True), charts.Axis("y <units>", log=log)
    drawn = charts.plot([charts.Series(points, "child", line=True)], *axes)
    heights = [float(y) for y in re.findall(r'cy="([^"]+)"', drawn)]
    assert len(heights) == len(values) and all(0 < y < 300 for y in heights)
    assert heights == sorted(heights, reverse=True)
    assert "y &lt;units&gt;" in drawn and 'class="tick' in drawn


def test_bars_grow_with_their_values():
    drawn = charts.bars([charts.Bar("a", 1.0, "1"), charts.Bar("b", 2.0, "2"), charts.Bar("c", None, "none")])
    small, large = (float(width) for width in re.findall(r'rect [^>]*width="([^"]+)"', drawn))
    assert large == pytest.approx(2 * small)


def test_what_the_choices_do_together_before_healing_is_shown(report):
    assert "Before healing" not in html.render(report)
    report["unhealed"] = {"kl": 0.0271, "lm": 0.02, "cosine": 0.01, "nmse": 0.01}
    page = html.render(report)
    assert "Before healing, on the scored text" in page
    assert "0.0271" in page


def test_a_bound_on_time_is_told_as_predicted_and_as_measured(report, bare):
    for one in (report, bare):
        one["budget"]["tpot_seconds"] = 0.015
        one["config"]["budget"]["tpot"] = "15ms"
    for render in (html.render, card.render, summary.render):
        assert "predicted; 13.10 ms measured in the native engine" in render(report)
        assert "predicted, not measured" in render(bare)


def test_the_terminal_gets_the_outcome_in_a_few_lines(report, bare):
    lines = summary.render(report).splitlines()
    assert [line.split()[0] for line in lines] == [
        "budget",
        "budget",
        "size",
        "quality",
        "agreement",
        "speed",
        "checks",
    ]
    assert "0.90 x as fast; median in the native engine)" in lines[5]
    report["workload"]["concurrency"] = 4
    assert "median in the native engine, 4 texts at once)" in summary.render(report)
    report["verified"]["slowdown"] = 1.1
    assert "0.90 x as fast" in summary.render(report)
    report["verified"]["slowdown"] = 1.6
    told = "the machine is busier than when prices were made: the same work takes 1.60 x as long now"
    assert "as fast" not in summary.render(report) and told in summary.render(report)
    assert told in Page(html.render(report)).text
    assert "speed" not in summary.render(bare)


def test_a_check_that_could_not_be_made_has_neither_passed_nor_failed(report):
    unmade = {"name": "logits", "ok": False, "expected": "at most 0.05", "found": None, "not_run": "no <engine>"}
    report["verified"]["checks"].append(unmade)
    assert "checks     1 of 1 passed, 1 not run: no <engine>" in summary.render(report)
    assert "1 of 1 passed, 1 not run: no <engine>" in card.render(report)
    assert "The budget was kept" in card.render(report)
    page = html.render(report)
    assert "1 of 1 passed, 1 not run: no &lt;engine&gt;" in page and '<li class="unrun">logits' in page
    report["verified"]["checks"].append({**unmade, "not_run": None, "found": 0.4})
    assert "checks     1 of 2 passed, 1 not run" in summary.render(report)
    assert "**not kept**" in card.render(report)
