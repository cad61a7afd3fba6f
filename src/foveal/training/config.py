"""A training run as data: `Recipe`, read from a TOML file and checked before anything starts.

A recipe holds what decides the result: the model's shape, the text, the optimiser, the length of
the run. What depends on the machine alone (threads, where to write, a limit of time) stays outside,
on the command line. Tables of the file are the classes below; an unknown key or a value of the
wrong type is refused with its name.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from foveal.core.errors import ConfigError

Section = TypeVar("Section")


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
    batch: int = 16
    """Rows that go through the model at once."""
    accumulate: int = 1
    """Batches whose gradients make one update."""
    seed: int = 0
    """Of the first weights and of the order of rows."""
    backend: str = "auto"
    """Attention backend."""
    log_every: int = 10
    """Steps between records of the training loss."""
    evaluate_every: int = 200
    """Steps between evaluations on held-out text."""
    evaluate_rows: int = 64
    """Held-out rows looked at during the run, spread evenly; the last evaluation takes all."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "evaluate_every"):
            _require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        for name in ("evaluate_rows", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run. Frozen; `replace` gives a changed copy."""

    model: Mapping[str, Any]
    """The model's shape, in the words of a Hugging Face `config.json`."""
    data: DataRecipe = field(default_factory=DataRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

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
        sections = {"model", "data", "optimiser", "run"}
        if unknown := set(table) - sections:
            accepted = ", ".join(sorted(sections))
            raise ConfigError(f"recipe: unknown {', '.join(sorted(unknown))}; accepted: {accepted}")
        if not isinstance(table.get("model"), Mapping):
            raise ConfigError("recipe: needs a table [model], the fields of a config.json")
        return cls(
            model=dict(table["model"]),
            data=_section(DataRecipe, table.get("data", {}), "data"),
            optimiser=_section(OptimiserRecipe, table.get("optimiser", {}), "optimiser"),
            run=_section(RunRecipe, table.get("run", {}), "run"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, as in the TOML file."""
        return {
            "model": dict(self.model),
            "data": dataclasses.asdict(self.data),
            "optimiser": dataclasses.asdict(self.optimiser),
            "run": dataclasses.asdict(self.run),
        }

    def override(self, **changes: Any) -> Self:
        """A copy with some fields changed, named `section_field`; None leaves a field alone."""
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
    right = isinstance(value, hint) and not isinstance(value, bool)
    _require(right, where, repr(value), f"a value of type {hint.__name__}")
    return value


def _require(holds: bool, name: str, got: object, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: got {got}; accepted: {accepted}")
