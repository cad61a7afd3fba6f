"""One answer under way: its tokens, its text so far, and whether it has ended.

Text is given out as it is made, except what may still turn out to be the beginning of a stop
string. Of several stop strings the one that is complete first counts, so the answer does not
depend on how the text falls into tokens.
"""

from time import perf_counter

from foveal.engine.request import Completion, FinishReason, Request, Timing, TokenLogprobs
from foveal.text.stream import TextStream
from foveal.text.tokenizer import Tokenizer


class StopFinder:
    """Finds the first of some strings in a text that comes in pieces."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False
        """Whether a stop string has come; nothing is given out after it."""

    def push(self, text: str) -> str:
        """What of the text so far can be given out; nothing of a stop string ever is."""
        if self.found:
            return ""
        text = self._held + text
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops]
        complete = [(end, start) for end, start in places if start >= 0]
        if complete:
            self.found, self._held = True, ""
            return text[: min(complete)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """Collects what the sampler draws for one request."""

    def __init__(self, request: Request, tokenizer: Tokenizer, started: float) -> None:
        """`started` is the `perf_counter` when the computation of the prompt began."""
        params = request.params
        ends = set(params.stop_ids) if params.ignore_eos else {*params.stop_ids, *tokenizer.eos_ids}
        self._request = request
        self._end_ids = ends
        self._stream = TextStream(tokenizer)
        self._stops = StopFinder(tuple(params.stop))
        self._started = self._first = self._last = started
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        """Why the answer has ended; None while it goes on."""

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> str:
        """Take the next token; give the text that it settles."""
        self._last = perf_counter()
        self._first = self._first if self._token_ids else self._last
        self._token_ids.append(token_id)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        ended = token_id in self._end_ids
        text = "" if ended else self._stops.push(self._stream.push(token_id))
        if not ended and len(self._token_ids) == self._request.max_tokens:
            self.finish_reason = "length"
        if ended or self.finish_reason:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
        if ended or self._stops.found:
            self.finish_reason = "stop"
        self._pieces.append(text)
        return text

    def completion(self) -> Completion:
        """The answer as a whole. Only for one that has ended."""
        assert self.finish_reason is not None
        return Completion(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self._request.prompt),
            timing=Timing(
                first_token_s=self._first - self._started,
                total_s=self._last - self._started,
                num_tokens=len(self._token_ids),
            ),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )
