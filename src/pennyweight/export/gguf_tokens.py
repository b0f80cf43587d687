"""The tokenizer of a folder as a GGUF file says it: the other way round of disk/gguf/vocabulary.py.

A file names the rule that splits text into words instead of holding it. Which of the rules is this tokenizer's cannot
be read off its tokenizer.json, since the same rule is written there in many ways; so each is tried, and a text in which
they differ decides. What reads the file back has to find the same ids, or the model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from pennyweight.disk.gguf.file import File
from pennyweight.disk.gguf.vocabulary import RULES, vocabulary
from pennyweight.disk.tokenizer import added, encode
from pennyweight.runtime.sources.folder import Folder

_PROBE = (
    "It's 1234567 tokens, I'LL say; don't\t we?  x=3.50 €\r\n\n\n    def f(a_b):\n\t\treturn [x*y for x in y]  # 42°C\n"
    "naïve café cafe\u0301 \ufb01 \u2167 日本語 한국어 עברית العربية हिन्दी 👩\u200d👧 \u00a0\u200b\ufeff ... <|x|>"
)
"""Words, digits, quotes, spaces and scripts: what rules split in different ways."""


def metadata(folder: Folder) -> dict[str, Any]:
    """The keys `tokenizer.*`. Raises ValueError for a tokenizer that such files cannot hold."""
    vocabulary_of = folder.vocabulary()
    tokenizer, size = vocabulary_of.tokenizer, folder.config["vocab_size"]
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{folder.name}: its tokenizer has no tokenizer.json; load and save it with transformers once")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{folder.name}: a tokenizer of kind {model['type']} cannot be exported; BPE can")
    begin, end = added(tokenizer)
    if end or len(begin) > 1 or (begin and begin[0] != tokenizer.bos_token_id):
        raise ValueError(
            f"{folder.name}: its tokenizer puts {begin} before and {end} after a text; files can say BOS only"
        )
    words, types = _words(backend, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pieces = bool(model.get("byte_fallback")) or not _has_byte_level(backend)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_bos_token": bool(begin),
        **_roles(vocabulary_of, words),
    }
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        found["tokenizer.chat_template"] = template if isinstance(template, str) else template["default"]
    if pieces:
        first = {_joined(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        found["tokenizer.ggml.scores"] = np.array([first.get(word, 0.0) for word in words], np.float32)
        (begins, *_) = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))
        found["tokenizer.ggml.add_space_prefix"] = begins.startswith("▁")
        return found
    found["tokenizer.ggml.merges"] = merges
    for rule in dict.fromkeys(RULES.values()):
        found["tokenizer.ggml.pre"] = rule
        if not _differs(folder, File(Path(folder.name), found, {})):
            return found
    raise ValueError(
        f"{folder.name}: its tokenizer splits text by none of the rules that files can name ({', '.join(RULES)})"
    )


def hold_against(folder: Folder, file: File) -> None:
    """Raises ValueError if what reads the file splits a text into other tokens than the folder's tokenizer does, or
    ends answers elsewhere."""
    if differs := _differs(folder, file):
        raise ValueError(f"{folder.name}: {differs} when read back from a GGUF file; it cannot be exported")


def _differs(folder: Folder, file: File) -> str:
    ours, (theirs, _) = folder.vocabulary(), vocabulary(file, folder.config["vocab_size"])
    specials = "".join(f" a{token}{token} b" for token in ours.tokenizer.get_added_vocab())
    for text in (_PROBE, specials):
        if encode(ours.tokenizer, text) != encode(theirs.tokenizer, text):
            return "a text becomes other tokens"
    if ours.begin != theirs.begin:
        return "text begins with other tokens"
    return "" if ours.stop <= theirs.stop else "answers end at fewer tokens"


def _has_byte_level(backend: Mapping[str, Any]) -> bool:
    return "ByteLevel" in json.dumps(backend["pre_tokenizer"])


def _joined(merge: str) -> str:
    left, _, right = merge.partition(" ")
    return left + right


def _words(backend: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every id's token and type; ids of the embedding that have no token are unused. Raises ValueError for more tokens
    than the embedding has rows."""
    unknown = backend["model"].get("unk_token")
    by_id = {number: token for token, number in backend["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, TokenType.NORMAL)
    for token in backend["added_tokens"]:
        by_id[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if backend["model"].get("byte_fallback"):
        types |= {number: TokenType.BYTE for number, token in by_id.items() if _is_byte(token)}
        types |= {number: TokenType.UNKNOWN for number, token in by_id.items() if token == unknown}
    if max(by_id) >= size:
        raise ValueError(
            f"the tokenizer has a token {max(by_id)}, the embedding {size} rows; they do not belong together"
        )
    words = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    return words, [int(types.get(number, TokenType.UNUSED)) for number in range(size)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _roles(vocabulary_of: Any, words: list[str]) -> dict[str, int]:
    """Special tokens by what they are for; what ends answers beside EOS is the end of a turn, or of a message."""
    tokenizer = vocabulary_of.tokenizer
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    found |= dict(zip(("eot", "eom"), sorted(vocabulary_of.stop - {tokenizer.eos_token_id}), strict=False))
    named = {role: number for role, number in found.items() if number is not None and number < len(words)}
    return {f"tokenizer.ggml.{role}_token_id": int(number) for role, number in named.items()}
