"""FlexAttention: refusals that are true, an estimate that counts compiling, and the cases."""

import os
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import oracle
from cases import BY_NAME, CASES, spec
from foveal.attention.api import attend
from foveal.attention.backends import flex
from foveal.attention.operands import Operands
from foveal.attention.workload import Workload
from foveal.bench.memory import counted_peak
from foveal.hardware.detect import detect
from foveal.hardware.roofline import Peaks

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own

PEAKS = Peaks(
    device="cpu",
    matmul_flops=(("float32", 1e11),),
    bandwidth_bytes=1e10,
    overhead_s=1e-5,
    source="of a test",
)


def refusals(*, heads: dict[str, Any] | None = None, **circumstances: Any) -> str:
    sizes = {"batch": 2, "q_len": 9, "kv_len": 9, "dtype": torch.float32}
    return "; ".join(
        flex.Flex().refuse(spec(**(heads or {})), Workload(**{**sizes, **circumstances}), detect())
    )


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    without = refusals()
    for words, circumstances in (
        ("no backward pass", {"needs_grad": True}),
        ("no log-sum-exp", {"needs_lse": True}),
        ("no dropout", {"heads": {"dropout": 0.1}}),
        ("no float64", {"dtype": torch.float64}),
        ("on the CPU only", {"device": "cuda"}),
    ):
        assert words in refusals(**circumstances)
        assert words not in without
    monkeypatch.setitem(os.environ, "CXX", "no-such-compiler")
    flex._compiler.cache_clear()
    assert "install g++ or set CXX" in refusals()
    monkeypatch.undo()
    flex._compiler.cache_clear()


def test_estimate_counts_compiling() -> None:
    workload = Workload(batch=1, q_len=256, kv_len=256, dtype=torch.float32)
    estimate = flex.Flex().estimate(spec(causal=True), workload, PEAKS)
    assert estimate.seconds > flex._COMPILE_S
    assert f"+ {flex._COMPILE_S:g} s to compile" in estimate.formula


needs_compiler = pytest.mark.skipif(flex._compiler() is None, reason="no C++ compiler")
REPRESENTATIVE = (
    *("full-mha", "causal-gqa-strided", "causal-fewer-queries", "decode", "value-dim"),
    *("window-sinks", "softcap", "alibi-full-odd-heads", "lengths", "left-padding"),
    *("mask-heads", "bias", "bias-causal-softcap", "ring-alibi"),
)
"""Every kernel that differs once; `WITHOUT_COMPILING` are served by these."""
WITHOUT_COMPILING = ("causal-mha", "left-padding-window-sinks", "mask", "mask-keys")


def agree(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    q, k, v, operands = case.tensors(dtype)
    exact, _ = oracle.attention(q, k, v, case.spec, operands)
    given = {field: getattr(operands, field) for field in operands.present}
    out = attend(q, k, v, case.spec, backend="flex", **given)
    oracle.assert_close(out, exact, oracle.plain(q, k, v, case.spec, operands), "out")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_forward(name: str) -> None:
    agree(name, torch.float32)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    agree("window-sinks", dtype)


@pytest.mark.slow
@needs_compiler
def test_one_kernel_serves_every_mask_of_its_sizes() -> None:
    """What compiles takes seconds; these are served by kernels of other masks."""
    agree("full-mha", torch.float32)
    agree("left-padding", torch.float32)
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in WITHOUT_COMPILING:
            agree(name, torch.float32)


@pytest.mark.slow
@needs_compiler
def test_pytorch_gives_no_lse_on_a_cpu() -> None:
    """If this fails, PyTorch has learned it, and the refusal can go."""
    q = torch.randn(1, 2, 32, 16)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    many = torch._dynamo.config.patch(recompile_limit=256)
    with many, torch.no_grad(), pytest.raises(Exception, match="return_lse"):
        compiled(q, q, q, return_lse=True)


def test_workspace_holds_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of 1.5 of what preparing a call takes; the kernel's own is a tile more."""
    made = spec(4, 4, 16, causal=True, window=(64, None))
    q, k, v = torch.randn(3, 1, 4, 1500, 16)
    monkeypatch.setattr(flex, "_compiled", lambda: lambda q, *_, **__: q)
    taken = counted_peak(lambda: flex.Flex().run(q, k, v, made, Operands()))
    claimed = flex.Flex().workspace_bytes(made, Workload.of(q, k, v, Operands()))
    assert taken / 1.5 < claimed < taken * 1.5


def test_cases_that_flex_refuses() -> None:
    for case in CASES:
        q, k, v, operands = case.tensors(torch.float32)
        workload = Workload.of(q, k, v, operands)
        refused = flex.Flex().refuse(case.spec, workload, detect())
        if flex._compiler() is not None:
            assert bool(refused) == (operands.sink_logits is not None), case.name
