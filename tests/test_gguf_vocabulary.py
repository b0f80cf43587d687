"""Tokenizers made of GGUF metadata give the ids of the tokenizers that the metadata were taken from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pennyweight.disk.gguf.file import File
from pennyweight.disk.gguf.vocabulary import vocabulary

WORDS = "Ünïcode naïve façade 東京 и ещё we'll WE'LL I'd  \n\n\n\t x\r\n 10,000.00 …🦊 " + "1234567 2024 1999 333 " * 9
TEXT = Path(__file__).read_text() + WORDS * 20
TEXTS = (
    *(
        "",
        " ",
        "hello world",
        "  two  spaces ",
        "we'll WE'LL I'm",
        "1 22 333 4444 55555",
        "naïve façade e\u0301 \u00e9",
    ),
    *("tab\there\n\n\n  end\r\n", "東京 is 漢字", "a fox 🦊🦊 …", "......!!!???", "\u2003wide\u00a0space", "x" * 50),
)
ANY = st.text(st.one_of(st.sampled_from(" \n\r\t'sdlLeE0123456789aé\u0301東🦊.,_"), st.characters(codec="utf-8")))


def file(**entries: Any) -> File:
    return File(Path("made.gguf"), {f"tokenizer.{key.replace('__', '.')}": value for key, value in entries.items()}, {})


def byte_level(tokenizer: Tokenizer, pre: str, **more: Any) -> File:
    """What ggml's converter writes of a byte-level BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if token in ("<|end|>", "<|endoftext|>") else 1 for token in tokens]
    merges = [" ".join(merge) for merge in model["merges"]]
    pre_ = {"ggml__pre": pre} if pre else {}
    return file(
        **{
            "ggml__model": "gpt2",
            **pre_,
            "ggml__tokens": tokens,
            "ggml__token_type": types,
            "ggml__merges": merges,
            **more,
        }
    )


