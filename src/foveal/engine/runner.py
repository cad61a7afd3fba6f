"""Runs a model over one batch of prompts: prefill in chunks, then a token each.

Prompts of unequal length are padded on the left, so that all rows end together; pads have position
-1 and are seen by nobody. A row that has finished goes on as a pad. Where a model's rotary
frequencies change with the length of the sequence (`ModelConfig.restart_length`), everything is
computed anew at that length.
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
        self._rows = [list(prompt) for prompt in prompts]
        """Every token of each row so far."""
        self._cache = model.new_cache(len(prompts), self._longest + max_tokens)

    @property
    def _longest(self) -> int:
        return max(map(len, self._rows))

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Compute the prompts; logits [B, V] for the token after each."""
        width = self._longest
        pads = [width - len(row) for row in self._rows]
        ids = self._tensor([[0] * pad + row for pad, row in zip(pads, self._rows, strict=True)])
        positions = None
        if any(pads):
            slots = torch.arange(width, device=self._model.device)
            positions = (slots - self._tensor([[pad] for pad in pads])).clamp(min=-1)
        hidden = ids.new_zeros(0)
        for start in range(0, width, self._chunk):
            part = slice(start, start + self._chunk)
            placed = None if positions is None else positions[:, part]
            hidden = self._hidden(ids[:, part], placed)
        return self._model.logits(hidden)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int | None]) -> torch.Tensor:
        """Compute one more token of each row, None for a row that has finished; logits [B, V]."""
        before, limit = self._longest, self._model.config.restart_length
        for row, token in zip(self._rows, tokens, strict=True):
            row += [] if token is None else [token]
        if limit is not None and before <= limit < self._longest:
            self._cache.reset()
            return self.prefill()
        ids = self._tensor([[token or 0] for token in tokens])
        positions = self._tensor(
            [[-1 if t is None else len(r) - 1] for r, t in zip(self._rows, tokens, strict=True)]
        )
        return self._model.logits(self._hidden(ids, positions))

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The last token's hidden state [B, E]."""
        return self._model.hidden(
            ids, positions=positions, cache=self._cache, backend=self._backend
        )[:, -1]

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._model.device)
