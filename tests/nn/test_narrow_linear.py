"""Narrow linear layers as PyTorch modules: shapes, refusals, copies, compilation."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.core.errors import ArgumentError
from foveal.kernels.cpu import library
from foveal.kernels.portable.panels import parse_weights
from foveal.nn.linear import NarrowEmbedding, NarrowLinear

NAMES = ("f32", "bf16", "f16", "int8", "int4")
BOUND = 1e-4
"""Far above rounding, far below a wrong weight: sums of 70 products of about 1."""


def layer(name: str = "int8", outputs: int = 50, inputs: int = 70) -> NarrowLinear:
    source = nn.Linear(inputs, outputs)
    nn.init.normal_(source.weight)
    return NarrowLinear(source.weight, source.bias, parse_weights(name))


def expected(module: NarrowLinear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(70,), (1, 1, 70), (2, 3, 70), (0, 70), (2, 0, 70)], ids=str)
def test_any_leading_shape(name: str, shape: tuple[int, ...]) -> None:
    module, x = layer(name), torch.randn(shape)
    y = module(x)
    assert y.shape == (*shape[:-1], 50)
    torch.testing.assert_close(y, expected(module, x), atol=BOUND, rtol=0)


def test_strided_activations() -> None:
    module = layer()
    base = torch.randn(70, 6, 5)
    for x in (base.permute(1, 2, 0), base.permute(2, 1, 0)[::2], torch.randn(1, 70).expand(4, 70)):
        assert not x.is_contiguous()
        assert torch.equal(module(x), module(x.contiguous()))


def test_nothing_of_the_matrix_is_kept_twice() -> None:
    module = layer("int8", 64, 128)
    assert {t.dtype for t in module.buffers()} == {torch.int8, torch.bfloat16, torch.float32}
    assert sum(t.nbytes for t in module.buffers()) == 64 * 128 + 64 * 2 + 64 * 4
    assert not list(module.parameters())
    assert module.num_weights == 64 * 128 + 64
    assert str(module) == "NarrowLinear(128 -> 64, int8, bias=True)"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 69), r"x: got torch.float32 of shape \[2, 69\]; accepted: .* \[..., 70\]"),
        (torch.ones(2, 70).double(), "got torch.float64"),
        (torch.ones(2, 70).bfloat16(), "got torch.bfloat16"),
        (torch.ones(()), "got torch.float32 of shape"),
        (torch.ones(2, 70, requires_grad=True), "x: got requires_grad=True; .* inference only"),
    ],
)
def test_refusals(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        layer()(x)


def test_a_leaf_that_wants_a_gradient_elsewhere_may_pass() -> None:
    x = torch.ones(2, 70, requires_grad=True)
    with torch.no_grad():
        assert not layer()(x).requires_grad


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(), torch.randn(3, 70)
    library.load.cache_clear()
    monkeypatch.setattr(library, "VERSION", -1)
    y = module(x)
    monkeypatch.undo()
    library.load.cache_clear()
    torch.testing.assert_close(y, expected(module, x), atol=BOUND, rtol=0)


def test_copies_moves_and_saved_states() -> None:
    module, x = layer("int4"), torch.randn(3, 70)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    other = layer("int4")
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    other.to_empty(device="cpu")
    for mine, theirs in zip(other.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(other(x), y)
    assert torch.equal(other.share_memory()(x), y)


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str) -> None:
    module = layer(name)
    tensors = (module.codes, module.scale, module.low, module.bias)
    for x in (torch.randn(2, 3, 70), torch.randn(70, 4).T):
        torch.library.opcheck(torch.ops.foveal.linear.default, (x, *tensors, 50, name))


def test_compiled_and_exported() -> None:
    module, x = layer(), torch.randn(3, 70)
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(compiled(x[:2]), module(x[:2]))
    program = torch.export.export(module, (x,))
    assert "foveal.linear" in str(program.graph)
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("name", NAMES)
def test_embedding_and_output_are_one_matrix(name: str) -> None:
    source = torch.randn(90, 24)
    embedding = NarrowEmbedding(source, parse_weights(name))
    ids = torch.tensor([[0, 89, 31], [32, 17, 0]])
    assert embedding.num_embeddings == 90
    assert torch.equal(embedding(ids), embedding.matrix.weight[ids])
    hidden = torch.randn(2, 24)
    scores = hidden @ embedding.matrix.weight.T
    torch.testing.assert_close(embedding.scores(hidden), scores, atol=BOUND, rtol=0)
