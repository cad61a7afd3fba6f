"""A training run as data: `Recipe`, read from a TOML file and checked before anything starts.

A recipe holds what decides the result: the model's shape, the text, the optimiser, the length of
the run. What depends on the machine alone (threads, the attention backend, where to write) stays
outside, on the command line. Tables of the file are the classes below; an unknown key or a value
of the wrong type is refused with its name.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from foveal.core.errors import ConfigError
from foveal.models.config import ModelConfig
from foveal.nn.rope import RopeConfig

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecipe:
    """The shape of a Llama: rotary positions, RMSNorm, gated MLP, no biases. The vocabulary is the
    tokenizer's."""

    width: int = 192
    """E: size of a token's vector between blocks."""
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 512
    """F: size between the matrices of an MLP."""
    max_positions: int = 512
    """Tokens per sequence that the model is made for; at least the context of training."""
    rope_theta: float = 10_000.0
    tied: bool = True
    """The output matrix is the token embedding."""

    def config(self, vocab_size: int) -> ModelConfig:
        """The model. Raises `ConfigError` for sizes that do not fit together."""
        return ModelConfig(
            family="llama",
            vocab_size=vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            max_positions=self.max_positions,
            rope=RopeConfig(dim=self.head_dim, theta=self.rope_theta),
            tied=self.tied,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecipe:
    """Which tokens are seen, in which rows."""

    tokenizer: str = "bytes"
    """"bytes" for the byte tokenizer, or a Hugging Face directory that holds a tokenizer."""
    context: int = 512
    """Tokens in a row."""
    exclude: tuple[str, ...] = ()
    """Folders and files left out, by their name, wherever they are found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimiserRecipe:
    """AdamW (Loshchilov and Hutter 2019) and its schedule."""

    lr: float = 3e-3
    """Highest learning rate."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """After the warm-up: constant, then falling (wsd); or a half cosine (cosine)."""
    warmup: float = 0.02
    """Share of the run in which the learning rate rises from zero."""
    decay: float = 0.3
    """wsd: share of the run in which it falls to zero at the end."""
    weight_decay: float = 0.1
    """On matrices only, not on norms, biases and embeddings."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Gradients are scaled down to this norm when theirs is larger."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < 1, "optimiser.lr", self.lr, "a number between 0 and 1")
        shares = self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1
        got = (self.warmup, self.decay)
        _require(shares, "optimiser.warmup, optimiser.decay", got, "shares of at most 1 together")
        _require(self.weight_decay >= 0, "optimiser.weight_decay", self.weight_decay, ">= 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimiser.{name}", value, "a number in [0, 1)")
        _require(self.clip > 0, "optimiser.clip", self.clip, "a positive norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecipe:
    """How long, in which portions, and how often something is written."""

    steps: int = 1000
    """Updates of the weights."""
    time_limit_s: float = 0.0
    """Seconds after which the run ends, its schedule fitted to them; 0 is no limit."""
    batch: int = 16
    """Rows that go through the model at once."""
    accumulate: int = 1
    """Batches whose gradients make one update."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products take inputs rounded to it; weights, norms, the loss, AdamW's
    averages and evaluations stay float32 (Micikevicius et al. 2018)."""
    seed: int = 0
    """Of the first weights and of the order of rows."""
    log_every: int = 10
    """Steps between records of the training loss."""
    evaluate_every: int = 200
    """Steps between evaluations on held-out text."""
    evaluate_rows: int = 64
    """Held-out rows looked at during the run, spread evenly; the last evaluation takes all."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "evaluate_every"), 1)
        least |= {"evaluate_rows": 1, "checkpoint_every": 1, "seed": 0, "time_limit_s": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            _require(value >= lowest, f"run.{name}", value, f"at least {lowest}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run. Frozen; `replace` gives a changed copy."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    def __post_init__(self) -> None:
        most, context = self.model.max_positions, self.data.context
        accepted = f"1 to model.max_positions = {most}"
        _require(1 <= context <= most, "data.context", context, accepted)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The recipe in a TOML file. Raises `ConfigError` for what it does not understand."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"recipe {path}: {error}") from error
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        kinds = get_type_hints(cls)
        if unknown := ", ".join(sorted(set(table) - set(kinds))):
            raise ConfigError(f"recipe: unknown {unknown}; accepted: {', '.join(kinds)}")
        return cls(**{name: _section(kinds[name], table[name], name) for name in table})

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, as in the TOML file."""
        return dataclasses.asdict(self)

    def override(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some fields changed, named `section_field`; None leaves one as it is."""
        table = self.to_dict()
        for name, value in changes.items():
            section, _, key = name.partition("_")
            if value is not None:
                table[section][key] = value
        return type(self).from_dict(table)


def _section(kind: type[Section], table: object, where: str) -> Section:
    """A section's class from its table, every value checked against the field's type."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"recipe: {where} is {table!r}; accepted: a table")
    hints = get_type_hints(kind)
    if unknown := set(table) - set(hints):
        names, accepted = ", ".join(sorted(unknown)), ", ".join(hints)
        raise ConfigError(f"recipe: [{where}] has unknown {names}; accepted: {accepted}")
    return kind(**{key: _value(v, hints[key], f"{where}.{key}") for key, v in table.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: int, float, str, a Literal of strings, or a tuple of strings."""
    if get_origin(hint) is Literal:
        _require(value in get_args(hint), where, repr(value), " or ".join(get_args(hint)))
        return value
    if get_origin(hint) is tuple:
        strings = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        _require(strings, where, repr(value), "a list of strings")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require(right, where, repr(value), f"a value of type {hint.__name__}")
    return value


def _require(holds: bool, name: str, got: object, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: got {got}; accepted: {accepted}")
