"""Layers with and without a window: the words of config.json and `ModelConfig.windows`."""

from collections.abc import Callable, Sequence

SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = (FULL, SLIDING)
"""The entries of `layer_types` in config.json."""


def layer_types(num_layers: int, sliding: Callable[[int], bool]) -> tuple[str, ...]:
    """A word for each layer."""
    return tuple(SLIDING if sliding(layer) else FULL for layer in range(num_layers))


def windows_of(types: Sequence[str], window: int) -> tuple[int | None, ...]:
    """`ModelConfig.windows`: empty where no layer slides."""
    if SLIDING not in types:
        return ()
    return tuple(window if word == SLIDING else None for word in types)
