"""The native kernels as PyTorch operators: sound by its own checks, and one graph when compiled."""

import pytest
import torch

from cases import BY_NAME, spec
from foveal.attention import native
from foveal.attention.operands import Operands
from foveal.kernels import available
from foveal.kernels.cpu.operators import attention_operator, gradient_operator

pytestmark = pytest.mark.skipif(not available.native().present, reason="no native library")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["causal-gqa-strided", "value-dim", "mask-heads", "alibi", "left-padding"]
)
def test_attention_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    q, k, v, operands = case.tensors(dtype)
    made = case.spec
    tensors = (operands.mask, operands.bias, operands.q_positions, operands.kv_positions)
    numbers = (made.resolved_scale, made.softcap, made.causal, made.left, made.right)
    rest = (*tensors, operands.kv_lengths, None, None, *numbers, None, made.sinks, made.alibi)
    torch.library.opcheck(attention_operator, (q, k, v, *rest))


def test_a_compiled_call_is_one_graph_and_the_same() -> None:
    made = spec(4, 2, 16, causal=True, window=(9, None))
    q, k, v, _ = BY_NAME["causal-mha"].tensors(torch.float32)
    k, v = k[:, :2], v[:, :2]

    def call(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return native.forward(q * 2, k, v, made, Operands(mask=mask))[0] + 1

    mask = torch.rand(33, 33) < 0.5
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, mask), call(q, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal-gqa-strided", "value-dim", "softcap"])
def test_training_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    q, k, v = (x.requires_grad_() for x in case.tensors(dtype)[:3])
    made = case.spec
    numbers = (made.resolved_scale, made.softcap, made.causal, made.left, made.right)
    rest = (*[None] * 7, *numbers, None, made.sinks, made.alibi)
    torch.library.opcheck(attention_operator, (q, k, v, *rest))
    results = attention_operator(q, k, v, *rest)
    out, lse, tops, weights = (x.detach() for x in results)
    inputs = (out, lse, *(x.detach() for x in (q, k, v)), out, tops, weights)
    torch.library.opcheck(gradient_operator, (*inputs, *rest))


def test_compiled_training_is_one_graph_and_the_same() -> None:
    made = spec(4, 2, 16, causal=True)
    inputs = BY_NAME["causal-mha"].tensors(torch.float32)[:3]
    leaves = [x.requires_grad_() for x in (inputs[0], inputs[1][:, :2], inputs[2][:, :2])]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = native.forward(q * 2, k, v, made, Operands())
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
