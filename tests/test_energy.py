"""Energy, where the machine counts it: packages once, over the counter's end, and said where it is not told."""

from __future__ import annotations

import pytest

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime.energy import energy_meter


@pytest.fixture
def rapl(tmp_path):
    """Two packages, a part of one, and the whole platform, which holds them all."""

    def domain(name: str, called: str, energy: int, most: int = 10_000_000) -> None:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, value in (("name", called), ("energy_uj", energy), ("max_energy_range_uj", most)):
            (folder / file).write_text(f"{value}\n")

    domain("intel-rapl:0", "package-0", 1_000_000)
    domain("intel-rapl:1", "package-1", 2_000_000)
    domain("intel-rapl:0:0", "core", 500_000)
    domain("intel-rapl:2", "psys", 7_000_000)
    return tmp_path, domain


def test_packages_are_counted_once(rapl):
    folder, domain = rapl
    joules, source = energy_meter(folder)
    before = joules()
    domain("intel-rapl:0", "package-0", 1_500_000)
    domain("intel-rapl:1", "package-1", 2_250_000)
    domain("intel-rapl:2", "psys", 9_000_000)
    domain("intel-rapl:0:0", "core", 900_000)
    assert joules() - before == pytest.approx(0.75)
    assert source == "RAPL, 2 processor packages"


def test_a_counter_that_begins_anew_goes_on(rapl):
    folder, domain = rapl
    joules, _ = energy_meter(folder)
    before = joules()
    domain("intel-rapl:0", "package-0", 9_000_000)
    joules()
    domain("intel-rapl:0", "package-0", 250_000)  # of 10 J: 1 J to its end, and 0.25
    assert joules() - before == pytest.approx(8 + 1.25)


def test_without_counters_or_leave_to_read_them_that_is_said(tmp_path, rapl, monkeypatch):
    assert energy_meter(tmp_path / "nothing") == (None, "this machine has no RAPL counters")
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    joules, why = energy_meter(rapl[0])
    assert joules is None and "root" in why
