"""What foveal has measured, kept on disk: one JSON file for each kind of thing and machine.

A file carries the version of its format and of foveal. One that is corrupt, or written by another
version, is reported once and treated as if it were not there: measurements can be made again,
wrong ones must not decide. Files are replaced whole, so readers never see half of one.
"""

import json
from functools import cache
from importlib import metadata
from typing import Any

from foveal.core.files import cache_dir, write_text
from foveal.core.log import warn_once
from foveal.hardware.profile import Machine

Json = dict[str, Any]

_num_saves = 0


@cache
def foveal_version() -> str:
    """The installed version; "source" where foveal runs without being installed."""
    try:
        return metadata.version("foveal")
    except metadata.PackageNotFoundError:
        return "source"


def file_name(kind: str, machine: Machine) -> str:
    """`calibration-cpu` on a machine -> `calibration-cpu-1f2e3d4c5b6a.json`."""
    return f"{kind}-{machine.fingerprint}.json"


def load(name: str, format_version: int, remedy: str) -> Json | None:
    """The content of the file `name` in the cache folder; None if absent or not to be trusted.

    `remedy` tells the user how to make the file anew.
    """
    path = cache_dir() / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written_by = (content["format"], content["foveal"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn_once(f"{path} cannot be read and is ignored ({error!r}); {remedy}")
        return None
    if written_by != (format_version, foveal_version()):
        warn_once(f"{path} was written by another version and is ignored; {remedy}")
        return None
    return dict(content)


def save(name: str, format_version: int, content: Json) -> None:
    """Write `content` with its versions to the file `name` in the cache folder, atomically."""
    global _num_saves
    stamped = {"format": format_version, "foveal": foveal_version(), **content}
    write_text(cache_dir() / name, json.dumps(stamped, indent=1) + "\n")
    _num_saves += 1


def stamp() -> tuple[str, int, int]:
    """Changes whenever a file in the cache folder has been replaced; costs a few microseconds.

    The folder's time of change tells of other processes. It moves in ticks of milliseconds, so
    this process counts its own writes besides.
    """
    folder = cache_dir()
    try:
        return str(folder), folder.stat().st_mtime_ns, _num_saves
    except OSError:
        return str(folder), 0, _num_saves
