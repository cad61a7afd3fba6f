"""Narrow weights: the formats of a linear layer's matrix, and their storage in panels.

    float32                as it is: in panels for their speed and their order of sums alone
    bfloat16, float16      rounded to nearest even
    int8     w = scale * code          code -127 .. 127, scale = max |w| / 127
    int4     w = scale * code + low    code 0 .. 15, low = min w, scale = (max w - low) / 15

with a scale for every output channel and group of inputs, or for a whole channel. `scale` and `low`
are bfloat16: the products are then exact in float32, so that a narrow weight means the same float32
number here, in every native kernel and on every machine; the codes are chosen for the rounded
scale, so that its rounding costs nothing. A group with a number that is not finite comes back with
numbers that are not finite: visible, not silent.

A matrix [N, K] is stored in panels of 32 output channels, [ceil(N / 32), K, 32], the last filled up
with zeros: one order for few rows of activations and for many (`kernels/cpu/linear.cpp` reads it).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from foveal.core.errors import ArgumentError

PANEL = 32
"""Output channels of a panel."""
_HALF = PANEL // 2
_CHUNK_BYTES = 1 << 18
"""Of float32 encoded or decoded at once: larger temporaries take longer, and leave holes in the
heap between the codes, so that loading would take three times the narrow model's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """How a matrix is stored."""

    name: str
    """As one asks for it: "f32", "bf16", "f16", "int8", "int8-64", "int4-32"."""
    dtype: torch.dtype
    """Of the elements or codes."""
    bits: int
    """Of an element or code, without its share of scale and low."""
    group: int | None = None
    """Inputs that share a scale; None: all of a channel."""

    @property
    def quantised(self) -> bool:
        """Whether there are codes and scales."""
        return self.bits < 16


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A matrix [N, K] in panels."""

    codes: torch.Tensor
    """[P, K, 32] floats or int8, or uint8 [P, K, 16] of two codes each: channels c (lower four
    bits) and c + 16. In bfloat16, channel c is element 2 c, and c + 16 element 2 c + 1."""
    scale: torch.Tensor | None = None
    """bfloat16 [P, groups, 32], ordered as bfloat16 codes."""
    low: torch.Tensor | None = None
    """As `scale`; of int4 only."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        return tuple(t for t in (self.codes, self.scale, self.low) if t is not None)


_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_CODES = {"int8": torch.int8, "int4": torch.uint8}
_GROUPS: dict[str, int | None] = {"int8": None, "int4": 32}
"""By default."""
ACCEPTED = "f32, bf16, f16, int8, int4; int8 and int4 with a group of inputs as int8-64"


def parse_weights(name: str) -> WeightFormat:
    """The format of this name. Raises `ArgumentError`."""
    if name in _FLOATS:
        dtype = _FLOATS[name]
        return WeightFormat(name=name, dtype=dtype, bits=8 * dtype.itemsize)
    found = re.fullmatch(r"(int8|int4)(?:-([1-9][0-9]*))?", name)
    if found is None:
        raise ArgumentError("weights", repr(name), ACCEPTED)
    kind, group = found.groups()
    return WeightFormat(
        name=name,
        dtype=_CODES[kind],
        bits=int(kind[3:]),
        group=int(group) if group else _GROUPS[kind],
    )


