"""`foveal bench kv`, part by part and small: what is said to be measured is what was done."""

from pathlib import Path

import pytest
import torch

from foveal.bench import (
    kv_append,
    kv_arena,
    kv_formats,
    kv_memory,
    kv_tiers,
    lines,
    pictures,
    tables,
)
from foveal.bench.finding import Finding, read_findings
from foveal.bench.record import Run
from foveal.bench.stream import Text
from foveal.core.errors import ArgumentError, ConfigError
from foveal.engine.llm import LLM
from foveal.kv.arena import Arena
from foveal.kv.cache import Window
from foveal.kv.ring import RingCache

CAPACITY = 256


@pytest.fixture(scope="module")
def appended(run: Run) -> list[Finding]:
    return list(kv_append.measure(CAPACITY, 3, run))


@pytest.fixture(scope="module")
def tiered(run: Run) -> list[Finding]:
    with pytest.MonkeyPatch.context() as patch:
        small = {"width": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "mlp_width": 64}
        rope = kv_tiers.RopeConfig(dim=32)
        fields = {**_fields(kv_tiers.MODEL), **small, "rope": rope}
        patch.setattr(kv_tiers, "MODEL", kv_tiers.ModelConfig(**fields))
        return list(kv_tiers.measure(1024, 2, run))


