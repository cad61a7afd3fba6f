"""The one list of cases that every backend, cache and kernel must pass.

A case is a spec, sizes and a recipe for the tensors beside q, k, v. A new backend is tested by
being registered: for each case it either refuses with a reason or agrees with the oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec, alibi_slopes

Recipe = Callable[["Case", torch.Generator], Operands]


def nothing(case: "Case", rng: torch.Generator) -> Operands:
    return Operands()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation: spec, batch, lengths and the recipe for its operands."""

    name: str
    spec: AttentionSpec
    batch: int = 2
    lq: int = 33
    lk: int = 33
    operands: Recipe = field(default=nothing)
    strided: bool = False
    """Tensors are made as [B, L, H, D] and transposed, as models have them."""

    def tensors(
        self, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Operands]:
        """q, k, v and the operands, drawn from a seed."""
        rng = torch.Generator().manual_seed(seed)
        spec = self.spec
        sizes = (
            (spec.num_heads, self.lq, spec.head_dim),
            (spec.num_kv_heads, self.lk, spec.head_dim),
            (spec.num_kv_heads, self.lk, spec.value_dim),
        )
        q, k, v = (self._tensor(*size, dtype, rng) * scale for size in sizes)
        return q, k, v, self.operands(self, rng)

    def _tensor(
        self, heads: int, length: int, dim: int, dtype: torch.dtype, rng: torch.Generator
    ) -> torch.Tensor:
        if self.strided:
            made = torch.randn(self.batch, length, heads, dim, generator=rng)
            return made.to(dtype).transpose(1, 2)
        return torch.randn(self.batch, heads, length, dim, generator=rng).to(dtype)

    def __str__(self) -> str:
        return self.name


def spec(heads: int = 4, kv_heads: int = 2, dim: int = 16, value_dim: int = 0, **fields):
    """A spec with small defaults."""
    return AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, value_dim=value_dim, **fields
    )


