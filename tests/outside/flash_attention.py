"""A `flash_attn` for flash-attention's own tests, made of foveal's `attend` on CPU tensors.

`install` puts it where those tests import from. Layouts are theirs, [B, L, H, D] and packed
[tokens, H, D]; -1 in a window is no limit. Differences that the shim has to bridge:

- their ALiBi has slopes for each sequence, and hides its sign: -slope * |distance|. Ours has one
  list of slopes and slope * (p_j - p_i), which is the same where a query sees no key ahead of it.
  So sequences with slopes are computed one by one: by `AttentionSpec.alibi` if causal, else by an
  additive bias.
- their tests read dropped weights off the signs of unnormalised probabilities; `trace` shows ours.
- their cache holds rows or pages of one tensor; here those are gathered first.

What foveal does not offer is skipped with a reason that begins with "foveal:".
"""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from foveal import AttentionSpec, attend, attend_varlen, trace
from foveal.attention.operands import OperandFields
from foveal.attention.spec import SpecFields
from foveal.nn.rope import Rotation

BACKEND = "auto"
"""Who computes; `install` sets it."""

Window = tuple[int, int]
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec, OperandFields]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call in our terms."""

    fields: SpecFields
    slopes: torch.Tensor | None
    seed: int | None

    def parts(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: torch.Tensor
    ) -> Iterator[Part]:
        """The calls of `attend` that compute it, from [B, L, H, D] tensors and [B, L] positions."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.slopes is None:
            yield q, k, v, AttentionSpec.of(q, k, v, **self.fields), {"seed": self.seed, **given}
            return
        for b, slopes in enumerate(self.slopes.expand(len(q), -1)):
            row = slice(b, b + 1)
            one: OperandFields = {"seed": self.seed}
            one |= {name: x[row] for name, x in given.items()}
            fields = dict(self.fields)
            if self.fields["causal"]:
                fields["alibi"] = tuple(slopes.tolist())
            else:
                one["bias"] = -slopes[:, None, None] * _distances(q[row], k[row], one).abs()
            spec = AttentionSpec.of(q, k, v, **fields)
            yield q[row], k[row], v[row], spec, one

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` [B, Lq, H, Dv] and `lse` [B, H, Lq]."""
        results = [
            attend(*part, backend=BACKEND, return_lse=True, **operands)
            for *part, operands in self.parts(q, k, v, **given)
        ]
        out, lse = (torch.cat(x) for x in zip(*results, strict=True))
        return out.transpose(1, 2), lse

    def signed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """exp(score - row's largest), negative where dropped, [B, H, Lq, Lk]; None if none is."""
        if not self.fields["dropout"]:
            return None
        shown = []
        for *part, operands in self.parts(q.detach(), k.detach(), v.detach()):
            steps = trace(*part, **operands)
            weights = steps.exponentials
            shown.append(torch.where(steps.dropped == 0, -weights, weights))
        return torch.cat(shown)


def call(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> Call:
    """Their arguments in our terms."""
    left, right = (None if side < 0 else int(side) for side in window_size)
    fields: SpecFields = {
        "causal": causal,
        "window": None if left is None and right is None else (left, right),
        "scale": softmax_scale,
        "softcap": softcap or None,
        "dropout": dropout_p,
    }
    seed = int(torch.randint(2**31, ())) if dropout_p else None
    return Call(fields=fields, slopes=alibi_slopes, seed=seed)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`out`, or with `return_attn_probs` also lse and signed weights. All ours is deterministic."""
    asked = call(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = asked.run(q, k, v)
    return (out, lse, asked.signed(q, k, v)) if return_attn_probs else out


def flash_attn_kvpacked_func(q, kv, *args, **options):
    return flash_attn_func(q, *kv.unbind(2), *args, **options)


def flash_attn_qkvpacked_func(qkv, *args, **options):
    return flash_attn_func(*qkv.unbind(2), *args, **options)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """As `flash_attn_func` for packed sequences; `k` and `v` are pages if there is a table."""
    asked = call(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        inside = torch.arange(block_table.shape[1] * k.shape[1]) < cu_seqlens_k.diff()[:, None]
        slots = _slots(k, block_table)[inside]
        k, v = k.flatten(0, 1)[slots], v.flatten(0, 1)[slots]
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    parts = [(q[None, a:b], k[None, c:d], v[None, c:d]) for (a, b), (c, d) in bounds]
    each = [
        Call(
            fields=asked.fields,
            slopes=None if alibi_slopes is None else alibi_slopes.expand(len(parts), -1)[i : i + 1],
            seed=None if asked.seed is None else asked.seed + (i << 32),
        )
        for i in range(len(parts))
    ]
    if alibi_slopes is None:
        spec = AttentionSpec.of(q, k, v, **asked.fields)
        bounds = (cu_seqlens_q, cu_seqlens_k)
        out, lse = attend_varlen(
            q, k, v, spec, *bounds, backend=BACKEND, return_lse=True, seed=asked.seed
        )
        lse = lse.transpose(0, 1)
    else:
        results = [one.run(*part) for one, part in zip(each, parts, strict=True)]
        out = torch.cat([out[0] for out, _ in results])
        lse = torch.cat([lse[0] for _, lse in results], dim=-1)
    if not return_attn_probs:
        return out
    signed = [one.signed(*part) for one, part in zip(each, parts, strict=True)]
    if not dropout_p:
        return out, lse, None
    return out, lse, torch.cat([_padded(x, max_seqlen_q, max_seqlen_k) for x in signed])


def flash_attn_varlen_kvpacked_func(q, kv, *args, **options):
    return flash_attn_varlen_func(q, *kv.unbind(1), *args, **options)


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, *args, **options):
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(*qkv.unbind(1), *bounds, *args, **options)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
):
    """Attention to rows or pages of a cache, after turning and writing what is new into it."""
    asked = call(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    table = block_table
    if table is None:
        table = torch.arange(len(q)) if cache_batch_idx is None else cache_batch_idx
        table = table.unsqueeze(1)
    slots = _slots(k_cache, table)
    lengths = cache_seqlens.long()
    if k is not None:
        lengths = lengths + k.shape[1]
    if (lengths > slots.shape[1]).any():
        raise RuntimeError("cache_seqlens: longer than the block_table has room for")
    if rotary_cos is not None:
        if rotary_interleaved:
            pytest.skip("foveal: rotates pairs (i, i + D/2), not interleaved ones")
        moving = causal or any(side >= 0 for side in window_size)
        q = _turn(q, rotary_cos, rotary_sin, cache_seqlens, step=int(moving))
        k = _turn(k, rotary_cos, rotary_sin, cache_seqlens)
    if k is not None:
        new = slots.gather(1, cache_seqlens.long()[:, None] + torch.arange(k.shape[1]))
        k_cache.flatten(0, 1)[new], v_cache.flatten(0, 1)[new] = k, v
    keys = torch.arange(slots.shape[1]).expand(len(q), -1)
    first = 0 if cache_leftpad is None else cache_leftpad[:, None]
    there = (keys >= first) & (keys < lengths[:, None])
    # All positions are moved up by Lq: a query before the first key is no pad.
    queries = torch.arange(q.shape[1]) + lengths[:, None]
    keys = torch.where(there, keys + q.shape[1], -1)
    found = (k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots])
    return asked.run(q, *found, q_positions=queries, kv_positions=keys)[0]


def apply_rotary(x, cos, sin, seqlen_offsets=0, interleaved=False, **unused):
    """In place of their Triton kernel: their own formula in PyTorch, in float32 like the kernel."""
    assert not any(value for value in unused.values()), unused
    theirs = sys.modules["flash_attn.layers.rotary"]
    places = torch.as_tensor(seqlen_offsets).reshape(-1, 1) + torch.arange(x.shape[1])
    cos, sin = cos[places].float(), sin[places].float()
    return theirs.apply_rotary_emb_torch(x.float(), cos, sin, interleaved).to(x.dtype)


def get_block_size_n(device, head_dim, is_dropout, is_causal):
    """The signed weights are relative to the largest of the whole row: one block."""
    return 2**31


def install(checkout: Path, backend: str) -> None:
    """Make `import flash_attn` find this shim, and their own pure Python parts of `checkout`."""
    global BACKEND
    BACKEND = backend
    package = _module(
        "flash_attn", **{n: f for n, f in globals().items() if n[:10] == "flash_attn"}
    )
    package.__path__ = []
    _module("flash_attn.flash_attn_interface", _get_block_size_n=get_block_size_n)
    sys.modules["flash_attn.flash_attn_interface"].USE_TRITON_ROCM = False
    _module("flash_attn.ops.triton.rotary", apply_rotary=apply_rotary)
    for name in ("bert_padding", "layers.rotary"):
        path = checkout / "flash_attn" / f"{name.replace('.', '/')}.py"
        found = importlib.util.spec_from_file_location(f"flash_attn.{name}", path)
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module
        found.loader.exec_module(module)


def _module(name: str, **content: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def _distances(q: torch.Tensor, k: torch.Tensor, given: OperandFields) -> torch.Tensor:
    """Key's position less query's, [1, 1, Lq, Lk]."""
    lq, lk = q.shape[2], k.shape[2]
    rows = given.get("q_positions", torch.arange(lk - lq, lk)[None])
    columns = given.get("kv_positions", torch.arange(lk)[None])
    return (columns[:, None, :] - rows[:, :, None]).unsqueeze(1)


def _slots(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Where each sequence's keys are in `cache.flatten(0, 1)`, [B, pages * size of a page]."""
    size = cache.shape[1]
    return (table.long()[:, :, None] * size + torch.arange(size)).flatten(1)


def _turn(x, cos, sin, offsets, step=1):
    """Rotate [B, L, H, D]: token i of a sequence at its offset + i * step."""
    places = offsets.long()[:, None] + torch.arange(x.shape[1]) * step
    turn = Rotation(cos[places].float().unsqueeze(1), sin[places].float().unsqueeze(1))
    return turn.apply(x.transpose(1, 2)).transpose(1, 2)


def _padded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))
