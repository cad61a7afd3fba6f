"""Sights for tests that look into a cache's tiles without attending to them."""

import torch

from foveal.kv.cache import Sight


def sight(first: int = 0) -> Sight:
    """Of a query that may see every position from `first` on."""
    q = torch.zeros(1, 1, 1, 1)
    lse = torch.full((1, 1, 1), -torch.inf)
    positions = torch.zeros(1, 1, dtype=torch.int64)
    return Sight(q=q, far_q=q, positions=positions, scale=1.0, first=first, lse=lse)
