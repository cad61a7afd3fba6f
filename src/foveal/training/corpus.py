"""Which files are text to learn from, and which are kept apart to measure what was learned.

The order of documents and the choice of held-out ones depend on the SHA-256 of each file's path
below its root, never on the order in which a disk lists files, so that two machines with the same
files make the same two streams. Without paths the text is the Python standard library's own
source, which every machine that runs this has.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveal.core.errors import ArgumentError
from foveal.core.log import logger

HELDOUT_SHARE = 20
"""One document of this many is held out."""

NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
               "idlelib", "lib2to3", "turtledemo")  # fmt: skip
"""Folders of the standard library's tree that are installed packages, tests, or old grammars."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text file."""

    name: str
    """Path below the root that was given, with forward slashes."""
    path: Path

    @property
    def digest(self) -> str:
        """SHA-256 of the name: the place in the order."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether the document is kept apart; drawn by the digest's last digits, which do not
        follow the order."""
        return int(self.digest[-8:], 16) % HELDOUT_SHARE == 0

    def read(self) -> str | None:
        """The text; None (and a line in the log) if the file is not UTF-8."""
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            logger().info("%s is not UTF-8 and is left out", self.path)
            return None


def standard_library(exclude: Iterable[str] = ()) -> list[Document]:
    """The Python source files of this interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return _ordered(_below(root, "*.py", {*NOT_LIBRARY, *exclude}))


def documents(paths: Sequence[Path], exclude: Iterable[str] = ()) -> list[Document]:
    """The files named in `paths` and those in the folders named there, hidden ones left out."""
    found: list[Document] = []
    for path in paths:
        if path.is_file():
            found.append(Document(path.name, path))
        elif path.is_dir():
            found += _below(path, "*", {*exclude, "__pycache__"})
        else:
            raise ArgumentError("data", path, "files and folders that exist")
    return _ordered(found)


def _below(root: Path, pattern: str, exclude: set[str]) -> list[Document]:
    files = ((path, path.relative_to(root)) for path in root.rglob(pattern) if path.is_file())
    return [
        Document(name.as_posix(), path)
        for path, name in files
        if not exclude & set(name.parts) and not any(part[0] == "." for part in name.parts)
    ]


def _ordered(found: list[Document]) -> list[Document]:
    return sorted(found, key=lambda document: (document.digest, document.path.as_posix()))
