"""The trace shows the textbook's steps, and they are those of `attend`."""

import math

import pytest
import torch

from cases import CASES, Case, spec
from foveal.attention.api import attend
from foveal.attention.spec import alibi_slopes
from foveal.attention.trace import trace


@pytest.mark.parametrize("case", [case for case in CASES if case.lk], ids=str)
def test_trace_ends_where_attend_ends(case: Case) -> None:
    q, k, v, operands = case.tensors(torch.bfloat16)
    fields = {name: getattr(operands, name) for name in operands.present}
    shown = trace(q, k, v, case.spec, **fields)
    out, lse = attend(q, k, v, case.spec, backend="unfused", return_lse=True, **fields)
    assert torch.equal(shown.out, out)
    assert torch.equal(shown.lse, lse)


def test_every_step_follows_from_the_one_before() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 4, dtype=torch.float64) for heads in (4, 2, 2))
    made = spec(4, 2, 4, causal=True, softcap=2.0, alibi=alibi_slopes(4), dropout=0.3)
    sinks = torch.randn(4, dtype=torch.float64)
    t = trace(q, k, v, made, seed=7, sink_logits=sinks)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    distance = torch.arange(6) - torch.arange(6)[:, None]
    slopes = torch.tensor(alibi_slopes(4), dtype=torch.float64)[:, None, None]
    follows = {
        "scores": torch.einsum("bhid,bhjd->bhij", q, k),
        "scaled": t.scores / 2,
        "capped": 2 * torch.tanh(t.scaled / 2),
        "mask": (distance <= 0).expand(2, 1, 6, 6),
        "biased": t.capped + slopes * distance,
        "masked": t.biased.masked_fill(distance > 0, -math.inf),
        "row_max": t.masked.amax(-1, keepdim=True),
        "exponentials": torch.exp(t.masked - t.row_max),
        "denominator": t.exponentials.sum(-1, keepdim=True),
        "probabilities": torch.softmax(t.masked, dim=-1),
        "dropped": torch.where(t.dropped == 0, 0, t.probabilities / 0.7),
        "sink_weight": 1 - torch.exp(t.row_max + t.denominator.log() - t.lse[..., None])[..., 0],
        "out": t.dropped @ v * (1 - t.sink_weight[..., None]),
        "lse": torch.logaddexp(torch.logsumexp(t.masked, -1), sinks[:, None]),
    }
    assert list(follows) == [name for name, _ in t]
    for name, value in t:
        torch.testing.assert_close(value.expand_as(follows[name]), follows[name], msg=name)
    assert 0.1 < (t.dropped[t.probabilities > 0] == 0).double().mean() < 0.5


def test_steps_that_a_spec_lacks_are_absent() -> None:
    q = torch.ones(1, 1, 2, 3)
    t = trace(q, q, q)
    absent = {"capped", "biased", "dropped", "sink_weight"}
    assert not absent & {name for name, _ in t}
    assert t.capped is None


def test_a_trace_prints_one_line_a_step() -> None:
    q = torch.ones(1, 1, 2, 3)
    lines = str(trace(q, q, q, spec(1, 1, 3, causal=True))).splitlines()
    assert lines[0].split() == ["scores", "[1,", "1,", "2,", "2]", "from", "3", "to", "3"]
    assert "3 of 4 visible" in lines[2]
