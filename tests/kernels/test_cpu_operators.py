"""The native kernels as PyTorch operators: sound by its own checks, and one graph when compiled."""

import pytest
import torch

from cases import BY_NAME, spec
from foveal.attention import native
from foveal.attention.operands import Operands
from foveal.kernels import available
from foveal.kernels.cpu.operators import attention_operator

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
