"""Layers with and without a window: the words of config.json and `ModelConfig.windows`."""

from collections.abc import Callable, Sequence

from foveal.models.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = (FULL, SLIDING)
"""The entries of `layer_types` in config.json."""


def layer_types(num_layers: int, sliding: Callable[[int], bool]) -> tuple[str, ...]:
    """A word for each layer."""
    return tuple(SLIDING if sliding(layer) else FULL for layer in range(num_layers))


def read_window(fields: Fields, default: int | None) -> int | None:
    """`sliding_window`: null means none, absent means the reference's default."""
    if "sliding_window" not in fields:
        return default
    return None if fields.get("sliding_window") is None else fields.integer("sliding_window")


def windows_of(types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """`ModelConfig.windows`: empty where no layer slides."""
    if window is None or SLIDING not in types:
        return ()
    return tuple(window if word == SLIDING else None for word in types)
