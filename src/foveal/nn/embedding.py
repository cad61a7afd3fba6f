"""Token embedding, with the scale and the learned positions of the families that have them."""

import torch
import torch.nn.functional as F
from torch import nn

from foveal.core.errors import ArgumentError
from foveal.nn.linear import NarrowEmbedding


class Embedding(nn.Module):
    """ids [B, T] -> [B, T, E]."""

    def __init__(
        self, vocab_size: int, width: int, *, scale: float = 1.0, num_positions: int = 0
    ) -> None:
        """`num_positions` above 0 adds a learned embedding of the position (GPT-2)."""
        super().__init__()
        self.tokens: nn.Embedding | NarrowEmbedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(num_positions, width) if num_positions else None
        self.scale = scale

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`positions` is integer [B or 1, T], negative for pads."""
        if not ids.is_cuda:  # on a GPU looking would make the CPU wait
            self._check(ids, positions)
        x: torch.Tensor = self.tokens(ids)
        if self.scale != 1.0:
            # Rounded to the weights' dtype first, as Gemma was trained.
            x = x * torch.tensor(self.scale, dtype=x.dtype).item()
        if self.positions is not None:
            x = x + self.positions(positions.clamp(min=0))
        return x

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., E] times every token's vector: [..., V], the logits of tied models."""
        if isinstance(self.tokens, NarrowEmbedding):
            return self.tokens.scores(hidden)
        return F.linear(hidden, self.tokens.weight)

    def _check(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        limit = self.tokens.num_embeddings
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            got = f"ids from {int(ids.min())} to {int(ids.max())}"
            raise ArgumentError("ids", got, f"0 to {limit - 1} (the vocabulary)")
        if self.positions is not None and positions.numel():
            limit, last = self.positions.num_embeddings, int(positions.max())
            if last >= limit:
                raise ArgumentError("positions", last, f"below {limit} (learned positions)")
