"""Text that streams is the text that would have come whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pennyweight.runtime.words import Words


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))


def streamed(words: Words, tokens: list[int], step: int = 1) -> list[str]:
    parts = [words.push(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    return [*parts, words.end()]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), step=st.integers(1, 5))
def test_pieces_make_the_whole(tokenizer, text, step):
    tokens = tokenizer.encode(text)
    parts = streamed(Words(tokenizer), tokens, step)
    assert "".join(parts) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_not_text(tokenizer):
    tokens = tokenizer.encode("on<|endoftext|>ward")
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") in tokens
    assert "".join(streamed(Words(tokenizer), tokens)) == "onward"


def test_a_character_of_several_tokens_waits_until_it_is_whole(tokenizer):
    tokens = tokenizer.encode("naïve 🦊!")
    assert len(tokens) > len("naïve 🦊!")  # bytes, in a vocabulary of 300
    parts = streamed(Words(tokenizer), tokens)
    assert not any("�" in part for part in parts)
    assert "🦊" in parts


@settings(max_examples=100, deadline=None)
@given(text=st.text("abcSTOP ", max_size=40), step=st.integers(1, 5))
def test_nothing_of_a_stop_string_is_shown(tokenizer, text, step):
    words = Words(tokenizer, stop=["STOP", "ab"])
    parts = streamed(words, tokenizer.encode(text), step)
    cut = min((at for at in (text.find("STOP"), text.find("ab")) if at >= 0), default=len(text))
    assert "".join(parts) == words.text == text[:cut]
    assert words.stopped == (cut < len(text))


def test_what_may_begin_a_stop_string_waits(tokenizer):
    words = Words(tokenizer, stop=["</s>"])
    assert words.push(tokenizer.encode("yes <")) == "yes "
    assert words.push(tokenizer.encode("/b")) == "</b"
    assert not words.stopped
