"""Text to rows of tokens: two streams on disk, train and held out, and the order of reading.

A stream is one array of token ids: each document opened by the begin token and closed by the end
token, one after the other, in a file that is memory-mapped, so that its size does not matter. A row
is `context` consecutive tokens of it, to be predicted from a begin token and the row's own tokens
before each one: position 0 always holds the begin token, in training as in generation.

An epoch is the stream cut into rows from a random offset, in a random order, both drawn from (seed,
epoch); within it no token is seen twice. So the place in the data is one integer, the number of
rows taken, and resuming is exact by construction.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from foveal.core.errors import ConfigError, LoadError
from foveal.core.files import atomic_path, write_text
from foveal.text.tokenizer import Tokenizer
from foveal.training.corpus import HELDOUT_SHARE, Document
from foveal.training.loss import IGNORE

Tokens = npt.NDArray[Any]
DType = np.dtype[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamFacts:
    """What is in a stream."""

    documents: int
    text_bytes: int
    """Bytes of UTF-8 text."""
    tokens: int
    """Token ids, those that open and close documents included."""
    sha256: str
    """Of the ids as written."""


@dataclass(frozen=True, slots=True)
class Streams:
    """The two streams of a folder made by `write_streams`, memory-mapped."""

    train: Tokens
    heldout: Tokens
    train_facts: StreamFacts
    heldout_facts: StreamFacts
    begin_id: int


def write_streams(found: Sequence[Document], tokenizer: Tokenizer, folder: Path) -> None:
    """Write `train.bin`, `heldout.bin` and, last, `data.json`, which says that both are whole.

    Held out are the documents that `Document.held_out` draws; where there are too few documents for
    that, the last twentieth of each. Raises `ConfigError` for text too short to hold any out.
    """
    if tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise ConfigError("tokenizer: needs tokens that begin and end a text (bos and eos)")
    ends = (tokenizer.bos_id, tokenizer.eos_ids[0])
    dtype: DType = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    facts: dict[str, Any] = {"dtype": dtype.name, "begin_id": ends[0]}
    for name, held_out in (("train", False), ("heldout", True)):
        texts = _texts(found, held_out=held_out)
        written = _write(folder / f"{name}.bin", texts, tokenizer, ends, dtype)
        if not written.text_bytes:
            raise ConfigError(f"data: {len(found)} documents hold no text for the {name} stream")
        facts[name] = asdict(written)
    write_text(folder / "data.json", json.dumps(facts, indent=2) + "\n")


def read_streams(folder: Path) -> Streams:
    """Map the streams of `folder`. Raises `LoadError` if they are not what `data.json` says."""
    if not (folder / "data.json").is_file():
        raise LoadError(f"{folder}: holds no data.json, so its token streams are not whole")
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    dtype = np.dtype(facts["dtype"])
    streams = []
    for name in ("train", "heldout"):
        path, tokens = folder / f"{name}.bin", facts[name]["tokens"]
        if not path.is_file() or path.stat().st_size != tokens * dtype.itemsize:
            raise LoadError(
                f"{path}: not the {tokens} tokens that data.json counts; remove {folder}"
            )
        streams.append(np.memmap(path, dtype=dtype, mode="r"))
    train, heldout = (StreamFacts(**facts[name]) for name in ("train", "heldout"))
    return Streams(streams[0], streams[1], train, heldout, facts["begin_id"])


def _texts(found: Sequence[Document], *, held_out: bool) -> Iterator[str]:
    """The texts of one of the two streams, read one by one."""
    whole = len(found) >= HELDOUT_SHARE and any(document.held_out for document in found)
    for document in found:
        if whole and document.held_out != held_out:
            continue
        text = document.read()
        if not text:
            continue
        cut = len(text) - len(text) // HELDOUT_SHARE
        yield text if whole else text[cut:] if held_out else text[:cut]


def _write(
    path: Path, texts: Iterator[str], tokenizer: Tokenizer, ends: tuple[int, int], dtype: DType
) -> StreamFacts:
    num_documents = num_bytes = num_tokens = 0
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for text in texts:
            inner = tokenizer.encode(text, special=False)
            ids = np.array([ends[0], *inner, ends[1]], dtype=dtype)
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            num_documents += 1
            num_bytes += len(text.encode())
            num_tokens += len(ids)
    return StreamFacts(
        documents=num_documents,
        text_bytes=num_bytes,
        tokens=num_tokens,
        sha256=digest.hexdigest(),
    )


class TrainingRows:
    """The endless, seeded sequence of rows of a stream; row n is the same whoever asks when."""

    def __init__(self, tokens: Tokens, *, context: int, begin_id: int, seed: int) -> None:
        self._tokens, self._context, self._begin, self._seed = tokens, context, begin_id, seed
        self.rows_per_epoch = (len(tokens) - context + 1) // context
        self._epoch: tuple[int, int, npt.NDArray[np.int64]] | None = None
        if self.rows_per_epoch < 1:
            raise ConfigError(
                f"data: {len(tokens)} tokens; accepted: at least {2 * context - 1} for a context "
                f"of {context}"
            )

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows first .. first + count - 1: inputs and targets, int64 [count, context]."""
        starts = [self._start(n) for n in range(first, first + count)]
        targets = np.stack([self._tokens[s : s + self._context] for s in starts])
        return _with_inputs(torch.from_numpy(targets.astype(np.int64)), self._begin)

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self.rows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self._seed, epoch])
            offset = int(random.integers(self._context))
            self._epoch = (epoch, offset, random.permutation(self.rows_per_epoch))
        _, offset, order = self._epoch
        return offset + int(order[place]) * self._context


class HeldoutRows:
    """The held-out stream cut into rows from its start; the last row is padded with `IGNORE`."""

    def __init__(self, tokens: Tokens, *, context: int, begin_id: int) -> None:
        self._tokens, self._context, self._begin = tokens, context, begin_id
        self.num_rows = -(-len(tokens) // context)

    def batches(self, num_rows: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`num_rows` rows spread evenly over the stream (all of them, if there are fewer), in
        batches of at most `size`: inputs and targets, int64 [size, context]."""
        chosen = np.linspace(0, self.num_rows, min(num_rows, self.num_rows), endpoint=False)
        for part in np.split(chosen.astype(np.int64), range(size, len(chosen), size)):
            targets = torch.full((len(part), self._context), IGNORE)
            for i, row in enumerate(part):
                ids = self._tokens[row * self._context : (row + 1) * self._context]
                targets[i, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            yield _with_inputs(targets, self._begin)


def _with_inputs(targets: torch.Tensor, begin_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What predicts `targets` [B, T]: the begin token, then all of them but the last."""
    begin = targets.new_full((len(targets), 1), begin_id)
    inputs = torch.cat((begin, targets[:, :-1]), dim=1)
    return inputs.masked_fill(inputs == IGNORE, begin_id), targets
