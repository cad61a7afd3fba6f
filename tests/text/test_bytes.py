"""The byte tokenizer: every byte is its own id, and transformers reads the same file."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from foveal.text.bytes import BEGIN_ID, END_ID, VOCAB_SIZE, write_byte_tokenizer
from properties import examples


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(path)
    return path


@settings(max_examples=examples(50), deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_an_id_is_a_byte(directory, text):
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode(text, add_special_tokens=False).ids == list(text.encode())
    assert tokenizer.encode(text).ids == [BEGIN_ID, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text


def test_markers_and_transformers(directory):
    theirs = AutoTokenizer.from_pretrained(directory)
    ids = theirs("def f():\n\treturn 'é'<|end|>")["input_ids"]
    assert ids == [BEGIN_ID, *"def f():\n\treturn 'é'".encode(), END_ID]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (BEGIN_ID, END_ID)
    assert len(theirs) == VOCAB_SIZE
