"""Text becomes rows: every token is predicted once, every byte is counted once, nothing held out is seen."""

from __future__ import annotations

import functools
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import texts
from pennyweight.texts import Document, Rows, added, from_path, rows, separator_id, stdlib, strip_gutenberg

ASCII = [
    Document("one", "def fit(model, budget):\n    return best(model)\n"),
    Document("two", "a few words, and a few more"),
]
MULTIBYTE = [Document("ü", "größte Kürze: 3 Pfennig"), Document("mixed", "日本語 und 🙂🙃 and е́ (е + accent) ")]


@functools.cache
def tokenizer(*, trim_offsets: bool = False, special: str = "bos", adds: str = "<s> $A"):
    """A byte-level BPE of 300 tokens. Trained on ASCII alone: other characters fall into bytes, one token each.
    `special`: which tokens it names; `adds`: what it makes of a text by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([document.text for document in ASCII] * 3, trainer)
    framing = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), framing])
    tokens = {"bos": {"bos_token": "<s>", "eos_token": "</s>"}, "eos": {"eos_token": "</s>"}, "none": {}}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens[special])


def utf8(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def stream(documents: list[Document]) -> list[int]:
    """All tokens, each document as the tokenizer begins it: with BOS."""
    return [token for document in documents for token in tokenizer()(document.text)["input_ids"]]


# ----------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("context", [1, 2, 7, 63])
def test_every_token_but_the_first_is_predicted_once(context):
    documents = ASCII * 3
    flat = stream(documents)
    made = rows(documents, tokenizer(), context)
    count = (len(flat) - 1) // context
    assert made.ids.shape == (count, context + 1)
    assert made.ids.dtype == np.int64
    assert made.ids[:, 1:].ravel().tolist() == flat[1 : count * context + 1]
    assert made.ids[:, :-1].ravel().tolist() == flat[: count * context]


@pytest.mark.parametrize("context", [1, 2, 7])
def test_separators_are_seen_but_not_scored(context):
    documents = (ASCII + MULTIBYTE) * 3
    made = rows(documents, tokenizer(), context)
    assert made.ids[0, 0] == tokenizer().bos_token_id
    assert (made.scored == (made.ids[:, 1:] != tokenizer().bos_token_id)).all()
    assert (~made.scored).sum() == len(documents) - 1, "one before each document; the first is never a target"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("documents", [ASCII, MULTIBYTE, ASCII + MULTIBYTE], ids=["ascii", "multi-byte", "both"])
def test_bytes_of_all_targets_are_the_bytes_of_the_text(documents, trim_offsets):
    """Also where a tokenizer's offsets leave out the space before a word."""
    made = rows(documents, tokenizer(trim_offsets=trim_offsets), 1)
    assert made.nbytes.sum() == utf8(documents)
    assert (made.nbytes >= 0).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=4).filter(any), st.booleans())
def test_so_are_those_of_any_text(contents, trim_offsets):
    documents = [Document(str(i), text) for i, text in enumerate(contents)]
    made = rows(documents, tokenizer(trim_offsets=trim_offsets), 1)
    assert made.nbytes.sum() == utf8(documents)
    assert made.ids[:, 1].tolist() == stream(documents)[1:]


def test_the_first_token_of_a_character_owns_its_bytes():
    made = rows([Document("", "a🙂b日")], tokenizer(), 1)
    assert made.nbytes.tolist() == [1, 4, 0, 0, 0, 1, 3, 0, 0]


def test_tokens_that_overlap_share_no_byte():
    assert texts._byte_lengths("aüb", [(0, 2), (1, 2), (0, 1), (2, 3)]) == [3, 0, 0, 1]
    assert texts._byte_lengths("a b", [(0, 1), (2, 3)]) == [1, 2], "a space between offsets goes to the token after it"


def test_the_bytes_of_a_row_are_those_of_its_targets():
    one, row = rows(ASCII + MULTIBYTE, tokenizer(), 1), rows(ASCII + MULTIBYTE, tokenizer(), 9)
    cut = len(row.ids) * 9
    assert row.nbytes.tolist() == one.nbytes[:cut].reshape(-1, 9).sum(axis=1).tolist()
    assert row.nbytes.dtype == np.int64


def test_a_last_stretch_that_fills_no_row_is_dropped():
    tokens = len(stream(ASCII))
    assert len(rows(ASCII, tokenizer(), tokens - 1).ids) == 1
    with pytest.raises(
        ValueError, match=rf"the text holds {tokens} tokens, less than one stretch of {tokens + 1}; give more text"
    ):
        rows(ASCII, tokenizer(), tokens)


def test_empty_documents_are_a_separator_and_nothing_else():
    made = rows([Document("empty", ""), *ASCII, Document("empty", "")], tokenizer(), 1)
    assert made.nbytes.sum() == utf8(ASCII)
    assert (~made.scored).sum() == 3