def encode(weight: torch.Tensor, form: WeightFormat) -> Panels:
    """Floats [N, K], rounded or quantised; on the same device."""
    outputs, inputs = weight.shape
    count = -(-outputs // PANEL)
    group = form.group or max(inputs, 1)
    groups = -(-inputs // group)
    width = PANEL if form.bits > 4 else _HALF
    codes = weight.new_zeros((count, inputs, width), dtype=form.dtype)
    scale = low = None
    if form.quantised:
        scale = weight.new_zeros((count, groups, PANEL), dtype=torch.bfloat16)
        low = torch.zeros_like(scale) if form.bits == 4 else None
    panels = Panels(codes, scale, low)
    for start, stop in _spans(count, inputs):
        part = weight[start * PANEL : stop * PANEL].float()
        padded = part.new_zeros((stop - start) * PANEL, inputs)
        padded[: part.shape[0]] = part
        # [panels, K, channels]
        wide = padded.view(stop - start, PANEL, inputs).transpose(1, 2)
        for to, value in zip(panels.tensors, _encode(wide, form, group), strict=True):
            to[start:stop] = value
    return panels


def decode(panels: Panels, outputs: int, form: WeightFormat) -> torch.Tensor:
    """float32 [N, K]."""
    return torch.cat([part for _, part in decode_parts(panels, outputs, form)])


def decode_parts(
    panels: Panels, outputs: int, form: WeightFormat
) -> Iterator[tuple[int, torch.Tensor]]:
    """The matrix some rows at a time: the first of them, and float32 [rows, K]."""
    count, inputs, _ = panels.codes.shape
    if not count:
        yield 0, panels.codes.new_empty((0, inputs), dtype=torch.float32)
    for start, stop in _spans(count, inputs):
        part = Panels(*(tensor[start:stop] for tensor in panels.tensors))
        rows = _decode(part, form).transpose(1, 2).reshape(-1, inputs)
        yield start * PANEL, rows[: outputs - start * PANEL]


def decode_rows(panels: Panels, index: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Rows [...] of the matrix, float32 [..., K]."""
    panel, channel = index // PANEL, index % PANEL
    paired = channel % _HALF * 2 + channel // _HALF
    if not form.quantised:
        at = paired if form.dtype == torch.bfloat16 else channel
        return panels.codes[panel, :, at].float()
    scale = _spread(panels.scale, panel, paired, panels.codes.shape[1], form)
    if form.bits == 8:
        return panels.codes[panel, :, channel] * scale
    both = panels.codes[panel, :, channel % _HALF]
    codes = torch.where((channel < _HALF).unsqueeze(-1), both & 15, both >> 4)
    return codes * scale + _spread(panels.low, panel, paired, panels.codes.shape[1], form)


def _spread(
    shared: torch.Tensor | None,
    panel: torch.Tensor,
    paired: torch.Tensor,
    inputs: int,
    form: WeightFormat,
) -> torch.Tensor:
    """What the inputs of a group share, for each of them: float32 [..., K]."""
    assert shared is not None
    rows = shared[panel, :, paired].float()
    return rows.repeat_interleave(form.group or inputs, dim=-1)[..., :inputs]


def _spans(count: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Panels [start, stop) that are encoded or decoded together."""
    step = max(_CHUNK_BYTES // max(4 * PANEL * inputs, 1), 1)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _encode(wide: torch.Tensor, form: WeightFormat, group: int) -> tuple[torch.Tensor, ...]:
    """float32 [P, K, 32] to codes, scale and low, as far as the format has them."""
    if not form.quantised:
        codes = wide.to(form.dtype)
        return (_pair(codes) if form.dtype == torch.bfloat16 else codes,)
    inputs = wide.shape[1]
    # The last group is filled up with its own last input, which changes no extreme.
    whole = torch.arange(-(-inputs // group) * group, device=wide.device).clamp(max=inputs - 1)
    grouped = wide[:, whole].reshape(len(wide), -1, group, PANEL)
    if form.bits == 8:
        scale = (grouped.abs().amax(2) / 127).bfloat16()
        codes = _steps(grouped, scale).clamp(-127, 127).flatten(1, 2)[:, :inputs]
        return codes.to(form.dtype), _pair(scale)
    low = grouped.amin(2).bfloat16()
    scale = ((grouped.amax(2) - low.float()) / 15).bfloat16()
    codes = _steps(grouped - low.float().unsqueeze(2), scale).clamp(0, 15)
    first, second = codes.flatten(1, 2)[:, :inputs].to(form.dtype).chunk(2, dim=-1)
    return first | second << 4, _pair(scale), _pair(low)


def _decode(panels: Panels, form: WeightFormat) -> torch.Tensor:
    """float32 [P, K, 32]."""
    codes = panels.codes
    if not form.quantised:
        return (_unpair(codes) if form.dtype == torch.bfloat16 else codes).float()
    inputs = codes.shape[1]
    if panels.low is not None:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    wide = codes.float()
    for combine, shared in ((torch.mul, panels.scale), (torch.add, panels.low)):
        if shared is not None:
            spread = _unpair(shared).float().repeat_interleave(form.group or inputs, dim=1)
            wide = combine(wide, spread[:, :inputs])
    return wide


def _steps(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [P, groups, group, 32] in steps of its group's scale, rounded."""
    wide = scale.float().unsqueeze(2)
    return (x / torch.where(wide == 0, 1.0, wide)).round()


def _pair(x: torch.Tensor) -> torch.Tensor:
    """[..., 32]: channels c and c + 16 side by side."""
    return x.reshape(*x.shape[:-1], 2, _HALF).transpose(-1, -2).flatten(-2)


def _unpair(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pair`."""
    return x.reshape(*x.shape[:-1], _HALF, 2).transpose(-1, -2).flatten(-2)
