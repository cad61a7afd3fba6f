"""Every bad input raises an error that names the argument, what came, and what is accepted."""

from typing import Any

import pytest
import torch

from cases import spec
from foveal.attention.api import attend, attend_varlen
from foveal.attention.catalogue import BY_NAME
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.attention.trace import trace
from foveal.core.errors import ArgumentError, BudgetExceeded, Unsupported

B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 8, 6
SPEC = spec(H, HKV, D, DV)

BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "q-not-a-tensor": ("q", {"q": [1.0]}),
    "q-three-dimensions": ("q", {"q": torch.zeros(H, LQ, D)}),
    "q-integers": ("q", {"q": torch.zeros(B, H, LQ, D, dtype=torch.int64)}),
    "q-heads": ("q", {"q": torch.zeros(B, H + 1, LQ, D)}),
    "q-head-dim": ("q", {"q": torch.zeros(B, H, LQ, D + 1)}),
    "k-dtype": ("k", {"k": torch.zeros(B, HKV, LK, D, dtype=torch.float16)}),
    "k-device": ("k", {"k": torch.zeros(B, HKV, LK, D, device="meta")}),
    "k-heads": ("k", {"k": torch.zeros(B, H, LK, D)}),
    "k-batch": ("k", {"k": torch.zeros(B + 1, HKV, LK, D)}),
    "k-head-dim": ("k", {"k": torch.zeros(B, HKV, LK, D + 1)}),
    "v-length": ("v", {"v": torch.zeros(B, HKV, LK + 1, DV)}),
    "v-dim": ("v", {"v": torch.zeros(B, HKV, LK, D)}),
    "v-two-dimensions": ("v", {"v": torch.zeros(LK, DV)}),
    "spec-type": ("spec", {"spec": {"causal": True}}),
    "heads-do-not-divide": (
        "num_kv_heads",
        {"spec": None, "k": torch.zeros(B, 3, LK, D), "v": torch.zeros(B, 3, LK, DV)},
    ),
    "mask-type": ("mask", {"mask": True}),
    "mask-dtype": ("mask", {"mask": torch.zeros(LQ, LK)}),
    "mask-shape": ("mask", {"mask": torch.ones(LK, LQ, dtype=torch.bool)}),
    "mask-five-dimensions": ("mask", {"mask": torch.ones(1, 1, 1, LQ, LK, dtype=torch.bool)}),
    "mask-kv-heads": ("mask", {"mask": torch.ones(B, HKV, LQ, LK, dtype=torch.bool)}),
    "mask-device": ("mask", {"mask": torch.ones(LQ, LK, dtype=torch.bool, device="meta")}),
    "bias-dtype": ("bias", {"bias": torch.zeros(LQ, LK, dtype=torch.bool)}),
    "bias-shape": ("bias", {"bias": torch.zeros(B, H, LQ, LK + 1)}),
    "sinks-shape": ("sink_logits", {"sink_logits": torch.zeros(HKV)}),
    "sinks-dtype": ("sink_logits", {"sink_logits": torch.zeros(H, dtype=torch.int32)}),
    "lengths-too-long": ("kv_lengths", {"kv_lengths": torch.tensor([LK, LK + 1])}),
    "lengths-negative": ("kv_lengths", {"kv_lengths": torch.tensor([-1, 3])}),
    "lengths-dtype": ("kv_lengths", {"kv_lengths": torch.tensor([1.0, 3.0])}),
    "lengths-shape": ("kv_lengths", {"kv_lengths": torch.tensor([1, 2, 3])}),
    "q-positions-shape": ("q_positions", {"q_positions": torch.arange(LK)}),
    "q-positions-batch": ("q_positions", {"q_positions": torch.zeros(1, LQ, dtype=torch.int64)}),
    "kv-positions-shape": ("kv_positions", {"kv_positions": torch.arange(LQ)}),
    "kv-positions-dtype": ("kv_positions", {"kv_positions": torch.zeros(LK)}),
    "seed-float": ("seed", {"seed": 1.5}),
    "seed-bool": ("seed", {"seed": True}),
    "budget-negative": ("memory_budget", {"memory_budget": -1}),
    "budget-text": ("memory_budget", {"memory_budget": "200MiB"}),
    "backend": ("backend", {"backend": "fastest"}),
}


