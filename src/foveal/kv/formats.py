"""How keys and values are stored: the one list of formats, for caches and for every kernel.

A quantised tensor x [..., S, D] (S tokens of one page and head, D elements each) is kept as

    int8    x ≈ scale * code            code -127 .. 127, scale = max |x| / 127
    int4    x ≈ scale * code + low      code 0 .. 15,     scale = (max x - min x) / 15, low = min x

with one scale per token (over D) or per channel (over the S tokens of a page). Keys have channels
that are large throughout, so few bits fit them better per channel (KIVI, Liu et al. 2024); but
that needs the whole page. Scales are float32: with heads of 64, int8 then takes 0.53 of bfloat16.
Each element is within half a scale of what it was, but for the rounding of the arithmetic. A
number that is not finite makes the whole token, or channel, NaN: visible, not silent.

Element i of an int4 row shares its byte with element i + D/2, which has the upper four bits.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Self

import torch

from foveal.core.errors import ArgumentError
from foveal.kv.arena import Arena


class Scales(Enum):
    """What shares a scale."""

    NONE = "none"
    TOKEN = "token"
    CHANNEL = "channel"


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Tensors [..., S, D] in a storage format."""

    codes: torch.Tensor
    """[..., S, D] floats or int8, or uint8 [..., S, D / 2] of two int4 codes each."""
    scale: torch.Tensor | None = None
    """float32 [..., S, 1] per token or [..., 1, D] per channel."""
    low: torch.Tensor | None = None
    """float32 as `scale`; of int4 only."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        return tuple(t for t in (self.codes, self.scale, self.low) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(t.nbytes for t in self.tensors)

    def select(self, pages: torch.Tensor, arena: Arena) -> Self:
        """Pages [n] of dimension 1, copied next to each other into scratch memory."""
        return type(self)(*(_select(tensor, pages, arena) for tensor in self.tensors))

    def put(self, index: tuple[torch.Tensor | slice, ...], other: Self) -> None:
        """Write `other` at some indices."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[index] = theirs


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One storage format."""

    name: str
    dtype: torch.dtype
    """Of the stored codes."""
    bits: int
    """Of an element, without its share of the scales."""
    scales: Scales = Scales.NONE

    @property
    def quantised(self) -> bool:
        """Whether it is stored as codes and scales."""
        return self.scales is not Scales.NONE

    def empty(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Stored:
        """Zeros of shape [..., S, D], stored. Raises `ArgumentError` for an odd D in int4."""
        *lead, tokens, dim = shape
        if self.bits == 4 and dim % 2:
            raise ArgumentError("head size", dim, f"an even number for {self.name}")
        codes = torch.zeros(
            (*lead, tokens, dim * self.bits // 8 // self.dtype.itemsize),
            dtype=self.dtype,
            device=device,
        )
        if not self.quantised:
            return Stored(codes)
        shared = (tokens, 1) if self.scales is Scales.TOKEN else (1, dim)
        scale = torch.zeros((*lead, *shared), device=device)
        return Stored(codes, scale) if self.bits == 8 else Stored(codes, scale, scale.clone())

    def encode(self, x: torch.Tensor) -> Stored:
        """x [..., S, D] as it is stored. Per-channel scales are those of the S tokens given."""
        if not self.quantised:
            return Stored(x.to(self.dtype))
        x, axis = x.float(), -1 if self.scales is Scales.TOKEN else -2
        if self.bits == 8:
            scale = x.abs().amax(axis, keepdim=True) / 127
            return Stored(_steps(x, scale).clamp(-127, 127).to(self.dtype), scale)
        low, high = x.aminmax(dim=axis, keepdim=True)
        scale = (high - low) / 15
        codes = _steps(x - low, scale).clamp(0, 15).to(self.dtype)
        first, second = codes.chunk(2, dim=-1)
        return Stored(first | second << 4, scale, low)

    def decode(
        self, stored: Stored, dtype: torch.dtype, arena: Arena | None = None
    ) -> torch.Tensor:
        """[..., S, D] in `dtype`, rounded once; in scratch memory if an arena is given."""
        codes, scale, low = stored.codes, stored.scale, stored.low
        if scale is None and codes.dtype == dtype:
            return codes
        shape = (*codes.shape[:-1], codes.shape[-1] * (2 if low is not None else 1))
        out = codes.new_empty(shape, dtype=dtype) if arena is None else arena.take(shape, dtype)
        if scale is None:
            return out.copy_(codes)
        if low is None:
            return torch.mul(codes, scale, out=out)
        half = codes.shape[-1]
        for part, nibbles in ((slice(half), codes & 15), (slice(half, None), codes >> 4)):
            shared = part if scale.shape[-1] > 1 else slice(None)
            terms = (low[..., shared], nibbles, scale[..., shared])
            torch.addcmul(*terms, out=out[..., part])
        return out

    def nbytes(self, tokens: int, dim: int) -> int:
        """Bytes of one head of a page, scales included."""
        shared = {Scales.NONE: 0, Scales.TOKEN: tokens, Scales.CHANNEL: dim}[self.scales]
        return tokens * dim * self.bits // 8 + shared * (4 if self.bits == 8 else 8)


FORMATS: tuple[Format, ...] = (
    Format(name="float32", dtype=torch.float32, bits=32),
    Format(name="bfloat16", dtype=torch.bfloat16, bits=16),
    Format(name="float16", dtype=torch.float16, bits=16),
    Format(name="int8", dtype=torch.int8, bits=8, scales=Scales.TOKEN),
    Format(name="int8-channel", dtype=torch.int8, bits=8, scales=Scales.CHANNEL),
    Format(name="int4", dtype=torch.uint8, bits=4, scales=Scales.TOKEN),
    Format(name="int4-channel", dtype=torch.uint8, bits=4, scales=Scales.CHANNEL),
)


def parse_format(name: str) -> Format:
    """The format of this name. Raises `ArgumentError` if there is none."""
    for known in FORMATS:
        if known.name == name:
            return known
    raise ArgumentError("format", repr(name), ", ".join(known.name for known in FORMATS))


def _select(tensor: torch.Tensor, pages: torch.Tensor, arena: Arena) -> torch.Tensor:
    shape = (tensor.shape[0], pages.shape[0], *tensor.shape[2:])
    return torch.index_select(tensor, 1, pages, out=arena.take(shape, tensor.dtype))


def _steps(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, rounded; 0 where the scale is 0, NaN where it is not finite."""
    return (x / torch.where(scale == 0, 1.0, scale)).round()
