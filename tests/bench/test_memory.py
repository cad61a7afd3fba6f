"""Peak memory is measured: a temporary of known size is seen, and what malloc kept is no excuse."""

import pytest
import torch

from foveal.bench import memory

MIB = 2**20


def temporary(mebibytes: int) -> float:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)[0].item()


@pytest.fixture
def resident() -> None:
    if not memory.resident_works():
        pytest.skip("this system does not report the resident high-water mark")


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("mebibytes", [8, 24, 64])
def test_known_temporary_is_seen_within_five_percent(mebibytes: int) -> None:
    temporary(mebibytes)
    peak = memory.peak_memory(lambda: temporary(mebibytes))
    assert peak.num_bytes == pytest.approx(mebibytes * MIB, rel=0.05)


@pytest.mark.usefixtures("resident")
def test_memory_that_malloc_kept_is_counted_again() -> None:
    """Many small blocks leave malloc with free memory, which the next call would reuse unseen."""
    blocks = [torch.ones(100_000, dtype=torch.uint8) for _ in range(400)]
    del blocks[::2], blocks
    peak = memory.peak_memory(lambda: [torch.ones(100_000, dtype=torch.uint8) for _ in range(200)])
    assert peak.num_bytes == pytest.approx(20_000_000, rel=0.05)


def test_small_peaks_are_seen_although_malloc_has_room() -> None:
    """Freed blocks between living ones stay with malloc, and a small call finds room in them."""
    blocks = [torch.ones(2000, dtype=torch.uint8) for _ in range(4000)]
    del blocks[::2]
    peak = memory.peak_memory(lambda: [torch.ones(1500, dtype=torch.uint8) for _ in range(100)])
    assert peak.num_bytes >= 150_000
    assert len(blocks) == 2000


@pytest.mark.usefixtures("resident")
def test_resident_sees_scratch_inside_an_operator() -> None:
    """Sorting needs buffers that no tensor shows; only the resident method sees them."""
    values = torch.rand(MIB)
    values.sort()
    peak = memory.peak_memory(lambda: values.sort())
    counted = memory.counted_peak(lambda: values.sort())
    assert counted == MIB * (4 + 8)
    assert peak.num_bytes > 1.1 * counted
    assert peak.method == "resident"


def test_counted_follows_storages_to_their_end() -> None:
    start = torch.ones(MIB, dtype=torch.uint8)

    def call() -> torch.Tensor:
        x = start.view(-1) + 1  # 1 MiB, beside the input, which is not counted
        x = x + 1  # 2 MiB until the first goes
        x.add_(1)
        return x.view(2, -1)

    assert memory.counted_peak(call) == 2 * MIB


def test_counted_takes_over_where_the_system_does_not_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(field: str) -> int:
        raise OSError(field)

    monkeypatch.setattr(memory, "_status", unreadable)
    memory.resident_works.cache_clear()
    try:
        peak = memory.peak_memory(lambda: temporary(8))
    finally:
        memory.resident_works.cache_clear()
    assert peak == memory.PeakMemory(num_bytes=8 * MIB, method="counted")
