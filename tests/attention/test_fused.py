"""The fused backend: its kernel is pinned, and what it refuses SDPA really cannot do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from cases import spec
from foveal.attention.api import attend
from foveal.attention.backends.fused import Fused
from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.attention.workload import Workload
from foveal.bench.memory import counted_peak
from foveal.core.errors import Unsupported
from foveal.hardware.detect import detect
from foveal.hardware.roofline import Peaks

SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
GQA = spec(8, 2, 16, causal=True)


class Calls(TorchDispatchMode):
    """The calls of SDPA's kernels below it: their name, inputs and options."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.seen.append((func.overloadpacket.__name__, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def tensors(made: AttentionSpec, q_len: int, kv_len: int, batch: int = 2) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = ((made.num_heads, q_len), (made.num_kv_heads, kv_len), (made.num_kv_heads, kv_len))
    return [torch.randn(batch, h, n, made.head_dim, generator=rng) for h, n in sizes]


def kernel_call(
    made: AttentionSpec, q_len: int, kv_len: int, **fields: torch.Tensor
) -> tuple[tuple[int, ...], bool, bool]:
    """Shape of the queries that reached the one kernel, whether causal, whether with a mask."""
    with Calls() as calls:
        attend(*tensors(made, q_len, kv_len), made, backend="fused", **fields)
    ((name, args, options),) = calls.seen
    assert name == SDPA.__name__
    causal = args[4] if len(args) > 4 else options.get("is_causal", False)
    return tuple(args[0].shape), causal, options.get("attn_mask") is not None


def test_causal_of_equal_lengths_is_the_kernels_own() -> None:
    assert kernel_call(GQA, 9, 9) == ((2, 8, 9, 16), True, False)


@pytest.mark.parametrize("window", [(8, None), (400, 7)])
def test_a_window_that_hides_nothing_needs_no_mask(window: tuple[int, int | None]) -> None:
    assert kernel_call(GQA.replace(window=window), 9, 9)[1:] == (True, False)


def test_bottom_right_is_not_pytorchs_causal() -> None:
    assert kernel_call(GQA, 5, 9)[1:] == (False, True)
    q, k, v = tensors(GQA, 5, 9)
    theirs = SDPA(q, k, v, 0.0, True)[0]
    ours = attend(q, k, v, GQA, backend="fused")
    exact = oracle.attention(q, k, v, GQA, Operands())[0].float()
    assert (theirs - exact).abs().max() > 0.1
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_as_many_pairs_as_causal_are_not_yet_causal() -> None:
    assert kernel_call(GQA.replace(window=(1, None)), 3, 5)[1:] == (False, True)


def test_query_groups_are_folded_where_all_is_visible() -> None:
    assert kernel_call(GQA, 1, 9) == ((2, 2, 4, 16), False, False)
    assert kernel_call(GQA.replace(causal=False), 5, 9) == ((2, 2, 20, 16), False, False)
    positions = torch.arange(3, 12)
    given = {"q_positions": torch.tensor([20]), "kv_positions": positions}
    assert kernel_call(GQA, 1, 9, **given) == ((2, 2, 4, 16), False, False)
    lengths = torch.tensor([9, 4])
    assert kernel_call(GQA, 1, 9, kv_lengths=lengths) == ((2, 2, 4, 16), False, True)


def test_rows_that_see_nothing() -> None:
    """SDPA's own lse of such a row is 0; the gradients that it sends are zero either way."""
    made = spec(4, 4, 16, causal=True)
    q, k, v = (x.requires_grad_() for x in tensors(made, 9, 5))
    out, lse = Fused().run(q, k, v, made, Operands())
    assert (lse[:, :, :4] == -torch.inf).all()
    assert lse[:, :, 4:].isfinite().all()
    assert not out[:, :, :4].any()
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()
    mask = torch.full((9, 5), -torch.inf)
    assert not SDPA(q, k, v, attn_mask=mask)[1].any()


def refusals(made: AttentionSpec, *operands: str, **circumstances: Any) -> tuple[str, ...]:
    sizes = {"batch": 2, "q_len": 9, "kv_len": 9, "dtype": torch.float32}
    fields = {**sizes, "operands": frozenset(operands), **circumstances}
    return Fused().refuse(made, Workload(**fields), detect())


def kernel_fails(**options: Any) -> Callable[[], None]:
    made = spec(4, 4, 16)

    def check() -> None:
        q, k, v = tensors(made, 9, 9)
        v = options.pop("v", v)
        with pytest.raises(RuntimeError):
            SDPA(q, k, v, **options)

    return check


