"""`FrozenFile`: pages on disk, each of which is whole and right, or not there.

    header    4096 bytes: one line of JSON (version, layout of a page, digest of the salt), zeros
    record    row, part, serial number, CRC-32 of each layer, CRC-32 of these; then the page's bytes

Records have one size, so page i is at a known place. A record is written payload first, then its
header, and the header is taken away before the place is used again; so a process that is killed
leaves a record valid or absent. Nothing is flushed to disk by force: what a machine loses with its
power fails its checksum and is absent, too.

The file is written through calls, never through its map, because a full disk is then an error and
not a signal; it is read through the map, a layer at a time, and checked each time against the
checksum that was computed when the page was written. A CRC finds damage, not forgery.
"""

import fcntl
import hashlib
import json
import mmap
import os
import struct
import tempfile
import warnings
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from foveal.core.errors import ArgumentError, LoadError, OutOfPages
from foveal.kv.layout import Key, PageLayout

_VERSION = 1
_HEADER_BYTES = 4096
_ALIGNMENT = 64
_FACTS = struct.Struct("<4sqqQ")
"""Of a record: mark, row, part, serial number."""
_MARK = b"page"


@dataclass(frozen=True, slots=True)
class Record:
    """A page that is there."""

    key: Key
    serial: int
    """Grows with every page that is retired."""
    checksums: tuple[int, ...]
    """Of each layer."""


