"""Runs a model over one batch of prompts: prefill in chunks, then a token each.

Prompts of unequal length are padded on the left, so that all rows end together; pads have position
-1 and are seen by nobody. A row that has finished goes on as a pad.
"""

from collections.abc import Sequence

import torch

from foveal.models.decoder import Decoder


class Runner:
    """One batch under way on one model."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        backend: str = "auto",
        chunk: int = 512,
    ) -> None:
        """`prompts` are token ids, at least one each. Memory is set aside for `max_tokens` more;
        `chunk` tokens of each prompt are computed at once."""
        self._model, self._backend, self._chunk = model, backend, chunk
        self._prompts = prompts
        self._width = max(map(len, prompts))
        self._next = [len(prompt) for prompt in prompts]
        """The position of each row's next token."""
        self._cache = model.new_cache(len(prompts), self._width + max_tokens)

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Compute the prompts; logits [B, V] for the token after each."""
        rows = [[0] * (self._width - len(p)) + list(p) for p in self._prompts]
        pads = [self._width - len(p) for p in self._prompts]
        ids = self._tensor(rows)
        positions = None
        if any(pads):
            slots = torch.arange(self._width, device=self._model.device)
            positions = (slots - self._tensor([[pad] for pad in pads])).clamp(min=-1)
        hidden = ids.new_zeros(0)
        for start in range(0, self._width, self._chunk):
            part = slice(start, start + self._chunk)
            placed = None if positions is None else positions[:, part]
            hidden = self._hidden(ids[:, part], placed)
        return self._model.logits(hidden)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int | None]) -> torch.Tensor:
        """Compute one more token of each row, None for a row that has finished; logits [B, V]."""
        positions = [-1 if t is None else at for t, at in zip(tokens, self._next, strict=True)]
        self._next = [at + 1 for at in self._next]
        ids = self._tensor([[token or 0] for token in tokens])
        return self._model.logits(self._hidden(ids, self._tensor([[at] for at in positions])))

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The last token's hidden state [B, E]."""
        return self._model.hidden(
            ids, positions=positions, cache=self._cache, backend=self._backend
        )[:, -1]

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._model.device)
