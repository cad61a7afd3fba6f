"""Frozen dataclasses as lines of JSON, and back, checked against their own annotations.

One record is one line, appended by one write, so that a run cut short leaves whole lines behind.
Reading is strict: an unknown or missing field, a value of the wrong type, or a broken line is an
error that names the file, the line and the field. A field that has a default may be missing, so
that old files stay readable when a field is added.
"""

import dataclasses
import json
import os
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from foveal.core.dtypes import dtype_name, parse_dtype
from foveal.core.errors import ArgumentError, FovealError, LoadError

T = TypeVar("T")


def append(path: Path, record: object) -> None:
    """Add `record`, a dataclass, to `path` as one line, on disk when this returns."""
    line = encode(record) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last writer was cut short: its line stays its own
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, cls: type[T]) -> list[T]:
    """Every record of `path`. Raises `LoadError` with the line and the field that are wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(decode(cls, line))
        except (ValueError, FovealError) as error:
            raise LoadError(f"{path}, line {number}: {error}") from error
    return records


def encode(record: object) -> str:
    """One line of strict JSON: no NaN, no infinity."""
    return json.dumps(to_plain(record), ensure_ascii=False, allow_nan=False)


def decode(cls: type[T], line: str) -> T:
    """The record that `encode` wrote. Raises `ArgumentError` naming the field that is wrong."""
    value: T = _decode(cls, json.loads(line), cls.__name__)
    return value


def to_plain(value: object) -> Any:
    """`value` as dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return list(map(to_plain, value)) if isinstance(value, tuple | list) else value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value`, which came from JSON, as the type that `hint` says."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value, where)
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        (hint,) = set(arguments) - {NoneType}
        return _decode(hint, value, where)
    if origin is Literal:
        return _require(value in arguments, value, where, f"one of {arguments}")
    if origin is tuple:
        _require(isinstance(value, list), value, where, "a list")
        if arguments[1:] != (...,):
            _require(len(value) == len(arguments), value, where, f"{len(arguments)} values")
        hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_decode(h, item, f"{where}[{i}]") for i, (h, item) in pairs)
    if origin is dict:
        _require(isinstance(value, dict), value, where, "an object")
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is frozenset:
        _require(isinstance(value, list), value, where, "a list")
        return frozenset(_decode(arguments[0], item, where) for item in value)
    return _decode_scalar(hint, value, where)


def _decode_dataclass(cls: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), value, where, "an object")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in value:
        _require(name in fields, name, where, f"the fields {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        _require(name in value or not required, "nothing", f"{where}.{name}", f"{hints[name]}")
    return cls(**{name: _decode(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is torch.dtype:
        return parse_dtype(_decode_scalar(str, value, where))
    if isinstance(hint, type) and issubclass(hint, Enum):
        accepted = [member.value for member in hint]
        return hint(_require(value in accepted, value, where, f"one of {accepted}"))
    if hint is float and type(value) is int:
        return float(value)
    return _require(type(value) is hint, value, where, hint.__name__)


def _require(holds: bool, value: Any, where: str, accepted: str) -> Any:
    if not holds:
        raise ArgumentError(where, repr(value), accepted)
    return value
