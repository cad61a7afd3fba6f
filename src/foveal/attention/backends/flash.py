"""Our own flash attention: tiled online softmax, linear memory. Native on CPUs, portable elsewhere.

The native kernels (`attention.native`) compute what they can; `kernel` says who
computes a call and, where it is the portable kernels, why. The rest of this file is theirs: it
decides what they visit, namely the tiles that the mask does not hide, which of them need masking at
all, and how large tiles are. The arithmetic is in `kernels.portable.flash_*`.
Tiles that lie side by side and fit the buffer of scores are joined to one span, which is computed
in one product and one softmax. Half precision is widened to float32 tile by tile.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveal.attention import cost, native
from foveal.attention.mask import Sight, Visibility, cut
from foveal.attention.operands import Operands
from foveal.attention.packed import Bounds, OneByOne
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.dtypes import accumulate_dtype
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Estimate, Peaks, Work, roofline
from foveal.kernels.available import native_isa
from foveal.kernels.portable.flash_backward import Saved, flash_backward
from foveal.kernels.portable.flash_forward import flash_forward
from foveal.kernels.portable.flash_tiles import Plan, Span, Tile, is_finite
from foveal.kernels.portable.philox import keep_mask

_BUFFER = 2**20
"""Elements of one tile of scores [B, H, rows, keys], and of the keys or values that it gathers:
4 MiB in float32. Half as many or twice as many are slower on CPUs with 1 MiB of L2 per core."""
_ROWS = 128
"""Queries of a tile at most. 64 leave less of a window's edge to hide but double the calls, 256
waste up to a quarter of a short causal call."""
_KEYS = 64
"""Keys of a tile at least, where there are few queries."""

_CALLS_PER_TILE, _CALLS_PER_SPAN = 10, 14
"""Operators launched."""
_DROPOUT_BYTES = 20
"""What drawing the random words of one weight takes: int64 words and products, then the factor."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a computation is cut: sequences and queries of a tile, keys of a tile and of a span."""

    batch: int
    rows: int
    keys: int
    span: int


