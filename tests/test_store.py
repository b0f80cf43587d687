"""The run folder: results stay, files are named by content, another run's folder is refused with the difference."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from pennyweight.disk.writer import write_atomic
from pennyweight.runs import scratch, space
from pennyweight.runs.lock import Held, Lock
from pennyweight.runs.shared import Shared
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
    assert store.keys("") == ["kept", "origin"]
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


def test_dropping_a_key_leaves_those_that_only_begin_like_it(folder, store):
    store.put_bytes("pack/hidden-1", b"one")
    store.put_all({"pack/hidden-10": 10, "pack/hidden": 0})
    store.drop("pack/hidden-1")
    store.drop("pack/hidden-2")  # never there: no error
    assert store.keys("pack/") == ["pack/hidden", "pack/hidden-10"]
    assert files(folder) == set()
    assert not store.made_from("parts", {"of": 1}, "pack/hidden")
    assert store.keys("pack/") == ["pack/hidden-10"]


# ------------------------------------------------------------------------------------------------------- identity


def test_the_same_run_may_come_back(folder, store):
    Store(folder, IDENTITY).close()
    reordered = dict(reversed(IDENTITY.items()))
    Store(folder, reordered).close()
    assert store.get("origin") == IDENTITY


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"model": "xyz"}, 'model "abc", now it is "xyz"'),
        ({"config": {**IDENTITY["config"], "seed": 1}}, "config seed 0, now it is 1"),
        ({"config": {"seed": 0, "budget": {"ttft": None}}}, 'config budget weights "22%", now it is nothing'),
        ({"config": None}, 'config {"seed": 0, '),
        ({"extra": [1, 2]}, "extra nothing, now it is [1, 2]"),
    ],
)
def test_another_run_s_folder_is_refused_with_the_key_that_differs(folder, store, changed, difference):
    with pytest.raises(ValueError) as err:
        Store(folder, {**IDENTITY, **changed})
    assert str(err.value).startswith(f"{folder} was begun with {difference}")
    assert str(err.value).endswith("; choose another --run folder, or go back to that")
    assert store.get("origin") == IDENTITY, "the folder keeps its origin"


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
        with pytest.raises(RuntimeError, match=r"cannot use the run folder .*run: .*; choose another --run"):
            Store(tmp_path / "run", IDENTITY)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_place_that_cannot_hold_a_run_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match=r"cannot use the run folder .*run: .*; choose another --run"):
        Store(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("where", ["header", "page"])
def test_a_damaged_database_is_refused_in_one_line(folder, store, where):
    store.put_all({f"score/{i}": "x" * 500 for i in range(100)})
    store.close()
    raw = bytearray((folder / "run.sqlite").read_bytes())
    start, length = (0, 16) if where == "header" else (2 * 4096, 4096)
    raw[start : start + length] = b"\xff" * length
    (folder / "run.sqlite").write_bytes(raw)
    with pytest.raises(RuntimeError, match=r"cannot use the run folder .*; choose another --run or delete it") as err:
        Store(folder, IDENTITY)
    assert "\n" not in str(err.value)


def raw_rows(folder):
    return sqlite3.connect(folder / "run.sqlite", isolation_level=None)


@pytest.mark.parametrize("change", ["value", "hash", "key"])
def test_a_row_that_is_not_as_it_was_written_counts_as_not_there(folder, store, change):
    store.put_all({"score/0": {"kl": 0.25}, "score/1": {"kl": 0.5}})
    damaged = {"value": "value = '{\"kl\": 0.75}'", "hash": "hash = '0'", "key": "key = 'score/2'"}[change]
    raw_rows(folder).execute(f"update kept set {damaged} where key = 'score/0'")
    assert store.values("score/") == {"score/1": {"kl": 0.5}}
    assert [store.get(f"score/{i}") for i in range(3)] == [None, {"kl": 0.5}, None]


def test_without_its_origin_nothing_in_a_folder_is_believed(folder, store):
    store.put("score/0", 1)
    store.put_bytes("stats/0", b"content")
    store.close()
    raw_rows(folder).execute("update kept set value = '{}' where key = 'origin'")
    again = Store(folder, {**IDENTITY, "model": "another"})
    assert again.keys("") == ["origin"] and files(folder) == set()
    again.close()


@pytest.mark.parametrize("name", ["../../thesis.txt", "thesis.txt", "A" * 64, "a" * 63, ["a"], 7])
def test_a_row_that_names_anything_but_64_hex_digits_touches_no_file(tmp_path, folder, store, name):
    theses = [tmp_path / "thesis.txt", folder / "files" / "thesis.txt", folder / "files" / ("A" * 64)]
    for path in theses:
        path.write_text("three years of work")
    text = json.dumps({"file": name})
    hashed = hashlib.sha256(f"hidden/0\n{text}".encode()).hexdigest()[:16]
    for done in ("get", "path", "tensors", "put", "drop"):
        raw_rows(folder).execute("insert or replace into kept values ('hidden/0', ?, ?)", (text, hashed))
        if done == "tensors":
            with pytest.raises(RuntimeError, match="hidden/0 is gone from"):
                store.tensors("hidden/0")
        elif done == "put":
            store.put("hidden/0", 1)
        elif isinstance(name, str) or done == "drop":
            assert getattr(store, done)("hidden/0") is None
    store.close()
    Store(folder, IDENTITY).close()
    assert [path.read_text() for path in theses] == ["three years of work"] * 3


def test_values_of_another_kind_are_refused_in_one_line(store):
    store.put("score/0", {"kl": [1]})
    with pytest.raises(ValueError, match=r"run\.sqlite: kl: Input should be a valid number; found \[1\]"):
        store.get("score/0", dict[str, float])
    with pytest.raises(ValueError, match=r"run\.sqlite: score/0\.kl: Input should be a valid number; found \[1\]"):
        store.values("score/", dict[str, float])


def damage(path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how in ("cut", "emptied"):
        del content[-1 if how == "cut" else 0 :]
    else:
        content[{"first byte": 0, "last byte": -1}[how]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "emptied", "gone", "first byte", "last byte"])
@pytest.mark.parametrize("reopened", [True, False])
def test_a_file_that_is_not_as_it_was_written_is_no_result_and_can_be_made_again(folder, store, how, reopened):
    tensors = {"moment": torch.ones(63)}
    store.put_tensors("stats/0", tensors)
    path = store.path("stats/0")
    damage(path, how)
    if reopened:
        store.close()
        store = Store(folder, IDENTITY)
        assert store.get("stats/0") is None and store.path("stats/0") is None
    else:  # it was whole when it was looked at
        said = r"stats/0 is gone from .* or damaged there; the same command makes it again"
        with pytest.raises(RuntimeError, match=said):
            store.tensors("stats/0")
    store.put_tensors("stats/0", tensors)
    assert store.path("stats/0") == path and torch.equal(store.tensors("stats/0")["moment"], tensors["moment"])
    store.close()


def test_a_folder_of_an_earlier_version_is_refused_and_left_alone(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / ("a" * 64)).write_text("hours of work")
    sqlite3.connect(tmp_path / "run.sqlite").execute("create table results (key text primary key, value text)")
    with pytest.raises(ValueError, match="was begun with an earlier pennyweight; choose another --run"):
        Store(tmp_path, IDENTITY)
    assert files(tmp_path) == {"a" * 64}


def test_nothing_under_a_key_is_said(store):
    with pytest.raises(RuntimeError, match="stats/7 is gone"):
        store.tensors("stats/7")


def test_what_a_killed_run_left_half_written_or_unnamed_is_swept_and_nothing_else(folder, store):
    name = hashlib.sha256(b"content").hexdigest()
    for left in (f"{name}.0123456789abcdef.partial", hashlib.sha256(b"unnamed").hexdigest()):
        (folder / "files" / left).write_bytes(b"con")
    (folder / "built.partial").mkdir()
    (folder / "files" / "notes.txt").write_text("mine")
    store.put_bytes("a", b"content")
    store.close()
    again = Store(folder, IDENTITY)
    assert again.path("a").read_bytes() == b"content"
    assert files(folder) == {name, "notes.txt"} and not (folder / "built.partial").exists()
    again.close()


def test_a_result_that_is_put_again_leaves_no_earlier_file(folder, store):
    store.put_bytes("checkpoint", b"first")
    store.put_bytes("checkpoint", b"second")
    assert files(folder) == {hashlib.sha256(b"second").hexdigest()}


def test_results_are_dropped_when_what_they_are_made_from_has_changed(store):
    assert not store.made_from("build", {"layout": {"0.ffn": 1}}, "built", "parts/")
    store.put_all({"built": 1, "parts/0": 2, "other": 3})
    assert store.made_from("build", {"layout": {"0.ffn": 1}}, "built", "parts/")
    assert store.get("built") == 1
    assert not store.made_from("build", {"layout": {"0.ffn": 2}}, "built", "parts/")
    assert [store.get(key) for key in ("built", "parts/0", "other")] == [None, None, 3]


@pytest.mark.parametrize("how", ["cut", "emptied", "gone", "first byte", "last byte", "another file"])
def test_a_folder_is_kept_as_long_as_every_file_of_it_is_what_was_put(tmp_path, store, how):
    made = tmp_path / "candidate"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        (made / name).write_text(name)
    assert store.folder_digests("folder/candidate", made) is None
    store.put_folder("folder/candidate", made)
    assert store.folder_digests("folder/candidate", made)["config.json"] == hashlib.sha256(b"config.json").hexdigest()
    if how == "another file":
        (made / "model-2.safetensors").write_text("x")
    else:
        damage(made / "config.json", how)
    assert store.folder_digests("folder/candidate", made) is None


# ------------------------------------------------------------------------------------------------------ work files


@pytest.mark.parametrize("how", ["cut", "emptied", "gone", "first byte", "last byte"])
def test_a_work_file_that_is_damaged_counts_as_not_there(tmp_path, how):
    path, tensors = tmp_path / "state.safetensors", {"hidden": torch.randn(2, 3), "at": torch.tensor(7)}
    scratch.keep(path, tensors)
    found = scratch.kept(path)
    assert found is not None and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert len(found) == 2 and list(tmp_path.iterdir()) == [path]
    damage(path, how)
    assert scratch.kept(path) is None
    with pytest.raises(RuntimeError, match=r"state\.safetensors is gone or damaged; the same command makes it again"):
        scratch.needed(path)


def test_any_flipped_bit_of_a_work_file_is_seen(tmp_path):
    path = tmp_path / "state.safetensors"
    scratch.keep(path, {"hidden": torch.randn(1, 4).bfloat16()})
    raw = path.read_bytes()
    unseen = []
    for bit in range(0, 8 * len(raw), 3):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = scratch.kept(path)
        if found is not None:
            unseen.append(bit)
    path.write_bytes(raw)
    assert scratch.kept(path) is not None
    assert not unseen


def test_what_was_computed_is_remembered_by_what_it_was_computed_from(tmp_path):
    kept, made = scratch.Remembered(tmp_path / "codes"), []

    def make():
        made.append(1)
        return {"codes": torch.ones(3)}

    weight = torch.randn(4, 4)
    for source, how in (
        (weight, "int4"),
        (weight, "int4"),
        (weight.clone(), "int4"),
        (weight.T, "int4"),
        (weight, "int8"),
    ):
        assert torch.equal(kept.of(source, how, make)["codes"], torch.ones(3))
    assert len(made) == 3 and len(set(kept.used)) == 3 and kept.used[0] == kept.used[1] == kept.used[2]


# ----------------------------------------------------------------------------------------------------- a full disk


def full_file():
    Path("/dev/full").write_bytes(b"x")


def full_tensors():  # in its words: it would put a file in the place of /dev/full
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_array():
    with Path("/dev/full").open("wb") as file:
        np.ones(2**16).tofile(file)


def full_copy():
    raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])


def full_quota():
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "b")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("write", [full_file, full_tensors, full_array, full_copy, full_quota])
def test_a_full_disk_is_one_error_whoever_met_it(write):
    with pytest.raises(OSError) as err, space.full_disk_is_one_error():
        write()
    assert err.value.errno == errno.ENOSPC


def test_other_errors_of_the_disk_stay_what_they_are():
    with pytest.raises(FileNotFoundError), space.full_disk_is_one_error():
        Path("/nowhere/at/all").read_bytes()


def test_a_full_database_is_a_full_disk_and_what_was_there_stays(folder, store):
    store.put("score/0", 1)
    (pages,) = store._db.execute("pragma page_count").fetchone()
    store._db.execute(f"pragma max_page_count = {pages}")
    with pytest.raises(OSError) as err:
        store.put_all({f"score/{i}": "x" * 5000 for i in range(20)})
    assert err.value.errno == errno.ENOSPC and "run.sqlite" in str(err.value)
    store.close()
    again = Store(folder, IDENTITY)
    assert again.values("score/") == {"score/0": 1}
    again.close()


def test_a_failed_write_leaves_nothing_in_its_own_way(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space left", "x")

    monkeypatch.setattr(scratch, "save_file", lambda tensors, path: (path.write_bytes(b"half"), full()))
    with pytest.raises(OSError):
        scratch.keep(tmp_path / "state.safetensors", {"x": torch.ones(1)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "result", b"content")
    assert list(tmp_path.iterdir()) == []


def test_room_is_that_of_the_disk_and_what_is_used_that_of_the_files(folder, store):
    assert 0 < space.free_bytes(folder) < 2**60
    assert space.free_bytes(folder / "not" / "there") > 0
    before = space.used_bytes(folder)
    (folder / "work").mkdir()
    (folder / "work" / "state").write_bytes(b"x" * 1000)
    (folder / "work" / "link").symlink_to(folder / "run.sqlite")
    assert space.used_bytes(folder) == before + 1000
    assert space.used_bytes(folder / "not there") == 0


# --------------------------------------------------------------------------------------------------- one at a time


def test_a_folder_has_one_holder_at_a_time_who_is_named(tmp_path):
    with Lock(tmp_path / "run"), pytest.raises(Held) as err:
        Lock(tmp_path / "run")
    told = str(err.value)
    assert f"process {os.getpid()} on {socket.gethostname()} since 20" in told and "\n" not in told
    Lock(tmp_path / "run").close()


@pytest.mark.parametrize("said", [b"", b"{", b'{"pid": "x"}', b"x" * 10000])
def test_a_lock_file_of_any_content_locks(tmp_path, said):
    (tmp_path / "lock").write_bytes(said)
    with Lock(tmp_path):
        (tmp_path / "lock").write_bytes(said)
        with pytest.raises(Held, match="another process"):
            Lock(tmp_path)


def test_a_killed_process_holds_nothing(tmp_path):
    code = "import os; from pathlib import Path; from pennyweight.runs.lock import Lock; "
    code += f"kept = Lock(Path({str(tmp_path)!r})); print(os.getpid(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        pid = other.stdout.readline().strip()
        with pytest.raises(Held, match=f"process {pid} on"):
            Lock(tmp_path)
        other.kill()
    Lock(tmp_path).close()


def test_a_place_that_cannot_be_locked_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match=r"cannot write to the run folder .*; choose another --run"):
        Lock(tmp_path / "run")


def test_what_many_write_at_once_is_all_there(tmp_path):
    """Additions by 6 threads: each has its own file descriptor, and so its own lock."""
    path = tmp_path / "deep" / "latencies.json"

    def add(number: int) -> None:
        for i in range(15):
            Shared(path, float).add({f"{number}/{i}": number + i / 100})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    assert Shared(path, float).read() == {f"{n}/{i}": n + i / 100 for n in range(6) for i in range(15)}
    assert {p.name for p in path.parent.iterdir()} == {"latencies.json", "latencies.json.lock"}


def test_who_found_something_first_is_right_unless_it_is_forgotten(tmp_path):
    shared = Shared(tmp_path / "known.json", tuple[float, float])
    assert shared.add({"a|1": (1.0, 2.0), "b|1": (3.0, 4.0)}) == {"a|1": (1.0, 2.0), "b|1": (3.0, 4.0)}
    assert shared.add({"a|1": (9.0, 9.0)})["a|1"] == (1.0, 2.0)
    assert shared.add({"a|2": (5.0, 6.0)}, forget="a|") == {"a|2": (5.0, 6.0), "b|1": (3.0, 4.0)}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": [1, "x"]}', "\udce9"])
def test_a_shared_file_of_something_else_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "known.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"known\.json.*; remove the file, and what it held is measured again") as err:
        Shared(path, tuple[float, float]).read()
    assert "\n" not in str(err.value)