def head_is_misread() -> None:
    q, k, v = tensors(spec(4, 4, 16), 9, 9)
    strided = k.mT.contiguous().mT
    assert not torch.allclose(SDPA(q, strided, v)[0], SDPA(q, k, v)[0])


def lse_has_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(spec(4, 4, 16), 9, 9))
    out, lse = SDPA(q, k, v)
    assert out.requires_grad
    assert not lse.requires_grad


def softcap_is_unknown() -> None:
    names = {argument.name for argument in SDPA.default._schema.arguments}
    assert names == {"query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"}


PLAIN = spec(4, 4, 16)
REFUSED = {
    "softcap": (softcap_is_unknown, PLAIN.replace(softcap=3.0), {}),
    "dropout": (kernel_fails(dropout_p=0.5), PLAIN.replace(dropout=0.5), {}),
    "value_dim": (kernel_fails(v=torch.randn(2, 4, 9, 24)), spec(4, 4, 16, 24), {}),
    "strided": (head_is_misread, PLAIN, {"strided_head": True}),
    "lse": (lse_has_no_gradient, PLAIN, {"needs_grad": True, "needs_lse_grad": True}),
    "bias": (
        kernel_fails(attn_mask=torch.zeros(9, 9, requires_grad=True)),
        PLAIN,
        {"needs_grad": True, "operands": frozenset({"bias", "bias_grad"})},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_fails_in_pytorch(name: str) -> None:
    pytorch_cannot, made, circumstances = REFUSED[name]
    operands = circumstances.get("operands", frozenset())
    rest = {key: value for key, value in circumstances.items() if key != "operands"}
    assert len(refusals(made, *operands, **rest)) == 1
    pytorch_cannot()


def test_every_reason_is_given() -> None:
    made = spec(4, 4, 16, 24, softcap=2.0, dropout=0.1)
    with pytest.raises(Unsupported) as caught:
        attend(*tensors(made, 9, 9)[:2], torch.zeros(2, 4, 9, 24), made, backend="fused")
    assert len(caught.value.reasons["fused"]) == 3


def test_refusals_on_cuda() -> None:
    half = {"device": "cuda", "dtype": torch.float16}
    assert not refusals(GQA, **half)
    assert not refusals(spec(8, 8, 16, causal=True, window=(3, None)), **half)
    assert "as many KV as query heads" in refusals(GQA, device="cuda")[0]
    assert "as many KV as query heads" in refusals(GQA.replace(window=(3, None)), **half)[0]
    assert not refusals(GQA, device="cuda", q_len=1)
    assert "multiples of 8" in refusals(spec(8, 8, 12), **half)[0]
    assert "float64" in refusals(GQA, "mask", device="cuda", q_len=1, dtype=torch.float64)[0]


WORKSPACES = {
    "window": (spec(4, 4, 32, causal=True, window=(64, None)), {}),
    "alibi": (spec(4, 4, 32, alibi=alibi_slopes(4)), {}),
    "mask": (spec(4, 4, 32), {"mask": torch.ones(2, 4, 768, 768).bool()}),
    "bias": (spec(4, 4, 32, causal=True), {"bias": torch.zeros(2, 4, 768, 768)}),
    "lengths": (spec(4, 4, 32), {"kv_lengths": torch.tensor([768, 3])}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WORKSPACES)
def test_workspace_holds_the_mask(name: str, dtype: torch.dtype) -> None:
    """Within a factor of 1.5 of the bytes alive in tensors, and the kernel's scratch above that."""
    made, fields = WORKSPACES[name]
    q, k, v = (x.to(dtype) for x in tensors(made, 768, 768))
    operands = Operands(**fields)
    results = q.numel() * dtype.itemsize + q[..., 0].numel() * 4
    taken = counted_peak(lambda: Fused().run(q, k, v, made, operands)) - results
    claimed = Fused().workspace_bytes(made, Workload.of(q, k, v, operands))
    scratch = Fused().workspace_bytes(spec(4, 4, 32), Workload.of(q, k, v, Operands()))
    assert taken / 1.5 < claimed - scratch < taken * 1.5
    assert 0 < scratch < 2**20 * torch.get_num_threads()


def test_estimate_counts_half_for_causal_and_all_for_a_mask() -> None:
    workload = Workload(batch=1, q_len=4096, kv_len=4096, dtype=torch.float32)
    flops = (("float32", 1e11),)
    peaks = Peaks(
        device="cpu", matmul_flops=flops, bandwidth_bytes=1e10, overhead_s=1e-5, source="of a test"
    )

    def seconds(**fields: Any) -> float:
        return Fused().estimate(spec(**fields), workload, peaks).seconds

    assert 0.5 < seconds(causal=True) / seconds() < 0.6
    assert seconds(causal=True, window=(64, None)) >= seconds()
