"""`foveal generate`: continue a text, in the terminal or in a pipe."""

import json
import sys
from typing import Annotated

import typer

from foveal.cli import sampling
from foveal.core.errors import ArgumentError


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - or nothing reads standard input.")
    ] = None,
    model: sampling.Model = None,
    max_tokens: sampling.MaxTokens = 200,
    temperature: sampling.Temperature = 0.8,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    seed: sampling.Seed = None,
    stop: sampling.Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end token.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Show log-probabilities, with so many alternatives.")
    ] = None,
    dtype: sampling.Dtype = None,
    weights: sampling.Weights = None,
    device: sampling.Device = "cpu",
    backend: sampling.Backend = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Continue a text with a language model.

    The text streams to standard output; below it, on standard error, stand its speed and who
    computed the attention, with the reason.

    Example: foveal generate "def fibonacci(n):" --max-tokens 100 --seed 1
    """
    from foveal.cli import answers
    from foveal.engine.llm import LLM
    from foveal.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    text = _read(prompt)
    with answers.loading(model):
        llm = LLM(model, dtype=dtype, weights=weights, device=device, backend=backend)
    if as_json:
        completion = llm.generate(text, params)[0]
        print(json.dumps(answers.document(llm, text, completion), indent=1, ensure_ascii=False))
        return
    pieces = llm.stream(text, params)
    if sys.stdout.isatty():
        answers.show(text)
    completion = answers.show_pieces(pieces)
    if completion.logprobs is not None:
        answers.show_logprobs(llm, completion.logprobs)
    answers.show_costs(llm, completion)


def _read(prompt: str | None) -> str:
    """The prompt, from the command line or standard input; a single last line break is the
    pipe's, not the text's."""
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        accepted = "a text, or - to read standard input"
        raise ArgumentError("PROMPT", "nothing", f"{accepted}; see foveal generate --help")
    return sys.stdin.read().removesuffix("\n")
