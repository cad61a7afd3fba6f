"""Blocks of text together are the text, wherever the reads fall."""

import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.text import blocks
from foveal.text.blocks import read_blocks


def opened(path: Path) -> io.FileIO:
    return io.FileIO(path)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab\n é€𝄞"), max_size=200), size=st.integers(4, 20))
def test_blocks_are_the_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "text"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch, opened(path) as file:
        patch.setattr(blocks, "BLOCK_BYTES", size)
        parts = list(read_blocks(file, lambda: False))
    assert "".join(part.text for part in parts) == text
    end = 0
    for part in parts:
        end += len(part.text.encode())
        assert part.end == end
        assert len(part.text.encode()) < 2 * size
        assert part.text.endswith("\n") or "\n" not in part.text or part is parts[-1]


def test_an_offset_and_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("line\n" * 2000)
    with opened(path) as file:
        file.seek(5000)
        first = next(read_blocks(file, lambda: False, start=5000))
        assert first.end == 5000 + len(first.text)
    with opened(path) as file:
        asked = iter([False, True])
        assert len(list(read_blocks(file, lambda: next(asked)))) == 1


@pytest.mark.parametrize("end", [b"\xff\n", b"\xe2\x82", b"\xe2\x82\nx" * 3])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"fine\n" * 1000 + end)
    given_out = []
    with pytest.raises(ArgumentError, match="at offset 5000; accepted: UTF-8"), opened(path) as f:
        for block in read_blocks(f, lambda: False):
            given_out.append(block.text)
    assert "".join(given_out).startswith("fine\n" * 800)


def test_a_pipe_gives_out_what_has_come_and_can_be_left(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one\ntwo")
    stop = False
    with io.FileIO(reader) as file:
        parts = read_blocks(file, lambda: stop)
        assert next(parts).text == "one\n"
        os.write(writer, b"\n")
        assert next(parts).text == "two\n"
        stop = True
        assert list(parts) == []
        os.close(writer)
