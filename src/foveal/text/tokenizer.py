"""Text to token ids and back, as the checkpoint's own files say.

`load_tokenizer` reads `tokenizer.json` (Hugging Face `tokenizers`) or, where there is none, a
sentencepiece `tokenizer.model`. Both answer to `Tokenizer`. Which ids begin and end a text comes
from `declared.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import AddedToken

from foveal.core.errors import LoadError
from foveal.text.declared import Declared, read_declared
from foveal.text.pieces import PieceTokenizer


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (a model's own may be padded beyond it)."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the checkpoint has one."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the named special tokens (`bos_token`, ...), as chat templates use them."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out unless told otherwise."""

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for single bytes and are decoded in runs (byte fallback)."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; with `special` the checkpoint's begin and end tokens around them."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; unknown ids become nothing."""


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint in `directory`. Raises `LoadError` if none can be read."""
    root = Path(directory)
    declared = read_declared(root)
    if (root / "tokenizer.json").is_file():
        return JsonTokenizer(root / "tokenizer.json", declared)
    if (root / "tokenizer.model").is_file():
        return PieceTokenizer(root / "tokenizer.model", declared)
    raise LoadError(
        f"{root}: no tokenizer.json and no tokenizer.model. Copy them from where the checkpoint "
        "came from, or write tokenizer.json with transformers: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(directory)"
    )


class JsonTokenizer:
    """A `tokenizer.json`. Implements `Tokenizer`.

    The file itself says which tokens go around a text; `add_bos_token` in the configuration is
    for tokenizers without such a file, as in the `transformers` library.
    """

    def __init__(self, path: Path, declared: Declared | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise LoadError(f"{path}: not a tokenizer.json: {error}") from error
        declared = declared or Declared()
        self.special_tokens = dict(declared.named)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()  # some files cut at 512 tokens, in silence
        self._mark_special(list(declared.named.values()))
        self.bos_id = self._id("bos_token", declared.bos_id)
        eos_id = self._id("eos_token", None)
        self.eos_ids = declared.eos_ids or (() if eos_id is None else (eos_id,))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_ids = self._find_byte_ids()

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; see `Tokenizer.encode`."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; see `Tokenizer.decode`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def _id(self, name: str, default: int | None) -> int | None:
        text = self.special_tokens.get(name)
        return default if text is None else self._tokenizer.token_to_id(text)

    def _mark_special(self, texts: list[str]) -> None:
        """Tokens named in the configuration are special even where tokenizer.json forgot it."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        missing = [AddedToken(t, special=True, normalized=False) for t in texts if t not in known]
        self._tokenizer.add_special_tokens(missing)

    def _find_byte_ids(self) -> frozenset[int]:
        decoder = self._tokenizer.decoder
        if decoder is None or decoder.decode(["<0x41>"]) != "A":
            return frozenset()
        ids = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in ids if i is not None)
