"""The run folder: results stay, files are named by content, another run's folder is refused with the difference."""

from __future__ import annotations

import hashlib
import os
import stat

import pytest
import torch

from pennyweight.runs.store import Store

IDENTITY = {"model": "abc", "text": "def", "config": {"seed": 0, "budget": {"weights": "22%", "ttft": None}}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    opened = Store(folder, IDENTITY)
    yield opened
    opened.close()


def files(folder) -> set[str]:
    return {path.name for path in (folder / "files").iterdir()}


def test_what_is_put_can_be_got_now_and_after_reopening(folder, store):
    values = [None, 0, -1.5, True, "", "ü", [1, [2]], {"kl": 0.25, "rows": [63, 257]}]
    for i, value in enumerate(values):
        store.put(f"value/{i}", value)
    assert [store.get(f"value/{i}") for i in range(len(values))] == values
    store.close()
    again = Store(folder, IDENTITY)
    assert [again.get(f"value/{i}") for i in range(len(values))] == values
    again.close()


def test_the_last_value_put_counts_and_none_is_there_before_the_first(store):
    assert store.get("score/0") is None
    store.put("score/0", 1)
    store.put("score/0", 2)
    assert store.get("score/0") == 2
    assert store.keys("score/") == ["score/0"]


def test_what_one_process_puts_another_sees(folder, store):
    other = Store(folder, IDENTITY)
    store.put("score/0", 63)
    assert other.get("score/0") == 63
    other.close()


def test_keys_are_found_by_prefix_in_order(store):
    for key in ("score/1/7.ffn", "score/0/7.ffn", "score/0/7.mixer", "scores", "stats/0"):
        store.put(key, 1)
    assert store.keys("score/") == ["score/0/7.ffn", "score/0/7.mixer", "score/1/7.ffn"]
    assert store.keys("score/0/") == ["score/0/7.ffn", "score/0/7.mixer"]
    assert store.keys("nothing") == []


def test_tensors_come_back_as_they_were(store):
    tensors = {
        "moment": torch.randn(63, 63, generator=torch.Generator().manual_seed(0)),
        "transposed": torch.arange(6).view(2, 3).T,
        "half": torch.ones(1, dtype=torch.bfloat16),
        "none": torch.zeros(0, 257),
    }
    store.put_tensors("stats/0", tensors)
    found = store.tensors("stats/0")
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_files_are_named_by_content_and_kept_once(folder, store):
    store.put_bytes("a", b"content")
    store.put_bytes("b", b"content")
    store.put_bytes("c", b"other")
    assert files(folder) == {hashlib.sha256(content).hexdigest() for content in (b"content", b"other")}
    assert store.path("a") == store.path("b") != store.path("c")
    assert store.path("a").read_bytes() == b"content"
    assert store.path("nothing") is None


def test_dropping_deletes_only_files_that_nothing_else_names(folder, store):
    store.put_bytes("hidden/0", b"shared")
    store.put_bytes("hidden/1", b"own")
    store.put_bytes("kept", b"shared")
    store.put("hidden/2", {"kl": 0.5})
    store.put("hidden/3", [1])
    store.drop("hidden/")
    assert store.keys("hidden/") == []
    assert store.keys("") == ["identity", "kept"]
    assert files(folder) == {hashlib.sha256(b"shared").hexdigest()}
    assert store.path("kept").read_bytes() == b"shared"
    store.drop("kept")
    assert files(folder) == set()


def test_dropping_two_names_of_one_file_deletes_it(folder, store):
    store.put_bytes("hidden/0", b"shared")
    store.put_bytes("hidden/1", b"shared")
    store.drop("hidden/")
    assert files(folder) == set()
    store.drop("hidden/")  # nothing left: no error


# ------------------------------------------------------------------------------------------------------- identity


def test_the_same_run_may_come_back(folder, store):
    Store(folder, IDENTITY).close()
    reordered = dict(reversed(IDENTITY.items()))
    Store(folder, reordered).close()
    assert store.get("identity") == IDENTITY


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"model": "xyz"}, 'model was "abc", now it is "xyz"'),
        ({"config": {**IDENTITY["config"], "seed": 1}}, "config.seed was 0, now it is 1"),
        ({"config": {"seed": 0, "budget": {"ttft": None}}}, 'config.budget.weights was "22%", now it is null'),
        ({"config": None}, 'config was {"seed": 0, '),
        ({"extra": [1, 2]}, "extra was null, now it is [1, 2]"),
    ],
)
def test_another_run_s_folder_is_refused_with_the_key_that_differs(folder, store, changed, difference):
    with pytest.raises(ValueError) as err:
        Store(folder, {**IDENTITY, **changed})
    assert str(err.value).startswith(f"{folder} belongs to another run: {difference}")
    assert str(err.value).endswith(". Choose another --run folder")
    assert store.get("identity") == IDENTITY, "the folder keeps its identity"


def test_long_values_are_cut_in_the_difference(folder, store):
    with pytest.raises(ValueError) as err:
        Store(folder, {**IDENTITY, "text": "x" * 1000})
    assert len(str(err.value)) < 300


def test_tuples_in_an_identity_equal_their_lists(tmp_path):
    Store(tmp_path / "run", {"axes": ("noop", "bits")}).close()
    Store(tmp_path / "run", {"axes": ["noop", "bits"]}).close()
    Store(tmp_path / "run", {"axes": ("noop", "bits")}).close()


# --------------------------------------------------------------------------------------------------------- damage


@pytest.mark.skipif(os.geteuid() == 0, reason="running as root, who may write into read-only folders")
def test_a_read_only_folder_is_refused_with_the_way_out(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(RuntimeError, match=r"cannot write to the run folder .*run: .*; choose another --run"):
            Store(tmp_path / "run", IDENTITY)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_place_that_cannot_hold_a_run_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match=r"cannot write to the run folder .*run: .*; choose another --run"):
        Store(tmp_path / "run", IDENTITY)


def test_a_damaged_database_is_refused(folder, store):
    store.close()
    (folder / "run.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(RuntimeError, match=r"cannot write to the run folder .*not a database; choose another --run"):
        Store(folder, IDENTITY)


def test_nothing_under_a_key_is_a_key_error(store):
    with pytest.raises(KeyError, match="stats/7"):
        store.tensors("stats/7")


def damage(path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[-1:]
    else:
        content[{"first byte": 0, "last byte": -1}[how]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "first byte", "last byte"])
def test_a_damaged_file_is_refused_with_its_key_and_what_to_do(store, how):
    store.put_tensors("stats/0", {"moment": torch.ones(63)})
    damage(store.path("stats/0"), how)
    with pytest.raises(ValueError, match=r"\(stats/0\) is damaged; delete the run folder and start again"):
        store.tensors("stats/0")


def test_a_file_that_is_gone_is_refused_with_its_key_and_what_to_do(store):
    store.put_tensors("stats/0", {"moment": torch.ones(63)})
    store.path("stats/0").unlink()
    with pytest.raises(ValueError, match=r"\(stats/0\) is gone; delete the run folder and start again"):
        store.tensors("stats/0")


def test_a_file_half_written_when_the_run_was_killed_is_written_again(folder, store):
    name = hashlib.sha256(b"content").hexdigest()
    (folder / "files" / f"{name}.partial").write_bytes(b"con")
    store.put_bytes("a", b"content")
    assert store.path("a").read_bytes() == b"content"
    assert files(folder) == {name}


def test_free_space_is_that_of_the_folder_s_disk(store):
    assert 0 < store.free_bytes() < 2**60
