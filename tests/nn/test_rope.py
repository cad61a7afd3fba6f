"""Rotary positions: exact at any distance, and the same frequencies as the reference."""

import math

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from foveal.core.errors import ConfigError
from foveal.nn.rope import RopeConfig, Rotation
from foveal.nn.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    NoScaling,
    Scaling,
    YarnScaling,
)
from properties import examples

FAR = 10**8
YARN = YarnScaling(factor=4.0, original_length=64, attention_factor=1.2)


def rotate(x: torch.Tensor, positions: list[int], config: RopeConfig) -> torch.Tensor:
    """Turn x [T, D] at positions."""
    rotation = Rotation.at(config, torch.tensor([positions]), max(positions) + 1, x.dtype)
    return rotation.apply(x[None, None])[0, 0]


def exactly(x: torch.Tensor, position: int, config: RopeConfig) -> list[float]:
    """Turn x [D], pair by pair, with angles from exact integer arithmetic.

    A float32 frequency is a fraction n / 2^k, so position * frequency is exact as an integer; its
    remainder modulo 2 pi is taken with a 2 pi of 60 digits.
    """
    frequencies = config.scaling.frequencies(config.theta, config.dim, 0)
    two_pi = 6283185307179586476925286766559005768394338798750211641949889
    half, out = config.dim // 2, x.tolist()
    for i, frequency in enumerate(frequencies.tolist()):
        n, d = frequency.as_integer_ratio()
        angle = (position * n * 10**60 // d) % two_pi / 10**60
        cos, sin = math.cos(angle), math.sin(angle)
        first, second = out[i], out[i + half]
        out[i], out[i + half] = first * cos - second * sin, second * cos + first * sin
    return out


@pytest.mark.parametrize("position", [0, 1, 10, 12345, 10**6, FAR, 2**31 + 7])
def test_exact_at_any_position(position: int) -> None:
    config = RopeConfig(dim=16)
    x = torch.randn(16, generator=torch.Generator().manual_seed(position))
    turned = rotate(x[None], [position], config)[0]
    exact = torch.tensor(exactly(x, position, config), dtype=torch.float64)
    assert (turned.double() - exact).abs().max() < 4 * torch.finfo(torch.float32).eps
    turned = rotate(x[None].double(), [position], config)[0]
    # Up to 2^29 the product of position and frequency (24 bits) is exact in float64.
    assert (turned - exact).abs().max() < (1e-15 if position < 2**29 else 1e-6) * 4


@settings(max_examples=examples(30), deadline=None)
@given(start=st.integers(0, FAR), distance=st.integers(0, 4096))
def test_scores_depend_on_the_distance_alone(start: int, distance: int) -> None:
    config = RopeConfig(dim=8, theta=500000.0)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1)).unbind()
    near = rotate(q, [distance], config) @ rotate(k, [0], config).T
    far = rotate(q, [start + distance], config) @ rotate(k, [start], config).T
    assert (near - far).abs().max() < 1e-5


@pytest.mark.parametrize("scaling", [NoScaling(), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("start", [0, 48, FAR])
def test_what_is_turned_back_is_what_was_never_turned_so_far(scaling: Scaling, start: int) -> None:
    config = RopeConfig(dim=6, scaling=scaling)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
    far = rotate(x, list(range(start, start + 5)), config)
    back = Rotation.back(config, torch.tensor([[start]]), x.dtype).apply(far[None, None])[0, 0]
    assert (back - rotate(x, list(range(5)), config)).abs().max() < 1e-7
    forth = Rotation.back(config, torch.tensor([[-3]]), x.dtype).apply(back[None, None])[0, 0]
    assert (forth - rotate(x, list(range(3, 8)), config)).abs().max() < 1e-7
    many = far.float().expand(2, 1, 5, 8)
    two = Rotation.back(config, torch.tensor([[start], [0]]), torch.float32).apply(many)
    assert (two[0, 0] - back).abs().max() < 1e-6 and torch.equal(two[1], many[1])
    single = Rotation.back(config, torch.tensor([[start]]), torch.float32)
    assert (single.apply(far[None, None].float())[0, 0] - back).abs().max() < 1e-6


def test_rounded_once() -> None:
    config, x = RopeConfig(dim=8), torch.randn(5, 8).bfloat16()
    positions = [0, 1, 77, 4096, FAR]
    turned, exact = rotate(x, positions, config), rotate(x.double(), positions, config)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, exact.bfloat16())


def test_partial_rotation_leaves_the_rest() -> None:
    x = torch.randn(3, 10)
    turned = rotate(x, [0, 5, 9], RopeConfig(dim=6))
    assert torch.equal(turned[:, 6:], x[:, 6:])
    assert torch.equal(turned[:, :6], rotate(x[:, :6], [0, 5, 9], RopeConfig(dim=6)))


def test_pads_are_turned_by_nothing() -> None:
    x = torch.randn(2, 8)
    assert torch.equal(rotate(x, [-1, 0], RopeConfig(dim=8)), x)


def test_frequencies_made_in_inference_mode_serve_training() -> None:
    config = RopeConfig(dim=8, theta=123.0)
    x = torch.randn(2, 8, requires_grad=True)
    with torch.inference_mode():
        rotate(x.detach(), [3, 4], config)
    rotate(x, [3, 4], config).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dim", [0, 7, -2])
def test_odd_sizes_are_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"rotary dim: got {dim}"):
        RopeConfig(dim=dim)


SCALINGS: dict[str, tuple[Scaling, dict[str, object]]] = {
    "linear": (LinearScaling(factor=4.0), {"factor": 4.0}),
    "dynamic": (DynamicScaling(factor=2.0, original_length=64), {"factor": 2.0}),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        YarnScaling(factor=40.0, original_length=4096, attention_factor=1.3688879454113936),
        {"factor": 40.0, "original_max_position_embeddings": 4096},
    ),
    "yarn-untruncated": (
        YarnScaling(
            factor=4.0,
            original_length=512,
            attention_factor=(0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
        {
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "truncate": False,
        },
    ),
    "longrope": (
        LongScaling(
            short_factor=(1.0,) * 32,
            long_factor=(3.0,) * 32,
            original_length=48,
            attention_factor=1.25,
        ),
        {
            "short_factor": [1.0] * 32,
            "long_factor": [3.0] * 32,
            "original_max_position_embeddings": 48,
            "attention_factor": 1.25,
        },
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [10, 65, 100])
def test_frequencies_equal_the_reference_bit_for_bit(kind: str, length: int) -> None:
    scaling, fields = SCALINGS[kind]
    kind = kind.partition("-")[0]
    config = hf.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **fields},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=torch.tensor(length))
    assert torch.equal(scaling.frequencies(10000.0, 64, length), theirs)
    assert scaling.attention_factor == pytest.approx(factor, rel=1e-12)


def test_length_dependence_is_declared() -> None:
    for scaling in (NoScaling(), *(scaling for scaling, _ in SCALINGS.values())):
        short, long = (scaling.frequencies(10000.0, 64, length) for length in (10, 1000))
        assert scaling.length_dependent == (not torch.equal(short, long))
