"""What the small JSON files of a checkpoint declare about its tokens.

`tokenizer_config.json` names the special tokens by their text, `generation_config.json` and
`config.json` the ids that begin and end a text. Where they differ, generation stops where
`generation_config.json` says, as in the `transformers` library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.core.errors import LoadError


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """Special tokens as a checkpoint's files declare them; absent files declare nothing."""

    named: Mapping[str, str] = field(default_factory=dict)
    """Text of each named token: `bos_token`, `eos_token`, `unk_token`, `pad_token`, ..."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Text and id of tokens beside the vocabulary proper."""
    ordinary: frozenset[str] = frozenset()
    """Those of the added tokens that are text like any other: decoding keeps them."""
    add_bos: bool | None = None
    """Whether encoding puts the begin token first; None where no file says so."""
    add_eos: bool | None = None
    """Whether encoding puts the end token last; None where no file says so."""
    bos_id: int | None = None
    """The id that begins a text."""
    eos_ids: tuple[int, ...] = ()
    """The ids that end one; generation stops at any of them."""


def read_declared(directory: Path) -> Declared:
    """Read the files of `directory`. Raises `LoadError` for one that is not JSON."""
    config = read_json(directory / "tokenizer_config.json")
    named_tokens = read_json(directory / "special_tokens_map.json") | config
    entries = config.get("added_tokens_decoder") or {}
    legacy = read_json(directory / "added_tokens.json")
    sources = [read_json(directory / n) for n in ("generation_config.json", "config.json")]
    named = {
        name: _text(value)
        for name, value in named_tokens.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    special = {e["content"] for e in entries.values() if e.get("special")} | set(named.values())
    added = legacy | {entry["content"]: int(i) for i, entry in entries.items()}
    return Declared(
        named=named,
        added=added,
        ordinary=frozenset(added.keys() - special),
        add_bos=config.get("add_bos_token"),
        add_eos=config.get("add_eos_token"),
        bos_id=next(iter(_first_ids(sources, "bos_token_id")), None),
        eos_ids=_first_ids(sources, "eos_token_id"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises `LoadError`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path}: holds a {type(content).__name__}; expected an object")
    return content


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _first_ids(sources: list[dict[str, Any]], name: str) -> tuple[int, ...]:
    """The ids of the first source that has any; a single id and a list are both in use."""
    for source in sources:
        value = source.get(name)
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return ()
