"""Models by what people type: a path, or a name that a hub knows, fetched into the cache that its other programs share.

    a/folder   a/file.gguf                      what is there, always, whatever else the words could mean
    owner/name   owner/name@revision            safetensors of a repository; a branch, a tag or a commit
    owner/name:Q4_K_M   owner/name:file.gguf    one GGUF file of a repository, by its quantisation or its name
    smollm2                                     a name that `penny models` lists

Nothing is asked of a network unless a name was typed, and never code or a pickle fetched. What is written with a dot or
a slash in front, ends like a file, or begins with a folder that is here is a path: if it is not there, that is said.

Cache, endpoint, token, offline mode and progress are huggingface_hub's, with its variables: HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE and the rest. It checks the lengths of what it fetched; the hashes that the hub tells are
checked here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.disk import tried
from pennyweight.disk.checkpoint import INDEX, WEIGHTS, shards, weight_files
from pennyweight.disk.model_config import CONFIG, read_config
from pennyweight.units import show_bytes

_NAME = re.compile(
    r"(?P<repository>[a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<part>[\w./-]+))?",
    re.ASCII | re.IGNORECASE,
)
_PATH = re.compile(r"[./~\\].*|.*\.(gguf|json|safetensors)/?|.*\\.*", re.IGNORECASE)
_WORDS = re.compile(
    r"config\.json|generation_config\.json|(tokenizer|special_tokens_map|added_tokens|vocab|chat_template)[\w.-]*"
    r"\.(json|jinja|txt)|merges\.txt|tekken\.json|[\w-]+\.(model|tiktoken)|tokenizer\.model\.v\d+"
    r"|additional_chat_templates/[\w.-]+\.jinja|(licen[cs]e|notice|copying|use_policy)([._-](txt|md))?",
    re.IGNORECASE,
)
"""What is read of a repository beside its weights, or goes along with a model made of it."""
_ODD = re.compile(r"[*?\[\]\\]|(^|/)\.\.?(/|$)")
_ROOM = 2**26  # bytes that a disk is not filled up to

Tell = Callable[[str], None]


class Unfetched(RuntimeError):
    """A model could not be fetched now, or not to its end; the same call goes on where this one stopped."""


@dataclass(frozen=True)
class Name:
    """A model as a hub knows it. `part`: which GGUF file of the repository."""

    repository: str
    revision: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "") + (f":{self.part}" if self.part else "")


def name_of(typed: str) -> Name | None:
    """The name that somebody typed; None for what can only be a path, whether it is there or not."""
    if typed in tried.models():
        return Name(tried.models()[typed].hub)
    match = _NAME.fullmatch(typed)
    if match is None or (_PATH.fullmatch(typed) and not match["part"]):
        return None
    return Name(match["repository"], match["revision"], match["part"])


def find(typed: str | Path, *, only_config: bool = False, tell: Tell = lambda said: None) -> Path:
    """The folder or GGUF file that `typed` means, fetched if it is a name and not in the cache. `only_config`: of a
    folder nothing else is needed, and nothing else fetched. `tell` hears what users should know.

    Raises FileNotFoundError for a path that is not there and a name that the hub does not know, ValueError for a
    repository that may not be read, or holds nothing that is, Unfetched for what may go better later.
    """
    path, typed = Path(typed), str(typed)
    if path.exists():
        return path
    name = name_of(typed)
    if name is None or ("/" in typed and Path(path.parts[0]).is_dir()):
        folder = f"; {path.parts[0]} is a folder here, so this is a path and no name of a hub" if name else ""
        hint = "" if name else ". A model of a hub is typed owner/name"
        raise FileNotFoundError(f"{typed} does not exist{folder}{hint}")
    if typed in tried.models():
        tell(f"{typed} is {name} of the hub")
    return _fetched(name, only_config, tell)


def cached(name: Name) -> bool:
    """Whether all of a model is in the cache. No network is asked."""
    try:
        _in_cache(name, False, "")
    except (OSError, ValueError, Unfetched):
        return False
    return True


@dataclass(frozen=True)
class _File:
    """Of a repository. `hash`: SHA-256, or the one that git gives small files; None if the hub tells neither."""

    size: int
    hash: str | None


def _fetched(name: Name, only_config: bool, tell: Tell) -> Path:
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return _in_cache(name, only_config, "HF_HUB_OFFLINE is set")
    try:
        with _one_line(name):
            info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    except Unfetched as err:
        found = _in_cache(name, only_config, str(err))
        tell(f"{err}; {name} is taken from the cache as it was fetched last")
        return found
    files = {
        each.rfilename: _File(each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id)
        for each in info.siblings or ()
    }
    fetch = _Fetch(name, str(info.sha), files)
    ggufs = [file for file in files if file.endswith(".gguf")]
    if name.part or (ggufs and WEIGHTS not in files and INDEX not in files):
        file = _chosen(name, ggufs)
        return fetch.get([file]) / file
    if CONFIG not in files:
        raise ValueError(f"{name} holds no {CONFIG}: it is no model that transformers loads")
    if only_config:
        tell(f"{name}: of the repository {CONFIG} alone was fetched")
        return fetch.get([CONFIG])
    if WEIGHTS not in files and INDEX not in files:
        others = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")))
        said = f", only {others[0]}, a kind of file that is not read" if others else ""
        raise ValueError(f"{name} holds no {WEIGHTS}{said}; look for a conversion to safetensors")
    index = [] if WEIGHTS in files else [INDEX]
    folder = fetch.get([*filter(_WORDS.fullmatch, files), *index])
    read_config(folder)  # a model that is not supported is refused before gigabytes are fetched
    weights = [WEIGHTS] if WEIGHTS in files else _shards(folder, files)
    return fetch.get(weights)


def _chosen(name: Name, ggufs: Sequence[str]) -> str:
    """The one file that a name means: by its whole name, or by its quantisation in any case of letters."""
    part = name.part or ""
    tag = re.compile(rf"(.*[.\-_/])?{re.escape(part)}(\.gguf)?", re.IGNORECASE)
    found = [part] if part in ggufs else [file for file in ggufs if not part or tag.fullmatch(file)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(sorted(ggufs)[:8]) + (" ..." if len(ggufs) > 8 else "")
    if not ggufs:
        raise ValueError(f"{name.repository} holds no GGUF file; without :{part} its safetensors are read")
    if not found:
        raise FileNotFoundError(f"{name.repository} has no GGUF file {part}; there are {shown}")
    raise ValueError(f"{name} means {len(found)} GGUF files; add one after a colon: {shown}")


def _shards(folder: Path, files: Mapping[str, _File]) -> list[str]:
    """The weight files that a fetched index names."""
    named, _ = shards(folder)
    if lacking := [file for file in named if file not in files]:
        raise ValueError(f"{folder / INDEX} names {lacking[0]}, which the repository does not have")
    return named


@dataclass(frozen=True)
class _Fetch:
    """Fetching from one commit of a repository."""

    name: Name
    commit: str
    files: Mapping[str, _File]

    def get(self, wanted: Sequence[str]) -> Path:
        """Fetch the files that the cache does not have; the folder that holds them. Raises ValueError or Unfetched."""
        from huggingface_hub import snapshot_download

        if odd := [file for file in wanted if _ODD.search(file)]:
            raise ValueError(f"{self.name} holds {odd[0]!r}, a name that is not fetched")
        new = [file for file in wanted if not self._has(file)]
        self._hold_room(sum(self.files[file].size for file in new))
        with _one_line(self.name):
            where = snapshot_download(self.name.repository, revision=self.name.revision, allow_patterns=list(wanted))
        folder = Path(where)
        if folder.name != self.commit:
            raise Unfetched(f"{self.name} was changed on the hub meanwhile; the same command fetches it as it is now")
        for file in wanted:
            self._hold(folder / file, self.files[file], whole=file in new)
        return folder

    def _has(self, file: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.name.repository, file, revision=self.commit), str)

    def _hold_room(self, needed: int) -> None:
        from huggingface_hub import constants

        place = Path(constants.HF_HUB_CACHE)
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if needed and needed + _ROOM > free:
            raise Unfetched(
                f"the disk is full: {self.name} takes {show_bytes(needed)} more, {show_bytes(free)} are free at "
                f"{there}; free some space, or set HF_HOME to a folder on another disk"
            )

    def _hold(self, path: Path, file: _File, *, whole: bool) -> None:
        """Raises Unfetched, and deletes it, for a file that is not what the hub has. `whole`: its hash as well."""
        found = path.stat().st_size
        if found != file.size:
            said = f"{found} bytes, the hub has {file.size}"
        elif whole and file.hash is not None and _hash(path, file) != file.hash:
            said = "other bytes than the hub has"
        else:
            return
        if path.is_symlink():
            (path.parent / path.readlink()).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise Unfetched(f"{path} was damaged ({said}) and is deleted; the same command fetches it again")


def _hash(path: Path, file: _File) -> str:
    """SHA-256, or git's SHA-1 of a blob, whichever the hub tells."""
    assert file.hash is not None
    digest = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _in_cache(name: Name, only_config: bool, why: str) -> Path:
    """What the cache has of a model. Raises Unfetched if that is not all; `why`: the reason not to ask the hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        where = snapshot_download(
            name.repository, revision=name.revision, local_files_only=True, allow_patterns=[CONFIG]
        )
    except (errors.LocalEntryNotFoundError, OSError) as err:
        raise Unfetched(f"{name} is not in the cache, and {why}") from err
    folder = Path(where)
    ggufs = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.gguf"))]
    if name.part or (ggufs and not (folder / CONFIG).exists()):
        return folder / _chosen(name, ggufs)
    try:
        if only_config:
            read_config(folder)
        else:
            weight_files(folder)
    except FileNotFoundError as err:
        raise Unfetched(f"{name} is in the cache only in part, and {why}") from err
    return folder


@contextlib.contextmanager
def _one_line(name: Name) -> Iterator[None]:
    """What huggingface_hub raises, in one line."""
    from huggingface_hub import constants, errors

    where, repository = constants.ENDPOINT, name.repository
    transport: Any = errors.HfHubHTTPError.__mro__[1]  # its HTTP library's error, of which it has changed the library
    try:
        yield
    except errors.GatedRepoError as err:
        raise ValueError(
            f"{repository} is gated: accept its terms at {where}/{repository}, then log in (hf auth login) or set "
            "HF_TOKEN"
        ) from err
    except errors.RepositoryNotFoundError as err:
        raise FileNotFoundError(
            f"{repository} is neither a path here nor a model at {where}; one that is private needs HF_TOKEN"
        ) from err
    except errors.RevisionNotFoundError as err:
        raise FileNotFoundError(f"{repository} has no revision {name.revision or 'main'}") from err
    except errors.HfHubHTTPError as err:
        status = err.response.status_code
        if status in (401, 403):
            raise ValueError(f"{repository} may not be read with this HF_TOKEN, or without one ({status})") from err
        raise Unfetched(f"{where} answers {status} for {repository}; try again later") from err
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise Unfetched(f"the disk is full; free some space, the same command goes on with {name}") from err
        raise Unfetched(f"{name} could not be fetched to its end: {_brief(err)}; the same command goes on") from err
    except transport as err:
        raise Unfetched(f"{where} cannot be reached ({_brief(err)})") from err


def _brief(err: Exception) -> str:
    return " ".join((str(err) or type(err).__name__).split())[:160]
