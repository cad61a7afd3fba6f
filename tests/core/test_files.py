"""Files are written whole or not at all."""

import stat
from pathlib import Path

import pytest

from foveal.core.files import atomic_path, cache_dir, write_text


def test_write_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    write_text(target, "naïve")
    assert target.read_text(encoding="utf-8") == "naïve"
    assert list(target.parent.iterdir()) == [target]


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    target = tmp_path / "ours"
    write_text(target, "")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("full disk")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("FOVEAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "foveal"
