"""What is shown of a long job: what a stage waits for, how long it still takes, and in the end how long it took."""

from __future__ import annotations

import re

import pytest

from pennyweight.runs import progress
from pennyweight.runs.events import waiting
from pennyweight.runs.progress import Terminal


@pytest.fixture(params=["piped", "terminal"])
def terminal(request, monkeypatch) -> str:
    """Where stderr goes."""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if request.param == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "80")
    return request.param


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """As they stand at last: a bar is drawn over itself, and control codes move nothing else."""
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    return [line.rsplit("\r", 1)[-1].strip() for line in drawn.replace("\r\n", "\n").split("\n") if line.strip()]


def test_a_finished_stage_says_how_long_it_took(terminal, capsys):
    with Terminal() as listen:
        listen.begin("pack", total=2, unit="layers")
        listen.advance(1)
        listen.advance(2, loss=0.5)
        listen.end()
        with waiting(listen, "report"):
            pass
    found = lines(capsys)
    packed = [line for line in found if line.startswith("pack")]
    assert "done in" in packed[-1] and "eta" not in packed[-1]
    assert not [line for line in found if "eta 0" in line]
    if terminal == "piped":
        assert packed[0].startswith("pack: 1/2 layers, eta") and packed[1] == "pack: 2/2 layers, finishing loss 0.5"
    assert found[-1].startswith("report") and "done in" in found[-1]


def test_time_left_is_never_told_in_microseconds(terminal, monkeypatch, capsys):
    clock = iter([float(at) for at in range(100)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Terminal() as listen:
        listen.begin("score", total=10**6, unit="variants")
        listen.advance(10**6 - 1)
        listen.end()
    found = lines(capsys)
    assert not [line for line in found if re.search(r"eta [0-9.]+ (us|ms)", line)]
    if terminal == "piped":
        assert found[0] == "score: 999999/1000000 variants, eta under 1 s"


def test_a_stage_that_was_finished_before_is_not_told_as_done_in_no_time(terminal, capsys):
    with Terminal() as listen:
        listen.begin("heal model", total=4, done=4, unit="steps")
        listen.end()
        listen.begin("score", total=10, done=4, unit="variants")
        listen.advance(10)
        listen.end("note")
    found = lines(capsys)
    healed = next(line for line in found if line.startswith("heal model"))
    assert "nothing left to do" in healed and "done in" not in healed
    assert "4 before, note" in found[-1]


def test_a_stopped_job_leaves_no_bar_that_goes_on(terminal, capsys):
    with pytest.raises(KeyboardInterrupt), Terminal() as listen:
        listen.begin("stats", total=8)
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "done in" not in said
    if terminal == "terminal":
        assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")  # the cursor is shown again
