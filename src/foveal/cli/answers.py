"""Answers on the terminal: streamed as they are made, with what they cost below.

The text goes to standard output, everything about it to standard error; with `--json` one
document holds both.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.table import Table

from foveal.attention.select import Choice
from foveal.core.units import format_s
from foveal.engine.llm import LLM
from foveal.engine.request import Completion, Piece, TokenLogprobs

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def loading(model: str | None) -> Iterator[None]:
    """A spinner while a model loads, where somebody watches."""
    with NOTES.status(f"Loading {model or 'the bundled model'} ..."):
        yield


def show(text: str) -> None:
    """Write a piece of text at once. A terminal gets no control characters but line breaks and
    tabs: a model's text must not move the cursor or rename the window."""
    if sys.stdout.isatty():
        text = "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def show_pieces(pieces: Iterator[Piece]) -> Completion:
    """Write an answer as it is made, and end its last line; gives the whole."""
    for piece in pieces:
        show(piece.text)
        if piece.completion is not None:
            if not piece.completion.text.endswith("\n"):
                show("\n")
            return piece.completion
    raise AssertionError("the last piece carries the completion")


def summary(completion: Completion) -> str:
    """What an answer took, in one line."""
    timing = completion.timing
    words = [
        f"prompt {completion.num_prompt_tokens} tokens",
        f"first token after {format_s(timing.first_token_s)}",
    ]
    if timing.tokens_per_s:
        words.append(f"then {timing.tokens_per_s:.1f} tokens/s")
    ended = "stopped" if completion.finish_reason == "stop" else "cut"
    words.append(f"{ended} after {timing.num_tokens} tokens")
    return ", ".join(words)


def show_costs(llm: LLM, completion: Completion) -> None:
    """What an answer took, and who computed its attention."""
    NOTES.print(summary(completion), style="dim", markup=False)
    for phase, choice in attention(llm, completion).items():
        NOTES.print(f"{phase} attention: {choice.reason}", style="dim", markup=False)


def attention(llm: LLM, completion: Completion) -> dict[str, Choice]:
    """Who computed the attention of the prompt and of the last token, and why."""
    prefill, decode = llm.explain(completion.num_prompt_tokens, completion.timing.num_tokens)
    return {"prefill": prefill, "decode": decode}


def show_logprobs(llm: LLM, logprobs: tuple[TokenLogprobs, ...]) -> None:
    """A table of tokens with their log-probabilities and the likeliest alternatives."""
    table = Table("token", "log-probability", "likeliest")
    for one in logprobs:
        top = "  ".join(f"{_token(llm, i)} {value:.3f}" for i, value in one.top)
        table.add_row(_token(llm, one.token_id), f"{one.logprob:.3f}", top)
    Console(highlight=False, markup=False).print(table)


def document(llm: LLM, prompt: str, completion: Completion) -> dict[str, Any]:
    """All about an answer as data that JSON can hold."""
    logprobs = completion.logprobs
    return {
        "model": str(llm.directory),
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "token_ids": list(completion.token_ids),
        "logprobs": None if logprobs is None else [_logprobs_data(llm, one) for one in logprobs],
        "first_token_s": completion.timing.first_token_s,
        "total_s": completion.timing.total_s,
        "tokens_per_s": completion.timing.tokens_per_s,
        "attention": {
            phase: {"backend": choice.name, "reason": choice.reason}
            for phase, choice in attention(llm, completion).items()
        },
    }


def _logprobs_data(llm: LLM, one: TokenLogprobs) -> dict[str, Any]:
    pairs = ((one.token_id, one.logprob), *one.top)
    chosen, *top = (
        {"id": i, "text": llm.tokenizer.decode([i], skip_special=False), "logprob": value}
        for i, value in pairs
    )
    return {**chosen, "top": top}


def _token(llm: LLM, token_id: int) -> str:
    return repr(llm.tokenizer.decode([token_id], skip_special=False))
