"""Streams of text: the pieces equal the whole, and no piece holds half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.text.stream import TextStream, stream_text
from foveal.text.tokenizer import load_tokenizer
from properties import examples
from vocabularies import KINDS

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    made = {}
    for kind, make in KINDS.items():
        directory = tmp_path_factory.mktemp("stream")
        make(directory)
        made[kind] = load_tokenizer(directory)
    return made


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(80), deadline=None)
@given(text=ANY_TEXT)
def test_valid_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_any_ids(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    some_byte = st.sampled_from(sorted(tokenizer.byte_ids)) if tokenizer.byte_ids else st.nothing()
    one = st.integers(0, tokenizer.vocab_size - 1) | some_byte
    ids = data.draw(st.lists(one, max_size=30))
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_whole_and_at_once(tokenizers):
    stream = TextStream(tokenizers["bytes"])
    assert [stream.push(byte) for byte in "é😀!".encode()] == ["", "é", "", "", "", "😀", "!"]
    assert [stream.push(0xE2), stream.push(0x82), stream.finish()] == ["", "", "\ufffd"]


def test_a_skipped_token_does_not_end_a_run_of_bytes(tokenizers):
    """ "é" in two byte tokens with an end token between, and then a byte that spoils the run."""
    tokenizer = tokenizers["byte-fallback-bpe"]
    first = min(tokenizer.byte_ids)
    ids = [first + 0xC3, first + 0xA9, tokenizer.eos_ids[0], first + 0xFF]
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(stream_text(tokenizer, ids[:3])) == "é"


def test_special_tokens_only_when_asked(tokenizers):
    ids = [256, *b"ab", 257]
    assert "".join(stream_text(tokenizers["bytes"], ids)) == "ab"
    shown = TextStream(tokenizers["bytes"], skip_special=False)
    assert "".join(map(shown.push, ids)) == "<|begin|>ab<|end|>"
