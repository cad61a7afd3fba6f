"""Hand-written backward passes against finite differences, in float64, through `out` and `lse`."""

import pytest
import torch

from cases import spec
from foveal.attention.api import attend, attend_varlen
from foveal.attention.catalogue import BY_NAME
from foveal.attention.spec import AttentionSpec, alibi_slopes

OWN = [name for name in ("unfused", "flash") if name in BY_NAME]

SPECS = {
    "full-mha": spec(2, 2, 3),
    "causal-gqa": spec(4, 2, 3, 2, causal=True),
    "mqa-window": spec(3, 1, 2, window=(2, 1)),
    "softcap": spec(2, 1, 3, causal=True, softcap=1.5),
    "alibi": spec(2, 2, 3, alibi=alibi_slopes(2)),
    "window-sinks": spec(2, 1, 3, causal=True, window=(1, None), sinks=1),
    "chunk": spec(2, 1, 3, causal=True, chunk=3),
    "dropout": spec(2, 1, 3, dropout=0.4),
    "scale": spec(2, 1, 3, scale=1.7),
}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check(
    backend: str, made: AttentionSpec, q_len: int = 4, kv_len: int = 6, **extra: torch.Tensor | int
) -> None:
    """Finite differences for q, k, v and those operands that require a gradient."""
    torch.manual_seed(0)
    tensors = {
        "q": leaf(2, made.num_heads, q_len, made.head_dim),
        "k": leaf(2, made.num_kv_heads, kv_len, made.head_dim),
        "v": leaf(2, made.num_kv_heads, kv_len, made.value_dim),
    }
    tensors |= {n: x for n, x in extra.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    fixed = {name: x for name, x in extra.items() if name not in tensors}

    def call(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = dict(zip(tensors, values, strict=True)) | fixed
        out, lse = attend(spec=made, backend=backend, return_lse=True, **given)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", OWN)
def test_spec(backend: str, name: str) -> None:
    check(backend, SPECS[name], seed=3)


@pytest.mark.parametrize("backend", OWN)
def test_rows_that_see_nothing(backend: str) -> None:
    check(backend, spec(2, 1, 3, causal=True), 6, 4)
    check(backend, spec(2, 1, 3), kv_lengths=torch.tensor([0, 3]))


@pytest.mark.parametrize("shape", [(1, 2, 4, 6), (2, 1, 1, 6), (6,), (2, 2, 4, 1)], ids=str)
@pytest.mark.parametrize("backend", OWN)
def test_bias(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    check(backend, spec(2, 1, 3, causal=True, softcap=2.0), bias=leaf(*shape))


@pytest.mark.parametrize("q_len", [4, 7])
@pytest.mark.parametrize("backend", OWN)
def test_sink_logits(backend: str, q_len: int) -> None:
    """With 7 queries over 6 keys the first row sees nothing but the sink."""
    torch.manual_seed(1)
    check(backend, spec(4, 2, 3, causal=True), q_len, sink_logits=leaf(4))


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 3), (3, 0)])
@pytest.mark.parametrize("backend", OWN)
def test_nothing_gives_zero_gradients(backend: str, q_len: int, kv_len: int) -> None:
    made = spec(2, 1, 3)
    q, k, v = leaf(1, 2, q_len, 3), leaf(1, 1, kv_len, 3), leaf(1, 1, kv_len, 3)
    attend(q, k, v, made, backend=backend).sum().backward()
    for x in (q, k, v):
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", OWN)
def test_packed(backend: str) -> None:
    torch.manual_seed(0)
    made = spec(2, 1, 3, causal=True)
    q_bounds, k_bounds = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 4, 7])

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, sinks = tensors
        return attend_varlen(
            q, k, v, made, q_bounds, k_bounds, backend=backend, return_lse=True, sink_logits=sinks
        )

    assert torch.autograd.gradcheck(call, (leaf(5, 2, 3), leaf(7, 1, 3), leaf(7, 1, 3), leaf(2)))


def test_one_key_with_nearly_all_the_weight() -> None:
    """The gradient of a score is a small difference of large numbers, which `unfused` avoids;
    PyTorch's own softmax is wrong by a sixth here."""
    rng = torch.Generator().manual_seed(0)
    made = spec(1, 1, 1, 8)
    v = torch.randn(1, 1, 50, 8, generator=rng) + 1000.0
    k = torch.rand(1, 1, 50, 1, generator=rng)
    k[:, :, 17] = 12.0
    grads = []
    for dtype in (torch.float32, torch.float64):
        q = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
        attend(q, k.to(dtype), v.to(dtype), made, backend="unfused").sum().backward()
        grads.append(float(q.grad))
    assert grads[0] == pytest.approx(grads[1], rel=1e-3)
