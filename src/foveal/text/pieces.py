"""A sentencepiece `tokenizer.model` (Kudo and Richardson 2018), for checkpoints that ship no
`tokenizer.json`: Llama 2, Mistral, Gemma and their like.

The sentencepiece library knows nothing of tokens that stand in running text, such as the `<s>` and
`[INST]` of a chat template, so text is cut at them first. The space that sentencepiece puts before
a text is put before its first part only.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from foveal.core.errors import LoadError
from foveal.text.declared import Declared

_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a serialised model it sets `normalizer_spec.add_dummy_prefix` (field 3 of field 3) to
false: protocol buffers merge repeated messages, and the last value counts."""


class PieceTokenizer:
    """A sentencepiece model. Implements `Tokenizer`."""

    def __init__(self, path: Path, declared: Declared | None = None) -> None:
        try:
            first = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise LoadError(
                f"{path}: not a sentencepiece model ({error}). If it is in tiktoken's format, "
                "use the tokenizer.json of the same checkpoint"
            ) from error
        declared = declared or Declared()
        self._first = first
        self._later = SentencePieceProcessor(
            model_proto=first.serialized_model_proto() + _NO_DUMMY_PREFIX
        )
        self._size: int = first.vocab_size()
        self.special_tokens = self._named(declared)
        self._inline = self._find_inline(declared)
        self._text_of = {i: text for text, i in self._inline.items()}
        longest_first = sorted(self._inline, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.special_ids = frozenset(
            i for text, i in self._inline.items() if text not in declared.ordinary
        )
        self.byte_ids = frozenset(i for i in range(self._size) if first.is_byte(i))
        self.bos_id = self._id("bos_token", declared.bos_id)
        eos_id = self._id("eos_token", None)
        self.eos_ids = declared.eos_ids or (() if eos_id is None else (eos_id,))
        self._before = [] if self.bos_id is None or declared.add_bos is False else [self.bos_id]
        self._after = [eos_id] if declared.add_eos and eos_id is not None else []

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return max(self._size, 1 + max(self._text_of, default=-1))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; see `Tokenizer.encode`. A begin token is added unless the checkpoint
        says not to."""
        ids: list[int] = []
        for at, part in enumerate(self._cut.split(text)):
            if at % 2:
                ids.append(self._inline[part])
            elif part:
                ids += (self._later if at else self._first).encode(part)
        return [*self._before, *ids, *self._after] if special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; see `Tokenizer.decode`."""
        known = [i for i in ids if i in self._text_of or 0 <= i < self._size]
        if skip_special:
            known = [i for i in known if i not in self.special_ids]
        parts: list[str] = []
        for inline, run in groupby(known, key=self._text_of.__contains__):
            if inline:
                parts += [self._text_of[i] for i in run]
            else:
                parts.append((self._later if parts else self._first).decode(list(run)))
        return "".join(parts)

    def _named(self, declared: Declared) -> dict[str, str]:
        """The named tokens; those of the model itself where no file names them."""
        own = {"bos_token": self._first.bos_id(), "eos_token": self._first.eos_id()}
        own["unk_token"] = self._first.unk_id()
        named = {name: self._first.id_to_piece(i) for name, i in own.items() if i >= 0}
        return named | dict(declared.named)

    def _find_inline(self, declared: Declared) -> dict[str, int]:
        """Tokens that stand in running text: the model's control pieces, named and added ones."""
        sp = self._first
        controls = (i for i in range(self._size) if sp.is_control(i) or sp.is_unknown(i))
        named = {text: sp.piece_to_id(text) for text in self.special_tokens.values()}
        real = {text: i for text, i in named.items() if sp.id_to_piece(i) == text}
        return {sp.id_to_piece(i): i for i in controls} | real | dict(declared.added)

    def _id(self, name: str, default: int | None) -> int | None:
        return self._inline.get(self.special_tokens.get(name, ""), default)
