"""AdamW with decay on matrices only, and a learning rate that follows the run's progress.

The schedule is a function of progress in [0, 1], not of the step: progress is the larger of the
share of steps and the share of time used, so that a run with a limit of time still ends with its
decay, on a machine of any speed. Warm-up, constant, decay ("wsd") is Hu et al. 2024 (MiniCPM),
its decay the 1 - sqrt of Hägele et al. 2024; "cosine" is Loshchilov and Hutter 2017.
"""

import math

import torch
from torch import nn

from foveal.training.config import OptimiserRecipe


def build_optimiser(model: nn.Module, recipe: OptimiserRecipe) -> torch.optim.AdamW:
    """AdamW over the model's parameters, those that decay in the first group."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if decays(name, p)]
    others = [p for name, p in named if not decays(name, p)]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Matrices decay; norms, biases and embeddings (a tied output among them) do not."""
    return parameter.ndim >= 2 and "embed" not in name


def learning_rate(recipe: OptimiserRecipe, progress: float) -> float:
    """The learning rate at `progress` in [0, 1]."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    if recipe.schedule == "cosine":
        share = (progress - recipe.warmup) / (1 - recipe.warmup)
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    left = max(0.0, 1 - progress)
    if left >= recipe.decay:
        return recipe.lr
    return recipe.lr * (1 - math.sqrt(1 - left / recipe.decay))
