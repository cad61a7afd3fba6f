"""What a stream takes beside the weights: its cache, to the byte, and one step, by estimate.

    step = keys and values of the step, kept aside until its last layer has been written
         + one layer of all that a step sees, copied as it is stored (`Policy.read_bytes`) and as it
           is computed with
         + activations of one block, at 4 bytes
         + logits, their float32 copy and its log-softmax
         + the temporaries of attention, as the chosen backend states them

The cache is counted from the tensors themselves, on the "meta" device, without allocating any.
"""

from dataclasses import dataclass, replace

import torch

from foveal.attention.paged import narrow
from foveal.attention.select import choose
from foveal.attention.workload import Workload
from foveal.core.dtypes import dtype_name
from foveal.core.errors import BudgetExceeded
from foveal.core.units import format_bytes
from foveal.engine.gate import Tolerance, rounds
from foveal.engine.policy import Policy, Storage
from foveal.kv.cache import ResumableCache, Window
from foveal.kv.formats import parse_format
from foveal.models.decoder import Decoder

_LARGEST_STEP = 256
"""Tokens of a step where nobody says: more make a step of a small model no faster."""
_STEPS_OF_WINDOW = 4
"""Where keys and values are stored in few bits, a step is at most this part of the window: its own
tokens are not coded before it ends, and would take what coding saves. Where tokens share what they
see, small steps see better."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a stream beside the weights."""

    cache_bytes: int
    """Allocated once and for ever."""
    step_bytes: int
    """Alive at most while a step is computed. An estimate."""
    disk_bytes: int = 0
    """Files, at most; not of the total."""
    reference_bytes: int = 0
    """The cache that a tolerance is measured against."""

    @property
    def total_bytes(self) -> int:
        """Of memory, all of it."""
        return self.cache_bytes + self.step_bytes + self.reference_bytes


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream on one model, priced before it is made."""

    model: Decoder
    policy: Policy
    window: Window
    storage: Storage
    backend: str = "auto"
    tolerance: Tolerance | None = None

    @property
    def reference(self) -> "Stream":
        """The stream that this one is measured against, in the model's precision."""
        exact = replace(self.storage, format=dtype_name(self.storage.dtype))
        return replace(self, storage=exact, tolerance=None)

    @property
    def rounds(self) -> bool:
        """Whether its cache changes what it stores."""
        return rounds(self.storage.format, self.storage.dtype)

    def make(self) -> ResumableCache:
        """Its cache."""
        return self.policy.make(self.window, self.storage)

    def need(self) -> Need:
        """What it takes."""
        own = self._own_need()
        if self.tolerance is None or not self.rounds:
            return own
        beside = self.reference.need()
        return replace(
            own,
            step_bytes=own.step_bytes + beside.step_bytes,
            reference_bytes=beside.cache_bytes,
        )

    def _own_need(self) -> Need:
        meta = replace(self.storage, device=torch.device("meta"))
        cache = self.policy.make(self.window, meta)
        seen = min(cache.stats.capacity, 2 * self.window.span)  # pages hold more than the window
        config, tokens = self.model.config, self.storage.step_tokens
        spec = narrow(config.spec(0), self.window)
        workload = Workload(
            batch=1,
            q_len=tokens,
            kv_len=self.window.span,
            dtype=self.storage.dtype,
            device=self.storage.device.type,
            operands=frozenset({"q_positions", "kv_positions"}),
        )
        heads = config.num_heads * config.head_dim
        layer_bytes = (
            self.storage.shape.slot_elements // config.num_layers * self.storage.dtype.itemsize
        )
        elements = 6 * config.width + 3 * config.mlp_width + 6 * heads + 3 * config.vocab_size
        step_bytes = (
            tokens * self.storage.shape.slot_elements * self.storage.dtype.itemsize
            + self.policy.read_bytes(cache, self.storage, config.num_heads)
            + (seen + tokens) * layer_bytes
            + tokens * elements * 4
            + choose(spec, workload, backend=self.backend).chosen.workspace_bytes
        )
        return Need(cache.nbytes, step_bytes, self.policy.disk_bytes(self.window, self.storage))

    def within(self, memory: int | None, step_tokens: int | None) -> "Stream":
        """This stream with steps of `step_tokens`, or else the largest that fit `memory` bytes.

        Raises `BudgetExceeded` with the numbers, and with the largest window that would fit.
        """
        step = step_tokens or self._largest_step()
        fitted = self._with(self.window.size, step)
        while memory is not None and fitted.need().total_bytes > memory:
            if step_tokens or step == 1:
                raise fitted._refusal(memory)
            step //= 2
            fitted = self._with(self.window.size, step)
        return fitted

    def _largest_step(self) -> int:
        step = _LARGEST_STEP
        small = self.policy.shared_steps or parse_format(self.storage.format).quantised
        while small and step > max(1, self.window.size // _STEPS_OF_WINDOW):
            step //= 2
        return step

    def _with(self, size: int, step_tokens: int) -> "Stream":
        storage = replace(self.storage, step_tokens=step_tokens)
        return replace(self, window=Window(size, self.window.sinks), storage=storage)

    def _refusal(self, memory: int) -> BudgetExceeded:
        need, steps = self.need(), self.storage.step_tokens
        low, high = max(1, self.window.sinks), self.window.size
        remedy = f"no window fits, however small, with {self.policy}"
        if self._with(low, steps).need().total_bytes <= memory:
            while high - low > 1:
                middle = (low + high) // 2
                fits = self._with(middle, steps).need().total_bytes <= memory
                low, high = (middle, high) if fits else (low, middle)
            remedy = f"the largest window that fits is {low}"
        what = (
            f"a stream with a window of {self.window.size}, {self.window.sinks} sinks and steps of "
            f"{steps} in {self.storage.format} takes {format_bytes(need.total_bytes)}; {remedy}"
        )
        needed = {"cache": need.cache_bytes, "step (estimate)": need.step_bytes}
        if need.reference_bytes:
            needed["reference"] = need.reference_bytes
        return BudgetExceeded(what, memory, needed)
