"""Text from a stream of token ids, piece by piece, never half a character.

Decoding one id at a time is wrong: a character may need several tokens, and many decoders treat
the first token of a text differently (they drop its leading space). So each new id is decoded
together with the few before it, from the last id at which text was given out, and what the longer
decoding adds is the new piece. Text is held back while it may still change: while the last
character is U+FFFD, which an unfinished UTF-8 sequence decodes to, and while the last id is one of
a run of byte tokens, which the decoders judge as a whole.

The pieces together equal `tokenizer.decode` of all ids, for any ids.
"""

from collections.abc import Iterable, Iterator

from foveal.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"


class TextStream:
    """Turns ids into text as they come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._ids: list[int] = []
        """The ids since the one before the last piece; all that decoding still depends on."""
        self._settled = 0
        """How many of them had all their text given out when the last piece was made."""
        self._given = 0
        """Characters of their text that have been given out."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished.

        A skipped token changes nothing: the bytes on both sides of it make one run.
        """
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED):
            return self._give(text[:-1])
        piece = self._give(text)
        if piece:
            self._ids = self._ids[self._settled :]
            self._settled = len(self._ids)
            self._given = len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The pieces of text of `ids`, empty ones left out."""
    stream = TextStream(tokenizer)
    for token_id in ids:
        if piece := stream.push(token_id):
            yield piece
    if piece := stream.finish():
        yield piece