def good() -> dict[str, Any]:
    return {
        "q": torch.zeros(B, H, LQ, D),
        "k": torch.zeros(B, HKV, LK, D),
        "v": torch.zeros(B, HKV, LK, DV),
        "spec": SPEC,
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    argument, changes = BAD[name]
    with pytest.raises(ArgumentError) as caught:
        attend(**(good() | changes))
    error = caught.value
    assert error.argument == argument
    assert str(error).startswith(f"{argument}: got {error.got}; accepted: {error.accepted}")
    assert error.accepted


def test_good_input_passes() -> None:
    out = attend(
        **good(),
        mask=torch.ones(LK, dtype=torch.bool),
        bias=torch.zeros(H, 1, LK, dtype=torch.float64),
        kv_lengths=torch.tensor([0, LK], dtype=torch.int32),
        q_positions=torch.zeros(B, LQ, dtype=torch.int32),
        seed=-1,
        memory_budget=10**9,
    )
    assert out.shape == (B, H, LQ, DV)


def test_unknown_operand_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="masks"):
        attend(**good(), masks=None)


def test_spec_defaults_to_full_attention() -> None:
    given = good()
    torch.testing.assert_close(attend(**given), attend(**(given | {"spec": None})))


PACKED_BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "four-dimensions": ("q", {"q": torch.zeros(1, 5, H, D)}),
    "v-tokens": ("v", {"v": torch.zeros(8, HKV, DV)}),
    "not-from-0": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([1, 5])}),
    "not-to-the-end": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 4])}),
    "not-monotone": (
        "cu_seqlens_k",
        {
            "cu_seqlens_q": torch.tensor([0, 1, 2, 5]),
            "cu_seqlens_k": torch.tensor([0, 6, 3, 7]),
        },
    ),
    "floating": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0.0, 7.0])}),
    "a-list": ("cu_seqlens_k", {"cu_seqlens_k": [0, 7]}),
    "two-dimensions": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([[0, 7]])}),
    "no-bounds": ("cu_seqlens_q", {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}),
    "another-number": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 3, 7])}),
    "mask": ("mask", {"mask": torch.ones(7, dtype=torch.bool)}),
    "kv-lengths": ("kv_lengths", {"kv_lengths": torch.tensor([1])}),
    "positions": ("q_positions", {"q_positions": torch.arange(7)}),
}


@pytest.mark.parametrize("name", PACKED_BAD)
def test_bad_packed_input_is_named(name: str) -> None:
    argument, changes = PACKED_BAD[name]
    given: dict[str, Any] = {
        "q": torch.zeros(5, H, D),
        "k": torch.zeros(7, HKV, D),
        "v": torch.zeros(7, HKV, DV),
        "spec": SPEC,
        "cu_seqlens_q": torch.tensor([0, 5]),
        "cu_seqlens_k": torch.tensor([0, 7]),
    }
    with pytest.raises(ArgumentError) as caught:
        attend_varlen(**(given | changes))
    assert caught.value.argument == argument


def test_refusals_carry_every_reason() -> None:
    approximate = SPEC.replace(approximation=Approximation.TOPK)
    with pytest.raises(Unsupported) as caught:
        attend(**(good() | {"spec": approximate}))
    assert caught.value.reasons.keys() == BY_NAME.keys()
    assert all(caught.value.reasons.values())


def test_a_budget_that_nobody_keeps() -> None:
    with pytest.raises(BudgetExceeded) as caught:
        attend(**good(), backend="unfused", memory_budget=1)
    assert caught.value.needed_bytes["unfused"] > 1


def test_trace_checks_as_attend_does() -> None:
    with pytest.raises(ArgumentError, match="mask"):
        trace(**good(), mask=torch.ones(3, dtype=torch.bool))
    empty = good() | {"k": torch.zeros(B, HKV, 0, D), "v": torch.zeros(B, HKV, 0, DV)}
    with pytest.raises(ArgumentError, match="at least one key"):
        trace(**empty)


def test_spec_of_needs_matching_ranks() -> None:
    with pytest.raises(ArgumentError, match="k: got shape"):
        AttentionSpec.of(torch.zeros(1, 2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
