"""Text to calibrate, measure and train on, without shipping any.

Every Python installation carries about 12 MB of source and documentation: the standard library and
`pydoc_data.topics`. It is read where it lies (PSF licence), split once and for all into a part that calibration
and training may see and a held-out part that they never do. `HELD_OUT_MODULES` names the held-out modules, so the
split survives a change of interpreter; which bytes were read is told by `fingerprint`.

Any other text comes from the user (`from_path`) or from the parent model itself (`evals.sample`).
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.disk.reading import size_of

HELD_OUT_MODULES = frozenset(
    """
    bdb bisect calendar cmd configparser contextlib copy fractions graphlib heapq json mimetypes netrc operator
    queue sched shelve shlex shutil smtplib statistics tabnanny textwrap tokenize wsgiref zipapp
    """.split()  # noqa: SIM905
)
"""Top-level standard-library modules that neither training nor calibration reads."""

_SKIPPED_PARTS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data")
)
_HELD_OUT_TOPICS_OF = 5  # one topic in five is held out, by the CRC of its name


@dataclass(frozen=True)
class Document:
    """One text with a name that stays the same from one machine to the next."""

    name: str
    text: str


def stdlib(*, held_out: bool) -> Iterator[Document]:
    """Source files of this interpreter's standard library, then its documentation topics, in a fixed order.

    Tests, character tables (`encodings`) and files that are not UTF-8 are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_PARTS.intersection(parts) or (parts[0].removesuffix(".py") in HELD_OUT_MODULES) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document("/".join(parts), text)
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        if (zlib.crc32(name.encode()) % _HELD_OUT_TOPICS_OF == 0) == held_out:
            yield Document(f"topics/{name}", text)


def from_path(path: Path) -> list[Document]:
    """A text file, or every .txt, .md, .py and .jsonl file below a folder (sorted). JSONL lines need a "text" key.

    Raises FileNotFoundError if `path` is missing, ValueError if no text is found or a file is not UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(f"text {path} does not exist; give a file or a folder of .txt, .md, .py, .jsonl files")
    files = [path]
    if not path.is_dir():
        size_of(path)  # a pipe would wait for ever
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix in {".txt", ".md", ".py", ".jsonl"} and p.is_file())
    documents = [document for file in files for document in _read(file, path if path.is_dir() else path.parent)]
    if not documents:
        raise ValueError(f"no text in {path}: expected at least one non-empty .txt, .md, .py or .jsonl file")
    return documents


def _read(file: Path, root: Path) -> Iterator[Document]:
    name = file.relative_to(root).as_posix()
    try:
        raw = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise ValueError(f"{file} is not UTF-8 text (byte {err.start}); convert it or leave it out") from err
    if file.suffix != ".jsonl":
        if raw.strip():
            yield Document(name, raw)
        return
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError(f"text is a {type(text).__name__}")
        except (ValueError, RecursionError, KeyError, TypeError) as err:
            raise ValueError(f'{file}:{number}: expected a JSON object with a "text" key, got {line[:60]!r}') from err
        yield Document(f"{name}:{number}", text)


_GUTENBERG_START = re.compile(r"^\s*\*\*\* ?START OF TH(E|IS) PROJECT GUTENBERG.*$", re.M)
_GUTENBERG_END = re.compile(r"^\s*(\*\*\* ?END OF TH|End of (the |this )?Project Gutenberg)", re.M)


def strip_gutenberg(raw: str) -> str:
    """The book between Project Gutenberg's header and licence, with plain line ends; all of `raw` if it has none."""
    text = raw.removeprefix("\ufeff").replace("\r\n", "\n")
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip() + "\n"


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts: the same documents in the same order give the same hash."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """Equal stretches of tokens, cut from documents laid end to end, each begun and ended as the tokenizer itself does.
    Where that adds nothing to a text, EOS stands between documents and nothing before the first.

    ids (n, context + 1) int64: row i + 1 starts with the last token of row i, so every token but the first is
    predicted once. scored (n, context) bool: False where the target ids[:, 1:] is not of the text, but one that the
    tokenizer adds or that stands between documents. nbytes (n,) int64: UTF-8 bytes of the row's scored targets.
    """

    ids: np.ndarray
    scored: np.ndarray
    nbytes: np.ndarray

    def take(self, count: int) -> Rows:
        """At most `count` rows, evenly spread over the text."""
        if count >= len(self.ids):
            return self
        return self.pick(np.linspace(0, len(self.ids) - 1, count).round().astype(np.int64))

    def pick(self, rows: np.ndarray) -> Rows:
        """The given rows, in the given order."""
        return Rows(self.ids[rows], self.scored[rows], self.nbytes[rows])

    def hold_within(self, vocabulary: int) -> None:
        """Raises ValueError if there is a token that a model of so many does not know."""
        highest = int(self.ids.max(initial=0))
        if highest >= vocabulary:
            raise ValueError(
                f"the tokenizer gives token {highest}, the model's vocabulary ends at {vocabulary - 1}; "
                "they do not belong together"
            )


def rows(documents: Iterable[Document], tokenizer: Any, context: int, *, most: int | None = None) -> Rows:
    """Tokenise and cut; with `most`, stop reading documents once they give that many rows.

    `tokenizer` is a fast transformers tokenizer; a last stretch shorter than `context` is dropped.

    Raises ValueError if the tokenizer cannot tell offsets (slow tokenizers) or the text is shorter than one row.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; save the model with its tokenizer.json")
    between = [] if added(tokenizer) != ([], []) or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    nbytes: list[int] = []  # -1 marks what is not of the text
    for document in documents:
        encoded = tokenizer(
            document.text,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        if ids:
            ids += between
            nbytes += [-1] * len(between)
        ids += encoded["input_ids"]
        sizes = _byte_lengths(document.text, encoded["offset_mapping"])
        nbytes += [-1 if own else size for own, size in zip(encoded["special_tokens_mask"], sizes, strict=True)]
        if most is not None and len(ids) > most * context:
            break
    count = (len(ids) - 1) // context if most is None else min(most, (len(ids) - 1) // context)
    if count < 1:
        raise ValueError(f"the text holds {len(ids)} tokens, less than one stretch of {context + 1}; give more text")
    flat = np.asarray(ids, np.int64)
    cut = np.lib.stride_tricks.sliding_window_view(flat, context + 1)[: count * context : context]
    per_target = np.asarray(nbytes, np.int64)[1 : count * context + 1].reshape(count, context)
    return Rows(cut.copy(), per_target >= 0, per_target.clip(0).sum(axis=1))


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer by its own rule puts before and after a text; many put none."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, own = encoded["input_ids"], [bool(flag) for flag in encoded["special_tokens_mask"]]
    if False not in own:
        return ids, []
    return ids[: own.index(False)], ids[len(own) - own[::-1].index(False) :]


def separator_id(tokenizer: Any) -> int:
    """The token after which a text begins: the one that the tokenizer puts there, or else the one that ended the text
    before, EOS, or else BOS. Raises ValueError if it names none."""
    before, _ = added(tokenizer)
    for token in (*before[-1:], tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer names neither a BOS nor an EOS token; set one in tokenizer_config.json")


def _byte_lengths(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes per token; of several tokens that share one multi-byte character, the first owns its bytes."""
    width = np.zeros(len(text) + 1, np.int64)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    width[1:] = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    end_byte = width.cumsum()
    ends = np.maximum.accumulate(np.asarray([end for _, end in offsets], np.int64))
    starts = np.concatenate([[0], ends[:-1]])
    return (end_byte[ends] - end_byte[starts]).tolist()
