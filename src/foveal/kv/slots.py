"""Slots of a batch and positions of its tokens, for caches that store no pads.

A batch advances slot by slot, the same number for each sequence, while a sequence advances only by
its tokens: pads take a slot and no position. Positions of a sequence are 0, 1, 2, ... without a
gap, so the position alone says where a key is stored, padded or not.
"""

from collections.abc import Mapping

import torch

from foveal.core.errors import ArgumentError


class Slots:
    """Counts the slots of a batch and the tokens of each sequence."""

    def __init__(self, batch: int, device: torch.device | str = "cpu") -> None:
        self.length = 0
        """Slots so far, pads included."""
        self.next = torch.zeros(batch, dtype=torch.int64, device=device)
        """[B]: tokens of each sequence so far, which is the position of its next one."""
        self._pads: list[tuple[int, torch.Tensor]] = []
        """(first slot, bool [B, T]) of each step that had pads."""

    def place(self, positions: torch.Tensor | None, num_slots: int) -> torch.Tensor:
        """int64 [B, num_slots]: the positions of a step's tokens, -1 for pads.

        None goes on after each sequence's last position. Raises `ArgumentError` for positions
        that do not.
        """
        if positions is None:
            steps = torch.arange(num_slots, device=self.next.device)
            return self.next.unsqueeze(1) + steps
        shape = (self.next.shape[0], num_slots)
        if positions.shape != shape:
            raise ArgumentError("positions", f"shape {list(positions.shape)}", f"{list(shape)}")
        positions = positions.to(self.next)
        real = positions >= 0
        expected = self.next.unsqueeze(1) + real.cumsum(1) - 1
        if not torch.equal(positions[real], expected[real]):
            accepted = f"pads (-1), and tokens that go on from {self.next.tolist()} without a gap"
            raise ArgumentError("positions", positions.tolist(), accepted)
        return torch.where(real, positions, -1)

    def advance(self, positions: torch.Tensor) -> None:
        """Take the slots at these positions, [B, T] from `place`."""
        pads = positions < 0
        if pads.any():
            self._pads.append((self.length, pads))
        self.next = self.next + (~pads).sum(1)
        self.length += positions.shape[1]

    def tokens_before(self, length: int) -> torch.Tensor:
        """int64 [B]: how many tokens of each sequence lie in the first `length` slots."""
        tokens = torch.full_like(self.next, length)
        for start, pads in self._pads:
            tokens -= pads[:, : max(length - start, 0)].sum(1)
        return tokens

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        self.next = self.tokens_before(length)
        cut = [(start, pads[:, : max(length - start, 0)]) for start, pads in self._pads]
        self._pads = [(start, pads) for start, pads in cut if pads.any()]
        self.length = length

    def state(self) -> dict[str, torch.Tensor]:
        """All of it as tensors by name, for `restore`."""
        pads = {f"pads.{start}": pads for start, pads in self._pads}
        return {"length": torch.tensor(self.length), "next": self.next, **pads}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what `state` was taken of; other names in it are left alone."""
        self.length = int(state["length"])
        self.next = state["next"].to(self.next.device, copy=True)
        pads = {int(name[5:]): state[name] for name in state if name.startswith("pads.")}
        self._pads = [(start, pads[start].to(self.next.device)) for start in sorted(pads)]

    def copy(self) -> "Slots":
        """An independent copy."""
        other = Slots(self.next.shape[0], self.next.device)
        other.length, other.next, other._pads = self.length, self.next, list(self._pads)
        return other
