"""Computes one batch of requests from the prompts to the last answer.

The batch is static: it runs until its last answer has ended, and nobody joins it on the way.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter

from foveal.engine.answer import Answer
from foveal.engine.request import Piece, Request
from foveal.engine.runner import Runner
from foveal.engine.sampler import Draw, report, sample
from foveal.models.decoder import Decoder
from foveal.text.tokenizer import Tokenizer


def run_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    backend: str = "auto",
    chunk: int = 512,
) -> Iterator[tuple[int, Piece]]:
    """Yield (index of the request, its new text) token by token; the last piece of each request
    carries its completion. See `Runner` for `chunk`."""
    started = perf_counter()
    answers = [Answer(request, tokenizer, started) for request in requests]
    vocab_size = model.config.vocab_size
    draws = [Draw(r.params, r.prompt, vocab_size, model.device) for r in requests]
    runner = Runner(
        model,
        [request.prompt for request in requests],
        max_tokens=max(request.max_tokens for request in requests),
        backend=backend,
        chunk=chunk,
    )
    logits = runner.prefill()
    live = list(range(len(requests)))
    while live:
        logits, drawing = logits[live], [draws[at] for at in live]
        ids = sample(logits, drawing)
        reports = report(logits, ids, drawing)
        tokens: list[int | None] = [None] * len(requests)
        for at, token_id, logprobs in zip(live, ids, reports, strict=True):
            draws[at].record(token_id)
            text = answers[at].push(token_id, logprobs)
            if answers[at].finish_reason is None:
                tokens[at] = token_id
                yield at, Piece(text)
            else:
                yield at, Piece(text, answers[at].completion())
        live = [at for at in live if tokens[at] is not None]
        if live:
            logits = runner.step(tokens)
