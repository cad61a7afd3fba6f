"""Text of any length, block by block, from a file or from a pipe that is still being written.

A block ends at a line break wherever there is one, because tokenizers rarely join across line
breaks: the ids of the blocks are then those of the whole text (always so for tokens of bytes).
Memory is that of one block. What has arrived is given out without waiting for more.
"""

import io
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from foveal.core.errors import ArgumentError

BLOCK_BYTES = 4096
_PATIENCE_S = 0.2
"""How often a silent pipe is left to ask whether to stop."""


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of text."""

    text: str
    end: int
    """Byte of the file after it."""


def read_blocks(file: io.FileIO, stop: Callable[[], bool], *, start: int = 0) -> Iterator[Block]:
    """Blocks of an unbuffered file that stands at byte `start`, until its end or until `stop`.

    Raises `ArgumentError` for bytes that are not UTF-8, with their place; the blocks before them
    have been given out.
    """
    held, end = b"", False
    while not end:
        if stop():
            return
        if not select.select([file], [], [], _PATIENCE_S)[0]:
            continue
        new = file.read(BLOCK_BYTES)
        held, end = held + new, not new
        cut = len(held) if end else _cut(held)
        if cut:
            text = _decode(held[:cut], start)
            start, held = start + cut, held[cut:]
            yield Block(text, start)


def _cut(held: bytes) -> int:
    """Where a block may end: after a line break, or at a character's end if there is none."""
    cut = held.rfind(b"\n") + 1
    if cut or len(held) < BLOCK_BYTES:
        return cut
    for back in (1, 2, 3):
        lead = held[-back]
        if lead >= 0xC0:  # the first byte of a character of 2, 3 or 4
            whole = back >= 2 + (lead >= 0xE0) + (lead >= 0xF0)
            return len(held) if whole else len(held) - back
    return len(held)


def _decode(data: bytes, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at offset {start + error.start}"
        raise ArgumentError("text", got, f"UTF-8 ({error.reason})") from error
