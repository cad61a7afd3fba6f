"""Answers: where they end, and what is given out before that is known."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foveal.engine.answer import Answer, StopFinder
from foveal.engine.request import Request, SamplingParams
from foveal.text.bytes import END_ID, write_byte_tokenizer
from foveal.text.tokenizer import load_tokenizer
from properties import examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("answer")
    write_byte_tokenizer(directory)
    return load_tokenizer(directory)


def expected_cut(text: str, stops: list[str]) -> str:
    """Read letter by letter: the stop string that is complete first ends the text."""
    for end in range(1, len(text) + 1):
        done = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: min(done)]
    return text


WORD = st.text("ab ", min_size=1, max_size=4)


@settings(max_examples=examples(200), deadline=None)
@example(pieces=["ab a"], stops=["ab a", "b"])
@given(pieces=st.lists(st.text("ab ", max_size=5), max_size=8), stops=st.lists(WORD, max_size=3))
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    finder = StopFinder(tuple(stops))
    given_out = [finder.push(piece) for piece in pieces]
    found = finder.found
    text = "".join(given_out) + finder.finish()
    whole = "".join(pieces)
    assert text == expected_cut(whole, stops)
    assert found == any(stop in whole for stop in stops)


@settings(max_examples=examples(60), deadline=None)
@given(text=st.text("xyé😀", max_size=12), stop=st.text("xyé", min_size=1, max_size=3))
def test_what_is_given_out_is_never_taken_back(tokenizer, text, stop):
    request = Request([1], SamplingParams(stop=stop), max_tokens=500)
    answer, shown = Answer(request, tokenizer, 0.0), ""
    for token_id in [*text.encode(), END_ID]:
        if answer.finish_reason is None:
            shown += answer.push(token_id)
    completion = answer.completion()
    assert shown == completion.text == expected_cut(text, [stop])
    assert completion.finish_reason == "stop"


def push_all(answer: Answer, ids: list[int]) -> list[str]:
    return [answer.push(token_id) for token_id in ids]


def test_a_stop_string_is_held_back_until_it_cannot_be(tokenizer):
    request = Request([1, 2], SamplingParams(stop="\nend"), max_tokens=100)
    answer = Answer(request, tokenizer, 0.0)
    assert push_all(answer, list(b"a\nenx")) == ["a", "", "", "", "\nenx"]
    assert push_all(answer, list(b"\nend")) == ["", "", "", ""]
    assert answer.completion().text == "a\nenx"
    assert answer.completion().num_prompt_tokens == 2
    assert answer.completion().token_ids == tuple(b"a\nenx\nend")


@pytest.mark.parametrize(
    ("fields", "ids", "reason", "text"),
    [
        ({}, [*b"ab", END_ID], "stop", "ab"),
        ({"ignore_eos": True, "stop_ids": (66,)}, [*b"a", END_ID, *b"AB"], "stop", "aA"),
        ({}, [*b"abcd"], "length", "abcd"),
        ({"stop": "cd"}, [*b"abcd"], "stop", "ab"),
        ({"stop": "de"}, [*b"abcd"], "length", "abcd"),
        ({}, [*b"ab", 0xC3, END_ID], "stop", "ab\ufffd"),
        ({}, [*b"abc", END_ID], "stop", "abc"),
    ],
)
def test_reasons(tokenizer, fields, ids, reason, text):
    answer = Answer(Request([1], SamplingParams(**fields), max_tokens=4), tokenizer, 0.0)
    pieces = push_all(answer, ids)
    assert answer.finish_reason == reason
    assert "".join(pieces) == answer.completion().text == text
