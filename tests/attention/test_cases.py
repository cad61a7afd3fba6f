"""Every backend over every case: it agrees with the oracle, or refuses as the table here says."""

from functools import cache

import pytest
import torch

import oracle
from cases import BY_NAME, CASES, Case
from foveal.attention import catalogue
from foveal.attention.api import attend
from foveal.attention.operands import OperandFields, Operands
from foveal.core.errors import Unsupported

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

REFUSED: dict[str, set[str]] = {
    "unfused": set(),
    "fused": {"value-dim", "value-dim-small", "softcap", "bias-causal-softcap"},
    "flash": set(),
}
"""Cases that a backend refuses, forward in float32."""

BACKENDS = [name for name in catalogue.BY_NAME if name != "flex"]
"""flex gives no log-sum-exp and compiles for seconds at each case: `test_flex` runs the cases."""


def fields(operands: Operands) -> OperandFields:
    """Operands as keyword arguments."""
    return {name: getattr(operands, name) for name in operands.present}  # type: ignore[return-value]


@cache
def exact(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle's out and lse, and PyTorch's out."""
    case = BY_NAME[name]
    q, k, v, operands = case.tensors(dtype)
    out, lse = oracle.attention(q, k, v, case.spec, operands)
    return out, lse, oracle.plain(q, k, v, case.spec, operands)


@cache
def exact_gradients(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of q, k, v by autograd: of the oracle in float64, and of PyTorch's own."""
    case = BY_NAME[name]
    q, k, v, operands = case.tensors(dtype)
    found = []
    for inputs in ([t.double() for t in (q, k, v)], [q, k, v]):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        if inputs[0].dtype == torch.float64 and not found:
            out = oracle.attention(*leaves, case.spec, operands)[0]
        else:
            out = oracle.plain(*leaves, case.spec, operands)
        out.backward(upstream(out))
        found.append([leaf.grad for leaf in leaves])
    return found[0], found[1]


def upstream(out: torch.Tensor) -> torch.Tensor:
    """The gradient that comes from above, the same for every dtype."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=rng).bfloat16().to(out.dtype)


def refused(backend: str, case: Case) -> bool:
    q, k, v, operands = case.tensors(torch.float32)
    try:
        attend(q, k, v, case.spec, backend=backend, **fields(operands))
    except Unsupported as refusal:
        assert all(refusal.reasons[backend])
        return True
    return False


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_refuses_what_the_table_says(backend: str) -> None:
    assert {case.name for case in CASES if refused(backend, case)} == REFUSED[backend]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend: str, case: Case, dtype: torch.dtype) -> None:
    if case.name in REFUSED[backend]:
        return
    q, k, v, operands = case.tensors(dtype)
    out, lse = attend(q, k, v, case.spec, backend=backend, return_lse=True, **fields(operands))
    exact_out, exact_lse, plain_out = exact(case.name, dtype)
    oracle.assert_close(out, exact_out, plain_out, "out")
    # SDPA's kernel for half precision uses a fast exponential: its lse is good to 1e-4.
    lse_like = dtype if backend == "fused" else lse.dtype
    oracle.assert_close(lse, exact_lse, exact_lse.to(lse_like), "lse")
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


NO_LSE_GRADIENT = {"fused"}
"""Backends that refuse sink logits where there are gradients."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend: str, case: Case, dtype: torch.dtype) -> None:
    if case.name in REFUSED[backend]:
        return
    q, k, v, operands = case.tensors(dtype)
    if operands.sink_logits is not None and backend in NO_LSE_GRADIENT:
        return
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attend(q, k, v, case.spec, backend=backend, **fields(operands))
    out.backward(upstream(out))
    exact_grads, plain_grads = exact_gradients(case.name, dtype)
    terms = max((float(right.abs().max()) for right in exact_grads if right.numel()), default=0.0)
    for name, leaf, right, plain in zip("qkv", leaves, exact_grads, plain_grads, strict=True):
        what = f"gradient of {name}"
        oracle.assert_close(leaf.grad, right, plain, what, factor=3.0, terms=terms)
