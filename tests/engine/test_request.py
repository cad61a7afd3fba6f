"""Sampling parameters: what is out of range is refused, and the message names the field."""

import math

import pytest

from foveal.core.errors import ArgumentError
from foveal.engine.request import SamplingParams, Timing

WRONG = {
    "max_tokens": [0, -1, 1.5, True, None],
    "temperature": [-0.1, math.nan, math.inf, "1", None, False],
    "top_k": [0, -1, 2.5],
    "top_p": [0, -0.5, 1.01, math.nan],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, math.inf],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, math.nan],
    "logit_bias": [{-1: 0.0}, {"a": 0.0}, {1: math.nan}, {1: math.inf}, {1: "x"}],
    "seed": [-1, 0.5],
    "stop": [("",), (3,)],
    "stop_ids": [(-1,), ("a",)],
    "logprobs": [-1, 21, 1.0],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, many in WRONG.items() for v in many])
def test_errors_name_the_field(name, value):
    with pytest.raises(ArgumentError, match=f"^{name}: got .*; accepted: ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.argument == name


def test_bounds_are_inside():
    SamplingParams(temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(logit_bias={0: -math.inf, 5: 3}, logprobs=20, max_tokens=1, top_k=1, seed=0)


def test_a_single_stop_string_is_not_its_letters():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_ids=[3]).stop == ("a", "b")


def test_tokens_per_second_leave_the_first_out():
    assert Timing(first_token_s=2.0, total_s=4.0, num_tokens=11).tokens_per_s == 5.0
    assert Timing(first_token_s=2.0, total_s=2.0, num_tokens=1).tokens_per_s == 0.0
