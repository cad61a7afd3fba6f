"""What quality is measured on: text that the bundled model has never seen, or any file.

By default the standard library's files that its recipe holds out (`training/corpus.py`; drawn by
name, so they are the same ones on every machine), each opened and closed as in training. Passages
are spread evenly over the text, and each is opened by the begin token, as every row in training.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foveal.core.errors import ArgumentError
from foveal.text.tokenizer import Tokenizer
from foveal.training.config import Recipe
from foveal.training.corpus import standard_library

RECIPE = Path(__file__).parents[1] / "data" / "recipes" / "bundled.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A text as token ids."""

    name: str
    ids: tuple[int, ...]
    begin: tuple[int, ...]
    """What opens a passage: the begin token, where the tokenizer has one."""

    @property
    def digest(self) -> str:
        """SHA-256 of the ids."""
        return hashlib.sha256(np.asarray(self.ids, dtype=np.int64).tobytes()).hexdigest()

    def passages(self, length: int, num_tokens: int) -> list[list[int]]:
        """Passages of `length` tokens, of about `num_tokens` in all, each in the middle of its part
        of the text; fewer where the text is shorter, none overlapping. Raises `ArgumentError` for
        a text shorter than one."""
        inner = length - len(self.begin)
        count = min(max(1, round(num_tokens / length)), len(self.ids) // inner)
        if count < 1:
            accepted = f"at least the {length} tokens of one passage"
            raise ArgumentError("text", f"{len(self.ids)} tokens", accepted)
        starts = [((2 * n + 1) * len(self.ids) // count - inner) // 2 for n in range(count)]
        return [[*self.begin, *self.ids[start : start + inner]] for start in starts]


def source_of(tokenizer: Tokenizer, file: Path | None) -> Source:
    """The text of `file`, or the held-out files. Raises `ArgumentError`."""
    if file is not None:
        return _source(tokenizer, file.name, tokenizer.encode(_read(file), special=False))
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids: list[int] = []
    for document in standard_library(Recipe.read(RECIPE).data.exclude):
        if document.held_out and (text := document.read()):
            inner = tokenizer.encode(text, special=False)
            ids += [*begin, *inner, *tokenizer.eos_ids[:1]]
    return _source(tokenizer, "held-out source", ids)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("file", str(file), f"a text file in UTF-8 ({error})") from error


def _source(tokenizer: Tokenizer, name: str, ids: Sequence[int]) -> Source:
    begin = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    return Source(name=name, ids=tuple(ids), begin=begin)
