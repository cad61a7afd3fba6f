"""The stability table: our own backends keep their promise, and a broken one is caught."""

import pytest
import torch

import oracle
from foveal.attention.backends.flash import Flash
from foveal.attention.operands import Operands
from foveal.bench import stability
from foveal.bench.stability import PROMISING, verdicts
from foveal.bench.trials import BACKWARD, FORWARD, Trial


def made(name: str, dtype: torch.dtype = torch.float32) -> Trial:
    return FORWARD[name](torch.Generator().manual_seed(0), dtype)


@pytest.mark.parametrize("dtype", stability.DTYPES, ids=str)
def test_our_own_backends_keep_their_promise(dtype: torch.dtype) -> None:
    found = list(verdicts(PROMISING, [dtype]))
    assert len(found) == len(PROMISING) * (len(FORWARD) + len(BACKWARD))
    assert [v for v in found if v.breaks_promise] == []


@pytest.mark.parametrize("name", FORWARD)
def test_trials_are_what_the_oracle_sees(name: str) -> None:
    trial = made(name)
    operands = Operands(**trial.given)
    length = trial.q.shape[2]
    seen = oracle.visibility(trial.spec, trial.q.shape[0], length, length, operands)
    assert torch.equal(trial.seen.expand_as(seen), seen)
    assert torch.equal(trial.blind, ~seen.any(-1))
    assert trial.judged.any()


def test_poison_is_there_and_hidden_from_the_judged() -> None:
    for name in [name for name in FORWARD if "poison" in name]:
        trial = made(name)
        k, v = trial.poisoned
        assert k.isnan().any() and v.isinf().any()
        assert not (trial.seen & trial.poison[:, None, None, :])[trial.judged[:, :1]].any()


def test_trials_are_as_extreme_as_they_say() -> None:
    trial = made("q . k beyond float16", torch.float16)
    products = trial.q[:, :2].float() @ trial.k.float().transpose(-1, -2)
    assert (products > torch.finfo(torch.float16).max).float().mean() > 0.9
    denormal = made("denormals", torch.bfloat16)
    small = denormal.v.abs() < torch.finfo(torch.bfloat16).smallest_normal
    assert small.float().mean() > 0.9 and denormal.v.any()
    shifted = made("logits + 1e4")
    logits = shifted.q[:, :2] @ shifted.k.transpose(-1, -2) * shifted.spec.resolved_scale
    assert (logits - 1e4).abs().max() < 1e3


@pytest.mark.parametrize(
    ("spoil", "trial", "note"),
    [
        (lambda out, lse: (out * (1 + 1e-4), lse), "inputs at 1", ""),
        (lambda out, lse: (out + 0 * out.nan_to_num() / 0.0, lse), "inputs at 1", ""),
        (lambda out, lse: (out, lse.clamp(min=-1e30)), "rows that see nothing", "sees nothing"),
    ],
    ids=["inexact", "nan", "finite lse"],
)
def test_a_broken_backend_is_caught(
    spoil, trial: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Flash.run
    monkeypatch.setattr(Flash, "run", lambda self, *given: spoil(*right(self, *given)))
    monkeypatch.setattr(stability, "FORWARD", {trial: FORWARD[trial]})
    broken = [v for v in verdicts(["unfused", "flash"], [torch.float32]) if v.breaks_promise]
    assert {v.backend for v in broken} == {"flash"}
    assert note in broken[0].note


def test_a_refusal_is_no_answer_but_no_lie_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flash, "refuse", lambda *_: ("not today",))
    monkeypatch.setattr(stability, "FORWARD", {"denormals": FORWARD["denormals"]})
    (found,) = verdicts(["flash"], [torch.float64])
    assert found.accuracy is None and found.note == "refuses: not today"
