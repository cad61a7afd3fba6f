"""The families, by explicit import, and which of them a config.json belongs to."""

from collections.abc import Mapping

from foveal.core.errors import ConfigError, LoadError
from foveal.models.config import ModelConfig
from foveal.models.family import Family
from foveal.models.fields import Fields
from foveal.models.gemma import GEMMA2, GEMMA3
from foveal.models.gpt2 import GPT2
from foveal.models.llama import LLAMA, MISTRAL
from foveal.models.phi import PHI3
from foveal.models.qwen import QWEN2, QWEN3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT2)

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}


def family_of(values: Mapping[str, object]) -> Family:
    """The family of a parsed config.json: by `architectures`, else by `model_type`."""
    named = values.get("architectures")
    if named:
        for family in FAMILIES:
            if named == [family.architecture]:
                return family
        accepted = ", ".join(family.architecture for family in FAMILIES)
        raise LoadError(f"config.json: architectures: got {named!r}; accepted: {accepted}")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in BY_NAME:
        accepted = ", ".join(BY_NAME)
        raise LoadError(f"config.json: model_type: got {kind!r}; accepted: {accepted}")
    return BY_NAME[kind]


def read_config(values: Mapping[str, object]) -> ModelConfig:
    """The configuration in a parsed config.json. Raises `LoadError` for an unknown architecture,
    `ConfigError` for an unknown value of a field."""
    fields = Fields(values)
    config = family_of(values).read_config(fields)
    fields.finish()
    return config


def write_config(config: ModelConfig) -> dict[str, object]:
    """config.json for `config`. Raises `ConfigError` if its family has no words for it."""
    if config.family not in BY_NAME:
        raise ConfigError(f"family: got {config.family!r}; accepted: {', '.join(BY_NAME)}")
    family = BY_NAME[config.family]
    values = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.write_config(config),
        # A tokenizer knows these; left out, readers would assume those of the family's first model.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    back = read_config(values)
    if back != config:
        lost = [
            name for name in ModelConfig.__slots__ if getattr(back, name) != getattr(config, name)
        ]
        raise ConfigError(f"{', '.join(lost)}: cannot be written in the words of {family.name}")
    return values
