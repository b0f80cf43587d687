"""The tokenizer of a GGUF file, as transformers would have it.

Files hold tokens, merges or scores, and the name of the rule that splits text into words; not the rule. Two kinds
occur in the families we run: `gpt2`, byte-level BPE, and `llama`, SentencePiece's BPE, which merges the pair whose
token scores highest. The latter becomes a BPE with the merges its scores imply, as in transformers: equal to
SentencePiece but for ties between overlapping pairs of the same token.
"""

from __future__ import annotations

import re
from typing import Any

from gguf import TokenType

from pennyweight.disk.gguf.file import File
from pennyweight.disk.tokenizer import Vocabulary

# GPT-4's rule as Llama 3 and Qwen2 have it: they differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
RULES = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
_BEGINS = ("llama-bpe", "llama3", "llama-v3")  # rules whose text begins with BOS unless the file denies it

# By these names a token ends an answer, whatever type a file gives it: as in llama.cpp.
_ENDS = frozenset(
    """
    </s> <|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|>
    <end_of_turn> <turn|> <end_of_utterance> <｜end▁of▁sentence｜> <EOT> _<EOT> [EOT] [EOS]
    """.split()  # noqa: SIM905
)
_HARMONY = ("<|return|>", "<|call|>", "<|end|>")  # where all three are, the last only ends a part of an answer
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<start_of_turn>")
_TAG = re.compile(r"</?\w[^<>\s]*>|\[/?[A-Z_]+\]")
_LONGEST = 512  # characters of a token of SentencePiece's; it learns up to 16 unless it is told otherwise


def vocabulary(file: File, size: int) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of a model of `size` tokens, and what users should know about it. Raises ValueError for a kind of
    tokenizer that is not built, and for tokens, merges and scores that do not belong together."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    model = file.get("tokenizer.ggml.model", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [TokenType.NORMAL] * len(tokens))
    if not len(tokens) == len(types) <= size or not all(isinstance(token, str) for token in tokens):
        raise ValueError(
            f"{file.path}: {len(tokens)} tokens, {len(types)} types and {size} rows of the embedding do not go together"
        )
    notes: list[str] = []
    template = file.get("tokenizer.chat_template", str, "")
    types = _types_by_name(tokens, types, template, notes)
    numbered = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    roles = {role: _role(file, tokens, numbered, role) for role in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    called = {role: None if number is None else tokens[number] for role, number in roles.items()}
    if model == "gpt2":
        made = _byte_level(file, numbered, notes)
    elif model == "llama":
        made = _sentencepiece(file, numbered, types, called["unknown"])
    else:
        raise ValueError(f"{file.path}: tokenizer {model!r} is not built; supported are gpt2 and llama")
    for kind, special in ((TokenType.UNKNOWN, True), (TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        found = [token for token, i in numbered.items() if types[i] == kind]
        made.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])

    class Tokenizer(PreTrainedTokenizerFast):
        """A file may hold a token twice. One of its ids is the one that is written; all are read."""

        same = {i: numbered[token] for i, token in enumerate(tokens) if numbered.get(token, i) != i}  # noqa: RUF012

        def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if self.same:
                given = [token_ids] if isinstance(token_ids, int) else token_ids
                token_ids = [self.same.get(int(i), int(i)) for i in given]
            return super().decode(token_ids, *args, **kwargs)

    begins = file.get("tokenizer.ggml.add_bos_token", bool, _begins(file, model))
    begin = () if roles["bos"] is None or not begins else (roles["bos"],)
    tokenizer = Tokenizer(
        tokenizer_object=made,
        bos_token=called["bos"],
        eos_token=called["eos"],
        unk_token=called["unknown"],
        pad_token=called["padding"],
        add_bos_token=bool(begin),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template or None
    ends = _ENDS - ({"<|end|>"} if numbered.keys() >= set(_HARMONY) else set())
    stop = {i for i, token in enumerate(tokens) if token in ends}
    stop |= {number for role in ("eos", "eot", "eom") if (number := roles[role]) is not None}
    return Vocabulary(tokenizer, begin, frozenset(stop)), notes


def _types_by_name(tokens: list[str], types: list[int], template: str, notes: list[str]) -> list[int]:
    """The types of tokens, put right where names say more: ends of an answer are control tokens, and so is what looks
    like one and is typed as text; what looks like a tag and stands in the chat template is at least never cut up."""
    types, wrong = list(types), []
    for i, token in enumerate(tokens):
        kind = types[i]
        if token in _ENDS or (kind == TokenType.NORMAL and _CONTROL.fullmatch(token)):
            types[i] = TokenType.CONTROL
        elif kind == TokenType.NORMAL and template and _TAG.fullmatch(token) and token in template:
            types[i] = TokenType.USER_DEFINED
        if types[i] != kind:
            wrong.append(token)
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        notes.append(f"the file has {shown} as text; taken by name, they are control tokens of the chat template")
    return types


def _begins(file: File, model: str) -> bool:
    return model == "llama" or file.get("tokenizer.ggml.pre", str, "") in _BEGINS


def _role(file: File, tokens: list[str], numbered: dict[str, int], role: str) -> int | None:
    number = file.get(f"tokenizer.ggml.{role}_token_id", int, -1)
    if number == -1:
        return None
    if not 0 <= number < len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.{role}_token_id is {number}; there are {len(tokens)} tokens")
    return number if tokens[number] in numbered else None


def _byte_level(file: File, numbered: dict[str, int], notes: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list)]
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= numbered.keys():
            raise ValueError(f"{file.path}: merge {i}, {' '.join(merge)!r}, is not of tokens to a token; damaged")
    name = file.get("tokenizer.ggml.pre", str, "")
    rule = RULES.get(name, "gpt-2")
    if name not in RULES:
        said = f"names the rule {name!r}, unknown here" if name else "does not name the rule"
        notes.append(f"the file {said}, for splitting text into words; GPT-2's is used, which may cost quality")
    made = Tokenizer(models.BPE(vocab=numbered, merges=merges, ignore_merges=rule == "llama-bpe"))
    if rule in ("gpt-2", "smollm"):
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = bytes_ if rule == "gpt-2" else pre_tokenizers.Sequence([digits, bytes_])
    else:
        words = Regex(_WORDS.replace("DIGITS", "{1,3}" if rule == "llama-bpe" else ""))
        split, bytes_ = pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(file: File, numbered: dict[str, int], types: list[int], unknown: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(types):
        raise ValueError(f"{file.path}: {len(scores)} scores for {len(types)} tokens; the file is damaged")
    longest = max(map(len, numbered), default=0)
    if longest > _LONGEST:
        raise ValueError(f"{file.path}: a token of {longest} characters; at most {_LONGEST} are expected; damaged")
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, i in numbered.items():
        if types[i] == TokenType.NORMAL:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in numbered and right in numbered:
                    found.append((-scores[i], numbered[left], numbered[right], (left, right)))
    made = Tokenizer(
        models.BPE(
            vocab=numbered,
            merges=[merge for *_, merge in sorted(found)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(kind == TokenType.BYTE for kind in types),
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return made