@pytest.mark.parametrize(("adds", "before", "after"), [("<s> $A", [0], []), ("$A </s>", [], [1]), ("$A", [], [])])
@pytest.mark.parametrize("special", ["bos", "eos", "none"])
def test_a_text_begins_and_ends_as_the_tokenizer_itself_makes_it(adds, before, after, special):
    """A tokenizer that names a BOS and adds none gets none, here as in `penny run` and in transformers."""
    made = tokenizer(adds=adds, special=special)
    assert added(made) == (before, after)
    alone = rows([ASCII[0]], made, 5).ids
    assert alone[0].tolist() == made(ASCII[0].text)["input_ids"][:6]
    between = [] if before or after or special == "none" else [1]  # EOS, where a tokenizer says nothing of its own
    whole = made(ASCII[0].text)["input_ids"] + between + made(ASCII[1].text)["input_ids"]
    both = rows(ASCII, made, 1)
    assert [both.ids[0, 0], *both.ids[:, 1]] == whole
    assert both.ids[~both.scored[:, 0], 1].tolist() == [token for token in whole[1:] if token in (0, 1)]
    assert both.nbytes[~both.scored[:, 0]].sum() == 0
    first = 0 if before else len(made.convert_ids_to_tokens(whole[0]))  # is read, and predicted by nothing
    assert both.nbytes.sum() == utf8(ASCII) - first


def test_special_tokens_that_stand_in_a_text_are_scored_as_text():
    made = rows([Document("", "def</s>fit")], tokenizer(), 1)
    assert made.scored.all() and 1 in made.ids[:, 1]
    assert made.nbytes.sum() == len("def</s>fit")


def test_the_separator_is_what_the_tokenizer_puts_first_or_else_eos_or_bos():
    assert separator_id(tokenizer()) == 0
    assert separator_id(tokenizer(adds="$A")) == separator_id(tokenizer(special="eos", adds="$A")) == 1
    with pytest.raises(ValueError, match=r"names neither a BOS nor an EOS token; set one in tokenizer_config.json"):
        separator_id(tokenizer(special="none", adds="$A"))


def test_tokens_beyond_a_vocabulary_are_refused():
    made = rows(ASCII, tokenizer(), 4)
    highest = int(made.ids.max())
    made.hold_within(highest + 1)
    with pytest.raises(ValueError, match=f"gives token {highest}, the model's vocabulary ends at {highest - 1}"):
        made.hold_within(highest)


def test_a_slow_tokenizer_is_refused_with_the_way_out():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"Slow is not a fast tokenizer; save the model with its tokenizer.json"):
        rows(ASCII, Slow(), 7)


def test_rows_are_taken_evenly_and_picked_in_order():
    made = rows(ASCII * 3, tokenizer(), 2)
    count = len(made.ids)
    assert made.take(count) is made.take(10**9) is made
    third = made.take(3)
    assert (third.ids == made.ids[[0, round((count - 1) / 2), count - 1]]).all()
    assert len(made.take(1).ids) == len(made.take(1).nbytes) == len(made.take(1).scored) == 1
    picked = made.pick(np.array([5, 1, 1]))
    for field in ("ids", "scored", "nbytes"):
        assert (getattr(picked, field) == getattr(made, field)[[5, 1, 1]]).all()


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 257), st.integers(1, 300))
def test_any_number_of_rows_is_taken_without_repeats_from_first_to_last(total, count):
    taken = Rows(np.arange(total)[:, None], np.ones((total, 0), bool), np.zeros(total)).take(count).ids.ravel().tolist()
    assert len(taken) == len(set(taken)) == min(total, count)
    assert taken == sorted(taken)
    assert taken[0] == 0
    if count > 1:
        assert taken[-1] == total - 1
        gaps = np.diff(taken)
        assert total == 1 or gaps.max() - gaps.min() <= 1


# ------------------------------------------------------------------------------------------------------ from_path


def test_a_file_is_one_document_under_its_name(tmp_path):
    (tmp_path / "book.txt").write_text("\ufeffOnce\n", encoding="utf-8")
    assert from_path(tmp_path / "book.txt") == [Document("book.txt", "Once\n")]


def test_a_folder_is_read_in_order_and_only_where_it_holds_text(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/z.md", "a.py", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "folder.txt").mkdir()
    assert from_path(tmp_path) == [Document(name, name) for name in ("a.py", "b/z.md", "c.txt")]


def test_jsonl_is_one_document_per_line(tmp_path):
    contents = ["one", "a line separator\u2028inside\x85a string", "three\nlines\nof text", ""]
    lines = [json.dumps({"text": text, "id": i}, ensure_ascii=False) for i, text in enumerate(contents)]
    (tmp_path / "data.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    found = from_path(tmp_path / "data.jsonl")
    assert [document.text for document in found] == contents
    assert [document.name for document in found] == ["data.jsonl:1", "data.jsonl:3", "data.jsonl:5", "data.jsonl:7"]


@pytest.mark.parametrize("line", ["{", '{"content": "x"}', "[1]", "63", "null", "[" * 99999, "9" * 9999])
def test_a_line_that_is_no_text_is_named_and_shown(tmp_path, line):
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError) as err:
        from_path(tmp_path)
    shown = line[:60]
    assert str(err.value) == f'{tmp_path / "data.jsonl"}:2: expected a JSON object with a "text" key, got {shown!r}'


@pytest.mark.parametrize("value", ["63", "null", '["x"]'])
def test_a_text_that_is_no_string_is_named_and_shown(tmp_path, value):
    (tmp_path / "data.jsonl").write_text(f'{{"text": {value}}}\n')
    with pytest.raises(ValueError, match=r'data.jsonl:1: expected a JSON object with a "text" key, got'):
        from_path(tmp_path)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist; give a file or a folder of .txt, .md, .py, .jsonl files"
    ):
        from_path(tmp_path / "nowhere")


