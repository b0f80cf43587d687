"""Text that streams is the text that would have come whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pennyweight.disk.tokenizer import special_tokens
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


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A vocabulary as SentencePiece makes them: words begin with the space before, the rest is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁", "▁on", "▁two", "on", "a", "b", "n"]
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replaced = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replaced, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.json"
    tokenizer.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab ñ🦊漢", min_size=1, max_size=20), step=st.integers(1, 5))
def test_characters_spelt_in_bytes(pieces, text, step):
    tokens = pieces.encode(text, add_special_tokens=False)
    assert "".join(streamed(Words(pieces), tokens, step)) == pieces.decode(tokens) == text


def test_each_character_spelt_in_bytes_comes_when_it_is_whole(pieces):
    tokens = pieces.encode("🦊漢ñ漢🦊", add_special_tokens=False)
    assert [part for part in streamed(Words(pieces), tokens) if part] == ["🦊", "漢", "ñ", "漢", "🦊"]


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab ñ🦊漢", min_size=1, max_size=60), new=st.text("ab ñ🦊漢", max_size=9), step=st.integers(1, 5))
def test_what_continues_a_text_is_what_the_whole_text_has(pieces, text, new, step):
    before, after = (pieces.encode(part, add_special_tokens=False) for part in (text, new))
    whole = pieces.decode(before + after)
    assert "".join(streamed(Words(pieces, after=before), after, step)) == whole[len(pieces.decode(before)) :]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text("ab ñ🦊漢", max_size=9), max_size=5), cut=st.integers(0, 20), step=st.integers(1, 5))
def test_special_tokens_take_no_space_away(pieces, texts, cut, step):
    tokens = [token for text in texts for token in (*pieces.encode(text, add_special_tokens=False), *[1, 2] * 5)]
    while pieces.decode(tokens[:cut], skip_special_tokens=True).endswith("�"):
        cut -= 1
    before, whole = (pieces.decode(part, skip_special_tokens=True) for part in (tokens[:cut], tokens))
    assert "".join(streamed(Words(pieces, after=tokens[:cut]), tokens[cut:], step)) == whole[len(before) :]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=30), cut=st.integers(0, 30), step=st.integers(1, 5))
def test_what_is_not_utf8_comes_as_it_would_whole(tokenizer, tokens, cut, step):
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:cut], tokens))
    assert "".join(streamed(Words(tokenizer, after=tokens[:cut]), tokens[cut:], step)) == whole[len(before) :]


def test_a_stray_byte_takes_nothing_back(pieces):
    """Decoded whole, no byte of the run would be a character."""
    tokens = pieces.convert_tokens_to_ids(["<0x43>", "<0xA0>", "▁on", "<0xE6>", "<0xBC>"])
    assert streamed(Words(pieces), tokens) == ["C", "", "� on", "", "", "��"]


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


# --------------------------------------------------------------------------------------------- stops that are no text

SPECIAL = {300: "<|call|>", 301: "<|turn|>"}


@pytest.fixture(scope="module")
def talker(tokenizer_file):
    """A tokenizer with two special tokens that no configuration would name as ends."""
    made = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    assert {i: name for i, name in special_tokens(made).items() if i >= 300} == SPECIAL
    return made


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.one_of(st.sampled_from(list(SPECIAL)), st.text("ab\nñ", min_size=1, max_size=4)), max_size=9),
    stop=st.sampled_from(
        ["<|call|>", "\n<|call|>", "<|call|>a", "a<|turn|><|call|>b", "<|turn|>\n", "b", "a<|call|>b"]
    ),
    step=st.integers(1, 4),
)
def test_stops_that_hold_special_tokens_are_found_in_what_is_shown(talker, parts, stop, step):
    """Whole text, special tokens shown, cut before the stop, special tokens hidden again: by the definition."""
    tokens: list[int] = []
    shown = ""
    for part in parts:
        tokens += [part] if isinstance(part, int) else talker.encode(part, add_special_tokens=False)
        shown += SPECIAL[part] * ("|" in stop) if isinstance(part, int) else part
    expected = shown.split(stop)[0]
    for name in SPECIAL.values():
        expected = expected.replace(name, "")
    words = Words(talker, stop=[stop], special=SPECIAL)
    assert "".join(streamed(words, tokens, step)) == expected == words.text
    assert words.stopped == (stop in shown)


def test_a_hidden_token_may_be_what_a_stop_waits_for(talker):
    words = Words(talker, stop=["a<|call|>b"], special=SPECIAL)
    assert words.push(talker.encode("xa")) == "x"
    assert words.push([301]) == "a", "another token came between"
    assert words.push(talker.encode("a")) == words.push([300]) == ""
    assert words.push(talker.encode("c")) == "ac" and not words.stopped


@pytest.mark.parametrize("stop", ["ab", "<|call|>"])
@pytest.mark.parametrize("step", [1, 3, 20])
def test_no_stop_is_looked_for_in_the_first_tokens(talker, stop, step):
    tokens = [*talker.encode("ab"), 300, *talker.encode("ab"), 300, *talker.encode("x")]
    for least in range(len(tokens) + 1):
        words = Words(talker, stop=[stop], special=SPECIAL, least=least)
        streamed(words, tokens, step)
        rest = talker.decode(tokens[least:])
        before = talker.decode(tokens[:least], skip_special_tokens=True)
        cut = rest.split(stop)[0].replace("<|call|>", "")
        assert words.text == before + cut and words.stopped == (stop in rest)
