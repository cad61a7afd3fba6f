"""Tokenizers against transformers reading the same files, and sentencepiece against its converted
form."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from foveal.core.errors import LoadError
from foveal.text.tokenizer import load_tokenizer
from properties import examples
from vocabularies import JSON_KINDS, KINDS

TEXTS = [
    "",
    "def mean(data):\n    return sum(data) / len(data)  # naïve",
    "  two  spaces\tand a tab ",
    "東京 😀 Привет 🇫🇷",
    "<s>in the text</s> and after",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    made = {}
    for kind, make in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        make(made[kind])
    return made


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_agrees_with_transformers(directories, kind):
    ours, theirs = (
        load_tokenizer(directories[kind]),
        AutoTokenizer.from_pretrained(directories[kind]),
    )
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (theirs.eos_token_id,)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert (
            ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        )
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@pytest.fixture(scope="session")
def converted(directories):
    """The sentencepiece model as transformers converts it."""
    sp = SentencePieceProcessor(model_file=str(directories["sentencepiece"] / "tokenizer.model"))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    scores = {piece: sp.get_score(i) for piece, i in vocab.items()}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True)


def test_sentencepiece_agrees_with_transformers(directories, converted):
    """But for a leading space: there transformers leaves out sentencepiece's own."""
    ours = load_tokenizer(directories["sentencepiece"])
    for text in map(str.lstrip, TEXTS):
        ids = converted(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == converted.decode(ids, skip_special_tokens=True)
    assert ours.decode(converted(TEXTS[-1])["input_ids"], skip_special=False) == converted.decode(
        converted(TEXTS[-1])["input_ids"]
    )


@settings(max_examples=examples(60), deadline=None)
@given(text=ANY_TEXT)
def test_sentencepiece_any_text(directories, converted, text):
    ours = load_tokenizer(directories["sentencepiece"])
    assert ours.encode(text.lstrip(" ")) == converted(text.lstrip(" "))["input_ids"]
    model = SentencePieceProcessor(model_file=str(directories["sentencepiece"] / "tokenizer.model"))
    assert ours.encode(text, special=False) == model.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_sentencepiece_added_tokens(directories):
    ours = load_tokenizer(directories["sentencepiece"])
    ids = ours.encode("a<|tool|>b<think>c", special=False)
    assert 500 in ids and 501 in ids
    assert ours.vocab_size == 502
    assert ours.decode(ids) == "ab<think>c"
    assert ours.decode(ids, skip_special=False) == "a<|tool|>b<think>c"
    assert ours.decode([9999, *ids]) == "ab<think>c"


def test_end_ids_come_from_generation_config(directories, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(directories["bytes"], root)
    (root / "config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 5}))
    assert load_tokenizer(root).eos_ids == (7,)
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 10]}))
    assert load_tokenizer(root).eos_ids == (257, 10)
    assert load_tokenizer(root).bos_id == 256, "the tokenizer's own name outranks config.json"


def test_named_tokens_are_special(directories, tmp_path):
    """Even where tokenizer.json does not say so."""
    data = json.loads((directories["byte-level-bpe"] / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "</s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path).decode([2]) == "</s>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ours = load_tokenizer(tmp_path)
    assert ours.decode([2]) == "" and ours.encode("a</s>")[-1] == 2 == ours.eos_ids[0]


def test_settings_left_in_the_file_do_not_cut(directories, tmp_path):
    ours = load_tokenizer(directories["byte-level-bpe"])
    data = json.loads((directories["byte-level-bpe"] / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path).encode("one two three " * 9) == ours.encode(
        "one two three " * 9
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, "", "no tokenizer.json and no tokenizer.model"),
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", "tiktoken"),
        ("tokenizer_config.json", "[1]", "expected an object"),
        ("generation_config.json", "{", "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(LoadError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
