"""What `foveal stream` opens before it reads: the text, and the session of its options or of a
saved state. Options that are not given are not passed on, so that defaults live in one place."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from foveal.core.errors import ArgumentError
from foveal.core.units import parse_bytes, parse_s
from foveal.engine.gate import Tolerance
from foveal.engine.llm import LLM
from foveal.engine.policies.catalogue import find_policy
from foveal.engine.policy import Policy
from foveal.engine.session import Session

_MAY_CHANGE = ("kv", "window")
"""Settings of a saved state that an option may change."""


def check_target(option: str, path: Path | None) -> None:
    """Refuse, before a long run, a path that could not be written after it."""
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(option, str(path), "a file in a folder that exists and can be written")
    if path.exists() and not path.is_file():
        raise ArgumentError(option, str(path), "a file, not a folder or a device")


def check_report(path: Path | None) -> None:
    """The same for a report, and refuse where it could not be drawn."""
    check_target("report", path)
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("report", "no matplotlib", "pip install 'foveal[plots]' first")


def open_source(file: str, offset: int) -> Any:
    """The file, unbuffered, at its offset. Raises `ArgumentError`."""
    if file == "-":
        if offset:
            raise ArgumentError("offset", offset, "0 for standard input, which has no places")
        return os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    try:
        source = Path(file).open("rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ArgumentError("FILE", repr(file), f"a file that can be read ({error})") from error
    if offset:
        source.seek(offset)
    return source


def open_session(llm: LLM, options: dict[str, Any], load_state: Path | None) -> Session:
    """A fresh session, or the saved one with another format or a smaller window if so asked."""
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if load_state is not None:
        kept = [f"--{name.replace('_', '-')}" for name in given if name not in _MAY_CHANGE]
        if kept:
            accepted = f"no {kept[0]}: the saved state has its own (it may change --kv, --window)"
            raise ArgumentError("load-state", ", ".join(kept), accepted)
        session = Session.load(load_state, llm)
        if given:
            session.change(**given)
        return session
    if "memory" in given:
        given["memory"] = parse_bytes(given["memory"], "memory")
    if "set" in given:
        given["policy"] = read_policy(given.get("policy", "sinks"), given.pop("set"))
    if "on_drift" in given:
        if "tolerance" not in given:
            raise ArgumentError("on-drift", given["on_drift"], "--tolerance beside it")
        given["tolerance"] = Tolerance(kl=given["tolerance"], action=given.pop("on_drift"))
    return Session(llm, **given)


def read_policy(name: str, settings: Sequence[str]) -> Policy:
    """The policy of this name with settings such as `mass=0.9`, `budget=16MiB`, `latency=20ms`."""
    policy = find_policy(name)
    hints = get_type_hints(type(policy))
    known = [field.name for field in fields(policy)]
    for setting in settings:
        field, _, text = setting.partition("=")
        if field not in known or not text:
            accepted = ", ".join(f"{one}=..." for one in known) or "nothing"
            raise ArgumentError("set", repr(setting), f"{accepted} with policy {name!r}")
        kinds = get_args(hints[field]) or (hints[field],)
        policy = replace(policy, **{field: _value(setting, text, kinds)})
    return policy


def _value(setting: str, text: str, kinds: Sequence[type]) -> int | float | str:
    name = f"set {setting.partition('=')[0]}"
    if int in kinds:
        return parse_bytes(text, name)
    return parse_s(text, name) if float in kinds else text