def lengths(case: Case, rng: torch.Generator) -> Operands:
    """Right padding: one full sequence, one short, and one empty if there is a third."""
    return Operands(kv_lengths=torch.tensor([case.lk, case.lk // 3, 0][: case.batch]))


def left_padding(case: Case, rng: torch.Generator) -> Operands:
    """The second sequence starts with five pads."""
    kv = torch.arange(case.lk).repeat(case.batch, 1)
    kv[1:] = torch.where(kv[1:] < 5, -1, kv[1:] - 5)
    return Operands(kv_positions=kv, q_positions=kv[:, case.lk - case.lq :].contiguous())


def ring_order(case: Case, rng: torch.Generator) -> Operands:
    """Keys in the order of a ring buffer that has wrapped, two slots empty."""
    kv = torch.arange(case.lk).roll(7) + 100
    kv[3:5] = -1
    return Operands(kv_positions=kv, q_positions=torch.arange(case.lq) + 100 + case.lk - case.lq)


def dense_mask(case: Case, rng: torch.Generator) -> Operands:
    """A random mask, the same for all heads, with one row hidden whole."""
    mask = torch.rand(case.batch, 1, case.lq, case.lk, generator=rng) < 0.6
    mask[0, :, case.lq // 2] = False
    return Operands(mask=mask)


def head_mask(case: Case, rng: torch.Generator) -> Operands:
    """A random mask for each head."""
    shape = (case.batch, case.spec.num_heads, case.lq, case.lk)
    return Operands(mask=torch.rand(shape, generator=rng) < 0.5)


def key_mask(case: Case, rng: torch.Generator) -> Operands:
    """A mask over keys only, broadcast over heads and queries."""
    return Operands(mask=torch.rand(case.batch, 1, 1, case.lk, generator=rng) < 0.7)


def bias(case: Case, rng: torch.Generator) -> Operands:
    """An additive bias per head, shared by the batch, with some entries at minus infinity."""
    values = torch.randn(1, case.spec.num_heads, case.lq, case.lk, generator=rng)
    values[0, 0, :, : case.lk // 4] = -torch.inf
    return Operands(bias=values)


def sink_logits(case: Case, rng: torch.Generator) -> Operands:
    """One learned logit per head."""
    return Operands(sink_logits=torch.randn(case.spec.num_heads, generator=rng))


CASES: tuple[Case, ...] = (
    Case(name="full-mha", spec=spec(4, 4)),
    Case(name="full-gqa", spec=spec(4, 2)),
    Case(name="full-mqa", spec=spec(4, 1)),
    Case(name="causal-mha", spec=spec(4, 4, causal=True)),
    Case(name="causal-gqa-strided", spec=spec(6, 2, causal=True), strided=True),
    Case(name="causal-mqa-odd", spec=spec(3, 1, 7, causal=True), lq=37, lk=37),
    Case(name="causal-long", spec=spec(2, 1, 24, causal=True), batch=1, lq=300, lk=300),
    Case(name="causal-fewer-queries", spec=spec(causal=True), lq=5, lk=41),
    Case(name="causal-more-queries", spec=spec(causal=True), lq=41, lk=5),
    Case(name="full-more-queries", spec=spec(), lq=41, lk=5),
    Case(name="window-more-queries", spec=spec(window=(9, 3)), lq=41, lk=13),
    Case(name="decode", spec=spec(8, 2, causal=True), lq=1, lk=257),
    Case(name="decode-full", spec=spec(4, 1), lq=1, lk=100),
    Case(name="value-dim", spec=spec(4, 2, 16, 24, causal=True)),
    Case(name="value-dim-small", spec=spec(4, 2, 16, 5)),
    Case(name="window", spec=spec(window=(8, 0))),
    Case(name="window-causal", spec=spec(causal=True, window=(8, None)), lq=150, lk=150),
    Case(name="window-both", spec=spec(window=(5, 3)), lq=29, lk=43),
    Case(name="window-right", spec=spec(window=(None, 4))),
    Case(name="window-self", spec=spec(window=(0, 0))),
    Case(name="window-far", spec=spec(causal=True, window=(4096, None))),
    Case(name="window-sinks", spec=spec(causal=True, window=(7, None), sinks=3), lq=140, lk=140),
    Case(name="chunk", spec=spec(causal=True, chunk=8)),
    Case(name="chunk-sinks", spec=spec(causal=True, chunk=16, sinks=2), lq=90, lk=90),
    Case(name="chunk-full", spec=spec(chunk=10), lq=20, lk=33),
    Case(name="sinks-only", spec=spec(causal=True, sinks=4)),
    Case(name="softcap", spec=spec(causal=True, softcap=5.0)),
    Case(name="scale", spec=spec(causal=True, scale=0.7)),
    Case(name="scale-zero", spec=spec(scale=0.0)),
    Case(name="alibi", spec=spec(causal=True, alibi=alibi_slopes(4))),
    Case(name="alibi-full-odd-heads", spec=spec(6, 3, alibi=alibi_slopes(6))),
    Case(name="lengths", spec=spec(), batch=3, operands=lengths),
    Case(name="lengths-causal", spec=spec(causal=True), batch=3, operands=lengths),
    Case(name="lengths-decode", spec=spec(), batch=3, lq=1, lk=70, operands=lengths),
    Case(name="left-padding", spec=spec(causal=True), operands=left_padding),
    Case(name="left-padding-decode", spec=spec(causal=True), lq=1, operands=left_padding),
    Case(
        name="left-padding-window-sinks",
        spec=spec(causal=True, window=(6, None), sinks=2),
        operands=left_padding,
    ),
    Case(name="ring", spec=spec(causal=True, window=(20, None)), lq=3, operands=ring_order),
    Case(
        name="ring-alibi", spec=spec(causal=True, alibi=alibi_slopes(4)), lq=3, operands=ring_order
    ),
    Case(name="mask", spec=spec(), operands=dense_mask),
    Case(name="mask-causal", spec=spec(causal=True), operands=dense_mask),
    Case(name="mask-heads", spec=spec(), operands=head_mask),
    Case(name="mask-keys", spec=spec(causal=True), operands=key_mask),
    Case(name="bias", spec=spec(), operands=bias),
    Case(name="bias-causal-softcap", spec=spec(causal=True, softcap=3.0), operands=bias),
    Case(name="sink-logits", spec=spec(causal=True), operands=sink_logits),
    Case(
        name="sink-logits-window",
        spec=spec(causal=True, window=(6, None)),
        lq=50,
        lk=50,
        operands=sink_logits,
    ),
    Case(name="no-queries", spec=spec(causal=True), lq=0, lk=9),
    Case(name="no-keys", spec=spec(), lq=9, lk=0),
    Case(name="no-batch", spec=spec(causal=True), batch=0),
    Case(name="one-of-each", spec=spec(1, 1, 1), batch=1, lq=1, lk=1),
)

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
