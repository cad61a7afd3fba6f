"""Files written whole or not at all, and the folder where foveal keeps what it has learned."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


def cache_dir() -> Path:
    """The folder for calibrations and tuning tables: `$FOVEAL_CACHE`, else `~/.cache/foveal`."""
    return _cache_dir(os.environ.get("FOVEAL_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(maxsize=8)
def _cache_dir(own: str | None, shared: str | None) -> Path:
    """Cached because the folder is looked at in every call of `attend`."""
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "foveal"


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it when the block ends without an error.

    The file is flushed to disk before the rename, so a reader (or a machine that loses power)
    sees the old file or the new one, never a part. Raises `OSError`; a device is not replaced.
    """
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} is not a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