def trained(splits: list[Any], *, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(splits)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def split_by(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


def of_qwen2() -> Tokenizer:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    return trained(split_by(PRETOKENIZE_REGEX), normalizer=normalizers.NFC())


def of_llama3() -> Tokenizer:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    return trained(split_by(TikTokenConverter().pattern), ignore_merges=True)


ORIGINALS = {
    "gpt-2": lambda: trained([pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smollm": lambda: trained([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": of_llama3,
    "qwen2": of_qwen2,
}


@pytest.fixture(scope="module", params=ORIGINALS)
def pair(request):
    """A tokenizer by the rule that transformers has for a name, and ours by the name."""
    original = ORIGINALS[request.param]()
    made, notes = vocabulary(byte_level(original, request.param), 600)
    assert notes == []
    return original, made.tokenizer


@settings(max_examples=300)
@given(ANY)
def test_byte_level_ids_are_those_of_the_original(pair, text):
    original, tokenizer = pair
    for each in (text, *TEXTS):
        ids = tokenizer.encode(each, add_special_tokens=False)
        assert ids == original.encode(each).ids
        assert tokenizer.decode(ids) == original.decode(ids)


def test_every_rule_cuts_differently():
    """Or the test above could not tell one from the other."""
    learnt, cut = ORIGINALS["gpt-2"](), {}
    for name in ORIGINALS:
        rule = vocabulary(byte_level(learnt, name), 600)[0].tokenizer.backend_tokenizer.pre_tokenizer
        cut[name] = tuple(word for word, _ in rule.pre_tokenize_str("WE'LL 1234567 (so"))
    assert len(set(cut.values())) == len(ORIGINALS), cut


def test_whole_words_of_the_vocabulary_need_no_merges_in_llama_3():
    original = ORIGINALS["gpt-2"]()
    written = byte_level(original, "llama-bpe")
    written.metadata["tokenizer.ggml.tokens"] += ["zqzq"]
    written.metadata["tokenizer.ggml.token_type"] += [1]
    assert vocabulary(written, 601)[0].tokenizer.encode("zqzq", add_special_tokens=False) == [600]
    written.metadata["tokenizer.ggml.pre"] = "qwen2"
    assert len(vocabulary(written, 601)[0].tokenizer.encode("zqzq", add_special_tokens=False)) > 1


@pytest.mark.parametrize(("pre", "said"), [("tekken", "names the rule 'tekken', unknown here"), ("", "does not name")])
def test_an_unknown_rule_is_said(pre, said):
    original = ORIGINALS["gpt-2"]()
    made, notes = vocabulary(byte_level(original, pre), 600)
    assert len(notes) == 1 and said in notes[0] and "GPT-2's is used" in notes[0]
    assert made.tokenizer.encode(TEXT, add_special_tokens=False) == original.encode(TEXT).ids


# ---------------------------------------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module")
def pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as SentencePiece's BPE has them: merges score less the later they were learnt."""
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    learnt.train_from_iterator(TEXT.splitlines(), trainer)
    found = sorted(learnt.get_vocab(), key=learnt.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *found]
    scores = [0.0] * 259 + [-float(i) for i in range(len(found))]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * len(found)


def by_hand(text: str, tokens: list[str], scores: list[float], *, prefix: bool = True) -> list[int]:
    """The definition: of neighbours that make a token, merge those whose token scores highest, the leftmost first."""
    numbered = {token: i for i, token in enumerate(tokens)}
    parts = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
    while True:
        pairs = [(-scores[numbered[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in numbered]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [numbered[part]] if part in numbered else [3 + byte for byte in part.encode()]
    return ids


def sentencepiece(pieces: tuple[list[str], list[float], list[int]], **more: Any) -> File:
    tokens, scores, types = pieces
    entries = {"ggml__model": "llama", "ggml__tokens": tokens, "ggml__scores": scores, "ggml__token_type": types}
    return file(**entries, **{"ggml__bos_token_id": 1, "ggml__eos_token_id": 2, "ggml__unknown_token_id": 0, **more})


@pytest.fixture(scope="module")
def spelled(pieces) -> Any:
    return vocabulary(sentencepiece(pieces), len(pieces[0]))[0].tokenizer


@settings(max_examples=300)
@given(text=st.one_of(ANY, st.text("thesando _().\n", max_size=60)))
def test_sentencepiece_ids_are_those_of_its_definition(pieces, spelled, text):
    if "▁" in text or any(special in text for special in ("<unk>", "<s>", "</s>")):
        return
    ids = spelled.encode(text, add_special_tokens=False)
    assert ids == by_hand(text, *pieces[:2])
    assert spelled.decode(ids) == text


def test_a_file_may_deny_the_space_before_a_text(pieces):
    tokenizer = vocabulary(sentencepiece(pieces, ggml__add_space_prefix=False), len(pieces[0]))[0].tokenizer
    ids = tokenizer.encode("the end", add_special_tokens=False)
    assert ids == by_hand("the end", *pieces[:2], prefix=False) != by_hand("the end", *pieces[:2])
    assert tokenizer.decode(ids) == "the end"


# ---------------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    ("kind", "more", "begins"),
    [
        ("llama", {}, True),
        ("llama", {"ggml__add_bos_token": False}, False),
        ("qwen2", {}, False),
        ("qwen2", {"ggml__add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"ggml__add_bos_token": False}, False),
    ],
)
def test_bos_is_added_as_the_file_says(pieces, kind, more, begins):
    if kind == "llama":
        made, bos = vocabulary(sentencepiece(pieces, **more), 2000)[0], 1
    else:
        made, bos = vocabulary(byte_level(ORIGINALS["gpt-2"](), kind, ggml__bos_token_id=0, **more), 600)[0], 0
    assert made.begin == ((bos,) if begins else ())
    assert (made.tokenizer("hello").input_ids[0] == bos) == begins, "transformers' own way agrees"
    assert made.tokenizer.bos_token_id == bos, "templates may ask for it all the same"


def test_special_tokens_templates_and_ends():
    written = byte_level(
        ORIGINALS["qwen2"](),
        "qwen2",
        ggml__eos_token_id=0,
        ggml__eot_token_id=602,
        chat_template="{{ messages[0].content }}<|im_end|>",
    )
    written.metadata["tokenizer.ggml.tokens"] += ["<|im_end|>", "<tool>", "<|turn|>", "[PAD603]"]
    written.metadata["tokenizer.ggml.token_type"] += [3, 4, 3, 5]
    made = vocabulary(written, 604)[0]
    tokenizer = made.tokenizer
    ids = tokenizer.encode("a<tool>b<|im_end|>", add_special_tokens=False)
    assert ids[1] == 601 and ids[-1] == 600
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"
    assert made.stop == {0, 600, 602}, "named by the file, or usual and a control token"
    assert 603 not in tokenizer.encode("[PAD603]") and tokenizer.decode([603]) == ""
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "a<tool>b"}], return_dict=False)
    assert asked == ids


def extended(tokens: dict[str, int], **more: Any) -> File:
    """A byte-level vocabulary of 600 tokens and these, of the given types."""
    written = byte_level(ORIGINALS["qwen2"](), "qwen2", **more)
    written.metadata["tokenizer.ggml.tokens"] += list(tokens)
    written.metadata["tokenizer.ggml.token_type"] += list(tokens.values())
    return written


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
@pytest.mark.parametrize(
    "name",
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|return|>",
        "<|call|>",
        "</s>",
        "<|endoftext|>",
        "[EOS]",
    ],
)
def test_well_known_ends_are_ends_whatever_their_type(name, kind):
    made, notes = vocabulary(extended({"<tool>": 4, name: kind}), 602)
    ids = made.tokenizer.encode(f"a<tool>b{name}c", add_special_tokens=False)
    assert 601 in made.stop and ids.count(601) == 1 and len(ids) == 5
    assert made.tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>bc"
    assert [name in note for note in notes] == ([] if kind == 3 else [True])


def test_markers_typed_as_text_are_not_cut_up():
    template = "<|im_start|>{{ messages[0].content }}<|im_end|><start_of_turn><think>[INST]"
    marks = {"<|im_start|>": 1, "<start_of_turn>": 1, "<think>": 1, "[INST]": 1, "<other>": 1}
    made, notes = vocabulary(extended(marks, chat_template=template), 605)
    ids = made.tokenizer.encode("x".join(marks), add_special_tokens=False)
    assert [i for i in ids if i >= 600] == [600, 601, 602, 603]
    assert made.tokenizer.decode([600, 602, 601, 603], skip_special_tokens=True) == "<think>[INST]"
    assert len(notes) == 1 and "<|im_start|>, <start_of_turn>, <think>, [INST] as text" in notes[0]


def test_in_harmony_a_part_of_an_answer_ends_with_another_token_than_the_answer():
    assert vocabulary(extended({"<|return|>": 3, "<|call|>": 3}), 602)[0].stop == {600, 601}, "0 is <|end|> here"
    assert vocabulary(extended({"<|return|>": 3}), 601)[0].stop == {0, 600}


def test_every_id_of_a_repeated_token_is_its_text():
    written = byte_level(ORIGINALS["qwen2"](), "qwen2", ggml__eos_token_id=0, ggml__bos_token_id=0)
    tokens = written.metadata["tokenizer.ggml.tokens"]
    word = next(i for i, token in enumerate(tokens) if token == "Ġthe")
    tokens += ["Ġthe", tokens[0]]
    written.metadata["tokenizer.ggml.token_type"] += [1, 3]
    written.metadata["tokenizer.ggml.add_bos_token"] = True
    made = vocabulary(written, 602)[0]
    assert made.tokenizer.decode([word]) == made.tokenizer.decode([600]) == " the"
    assert made.tokenizer.decode([word, 600, 0, word], skip_special_tokens=True) == " the the the"
    assert made.tokenizer.decode(word) == " the"
    assert made.stop == {0, 601} and made.begin == (0,), "the file names 0, whose text 601 is as well"


def test_a_token_as_long_as_a_book_is_refused_at_once(pieces):
    tokens, scores, types = ([*each, one] for each, one in zip(pieces, ("x" * 400_000, -1.0, 1), strict=True))
    with pytest.raises(ValueError, match="a token of 400000 characters; at most 512"):
        vocabulary(sentencepiece((tokens, scores, types)), len(tokens))


def test_ids_of_the_pico_tokenizer(tokenizer_file):
    original = Tokenizer.from_file(str(tokenizer_file))
    made, _ = vocabulary(byte_level(original, "gpt-2", ggml__eos_token_id=0), 300)
    for each in (*TEXTS, TEXT, "to<|endoftext|>gether"):
        ids = made.tokenizer.encode(each, add_special_tokens=False)
        assert ids == original.encode(each).ids
        assert made.tokenizer.decode(ids) == original.decode(ids, skip_special_tokens=False)
    assert made.stop == {0} and not made.tokenizer.chat_template