def test_a_folder_without_text(tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(
        ValueError, match=r"no text in .*: expected at least one non-empty .txt, .md, .py or .jsonl file"
    ):
        from_path(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is not an ordinary file"):
        from_path(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="no text in"):
        from_path(tmp_path)


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"Pf\xfcnd")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 2\); convert it or leave it out"):
        from_path(tmp_path)


# ------------------------------------------------------------------------------------------------------ gutenberg

BOOK = """The Project Gutenberg eBook of Pennies\n\nTitle: Pennies\n
*** START OF {} PROJECT GUTENBERG EBOOK PENNIES ***\n\n\nChapter 1\n\nA penny.\n\n\n{}\n\nThe licence, at length.\n"""


@pytest.mark.parametrize("start", ["THE", "THIS"])
@pytest.mark.parametrize(
    "end",
    [
        "*** END OF THE PROJECT GUTENBERG EBOOK PENNIES ***",
        "***END OF THIS PROJECT GUTENBERG EBOOK PENNIES***",
        "End of the Project Gutenberg EBook of Pennies",
        "End of Project Gutenberg's Pennies",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_book_loses_its_header_and_its_licence(start, end, newline):
    raw = "\ufeff" + BOOK.format(start, end).replace("\n", newline)
    assert strip_gutenberg(raw) == "Chapter 1\n\nA penny.\n"


def test_a_text_from_elsewhere_is_left_whole():
    assert strip_gutenberg("A penny.\r\nTwo pennies.\r\n") == "A penny.\nTwo pennies.\n"
    assert strip_gutenberg("*** a row of stars ***\nA penny.") == "*** a row of stars ***\nA penny.\n"


# --------------------------------------------------------------------------------------------------------- stdlib


@pytest.fixture(scope="module")
def split() -> dict[bool, list[Document]]:
    return {held_out: list(stdlib(held_out=held_out)) for held_out in (False, True)}


def test_the_standard_library_is_split_into_two_parts_without_a_document_in_common(split):
    names = {held_out: [document.name for document in documents] for held_out, documents in split.items()}
    for held_out in (False, True):
        assert len(names[held_out]) == len(set(names[held_out]))
    assert not set(names[False]) & set(names[True])
    assert not {document.text for document in split[False]} & {document.text for document in split[True]}
    assert utf8(split[False]) > 5e6
    assert utf8(split[True]) > 3e5


def test_the_held_out_modules_are_held_out_with_everything_below_them(split):
    top = {held_out: {d.name.split("/")[0].removesuffix(".py") for d in split[held_out]} for held_out in (False, True)}
    assert top[True] - {"topics"} <= texts.HELD_OUT_MODULES
    assert not top[False] & texts.HELD_OUT_MODULES
    assert {"json/decoder.py", "heapq.py"} <= {document.name for document in split[True]}
    assert {"ast.py", "email/message.py"} <= {document.name for document in split[False]}


def test_topics_are_split_too_and_tests_and_tables_are_left_out(split):
    topics = {held_out: sum(d.name.startswith("topics/") for d in documents) for held_out, documents in split.items()}
    assert 0 < topics[True] < topics[False]
    for document in split[False] + split[True]:
        parts = document.name.split("/")
        assert not {"test", "tests", "encodings", "site-packages", "pydoc_data"} & set(parts)
        assert document.text.strip()


def test_the_split_is_the_same_every_time_and_told_apart_by_its_fingerprint(split):
    again = texts.fingerprint(stdlib(held_out=True))
    assert texts.fingerprint(split[True]) == again != texts.fingerprint(split[False])


def test_the_fingerprint_knows_names_texts_order_and_where_a_text_ends():
    one, two = Document("a", "b"), Document("c", "d")
    others = [
        [one],
        [two, one],
        [Document("a", "bc"), Document("", "d")],
        [Document("ab", ""), two],
        [Document("a", "B"), two],
        [],
    ]
    found = [texts.fingerprint(documents) for documents in ([one, two], *others)]
    assert len(set(found)) == len(found)
    assert texts.fingerprint(iter([one, two])) == found[0]
    assert texts.fingerprint([Document("lone surrogate", "\ud800")])