class Flash(OneByOne):
    """Tiled online softmax, by the native kernels where they serve a call."""

    name = "flash"

    def refuse(self, spec: AttentionSpec, workload: Workload, machine: Machine) -> tuple[str, ...]:
        """Refuses only approximations."""
        if spec.approximation is not Approximation.EXACT:
            return (f"computes exactly, not {spec.approximation.value}",)
        return ()

    def kernel(self, spec: AttentionSpec, workload: Workload) -> str:
        """See `Backend.kernel`."""
        why_not = _obstacles(spec, workload)
        return f"portable: {'; '.join(why_not)}" if why_not else f"native {native_isa()}"

    def workspace_bytes(self, spec: AttentionSpec, workload: Workload) -> int:
        """The buffers of one tile, whatever the lengths: scores, queries, keys, results."""
        if not _obstacles(spec, workload):
            return native.workspace_bytes(spec, workload)
        cut_to = sizes(spec, workload.q_len, workload.kv_len)
        size = accumulate_dtype(workload.dtype).itemsize
        batch = min(cut_to.batch, workload.batch)
        span = min(cut_to.span, workload.kv_len, _widest(spec, cut_to))
        queries = batch * spec.num_heads * cut_to.rows
        copies = 2 if spec.softcap is not None or cut_to.rows < _KEYS else 1
        per_pair = size * copies + (_DROPOUT_BYTES if spec.dropout else 0)
        if workload.operands & {"mask", "bias"}:
            per_pair += size + 1
        per_query = size * (spec.head_dim + 2 * spec.value_dim)
        gathered = batch * spec.num_kv_heads * span * max(spec.head_dim, spec.value_dim) * size
        if size == workload.dtype.itemsize:
            gathered = 0  # a view
        return queries * (span * per_pair + per_query) + cut_to.rows * span * size + gathered

    def estimate(self, spec: AttentionSpec, workload: Workload, peaks: Peaks) -> Estimate:
        """The pairs in visited tiles, each input once, and the calls of every tile and span."""
        if not _obstacles(spec, workload):
            return native.estimate(spec, workload, peaks)
        dtype = accumulate_dtype(workload.dtype)
        cut_to = sizes(spec, workload.q_len, workload.kv_len)
        edges = (spec.left is not None) + (spec.right is not None) + 2 * (spec.chunk is not None)
        queries = workload.batch * spec.num_heads * workload.q_len
        # Each bounded side of a row's view crosses a tile, half of which is wasted on average.
        wasted = queries * edges * cut_to.rows // 2
        pairs = min(cost.visible_pairs(spec, workload) + wasted, cost.all_pairs(spec, workload))
        num_tiles = -(-workload.batch // cut_to.batch) * -(-workload.q_len // cut_to.rows)
        num_spans = num_tiles + pairs // (spec.num_heads * cut_to.rows * cut_to.span)
        work = Work(
            flops=cost.attention_flops(spec, pairs),
            bytes_moved=cost.operand_bytes(spec, workload),
            calls=num_tiles * _CALLS_PER_TILE + num_spans * _CALLS_PER_SPAN,
        )
        return roofline(work, dtype, peaks)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run`. Differentiable in q, k, v and the bias, through `out` and `lse`."""
        if _is_native(spec, q, operands.bias):
            return native.forward(q, k, v, spec, operands)
        out, lse = _Flash.apply(q, k, v, operands.bias, spec, operands)  # type: ignore[no-untyped-call]
        return out, lse

    def run_packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
        bounds: Bounds,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run_packed`. In one call where the native kernels serve it."""
        if _is_native(spec, q):
            return native.forward(q, k, v, spec, operands, bounds)
        return super().run_packed(q, k, v, spec, operands, bounds)


def _is_native(spec: AttentionSpec, q: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return not native.obstacles(spec, q.dtype, q.device.type, native.needs_grad(bias))


def _obstacles(spec: AttentionSpec, workload: Workload) -> tuple[str, ...]:
    bias_grad = "bias_grad" in workload.operands and workload.needs_grad
    return native.obstacles(spec, workload.dtype, workload.device, bias_grad)


def sizes(spec: AttentionSpec, q_len: int, kv_len: int) -> Sizes:
    """How a call is cut: spans of keys as long, then as many sequences, as the buffers hold."""
    rows = max(1, min(_ROWS, q_len))
    keys = max(rows, _KEYS)
    per_key = max(spec.num_heads * rows, spec.num_kv_heads * max(spec.head_dim, spec.value_dim))
    span = max(1, _BUFFER // (per_key * keys)) * keys
    batch = max(1, _BUFFER // (per_key * max(1, min(span, kv_len))))
    return Sizes(batch, rows, keys, span)


def _widest(spec: AttentionSpec, cut_to: Sizes) -> int:
    """Keys that one tile of queries visits at most, sinks aside."""
    left, right = spec.left, spec.right
    if spec.chunk is not None:
        left, right = spec.chunk, spec.chunk
    if left is None or right is None:
        return cut_to.span
    return cut_to.rows + left + right + cut_to.keys


def spans(tiles: Sequence[tuple[slice, Sight]], limit: int, all_partial: bool) -> Iterator[Span]:
    """Join neighbouring tiles of keys to spans of at most `limit` keys."""
    joined: list[tuple[slice, Sight]] = []
    for keys, sight in tiles:
        if joined and (joined[-1][0].stop != keys.start or keys.stop - joined[0][0].start > limit):
            yield _join(joined, all_partial)
            joined = []
        joined.append((keys, sight))
    if joined:
        yield _join(joined, all_partial)


def _join(tiles: Sequence[tuple[slice, Sight]], all_partial: bool) -> Span:
    whole = slice(tiles[0][0].start, tiles[-1][0].stop)
    if all_partial or all(sight is Sight.PARTIAL for _, sight in tiles):
        return Span(whole, (whole,))
    return Span(whole, tuple(keys for keys, sight in tiles if sight is Sight.PARTIAL))


def plan(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, operands: Operands, cut_to: Sizes
) -> Plan:
    """What the kernel visits, and what it asks of a tile."""
    visibility = Visibility.of(spec, q, k, operands)
    bias_hides = operands.bias is not None and operands.bias.detach().amin().item() == -torch.inf
    all_partial = operands.mask is not None or bias_hides
    batches = [slice(i, min(i + cut_to.batch, len(q))) for i in range(0, len(q), cut_to.batch)]
    visits = [
        (rows, tuple(spans(tiles, cut_to.span, all_partial)))
        for rows, tiles in visibility.tiles(cut_to.rows, cut_to.keys)
    ]
    return Plan(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        scale=spec.resolved_scale,
        softcap=spec.softcap,
        tiles=[(Tile(batch, rows), found) for batch in batches for rows, found in visits if found],
        hidden=_hidden(visibility, operands),
        added=_added(q, visibility, operands),
        dropout=_dropout(q, spec, operands) if spec.dropout else None,
    )


def _hidden(visibility: Visibility, operands: Operands) -> Callable[[Tile, slice], torch.Tensor]:
    def hidden(tile: Tile, keys: slice) -> torch.Tensor:
        seen = _of_batch(visibility.dense(tile.rows, keys), tile)
        if operands.mask is not None:
            seen = seen & _of_batch(cut(operands.mask, tile.rows, keys), tile)
        if operands.bias is not None:
            seen = seen & (_of_batch(cut(operands.bias, tile.rows, keys), tile) != -torch.inf)
        return ~seen

    return hidden


def _added(
    q: torch.Tensor, visibility: Visibility, operands: Operands
) -> Callable[[Tile, slice], Sequence[torch.Tensor]]:
    dtype, alibi = accumulate_dtype(q.dtype), visibility.spec.alibi
    slopes = None if alibi is None else torch.tensor(alibi, dtype=dtype, device=q.device)

    def added(tile: Tile, keys: slice) -> list[torch.Tensor]:
        terms = []
        if slopes is not None:
            # Split at the tile's first query, so that one term depends on the key, one on the
            # query, and both are small, thus exact to rounding, where keys are near.
            q_positions = visibility.q_positions(tile.rows)
            k_positions = visibility.kv_positions(keys)
            first = q_positions[:, :1]
            terms.append(
                slopes[:, None, None] * _of_batch(k_positions - first, tile)[:, None, None]
            )
            terms.append(
                slopes[:, None, None] * _of_batch(first - q_positions, tile)[:, None, :, None]
            )
        if operands.bias is not None:
            terms.append(_of_batch(cut(operands.bias.detach(), tile.rows, keys), tile).to(dtype))
        return terms

    return added


def _dropout(
    q: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> Callable[[Tile, slice], torch.Tensor]:
    seed, dtype = operands.seed, accumulate_dtype(q.dtype)
    assert seed is not None, "the door draws a seed"

    def factors(tile: Tile, keys: slice) -> torch.Tensor:
        where = (_range(tile.batch), range(spec.num_heads), _range(tile.rows), _range(keys))
        return keep_mask(seed, spec.dropout, where, q.device).to(dtype) / (1 - spec.dropout)

    return factors


def _range(part: slice) -> range:
    return range(part.start, part.stop)


def _of_batch(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The tile's sequences of something that may be the same for all."""
    return x[tile.batch] if x.shape[0] > 1 else x


class _Flash(torch.autograd.Function):
    """The kernels, and what must be kept between them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        spec: AttentionSpec,
        operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visits = plan(q, k, spec, operands, sizes(spec, q.shape[2], k.shape[2]))
        out, lse = flash_forward(q, k, v, visits, accumulate_dtype(q.dtype))
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.plan = visits
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        saved = Saved(q=q, k=k, v=v, out=out, lse=lse, d_out=d_out, d_lse=d_lse)
        grads, d_bias = _gradients(saved, ctx.plan, bias if ctx.needs_input_grad[3] else None)
        d_q, d_k, d_v = (d.to(q.dtype) for d in grads)
        return d_q, d_k, d_v, d_bias, None, None


def _gradients(
    saved: Saved, visits: Plan, bias: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Gradients of q, k and v, and of the bias if one is given."""
    for careful in (False, True):
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=saved.lse.dtype)
        part = None if d_bias is None else partial(_bias_part, d_bias)
        grads = flash_backward(saved, visits, part, careful)
        if is_finite(*grads):
            break
    return grads, None if bias is None or d_bias is None else d_bias.to(bias.dtype)


def _bias_part(d_bias: torch.Tensor, tile: Tile, keys: slice) -> torch.Tensor:
    return _of_batch(cut(d_bias, tile.rows, keys), tile)
