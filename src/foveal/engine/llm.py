"""`LLM`: the library's door to text generation.

    from foveal.engine.llm import LLM
    print(LLM().generate("def fibonacci(n):")[0].text)

Prompts are computed in batches of similar length. A batch runs until its last answer has ended.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foveal.attention.select import Choice, choose
from foveal.attention.workload import Workload
from foveal.core.dtypes import parse_dtype
from foveal.core.errors import ArgumentError, RequestError
from foveal.engine.batch import run_batch
from foveal.engine.request import Completion, Piece, Request, SamplingParams, check_ids
from foveal.models.bundled import bundled_model
from foveal.models.hub import locate
from foveal.models.load import load_model
from foveal.text.chat import Message, load_chat_template
from foveal.text.tokenizer import load_tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids that are taken as they are."""


class LLM:
    """A model with its tokenizer, ready to generate."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        max_batch: int = 8,
        prefill_chunk: int = 512,
        weights: str | None = None,
    ) -> None:
        """Load a Hugging Face directory (or hub name); None loads the bundled model.

        `dtype` None keeps that of the weights. `backend` names the attention backend. At most
        `max_batch` prompts are computed together, `prefill_chunk` tokens of each at once. `weights`
        stores matrices narrow, such as "bf16", "int8" or "int4", and computes in float32. Raises
        `LoadError`, `ConfigError` or `ArgumentError`.
        """
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ArgumentError(name, value, "an integer of at least 1")
        self.directory = bundled_model() if path is None else locate(path)
        wanted = parse_dtype(dtype) if isinstance(dtype, str) else dtype
        self.tokenizer = load_tokenizer(self.directory)
        self.chat_template = load_chat_template(self.directory)
        self.model = load_model(self.directory, dtype=wanted, device=device, weights=weights)
        self.backend = backend
        self._max_batch, self._chunk = max_batch, prefill_chunk
        ropes = (self.model.config.rope, self.model.config.window_rope)
        if any(rope is not None and rope.scaling.length_dependent for rope in ropes):
            # The longest sequence of a call sets the frequencies: no neighbours, no parts.
            self._max_batch, self._chunk = 1, self.context

    @property
    def context(self) -> int:
        """Tokens that prompt and answer together may have."""
        return self.model.config.context

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete every prompt, in the given order; one prompt may stand alone.

        `params` are for all prompts, or one for each. Raises `RequestError` for a prompt that is
        empty or leaves no room in the model's context, before anything is computed.
        """
        requests = self._requests(prompts, params)
        order = sorted(range(len(requests)), key=lambda at: len(requests[at].prompt))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self._max_batch):
            batch = order[start : start + self._max_batch]
            for at, piece in self._run([requests[i] for i in batch]):
                if piece.completion is not None:
                    done[batch[at]] = piece.completion
        return [done[at] for at in range(len(requests))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Complete one prompt piece by piece; the last piece carries the whole completion.

        Errors are raised at the call, as `generate` raises them.
        """
        return (piece for _, piece in self._run(self._requests([prompt], params)))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """The model's answer to a conversation. Raises `RequestError` where the checkpoint has no
        chat template, or the template refuses the messages."""
        return self.generate(self.encode_chat(messages, tools=tools), params)[0]

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins."""
        text = self.chat_template.render(messages, tools=tools)
        return self.tokenizer.encode(text, special=False)

    def explain(self, num_prompt_tokens: int, num_tokens: int = 2) -> tuple[Choice, Choice]:
        """Who computes the attention of the first layer, and why: in the prefill of one prompt of
        this length (its last chunk), and in the decoding of the last of `num_tokens`."""
        last_chunk = (num_prompt_tokens - 1) % self._chunk + 1
        num_keys = num_prompt_tokens + max(num_tokens - 1, 1)
        sizes = ((last_chunk, num_prompt_tokens), (1, num_keys))
        spec, model = self.model.config.spec(0), self.model
        prefill, decode = (
            choose(
                spec,
                Workload(
                    batch=1,
                    q_len=q_len,
                    kv_len=kv_len,
                    dtype=model.dtype,
                    device=model.device.type,
                ),
                backend=self.backend,
            )
            for q_len, kv_len in sizes
        )
        return prefill, decode

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """Every prompt with its parameters, checked."""
        listed = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(listed)
        if len(params) != len(listed):
            accepted = f"one, or one for each of {len(listed)} prompts"
            raise ArgumentError("params", len(params), accepted)
        return [self._request(prompt, one) for prompt, one in zip(listed, params, strict=True)]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_id is None:
            raise RequestError(
                "prompt: got no tokens; accepted: at least one, because this model has no token "
                "that begins a text"
            )
        ids = ids or [self.tokenizer.bos_id or 0]
        check_ids("prompt", ids, self.model.config.vocab_size)
        check_ids("logit_bias", params.logit_bias, self.model.config.vocab_size)
        room = self.context - len(ids)
        if room < 1:
            raise RequestError(
                f"prompt: got {len(ids)} tokens; accepted: at most {self.context - 1}, because the "
                f"model's context is {self.context} tokens and an answer needs at least one"
            )
        return Request(ids, params, min(params.max_tokens, room))

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Piece]]:
        return run_batch(
            self.model, self.tokenizer, requests, backend=self.backend, chunk=self._chunk
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts, where a single one may stand alone as text or as token ids."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [one for one in prompts if isinstance(one, int)]
    several = [one for one in prompts if not isinstance(one, int)]
    if ids and several:
        raise ArgumentError("prompts", "token ids among prompts", "texts, or lists of token ids")
    return [ids] if ids else several