class FrozenFile:
    """Records by slot, for one process at a time. Safe to use from several threads as long as no
    slot is written while it is read."""

    def __init__(self, path: Path | None, layout: PageLayout, salt: bytes) -> None:
        """Open or make the file; None for one without a name, gone with the process.

        `salt` says what pages depend on beside the layout. What valid records the file has are
        taken up, which reads all of it. Raises `LoadError` for another model's file, another
        version's, no such file at all, or one in use; `ArgumentError` where none can be made.
        """
        self.path = path
        self._layout = layout
        self._words = json.dumps(
            {
                "foveal-frozen": _VERSION,
                "layout": layout.words,
                "salt": hashlib.sha256(salt).hexdigest(),
            }
        )
        self._facts_bytes = _FACTS.size + 4 * layout.num_layers
        self._payload_start = _payload_start(layout)
        self.record_bytes = record_bytes(layout)
        self.records: dict[int, Record] = {}
        """What is there, by slot."""
        try:
            self._file = _open(path)
        except OSError as error:
            raise ArgumentError("path", path, f"a file that can be written ({error})") from error
        self.close = weakref.finalize(self, _close, self._file)
        self._map: mmap.mmap | None = None
        self._take_up()

    @property
    def device(self) -> torch.device:
        """Of what `load` writes."""
        return torch.device("cpu")

    @property
    def name(self) -> str:
        """Of the file, for messages."""
        return "the unnamed frozen file" if self.path is None else str(self.path)

    @property
    def disk_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._file).st_size

    def put(self, slot: int, page: torch.Tensor, record: Record) -> None:
        """Write a page, uint8 [L, R]; the record's checksums are computed here. Raises
        `OutOfPages` where the disk takes no more, and the slot is empty then."""
        payload = [layer.numpy().data for layer in page.cpu()]
        record = Record(record.key, record.serial, tuple(zlib.crc32(layer) for layer in payload))
        start = self._start(slot)
        try:
            self._check()
            _write(self._file, start + self._payload_start, payload)
            _write(self._file, start, [self._facts(record)])
        except (OSError, LoadError) as error:
            raise OutOfPages(
                f"{self.name}: cannot take another page of {self.record_bytes:,} bytes "
                f"({self.disk_bytes:,} are there): {error}"
            ) from error
        self.records[slot] = record

    def load(self, layer: int, slots: list[int], out: torch.Tensor) -> None:
        """Copy one layer of these records to `out`, uint8 [n, R] on the CPU. Raises `LoadError`
        for what is not as it was written."""
        size = self._layout.layer_bytes
        whole = self._mapped(max(slots) + 1)
        for slot, target in zip(slots, out.numpy(), strict=True):
            start = self._start(slot) + self._payload_start + layer * size
            np.copyto(target, whole[start : start + size])
            self._verify(slot, layer, target)

    def page(self, slot: int) -> torch.Tensor:
        """A copy of a whole record, uint8 [L, R]. Raises as `load`."""
        out = torch.empty(self._layout.num_layers, 1, self._layout.layer_bytes, dtype=torch.uint8)
        for layer, target in enumerate(out):
            self.load(layer, [slot], target)
        return out.squeeze(1)

    def shown(self, slot: int) -> torch.Tensor:
        """A whole record as it lies in the file, uint8 [L, R], mapped and not to be written. Raises
        as `load`."""
        start = self._start(slot) + self._payload_start
        payload = self._mapped(slot + 1)[start : start + self._layout.page_bytes]
        layers = payload.reshape(self._layout.num_layers, -1)
        for layer, stored in enumerate(layers):
            self._verify(slot, layer, stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch has no tensors that cannot be written
            return torch.from_numpy(layers)

    def erase(self, slot: int) -> None:
        """Forget a record."""
        del self.records[slot]
        os.pwrite(self._file, bytes(len(_MARK)), self._start(slot))

    def _take_up(self) -> None:
        """Find the valid records of a file that is there, or begin a new one."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise LoadError(f"{self.name}: is in use ({error})") from error
        header = self._words.encode().ljust(_HEADER_BYTES, b"\0")
        there = os.pread(self._file, _HEADER_BYTES, 0)
        if not there:
            _write(self._file, 0, [header])
        elif there != header:
            self.close()
            raise LoadError(self._refusal(there))
        num_records = (self.disk_bytes - _HEADER_BYTES) // self.record_bytes
        for slot in range(num_records):
            record = self._read_facts(slot)
            if record is None:
                continue
            self.records[slot] = record
            try:
                self.page(slot)
            except LoadError:
                self.erase(slot)

    def _refusal(self, there: bytes) -> str:
        expected = json.loads(self._words)
        try:
            facts = json.loads(there.rstrip(b"\0"))
            version = facts["foveal-frozen"]
        except (ValueError, KeyError, TypeError):
            return f"{self.name}: is not a file of frozen pages; accepted: one, or none yet"
        if version != _VERSION:
            return f"{self.name}: is of version {version}; this foveal reads {_VERSION}"
        for what, key in (("holds pages laid out as", "layout"), ("is of another model:", "salt")):
            if facts.get(key) != expected[key]:
                return f"{self.name}: {what} {facts.get(key)}; accepted: {expected[key]}"
        return f"{self.name}: its header is damaged"

    def _verify(self, slot: int, layer: int, stored: npt.NDArray[np.uint8]) -> None:
        record = self.records.get(slot)
        if record is None:
            raise LoadError(f"{self.name}: record {slot} has been erased")
        if zlib.crc32(stored.data) != record.checksums[layer]:
            raise LoadError(
                f"{self.name}: layer {layer} of part {record.key[1]} of sequence "
                f"{record.key[0]} is damaged: it is not what was written"
            )

    def _facts(self, record: Record) -> bytes:
        facts = _FACTS.pack(_MARK, *record.key, record.serial)
        facts += np.array(record.checksums, dtype="<u4").tobytes()
        facts += np.array(zlib.crc32(facts), dtype="<u4").tobytes()
        return facts

    def _read_facts(self, slot: int) -> Record | None:
        facts = os.pread(self._file, self._facts_bytes + 4, self._start(slot))
        body, end = facts[: self._facts_bytes], facts[self._facts_bytes :]
        if body[: len(_MARK)] != _MARK or np.frombuffer(end, "<u4")[0] != zlib.crc32(body):
            return None
        _, row, part, serial = _FACTS.unpack_from(body)
        checksums = np.frombuffer(body[_FACTS.size :], "<u4").tolist()
        return Record((row, part), serial, tuple(checksums))

    def _start(self, slot: int) -> int:
        return _HEADER_BYTES + slot * self.record_bytes

    def _check(self) -> None:
        """Raise `LoadError` if the file is not at its place any more."""
        if self.path is None:
            return
        try:
            there = self.path.stat()
        except OSError as error:
            raise LoadError(f"{self.name}: is gone ({error})") from error
        if not os.path.samestat(there, os.fstat(self._file)):
            raise LoadError(f"{self.name}: has been replaced by another file")

    def _mapped(self, num_records: int) -> npt.NDArray[np.uint8]:
        """The file's bytes, of these records at least; a map beyond the end would be a signal."""
        self._check()
        there, needed = self.disk_bytes, self._start(num_records)
        if there < needed:
            raise LoadError(f"{self.name}: is cut short: {there:,} bytes of {needed:,}")
        if self._map is None or len(self._map) < needed:
            self._map = mmap.mmap(self._file, there, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, dtype=np.uint8)


def record_bytes(layout: PageLayout) -> int:
    """Bytes that a page takes in a file."""
    return _payload_start(layout) + layout.page_bytes


def _payload_start(layout: PageLayout) -> int:
    facts = _FACTS.size + 4 * layout.num_layers + 4
    return -(-facts // _ALIGNMENT) * _ALIGNMENT


def _open(path: Path | None) -> int:
    if path is None:
        file, name = tempfile.mkstemp(prefix="foveal-frozen-")
        Path(name).unlink()
        return file
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _close(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # a map has the file open, too, and may live on
    os.close(file)


def _write(file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
    """All of it, or an `OSError`."""
    for part in parts:
        rest = memoryview(part)
        while rest:
            written = os.pwrite(file, rest, offset)
            offset, rest = offset + written, rest[written:]
