"""The file of frozen pages: whole and right, or reported; through damage, a full disk, kill -9."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foveal.core.errors import ArgumentError, LoadError, OutOfPages
from foveal.kv.cache import CacheShape
from foveal.kv.frozen import FrozenFile, Record, record_bytes
from foveal.kv.layout import PageLayout
from foveal.kv.tiers import TierConfig, Tiers

SHAPE = CacheShape(num_layers=3, batch=1, num_kv_heads=2, head_dim=8, value_dim=8)
LAYOUT = PageLayout(SHAPE, 4, key_format="int8", value_format="int8")


def page(seed: int) -> torch.Tensor:
    """A page of random bytes."""
    size = (LAYOUT.num_layers, LAYOUT.layer_bytes)
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, size, generator=rng, dtype=torch.uint8)


def written(path: Path, num_pages: int = 5) -> FrozenFile:
    """A file in which slot i holds page i under key (0, 10 + i)."""
    file = FrozenFile(path, LAYOUT, b"model")
    for i in range(num_pages):
        file.put(i, page(i), Record((0, 10 + i), i, ()))
    return file


def reopened(path: Path, salt: bytes = b"model") -> FrozenFile:
    return FrozenFile(path, LAYOUT, salt)


def alter(path: Path, offset: int, value: bytes | None = None) -> None:
    """Write `value` at a place of a file, or flip a bit there."""
    with path.open("r+b") as file:
        file.seek(offset)
        new = value or bytes([file.read(1)[0] ^ 4])
        file.seek(offset)
        file.write(new)


def start_of(slot: int) -> int:
    return 4096 + slot * record_bytes(LAYOUT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "frozen"


def test_what_is_written_is_read_layer_by_layer(path: Path) -> None:
    file = written(path)
    assert file.disk_bytes == start_of(5)
    out = torch.empty(3, LAYOUT.layer_bytes, dtype=torch.uint8)
    for layer in range(3):
        file.load(layer, [4, 0, 2], out)
        assert torch.equal(out, torch.stack([page(i)[layer] for i in (4, 0, 2)]))
    file.erase(2)
    with pytest.raises(LoadError, match="record 2 has been erased"):
        file.page(2)
    file.put(2, page(9), Record((0, 3), 9, ()))
    assert torch.equal(file.page(2), page(9))
    one, two = file.shown(2), file.shown(2)
    assert torch.equal(one, page(9)) and one.data_ptr() == two.data_ptr(), "mapped, not copied"


def test_a_file_is_taken_up_again(path: Path) -> None:
    file = written(path)
    file.erase(1)
    file.close()
    file = reopened(path)
    assert {slot: record.key for slot, record in file.records.items()} == {
        slot: (0, 10 + slot) for slot in (0, 2, 3, 4)
    }
    assert all(torch.equal(file.page(slot), page(slot)) for slot in file.records)


def test_what_is_torn_or_damaged_is_not_taken_up(path: Path) -> None:
    written(path).close()
    alter(path, start_of(1) + 5)  # the record's header
    alter(path, start_of(3) - 1)  # the last byte of record 2
    os.truncate(path, start_of(5) - 7)
    file = reopened(path)
    assert sorted(file.records) == [0, 3]
    file.put(4, page(40), Record((0, 14), 5, ()))
    assert torch.equal(file.page(4), page(40))
    file.close()
    assert sorted(reopened(path).records) == [0, 3, 4]


def test_damage_while_in_use_is_reported_and_never_served(path: Path) -> None:
    file = written(path)
    assert torch.equal(file.page(3), page(3))
    alter(path, start_of(4) - 1)
    with pytest.raises(LoadError, match=rf"{path}: layer 2 of part 13 of sequence 0 is damaged"):
        file.page(3)
    with pytest.raises(LoadError, match="layer 2 of part 13"):
        file.shown(3)
    out = torch.empty(1, LAYOUT.layer_bytes, dtype=torch.uint8)
    file.load(1, [3], out)  # its other layers are as they were
    assert torch.equal(out[0], page(3)[1])


def test_a_file_cut_short_while_in_use_is_reported(path: Path) -> None:
    file = written(path)
    assert torch.equal(file.page(4), page(4))
    os.truncate(path, start_of(4) + 100)
    with pytest.raises(LoadError, match=rf"{path}: is cut short: .* bytes of"):
        file.page(4)
    assert torch.equal(file.page(3), page(3))


def test_a_deleted_or_replaced_file_is_reported(path: Path) -> None:
    file = written(path)
    path.unlink()
    with pytest.raises(LoadError, match=rf"{path}: is gone"):
        file.page(0)
    with pytest.raises(OutOfPages, match=r"cannot take another page .*: is gone"):
        file.put(5, page(5), Record((0, 15), 5, ()))
    path.write_bytes(b"another")
    with pytest.raises(LoadError, match=rf"{path}: has been replaced by another file"):
        file.page(0)


def test_a_file_of_another_model_layout_or_version_is_refused(path: Path) -> None:
    written(path).close()
    before = path.read_bytes()
    with pytest.raises(LoadError, match=rf"{path}: is of another model: \w+; accepted: \w+"):
        reopened(path, b"another")
    other = PageLayout(SHAPE, 4, key_format="int4", value_format="int8")
    with pytest.raises(LoadError, match=r"laid out as 3 layers.*int8 int8.*accepted: .*int4 int8"):
        FrozenFile(path, other, b"model")
    assert path.read_bytes() == before
    alter(path, len('{"foveal-frozen": '), b"2")
    with pytest.raises(LoadError, match=rf"{path}: is of version 2; this foveal reads 1"):
        reopened(path)
    path.write_bytes(b"[1, 2]".ljust(9000))
    with pytest.raises(LoadError, match=rf"{path}: is not a file of frozen pages"):
        reopened(path)
    assert path.read_bytes() == b"[1, 2]".ljust(9000)


def test_a_file_in_use_or_out_of_reach_is_refused(path: Path) -> None:
    file = written(path)
    with pytest.raises(LoadError, match=rf"{path}: is in use"):
        reopened(path)
    del file
    assert len(reopened(path).records) == 5
    with pytest.raises(ArgumentError, match=r"path: got .*; accepted: a file that can be written"):
        reopened(path.parent)


def tiers(path: Path, frozen_pages: int = 40) -> Tiers:
    configs = [
        TierConfig(name="cold", tokens=12),
        TierConfig(name="frozen", tokens=4 * frozen_pages, path=path),
    ]
    return Tiers(SHAPE, 4, configs, salt=b"model")


def test_tiers_take_up_what_their_file_holds(path: Path) -> None:
    layout = tiers(path).layout
    file = FrozenFile(path, layout, b"model")
    for slot, (part, serial) in enumerate([(0, 3), (7, 1), (0, 5)]):
        content = torch.full((3, layout.layer_bytes), slot, dtype=torch.uint8)
        file.put(slot + 1, content, Record((0, part), serial, ()))
    file.close()
    found = tiers(path)
    assert sorted(found.keys) == [(0, 0), (0, 7)]
    assert found.state()["tiers.0"].unique().tolist() == [1], "part 7"
    assert found.state()["tiers.1"].unique().tolist() == [2], "the newer of part 0"
    found.close()
    with pytest.raises(ArgumentError, match="frozen size: got 3 pages; accepted: the 4 pages that"):
        tiers(path, 3)


PRELUDE = """
import resource, sys
import torch
from pathlib import Path
from foveal.core.errors import OutOfPages
from foveal.kv.arena import Arena
from foveal.kv.cache import CacheShape
from foveal.kv.store import PageStore
from foveal.kv.tiers import TierConfig, Tiers

