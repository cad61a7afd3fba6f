"""Checks at the door: every bad input raises an `ArgumentError` that names the argument, what came
and what is accepted. Inside, nobody checks again.

Shapes, dtypes and devices are always checked. The values of lengths are checked where they lie in
main memory; on a GPU looking at them would stall it.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec
from foveal.core.dtypes import FLOATS
from foveal.core.errors import ArgumentError

_INTEGERS = (torch.int32, torch.int64)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None,
    operands: Operands,
) -> AttentionSpec:
    """Check a call on `[B, H, Lq, D]`, `[B, Hkv, Lk, D]`, `[B, Hkv, Lk, Dv]` tensors.

    Returns the spec, which is full attention with the tensors' heads if the caller gave none.
    """
    spec = _tensors(q, k, v, spec, ndim=4)
    batch, _, q_len, _ = q.shape
    kv_len = k.shape[2]
    _shape("q", q, (batch, spec.num_heads, q_len, spec.head_dim), "[B, H, Lq, D]")
    _shape("k", k, (batch, spec.num_kv_heads, kv_len, spec.head_dim), "[B, Hkv, Lk, D]")
    _shape("v", v, (batch, spec.num_kv_heads, kv_len, spec.value_dim), "[B, Hkv, Lk, Dv]")
    _beside(operands, spec, q.device)
    pairs = (batch, spec.num_heads, q_len, kv_len)
    _broadcastable("mask", operands.mask, pairs)
    _broadcastable("bias", operands.bias, pairs)
    _positions("q_positions", operands.q_positions, ((q_len,), (batch, q_len)))
    _positions("kv_positions", operands.kv_positions, ((kv_len,), (batch, kv_len)))
    _lengths(operands.kv_lengths, batch, kv_len)
    return spec


def check_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None,
    operands: Operands,
) -> AttentionSpec:
    """Check a packed call on `[tokens, H, D]` tensors, all but its bounds (`read_bounds`).

    Returns the spec, which is full attention with the tensors' heads if the caller gave none.
    """
    spec = _tensors(q, k, v, spec, ndim=3)
    q_len, kv_len = q.shape[0], k.shape[0]
    _shape("q", q, (q_len, spec.num_heads, spec.head_dim), "[tokens, H, D]")
    _shape("k", k, (kv_len, spec.num_kv_heads, spec.head_dim), "[tokens, Hkv, D]")
    _shape("v", v, (kv_len, spec.num_kv_heads, spec.value_dim), "[tokens, Hkv, Dv]")
    for name in ("mask", "bias", "kv_lengths"):
        if getattr(operands, name) is not None:
            raise ArgumentError(name, "a value", "None in a packed call")
    _beside(operands, spec, q.device)
    _positions("q_positions", operands.q_positions, ((q_len,),))
    _positions("kv_positions", operands.kv_positions, ((kv_len,),))
    return spec


def read_bounds(name: str, cu_seqlens: torch.Tensor, num_tokens: int) -> list[int]:
    """The bounds of packed sequences, integer [sequences + 1], as a list, once checked."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in _INTEGERS:
        raise ArgumentError(name, _kind(cu_seqlens), "an int32 or int64 tensor")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ArgumentError(name, f"shape {list(cu_seqlens.shape)}", "shape [sequences + 1]")
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        accepted = f"bounds that start at 0 and end at {num_tokens}, the number of tokens"
        raise ArgumentError(name, f"bounds from {bounds[0]} to {bounds[-1]}", accepted)
    for before, after in pairwise(bounds):
        if after < before:
            raise ArgumentError(name, f"{after} after {before}", "bounds that never decrease")
    return bounds


def check_budget(memory_budget: int | None) -> None:
    """Check the number of bytes that a caller allows for temporaries."""
    if memory_budget is None:
        return
    if not isinstance(memory_budget, int) or isinstance(memory_budget, bool) or memory_budget < 0:
        raise ArgumentError("memory_budget", repr(memory_budget), "bytes, at least 0, or None")


def _tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec | None, ndim: int
) -> AttentionSpec:
    """Rank, dtype and device of the three main tensors, and the spec or its default."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(name, type(x).__name__, "a tensor")
        if x.ndim != ndim:
            layout = "[B, H, L, D]" if ndim == 4 else "[tokens, H, D]"
            raise ArgumentError(name, f"shape {list(x.shape)}", f"a tensor {layout}")
        if x.dtype not in FLOATS:
            accepted = ", ".join(str(dtype) for dtype in FLOATS)
            raise ArgumentError(name, f"dtype {x.dtype}", accepted)
        if x.dtype != q.dtype:
            raise ArgumentError(name, f"dtype {x.dtype}", f"{q.dtype}, as q")
        if x.device != q.device:
            raise ArgumentError(name, f"device {x.device}", f"{q.device}, as q")
    if spec is None:
        return AttentionSpec.of(q, k, v)
    if not isinstance(spec, AttentionSpec):
        raise ArgumentError("spec", type(spec).__name__, "an AttentionSpec, or None")
    return spec


def _shape(name: str, x: torch.Tensor, shape: tuple[int, ...], layout: str) -> None:
    if x.shape != shape:
        raise ArgumentError(name, f"shape {list(x.shape)}", f"{layout} = {list(shape)}")


def _beside(operands: Operands, spec: AttentionSpec, device: torch.device) -> None:
    """Kind and device of the tensors beside q, k, v; the seed; the sink logits' shape."""
    for name, x in _present(operands):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(name, type(x).__name__, "a tensor, or None")
        if x.device != device:
            raise ArgumentError(name, f"device {x.device}", f"{device}, as q")
        if name == "mask":
            allowed: tuple[torch.dtype, ...] = (torch.bool,)
        else:
            allowed = FLOATS if name in ("bias", "sink_logits") else _INTEGERS
        if x.dtype not in allowed:
            raise ArgumentError(name, f"dtype {x.dtype}", ", ".join(str(d) for d in allowed))
    if operands.sink_logits is not None:
        _shape("sink_logits", operands.sink_logits, (spec.num_heads,), "[H]")
    seed = operands.seed
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ArgumentError("seed", repr(seed), "an integer, or None to draw one")


def _present(operands: Operands) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("mask", "bias", "sink_logits", "kv_lengths", "q_positions", "kv_positions"):
        x = getattr(operands, name)
        if x is not None:
            yield name, x


def _broadcastable(name: str, x: torch.Tensor | None, pairs: tuple[int, ...]) -> None:
    if x is None:
        return
    fits = x.ndim <= 4 and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(x.shape), reversed(pairs), strict=False)
    )
    if not fits:
        accepted = f"a shape that broadcasts to [B, H, Lq, Lk] = {list(pairs)}"
        raise ArgumentError(name, f"shape {list(x.shape)}", accepted)


def _positions(name: str, x: torch.Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if x is not None and x.shape not in shapes:
        accepted = " or ".join(str(list(shape)) for shape in shapes)
        raise ArgumentError(name, f"shape {list(x.shape)}", f"shape {accepted}")


def _lengths(lengths: torch.Tensor | None, batch: int, kv_len: int) -> None:
    if lengths is None:
        return
    _shape("kv_lengths", lengths, (batch,), "[B]")
    if lengths.device.type == "cpu":
        for length in lengths.tolist():
            if not 0 <= length <= kv_len:
                raise ArgumentError("kv_lengths", length, f"lengths from 0 to Lk = {kv_len}")


def _kind(x: object) -> str:
    return f"dtype {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
