"""Files of JSON and YAML come in one way: bounded, typed, wrong in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from pennyweight.disk import reading


class Wanted(BaseModel):
    count: int
    name: str = ""


def test_a_sound_file_is_its_type(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"count": 3}')
    (tmp_path / "a.yaml").write_text("count: 3\nname: x")
    assert reading.json_file(tmp_path / "a.json", Wanted) == Wanted(count=3)
    assert reading.yaml_file(tmp_path / "a.yaml", Wanted) == Wanted(count=3, name="x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"count": "many"}',
        '{"count": ' + "9" * 5000 + "}",
        "[" * 200_000,
        '{"count": NaN}',
        "\x00",
        '{"name": 1}',
    ],
)
def test_anything_else_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json") as raised:
        reading.json_file(path, Wanted)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        reading.json_file(tmp_path / "a.json", Wanted)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not an ordinary file"):
        reading.json_file(tmp_path / "a.json", Wanted)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no space
    with pytest.raises(ValueError, match="1099511627776 bytes"):
        reading.json_file(tmp_path / "a.json", Wanted)


def test_aliases_of_yaml_do_not_grow(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="aliases"):
        reading.yaml_file(tmp_path / "a.yaml", dict)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        reading.json_file(tmp_path / "a.json", Wanted)
