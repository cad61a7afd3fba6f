"""The way to flash-attention's tests, without their source: the shim, the sample, the exit code."""

import subprocess
import sys
from pathlib import Path

import flash_attention
import pytest
import run
import sampling
import torch

import oracle
from foveal import AttentionSpec
from foveal.attention.operands import Operands


def test_without_a_checkout_it_says_how_to_get_one() -> None:
    done = subprocess.run([sys.executable, run.__file__], capture_output=True, text=True)
    assert done.returncode == 2
    assert "git clone" in done.stderr


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_slopes_of_each_sequence(causal: bool) -> None:
    """Theirs hides the sign of the distance; the oracle takes it as a bias."""
    q, k, v = (torch.randn(2, length, 3, 8) for length in (5, 7, 7))
    slopes = torch.rand(2, 3)
    out = flash_attention.flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes)
    distance = torch.arange(7) - (torch.arange(5) + 2)[:, None]
    bias = -slopes[:, :, None, None] * distance.abs()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    spec = AttentionSpec.of(q, k, v, causal=causal)
    exact, _ = oracle.attention(q, k, v, spec, Operands(bias=bias))
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=1e-5, atol=1e-5)


def test_signed_weights_show_what_was_dropped() -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind()
    out, lse, signed = flash_attention.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
    scores = torch.einsum("blhd,bshd->bhls", q, k) / 8**0.5
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(signed < 0, 0.0) / 0.7
    torch.testing.assert_close(out, torch.einsum("bhls,bshd->blhd", weights, v))
    assert (signed < 0).any() and (signed > 0).any()


def test_a_sample_is_small() -> None:
    mark = pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 128), (1024, 3), (256, 512)]).mark
    rows = sampling._rows(mark)
    assert [sampling._small(row, 260 * 260, 128) for row in rows] == [True, True, False]


def test_their_file_is_read_for_the_cpu() -> None:
    source = (
        'x = torch.cuda.get_device_capability("cuda")[0] == 8\ny = torch.ones(1, device="cuda")'
    )
    assert run.on_cpu(source) == 'x = (8, 0)[0] == 8\ny = torch.ones(1, device="cpu")'


def test_counts_and_reasons_are_read(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped message="why"/>'
        '</testcase><testcase name="c"><failure message="1 != 2&#10;more"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = run.read(tmp_path / "report.xml")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, {"why": 1})
    assert found["failures"] == ["c: 1 != 2"]
