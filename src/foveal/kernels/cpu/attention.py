"""The native kernels of attention: tensors in, one call of the library, tensors out.

    out = softmax(softcap(scale * q k^T) + alibi + bias, over visible keys) v,   lse its logarithm

q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] in float32, bfloat16 or float16, with any
strides but contiguous channels; sums in float32. Packed sequences are one batch of all tokens,
[1, H, tokens, D], with the bounds of each. The algorithm is described in attention_forward.cpp,
which queries see which keys in visibility.h. Calls go straight to the library; compilers take the
way through `operators.py`.
"""

from dataclasses import dataclass
from struct import Struct

import torch

from foveal.kernels.cpu.library import load

Result = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

ELEMENTS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels read and write, as they number it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rules:
    """What is computed, in numbers; `AttentionSpec` explains them."""

    scale: float
    softcap: float | None = None
    causal: bool = False
    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    sinks: int = 0
    alibi: torch.Tensor | None = None
    """float32 [H]"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beside:
    """The tensors beside q, k and v; `Operands` explains them."""

    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    q_positions: torch.Tensor | None = None
    kv_positions: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    q_bounds: torch.Tensor | None = None
    """Integer [N + 1]: the first token of each packed sequence, and their end. With these there is
    no mask, bias or length, and positions are [tokens]."""
    kv_bounds: torch.Tensor | None = None


CALL = Struct("20q 10q 4q 4q 8q 2d 6q 16x 2q")
"""`AttentionForward` in attention.h, field by field: the tensors q, k, v, out and lse (address and
strides of batch, head and token), mask and bias (address and four strides), positions of queries
and keys (address and stride of the batch), four lists, sizes, numbers, room
for what the library sets, and two addresses of what the backward pass needs. 8 us less than ctypes
takes to fill its own structures."""

_GRADIENTS = Struct("20q")
"""What `AttentionBackward` has beside: d_out, d_lse, dq, dk and dv."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Saved:
    """What the forward pass leaves to the backward pass."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    tops: torch.Tensor
    """float32 [B, H, Lq], contiguous: the largest score of each row, in the kernel's own unit."""
    weights: torch.Tensor
    """Likewise: the sum of the weights relative to it."""


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    beside: Beside,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Result:
    """`out` [B, H, Lq, Dv] in q's dtype, laid out as q is, and `lse` float32 [B, H, Lq].

    Nothing is checked. Rows that see nothing give 0 and -inf. `rows` are filled with `Saved.tops`
    and `Saved.weights`.
    """
    q, k, v = (_dense(x) for x in (q, k, v))
    out, lse = new_result(q, v.shape[-1])
    call, _kept = _pack((q, k, v, out, lse), rules, beside, rows)
    load().foveal_attention_forward(call)
    return out, lse


def attention_backward(
    d_out: torch.Tensor, d_lse: torch.Tensor, saved: Saved, rules: Rules, beside: Beside
) -> Gradients:
    """The gradients of q, k and v, in their dtypes, from those of `out` and of `lse`.

    There is no gradient of a bias. What comes back to rows that see nothing is ignored.
    """
    q, k, v, out, d_out = (_dense(x) for x in (saved.q, saved.k, saved.v, saved.out, d_out))
    d_q, d_k, d_v = (new_gradient(x) for x in (saved.q, saved.k, saved.v))
    given = (q, k, v, out, saved.tops)
    call, _kept = _pack(given, rules, beside, (saved.tops, saved.weights))
    call += _GRADIENTS.pack(*(n for x in (d_out, d_lse, d_q, d_k, d_v) for n in strided(x)))
    if not load().foveal_attention_backward(call):
        raise MemoryError("no room for the gradients of the queries in float32")
    return d_q, d_k, d_v


def _pack(
    tensors: tuple[torch.Tensor, ...],
    rules: Rules,
    beside: Beside,
    rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[bytes, tuple[torch.Tensor | None, ...]]:
    """A call with q, k, v, out and lse, and tensors that must live as long as it."""
    q, _, v, _, _ = tensors
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    pairs = (batch, heads, q_len, kv_len)
    mask = None if beside.mask is None else beside.mask.expand(pairs)
    bias = None if beside.bias is None else beside.bias.float().expand(pairs)
    positions = [_rows(x) for x in (beside.q_positions, beside.kv_positions)]
    lists = [_list(x) for x in (beside.kv_lengths, beside.q_bounds, beside.kv_bounds)]
    num_sequences = batch if lists[1] is None else len(lists[1]) - 1
    call = CALL.pack(
        *(number for x in tensors for number in strided(x)),
        *(number for x in (mask, bias) for number in _pairs(x)),
        *(number for x in positions for number in _positions(x)),
        *(0 if x is None else x.data_ptr() for x in (*lists, rules.alibi)),
        *(num_sequences, heads, kv_heads, q_len, kv_len, head_dim, value_dim, ELEMENTS[q.dtype]),
        *numbers(rules, rows),
    )
    return call, (mask, bias, *positions, *lists)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """With contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided(x: torch.Tensor) -> tuple[int, ...]:
    """Address, and strides of batch, head and token."""
    return x.data_ptr(), *x.stride()[:3]


def numbers(
    rules: Rules, rows: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[float, ...]:
    """The last fields of a call."""
    return (
        rules.scale,
        rules.softcap or 0.0,
        rules.causal,
        -1 if rules.left is None else rules.left,
        -1 if rules.right is None else rules.right,
        rules.chunk or 0,
        rules.sinks,
        torch.get_num_threads(),
        *((0, 0) if rows is None else (x.data_ptr() for x in rows)),
    )


def new_gradient(x: torch.Tensor) -> torch.Tensor:
    """Room for the gradient of x, with contiguous channels; tokens and heads in the order of x."""
    batch, heads, length, dim = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return x.new_empty(x.shape)


def new_result(q: torch.Tensor, value_dim: int) -> Result:
    """Room for `out`, with heads side by side in each token if they are so in q, and `lse`."""
    batch, heads, q_len, _ = q.shape
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    if q.stride(1) < q.stride(2):
        out = q.new_empty((batch, q_len, heads, value_dim)).transpose(1, 2)
        return out, lse
    return q.new_empty((batch, heads, q_len, value_dim)), lse


def _rows(positions: torch.Tensor | None) -> torch.Tensor | None:
    """int64 [B or 1, L], contiguous."""
    if positions is None:
        return None
    rows = positions if positions.ndim == 2 else positions.unsqueeze(0)
    return rows.long().contiguous()


def _positions(rows: torch.Tensor | None) -> tuple[int, int]:
    if rows is None:
        return 0, 0
    return rows.data_ptr(), rows.shape[1] if rows.shape[0] > 1 else 0


def _pairs(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if x is None else (x.data_ptr(), *x.stride())


def _list(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.long().contiguous()
