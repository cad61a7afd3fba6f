"""`Decoder`: the one decoder-only transformer that serves every family.

`hidden` and `logits` are apart so that training can compute its loss in chunks and generation the
logits of the last token only. Positions are kept as plain counts as long as no sequence is padded,
because attention is fastest where it knows the mask in closed form.
"""

import math
from dataclasses import replace

import torch
from torch import nn

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.kv.cache import KVCache
from foveal.kv.contiguous import ContiguousCache
from foveal.models.config import ModelConfig
from foveal.nn.attention import Step
from foveal.nn.block import Block
from foveal.nn.embedding import Embedding
from foveal.nn.linear import NarrowLinear
from foveal.nn.norm import make_norm
from foveal.nn.rope import RopeConfig, Rotation

_INITIAL_STD = 0.02
"""Standard deviation of the weights before training (GPT-2, and most since)."""


class Decoder(nn.Module):
    """ids [B, T] -> logits [B, T, V]."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Weights as `initialise(seed=0)` makes them; none on device "meta"."""
        super().__init__()
        self.config = config
        with torch.device("meta"):
            learned = config.max_positions if config.rope is None else 0
            self.embedding = Embedding(
                config.vocab_size,
                config.width,
                scale=config.embedding_scale,
                num_positions=learned,
            )
            self.blocks = nn.ModuleList(
                Block(config.block(layer), layer) for layer in range(config.num_layers)
            )
            self.norm = make_norm(config.norm_of(config.width))
            self.head = (
                None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
            )
        self.to(dtype or torch.float32)
        if torch.device(device or "cpu").type != "meta":
            self.to_empty(device=device or "cpu")
            self.initialise(seed=0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes: the weights' dtype, or float32 where these are narrow."""
        return self.norm.weight.dtype

    @property
    def weight_format(self) -> str:
        """In which the matrices are stored: a dtype, or a format of narrow weights."""
        narrow = next((m for m in self.modules() if isinstance(m, NarrowLinear)), None)
        return dtype_name(self.dtype) if narrow is None else narrow.form.name

    @property
    def num_parameters(self) -> int:
        """Weights in all; a tied output matrix counts once."""
        narrow = (m.num_weights for m in self.modules() if isinstance(m, NarrowLinear))
        return sum(p.numel() for p in self.parameters()) + sum(narrow)

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> ContiguousCache:
        """An empty cache for this model; `capacity` in tokens, None grows as needed."""
        shape = self.config.cache_shape(batch)
        return ContiguousCache(shape, capacity=capacity, dtype=self.dtype, device=self.device)

    def forward(
        self,
        ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Logits [B, T, V]; see `hidden` for the arguments."""
        return self.logits(self.hidden(ids, positions=positions, cache=cache, backend=backend))

    def hidden(
        self,
        ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Normalised last hidden states [B, T, E].

        `ids` is integer [B, T]. `positions` is integer [B, T], -1 for a pad (left or right; the
        pad's id may be any in the vocabulary and its output means nothing); by default each
        sequence goes on after its last position in the cache. Raises `ArgumentError`.
        """
        _check_integers("ids", ids)
        given, start = self._place(ids, positions, cache)
        slots = torch.arange(start, start + ids.shape[1], device=ids.device).unsqueeze(0)
        placed = slots if given is None else given
        x: torch.Tensor = self.embedding(ids, placed)
        rotations = self._rotations(placed, x.dtype, cache)
        step = Step(positions=given, cache=cache, backend=backend)
        for layer, block in enumerate(self.blocks):
            rope = self.config.rotary(layer)
            x = block(x, None if rope is None else rotations[rope], step)
        out: torch.Tensor = self.norm(x)
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., E] -> [..., V]."""
        logits: torch.Tensor = (self.head or self.embedding.scores)(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Weights to train from: normal with standard deviation 0.02, those that write into the
        residual stream divided by sqrt(2 * layers) (GPT-2); biases zero, norms neutral.

        Drawn on the CPU in float32, so that a seed means the same on every device and dtype.
        """
        rng = torch.Generator().manual_seed(seed)
        writers = ("attention.output.weight", "mlp.down.weight")
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                module = self.get_submodule(name.rpartition(".")[0])
                neutral = name.endswith("norm.weight") and not getattr(module, "offset", 0.0)
                parameter.fill_(1.0 if neutral else 0.0)
                continue
            std = _INITIAL_STD
            if name.endswith(writers):
                std /= math.sqrt(2 * self.config.num_layers)
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)

    def _place(
        self, ids: torch.Tensor, positions: torch.Tensor | None, cache: KVCache | None
    ) -> tuple[torch.Tensor | None, int]:
        """The positions as a tensor, or None where they are simply the slots from `start` on."""
        start = 0 if cache is None else cache.length
        past = None if cache is None else cache.next_positions
        slots = torch.arange(start, start + ids.shape[1], device=ids.device)
        if positions is None:
            if past is None:
                return None, start
            return past.unsqueeze(1) + slots - start, start
        _check_integers("positions", positions)
        if positions.shape != ids.shape:
            accepted = f"the shape of ids, {list(ids.shape)}"
            raise ArgumentError("positions", f"shape {list(positions.shape)}", accepted)
        if past is None and torch.equal(positions, slots.expand_as(positions)):
            return None, start
        return positions, start

    def _rotations(
        self, positions: torch.Tensor, dtype: torch.dtype, cache: KVCache | None
    ) -> dict[RopeConfig, Rotation]:
        """The rotation of every rotary configuration in use."""
        ropes = {rope for rope in (self.config.rope, self.config.window_rope) if rope is not None}
        length = 0
        if positions.numel() and any(rope.scaling.length_dependent for rope in ropes):
            length = int(positions.max()) + 1
            self._check_restart(length, cache)
        rotations = {rope: Rotation.at(rope, positions, length, dtype) for rope in ropes}
        window = None if cache is None else cache.window
        if cache is None or window is None or not window.sinks:
            return rotations
        if cache.length + positions.shape[1] <= window.span:
            return rotations  # nothing is evicted yet
        seen = window.from_sinks(positions)
        return {
            rope: replace(rotation, far=Rotation.at(rope, seen, length, dtype))
            for rope, rotation in rotations.items()
        }

    def _check_restart(self, length: int, cache: KVCache | None) -> None:
        """Refuse to mix keys that were rotated for short sequences with those for long ones."""
        limit = self.config.restart_length
        if limit is None or cache is None or not cache.length:
            return
        past = cache.length if cache.next_positions is None else int(cache.next_positions.max())
        if past <= limit < length:
            accepted = (
                f"up to {limit} tokens, or an empty cache and the whole sequence: "
                "LongRoPE rotates all keys differently beyond that length"
            )
            raise ArgumentError("cache", f"{past} cached tokens of {length}", accepted)


def _check_integers(name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim != 2 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        got = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ArgumentError(name, got, "integers [B, T]")
