"""A matrix product in which a weight of 0 takes nothing, even from inf or NaN.

What a mask hides has weight 0, and 0 * inf is NaN in floating point; in attention it means nothing.
"""

import math

import torch


def weigh(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`weights @ x`, where a weight of exactly 0 takes nothing, even from inf or NaN.

    A weight other than 0 that meets inf or NaN gives NaN.
    """
    finite = x.isfinite()
    if finite.all():
        return weights @ x
    reached = (weights != 0).to(x.dtype) @ (~finite).to(x.dtype) > 0
    return (weights @ x.where(finite, 0.0)).masked_fill(reached, math.nan)
