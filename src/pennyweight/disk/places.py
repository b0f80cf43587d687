"""Where results are put: never over what they are made of, never over anything that penny did not write.

A finished folder lists its files in `SHA256SUMS`, as `sha256sum -c` reads it. What is not in that list, or was changed
since, is somebody's own, and the folder is left alone. The list is written first and deleted last, so that a folder
that was left half made, or half deleted, is still known for ours.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from pennyweight.disk.reading import bytes_of

LIST = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def apart(place: Path, called: str, inputs: Mapping[str, Path]) -> None:
    """Raises ValueError if what will be written to `place` (in the user's words: `called`) is one of the inputs (words
    -> path), lies in one or holds one: links, dots and the case of letters make no difference."""
    for name, path in inputs.items():
        inside, around = _within(place, path), _within(path, place)
        if inside and around:
            raise ValueError(f"{called} {place} is {name}; choose another place")
        if inside:
            raise ValueError(f"{called} {place} lies in {name} {path}; choose a place outside of it")
        if around:
            raise ValueError(f"{name} {path} lies in {called} {place}; choose a place apart from it")


def _within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or lies in it. Folders that exist are told by their inodes, not by their names."""
    inner, outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))
    ways = (inner, *inner.parents)
    if not outer.exists():
        return outer in ways
    return any(way.exists() and way.samefile(outer) for way in ways)


def beside(folder: Path) -> dict[str, Path]:
    """The neighbours that `publish` and a job use while they work on a folder, by what they are for."""
    folder = Path(os.path.realpath(folder))
    return {end: folder.with_name(f"{folder.name}.{end}") for end in ("partial", "replaced", "rejected")}


def replaceable(folder: Path, *, unchanged: bool = True) -> None:
    """Raises ValueError with the first thing in `folder` that penny did not write or, if it has to be `unchanged`, that
    is not as it was written. Nothing and an empty folder are fine."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} exists and is not a folder; choose another --out or move it away")
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    if found and LIST not in found:
        raise ValueError(
            f"{folder} exists and was not made by penny (it has no {LIST}); choose another --out or move it away"
        )
    known = _listed(folder) if found else {}
    for name, path in found.items():
        ours = name == LIST or name in known
        if path.is_dir():
            ours = any(other.startswith(f"{name}/") for other in known)
        if path.is_symlink() or not ours:
            raise ValueError(f"{folder} holds {name}, which penny did not write; move it away or choose another --out")
        if unchanged and name in known and sha256(path) != known[name]:
            raise ValueError(
                f"{path} was changed since penny wrote it; move it away or choose another --out (delete it if it is "
                "damaged)"
            )


def begun(folder: Path, mark: str, ours: Collection[str] = ()) -> None:
    """Raises ValueError if `folder` is there, is not empty, and is none in which we began to work: those hold the file
    `mark`, or no more than a lock and what is named in `ours`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} exists and is not a folder; choose another place")
    foreign = [path.name for path in sorted(folder.glob("*")) if path.name not in ("lock", *ours)]
    if foreign and not (folder / mark).exists():
        raise ValueError(f"{folder} holds {foreign[0]} and was not made by penny; move it away or choose another place")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name; empty if there is no folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def publish(folder: Path, source: Path, known: Mapping[str, str], more: Mapping[str, bytes]) -> Path:
    """Put the files of folder `source`, whose SHA-256 are `known`, and the files `more` at `folder`.

    `folder` holds all that it held before until it holds all of the new; where it existed, a kill between two renames
    leaves both beside it. Raises ValueError if something there is not ours, RuntimeError if a file of `source` is not
    what it was.
    """
    folder = Path(os.path.realpath(folder))
    staged, old = beside(folder)["partial"], beside(folder)["replaced"]
    replaceable(folder)
    _remove(staged)
    _remove(old)
    staged.mkdir(parents=True)
    _write(staged / LIST, _lines({**known, **{name: hashlib.sha256(raw).hexdigest() for name, raw in more.items()}}))
    for name, expected in known.items():
        copy = staged / name
        copy.parent.mkdir(exist_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, copy)
            _sync(copy)
        if not copy.is_file() or sha256(copy) != expected:
            raise RuntimeError(f"{source / name} is not what was written there; the same command makes it again")
    for name, raw in more.items():
        _write(staged / name, raw)
    _sync(staged)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    _sync(folder.parent)
    _remove(old)
    return folder


def note(path: Path) -> None:
    """A listed file was written again, by us: bring its folder's list up to date. Other files are left out of it."""
    known = _listed(path.parent) if (path.parent / LIST).is_file() else {}
    if path.name in known:
        _write(path.parent / LIST, _lines({**known, path.name: sha256(path)}))


def _listed(folder: Path) -> dict[str, str]:
    lines = bytes_of(folder / LIST).decode("utf-8", "replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    if not all(matches):
        raise ValueError(f"{folder / LIST} is not a list of SHA-256 and names; move {folder} away")
    return {match[2]: match[1] for match in matches if match}


def _lines(known: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items())).encode()


def _remove(folder: Path) -> None:
    """Delete what `publish` left. Raises ValueError, and deletes nothing, if something in it is not ours."""
    if not folder.exists():
        return
    replaceable(folder, unchanged=False)
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.name != LIST:
            path.rmdir() if path.is_dir() else path.unlink()
    (folder / LIST).unlink(missing_ok=True)
    folder.rmdir()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
