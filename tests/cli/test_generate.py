"""`foveal generate`, as a user or a script meets it."""

import json

import pytest
from typer.testing import CliRunner

from foveal.cli.main import app
from foveal.core.errors import ArgumentError, LoadError, RequestError
from foveal.engine.llm import LLM
from foveal.engine.request import SamplingParams
from tiny import CONTEXT, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return str(path)


def run(*arguments: str, given: str = ""):
    return CliRunner().invoke(app, ["generate", *arguments], input=given)


def test_streams_text_and_notes_apart(model):
    result = run("def f", "--model", model, "--max-tokens", "12", "--seed", "3")
    assert result.exit_code == 0
    params = SamplingParams(seed=3, temperature=0.8, max_tokens=12)
    assert result.stdout == LLM(model).generate("def f", params)[0].text + "\n"
    for words in ("prompt 6 tokens", "first token after", "tokens/s", "cut after 12 tokens"):
        assert words in result.stderr
    assert "prefill attention: " in result.stderr and "decode attention: " in result.stderr


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_prompt_from_standard_input(model, arguments):
    options = ("--model", model, "--max-tokens", "3", "--temperature", "0", "--json")
    piped = json.loads(run(*arguments, *options, given="a\nb\n").stdout)
    assert piped["prompt"] == "a\nb"
    assert piped["token_ids"] == json.loads(run("a\nb", *options).stdout)["token_ids"]


def test_json_is_one_document(model):
    options = ("--max-tokens", "4", "--temperature", "0", "--logprobs", "2", "--backend", "unfused")
    made = json.loads(run("x", "--model", model, *options, "--json").stdout)
    assert made["finish_reason"] == "length" and made["num_prompt_tokens"] == 2
    assert len(made["token_ids"]) == len(made["logprobs"]) == 4
    assert [one["id"] for one in made["logprobs"]] == made["token_ids"]
    assert all(one["top"][0]["id"] == one["id"] for one in made["logprobs"])
    assert made["attention"]["decode"]["backend"] == "unfused"
    assert 0 < made["first_token_s"] < made["total_s"]


def test_stop_and_log_probabilities(model):
    options = ("--model", model, "--temperature", "0", "--max-tokens", "9")
    free = json.loads(run("x", *options, "--json").stdout)["text"]
    result = run("x", *options, "--stop", free[3], "--logprobs", "1")
    assert result.stdout.startswith(free[: free.index(free[3])] + "\n")
    assert "log-probability" in result.stdout
    assert "stopped after" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("x", "--top-p", "2"), ArgumentError, "top_p"),
        (("x", "--dtype", "int3"), ArgumentError, "dtype"),
        (("x", "--backend", "nobody"), ArgumentError, "backend"),
        (("x" * CONTEXT,), RequestError, f"got {CONTEXT + 1} tokens"),
    ],
)
def test_refusals(model, arguments, error, words):
    result = run(*arguments, "--model", model)
    assert isinstance(result.exception, error)
    assert words in str(result.exception)
    assert result.stdout == ""


def test_a_missing_model():
    assert isinstance(run("x", "--model", "./nothing/here").exception, LoadError)