shape = CacheShape(num_layers=3, batch=1, num_kv_heads=2, head_dim=8, value_dim=8)
store = PageStore(shape, 8, 4)
for layer in range(3):
    store.write_pages(layer, torch.arange(8), *(
        torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 4, 8) + layer for _ in "kv"))
configs = [TierConfig(name="cold", tokens=12),
           TierConfig(name="frozen", tokens=160, path=Path(sys.argv[1]))]
tiers = Tiers(shape, 4, configs, salt=b"model")

def check(keys):
    arena = Arena()
    for layer in range(3):
        with arena.frame():
            k, v = tiers.read(layer, keys, torch.float32, arena)
            for i, (row, part) in enumerate(keys):
                assert (k[:, i] == part % 8 + layer).all() and (v[:, i] == part % 8 + layer).all()
"""


def child(code: str, path: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PRELUDE + code, str(path)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_loses_nothing_and_can_be_gone_on_with(path: Path) -> None:
    code = """
limit = 4096 + 6 * (tiers.page_bytes + 64) + 100
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for part in range(40):
    try:
        tiers.retire([(0, part)], store, [part % 8])
    except OutOfPages as error:
        print(part, error)
        break
assert tiers.keys == [(0, i) for i in range(part)]
check(tiers.keys)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
tiers.retire([(0, part)], store, [part % 8])
check(tiers.keys)
tiers.close()

resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
path = Path(sys.argv[1]).with_name("forgetful")
configs = [configs[0], TierConfig(name="frozen", tokens=160, path=path)]
tiers = Tiers(shape, 4, configs, forget=True)
forgotten = sum((tiers.retire([(0, part)], store, [part % 8]) for part in range(40)), [])
assert forgotten == [(0, i) for i in range(32)] and tiers.keys == [(0, i) for i in range(32, 40)]
check(tiers.keys)
"""
    process = child(code, path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    number, message = out.split(maxsplit=1)
    assert int(number) == 6 + 2, "six frozen, two cold"
    size = record_bytes(tiers(path.with_name("other")).layout)
    assert f"{path}: cannot take another page of {size:,} bytes" in message
    assert "File too large" in message


def test_killed_in_the_middle_of_moves_every_record_is_whole_or_absent(path: Path) -> None:
    code = """
print("begun", flush=True)
part = 0
while True:
    tiers.retire([(0, part)], store, [part % 8])
    if len(tiers.keys) > 30:
        tiers.drop(tiers.keys[:7])
    tiers.promote(tiers.keys[:2])
    part += 1
"""
    for delay in (0.06, 0.17):
        process = child(code, path)
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        found = tiers(path)
        state = found.state()
        keys = state["tiers.keys"].tolist()
        assert keys and len({part for _, part, _ in keys}) == len(keys)
        for i, (_, part, _) in enumerate(keys):
            floats = state[f"tiers.{i}"].view(torch.float32)
            expected = torch.arange(3.0).add(part % 8).unsqueeze(1).expand_as(floats)
            assert torch.equal(floats, expected)
        found.reset()
        found.close()