def _fields(config: kv_tiers.ModelConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@pytest.fixture(scope="module")
def remembered(run: Run) -> list[Finding]:
    with pytest.MonkeyPatch.context() as patch:
        shapes = dict(list(kv_memory.SHAPES.items())[:1])
        patch.setattr(kv_memory, "SHAPES", shapes)
        patch.setattr(kv_memory, "WINDOW", Window(508, 4))
        return list(kv_memory.measure((4096, 32_768), 2**24, run))


def test_every_kind_is_appended_to_at_every_fill(appended: list[Finding]) -> None:
    rows = [(f.subject["cache"], f.subject["fill"]) for f in appended]
    assert rows == [(kind.name, fill) for kind in kv_append.KINDS for fill in kv_append.FILLS]
    for finding in appended:
        assert 0 < finding.values["best_s"] <= finding.values["append_s"]
        assert finding.values["append_s"] <= finding.values["longest_s"]
        assert len(finding.curve["seconds"]) == 3
    judged = [f.subject["cache"] for f in appended if f.checks]
    assert judged == [kind.name for kind in kv_append.KINDS if kind.promised]


def test_appends_append() -> None:
    """Each token is written once in every layer, and a full memory goes on taking them."""
    cache = RingCache(kv_append.SHAPE, Window(CAPACITY), dtype=kv_append.DTYPE)
    append = kv_append._appending(cache, CAPACITY * 3 // 2)
    append(5)
    assert cache.length == CAPACITY * 3 // 2 + 5


def test_the_arena_is_told_apart_from_none(run: Run) -> None:
    found = {
        (f.subject["format"], f.subject["temporaries"]): f for f in kv_arena.measure(2048, 0.0, run)
    }
    assert {format for format, _ in found} == set(kv_arena.FORMATS)
    for format in kv_arena.FORMATS:
        arena, anew = found[format, "arena"], found[format, "anew"]
        assert arena.values["requests"] == anew.values["requests"] == anew.values["allocations"] > 3
        assert arena.values["allocations"] == 0 and arena.checks[0].holds
        assert arena.values["scratch_bytes"] > 1024 * 8 * 128 * 4


def test_both_ways_compute_the_same() -> None:
    view, q = kv_arena._filled("int8", 300)
    results = [kv_arena._decode(view, q, arena) for arena in (Arena(), kv_arena.Anew())]
    assert torch.equal(*results) and results[0].shape == (1, 32, 1, 128)
    with kv_arena.Anew().frame():
        fresh = kv_arena.Anew().take((3, 5), torch.int8)
    assert fresh.shape == (3, 5) and fresh.dtype == torch.int8


def test_tiers_hold_what_is_not_hot(tiered: list[Finding]) -> None:
    by_name = {f.subject["kept"]: f.values for f in tiered}
    assert list(by_name)[:-1] == [keeping.name for keeping in kv_tiers.KEEPINGS]
    for name in ("warm, int8", "warm", "cold", "frozen"):
        assert by_name[name]["pages_there"] == by_name[name]["moves"] == (1024 - 128) / 64
        assert by_name[name]["hits"] > 0
    assert by_name["frozen"]["disk_bytes"] >= by_name["frozen"]["moved_bytes"] > 0
    assert by_name["warm, int8"]["memory_bytes"] < by_name["warm"]["memory_bytes"]
    assert by_name["frozen"]["memory_bytes"] < by_name["all hot"]["memory_bytes"] / 2
    *_, anew = by_name.values()
    once = by_name["all hot"]["token_s"] + anew["reading_s"] / kv_tiers.ANSWER_TOKENS
    assert anew["token_s"] == pytest.approx(once)


def test_tiers_need_a_page_that_is_hot(run: Run) -> None:
    with pytest.raises(ArgumentError, match="tokens: got 511"):
        list(kv_tiers.measure(511, 1, run))


def test_formats_are_counted_and_held_against_what_was_never_stored(run: Run) -> None:
    llm = LLM(dtype="float32")
    ids = next(Text().chunks(llm, 130, 130))
    found = {f.subject["format"]: f for f in kv_formats.measure(llm, ids, run)}
    values = {name: finding.values for name, finding in found.items()}
    assert values["int8"]["of_bfloat16_64_ratio"] == pytest.approx((64 + 4) / 128)
    assert values["int8"]["of_bfloat16_128_ratio"] == pytest.approx((128 + 4) / 256)
    assert all(check.holds for check in found["int8"].checks) and len(found["int8"].checks) == 2
    assert values["float32"]["rms_error"] == 0.0
    order = ["float16", "bfloat16", "int8", "int4"]
    errors = [values[name]["rms_error"] for name in order]
    assert errors == sorted(errors) and errors[0] > 0 and errors[-1] < 1
    assert "over 128 stored keys of the bundled model" in found["int8"].title


def test_heads_are_those_that_the_model_attends_with() -> None:
    """The output of our attention over them, projected, is what the layer gives."""
    llm = LLM(dtype="float32")
    ids = next(Text().chunks(llm, 64, 64))
    given: list[torch.Tensor] = []
    layer = llm.model.blocks[1].attention
    hook = layer.output.register_forward_hook(lambda module, x, out: given.append(x[0]))
    heads = kv_formats.heads_of(llm, ids)[1]
    hook.remove()
    ours = heads.attention(heads.k, heads.v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours.float(), given[0], rtol=1e-4, atol=1e-5)


def test_a_text_under_a_page_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="got 63 tokens"):
        list(kv_formats.measure(LLM(), [5] * 63, run))


def test_memory_is_measured_as_far_as_the_cap_and_computed_beyond(
    remembered: list[Finding],
) -> None:
    rows = {(f.subject["tokens"], f.subject["style"]): f for f in remembered}
    basis = {key: f.subject["basis"] for key, f in rows.items()}
    assert basis == {
        ("4,096", "whole text"): "measured",
        ("4,096", "stream"): "measured",
        ("32,768", "whole text"): "computed",
        ("32,768", "stream"): "computed",
    }
    token = 4 * 2 * 2 * 64 * 2
    assert rows["32,768", "whole text"].values["resident_bytes"] == 32_768 * token
    short = rows["4,096", "whole text"].values
    assert short["tensors_bytes"] == 4096 * token
    # So little that what the process has ready, or gives back, counts.
    assert 0.8 < short["resident_bytes"] / short["tensors_bytes"] < 1.3
    streams = {f.values["tensors_bytes"] for (_, style), f in rows.items() if style == "stream"}
    assert len(streams) == 1 and streams.pop() < 4096 * token


def test_all_are_kept_tabled_and_drawn(
    appended: list[Finding], tiered: list[Finding], remembered: list[Finding], tmp_path: Path
) -> None:
    path, found = tmp_path / "kv.jsonl", [*appended, *tiered, *remembered]
    for finding in found:
        lines.append(path, finding)
    assert read_findings(path) == found
    text = tables.markdown(found)
    for part in ("append", "tiers", "memory"):
        assert f"### {part}: " in text
        pictures.draw(found, tmp_path / f"{part}.png", part)
        assert (tmp_path / f"{part}.png").read_bytes().startswith(b"\x89PNG")
