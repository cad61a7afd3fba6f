"""Norms, embedding, MLP and the attention layer against plain formulas, and their refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ArgumentError, ConfigError
from foveal.nn.attention import Attention, AttentionConfig, Step
from foveal.nn.embedding import Embedding
from foveal.nn.mlp import ACTIVATIONS, MLP, MLPConfig
from foveal.nn.norm import NormConfig, NormKind, RMSNorm, make_norm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norm(kind: NormKind, dtype: torch.dtype) -> None:
    norm = make_norm(NormConfig(size=33, eps=1e-2, kind=kind))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-1, 1)
    norm, x = norm.to(dtype), (torch.randn(3, 5, 33) * 3).to(dtype)
    wide, weight = x.double(), norm.weight.double()
    if kind is NormKind.LAYER:
        centred = wide - wide.mean(-1, keepdim=True)
        exact = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
        exact = exact * weight + norm.bias.double()
    else:
        exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
        exact = exact * (weight + (kind is NormKind.RMS_OFFSET))
    error = (norm(x).double() - exact).abs()
    # Rounded once: half a unit in the last place, beside the rounding of float32 arithmetic.
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert (error <= 0.5 * ulp + 1e-6).all() if dtype.itemsize == 2 else error.max() < 5 * ulp.max()
    assert norm(x).dtype == dtype


@pytest.mark.parametrize("kind", NormKind)
def test_fresh_norm_scales_only(kind: NormKind) -> None:
    x = torch.randn(4, 64)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
    norm = make_norm(NormConfig(size=64, eps=1e-6, kind=kind))
    assert (norm(7 * x) - x).abs().max() < 1e-5


def test_norm_gradients() -> None:
    norm = RMSNorm(6, 1e-3, offset=1.0).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


def test_embedding_scale_is_rounded_to_the_weights_dtype() -> None:
    embedding = Embedding(7, 8, scale=48**0.5).bfloat16()
    ids = torch.tensor([[3, 0]])
    expected = embedding.tokens.weight[ids] * torch.tensor(6.9375, dtype=torch.bfloat16)
    assert torch.equal(embedding(ids, torch.tensor([[0, 1]])), expected)


def test_learned_positions_and_their_refusals() -> None:
    embedding = Embedding(7, 8, num_positions=4)
    ids = torch.tensor([[3, 0]])
    expected = embedding.tokens.weight[ids] + embedding.positions.weight[torch.tensor([[2, 0]])]
    assert torch.equal(embedding(ids, torch.tensor([[2, -1]])), expected)
    with pytest.raises(ArgumentError, match=r"positions: got 4; accepted: below 4"):
        embedding(ids, torch.tensor([[3, 4]]))
    for bad in (7, -1):
        with pytest.raises(ArgumentError, match=r"ids: got ids from .* to .*0 to 6"):
            embedding(torch.tensor([[3, bad]]), torch.tensor([[0, 1]]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_mlp(activation: str, bias: bool) -> None:
    act = ACTIVATIONS[activation]
    x = torch.randn(2, 3, 5)
    gated = MLP(MLPConfig(width=5, inner=7, activation=activation, bias=bias))
    gate, up = F.linear(x, gated.up.weight, gated.up.bias).split(7, dim=-1)
    expected = F.linear(act(gate) * up, gated.down.weight, gated.down.bias)
    assert torch.equal(gated(x), expected)
    plain = MLP(MLPConfig(width=5, inner=7, activation=activation, bias=bias, gated=False))
    expected = F.linear(act(F.linear(x, plain.up.weight, plain.up.bias)), plain.down.weight)
    expected = expected if plain.down.bias is None else expected + plain.down.bias
    assert (plain(x) - expected).abs().max() < 1e-6


def test_gelu_tanh_is_the_approximation() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    assert (ACTIVATIONS["gelu_tanh"](x) - 0.5 * x * (1 + inner.tanh())).abs().max() < 1e-12


def test_unknown_activation() -> None:
    with pytest.raises(ConfigError, match=r"activation: got 'mish'; accepted: silu"):
        MLPConfig(width=5, inner=7, activation="mish")


def layer(num_kv_heads: int, value_dim: int = 6, head_norm: bool = False) -> Attention:
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, value_dim=value_dim, causal=True
    )
    norm = NormConfig(size=6, eps=1e-6) if head_norm else None
    config = AttentionConfig(width=10, spec=spec, qkv_bias=True, head_norm=norm)
    return Attention(config, layer=0)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("value_dim", [6, 3])
@pytest.mark.parametrize("head_norm", [False, True])
def test_attention_layer(num_kv_heads: int, value_dim: int, head_norm: bool) -> None:
    attention, x = layer(num_kv_heads, value_dim, head_norm), torch.randn(2, 7, 10)
    q, k, v = attention.qkv(x).split([24, 6 * num_kv_heads, value_dim * num_kv_heads], dim=-1)
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, 4), (k, num_kv_heads), (v, num_kv_heads)))
    if head_norm:
        q, k = (F.rms_norm(t, (6,), eps=1e-6) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(4 // num_kv_heads, dim=1) for t in (k, v))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = F.linear(heads.transpose(1, 2).flatten(2), attention.output.weight)
    assert (attention(x, None, Step()) - expected).abs().max() < 1e-6


def test_backend_reaches_attend() -> None:
    with pytest.raises(ArgumentError, match="backend"):
        layer(2)(torch.randn(1, 3, 10), None, Step(backend="nobody"))


def test_linear_layers_have_the_biases_of_the_config() -> None:
    attention = layer(2)
    assert isinstance(attention.qkv, nn.Linear)
    assert attention.qkv.bias is not None
    assert attention.output.bias is None
