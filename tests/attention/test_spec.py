"""The spec: frozen, hashable, one line, and particular about its fields."""

import dataclasses

import pytest
import torch

from foveal.attention.spec import Approximation, AttentionSpec, alibi_slopes
from foveal.core.errors import ArgumentError

GOOD = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def test_spec_is_a_value() -> None:
    spec = AttentionSpec(**GOOD, causal=True)
    assert spec == AttentionSpec(**GOOD, causal=True)
    assert len({spec, spec.replace(causal=True), spec.replace(sinks=4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.causal = False


def test_spec_from_tensors() -> None:
    dense = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 5)
    packed = torch.zeros(9, 4, 8), torch.zeros(7, 2, 8), torch.zeros(7, 2, 5)
    expected = AttentionSpec(**GOOD, value_dim=5, sinks=1)
    assert AttentionSpec.of(*dense, sinks=1) == AttentionSpec.of(*packed, sinks=1) == expected
    with pytest.raises(ArgumentError, match="k: got shape"):
        AttentionSpec.of(dense[0], packed[1], dense[2])


def test_defaults() -> None:
    spec = AttentionSpec(**GOOD)
    assert spec.value_dim == 8
    assert spec.resolved_scale == pytest.approx(8**-0.5)
    assert spec.replace(scale=0.0).resolved_scale == 0.0
    assert spec.group_size == 2
    assert not spec.restricted
    assert spec.replace(causal=True, window=(3, 9)).right == 0


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "4/2 heads of 8, full"),
        ({"causal": True, "window": (255, None)}, "4/2 heads of 8, causal, window 255"),
        ({"window": (3, None), "value_dim": 5}, "4/2 heads of 8|5, full, window 3:∞"),
        (
            {"sinks": 4, "softcap": 50.0, "chunk": 16},
            "4/2 heads of 8, full, chunk 16, sinks 4, softcap 50",
        ),
        ({"scale": 0.0}, "4/2 heads of 8, full, scale 0"),
        ({"approximation": Approximation.TOPK}, "4/2 heads of 8, full, topk"),
        ({"alibi": (0.5,) * 4, "dropout": 0.1}, "4/2 heads of 8, full, dropout 0.1, ALiBi"),
    ],
)
def test_prints_in_one_line(fields: dict, line: str) -> None:
    assert str(AttentionSpec(**GOOD, **fields)) == line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 0),
        ("num_heads", 2.0),
        ("num_kv_heads", 3),
        ("head_dim", -1),
        ("value_dim", -2),
        ("window", (-1, 0)),
        ("window", (1, 2, 3)),
        ("window", 5),
        ("window", (1.5, None)),
        ("chunk", 0),
        ("sinks", -1),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("softcap", 0.0),
        ("softcap", -3.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("alibi", (0.5,)),
        ("alibi", (0.5, float("nan"), 1.0, 1.0)),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{field}: got"):
        AttentionSpec(**(GOOD | {field: value}))


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0 ** -(h + 1) for h in range(8))
    assert alibi_slopes(6)[:4] == alibi_slopes(4)
    assert alibi_slopes(6)[4:] == (2.0**-1, 2.0**-3)
