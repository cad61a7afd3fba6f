"""`Family`: a kind of checkpoint as data. It reads and writes a configuration and names weights.

A family holds no module: one `Decoder` serves all. Its names map each of our modules to the
modules in the file whose weights, stacked along the output dimension, make up ours: our `qkv` is
q, k and v below each other, our gated `up` is gate and up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from foveal.models.config import ModelConfig
from foveal.models.fields import Fields

Names = Mapping[str, tuple[str, ...]]
"""Our module, with `{}` for the layer, to the modules in the file that it is stacked from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A tensor in a file, and the rows of one of our weights that it fills."""

    name: str
    start: int
    stop: int
    """Rows [start, stop) of our weight."""
    transposed: bool = False
    """The file holds [in, out] instead of [out, in]."""

    def named(self, name: str) -> Self:
        """The same rows from a tensor of another name."""
        return replace(self, name=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of checkpoint."""

    name: str
    """Our name, and the `model_type` in config.json."""
    architecture: str
    """The entry of `architectures` in config.json."""
    read_config: Callable[[Fields], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, object]]
    names: Names
    transposed: frozenset[str] = frozenset()
    """Our modules whose weights lie transposed in the file (GPT-2's Conv1D)."""
    prefix: str = "model."
    """What the names of all tensors but the head begin with; some files leave it out."""
    spare: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    """Patterns of tensors that a file may hold and that mean nothing."""

    def sources(self, config: ModelConfig, weight: str, rows: int) -> tuple[Source, ...]:
        """Where our `weight` of so many rows comes from, in order of its rows."""
        module, _, kind = weight.rpartition(".")
        template, layer = _template(module)
        theirs = self.names[template]
        sizes = _part_rows(config, len(theirs), rows)
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(
            Source(
                name=f"{name.format(layer)}.{kind}",
                start=stop - size,
                stop=stop,
                transposed=template in self.transposed and kind == "weight",
            )
            for name, size, stop in zip(theirs, sizes, stops, strict=True)
        )


def _template(module: str) -> tuple[str, str]:
    """`blocks.3.mlp.up` -> (`blocks.{}.mlp.up`, `3`)."""
    first, *rest = module.split(".")
    if first != "blocks":
        return module, ""
    return ".".join([first, "{}", *rest[1:]]), rest[0]


def _part_rows(config: ModelConfig, num_parts: int, rows: int) -> tuple[int, ...]:
    """The rows of each part: q, k and v where there are three, else equal shares."""
    if num_parts == 3:
        kv = config.num_kv_heads * config.head_dim
        return rows - 2 * kv, kv, kv
    return (rows // num_parts,) * num_parts
