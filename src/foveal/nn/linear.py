"""Linear layers and embeddings with narrow weights, for inference.

The matrix is stored in bfloat16, float16, int8 or int4 (`kernels.portable.panels` says how);
activations and sums are float32. Decoding reads every weight once per token, so its speed is that
of the memory, and halves or quarters of the bytes are twice or four times the tokens.
"""

from typing import Any

import torch
from torch import nn

from foveal.core.errors import ArgumentError
from foveal.kernels.cpu.linear import BoundLinear
from foveal.kernels.narrow import bind, check_input, linear, portable_linear
from foveal.kernels.portable.panels import Panels, WeightFormat, decode, decode_rows, encode


class NarrowLinear(nn.Module):
    """float32 [..., K] -> [..., N]. Has no parameters and refuses to be trained."""

    codes: torch.Tensor
    scale: torch.Tensor | None
    low: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, form: WeightFormat) -> None:
        """`weight` [N, K] and `bias` [N], of which nothing is kept but what `form` stores."""
        super().__init__()
        self.form = form
        self.outputs, self.inputs = weight.shape
        panels = encode(weight.detach(), form)
        for name in ("codes", "scale", "low"):
            self.register_buffer(name, getattr(panels, name))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._bound: BoundLinear | None = None
        self._bound_at = 0

    @property
    def num_weights(self) -> int:
        """Numbers that it stands for."""
        return self.inputs * self.outputs + (0 if self.bias is None else self.outputs)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix that it computes with, float32 [N, K]; made anew at every use."""
        return decode(self._panels, self.outputs, self.form)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix: integer [...] -> float32 [..., K]."""
        return decode_rows(self._panels, index, self.form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raises `ArgumentError` for another dtype or size, and where a gradient is wanted."""
        check_input(x, self.inputs)
        if x.requires_grad and torch.is_grad_enabled():
            accepted = "activations without gradient: narrow weights are for inference only"
            raise ArgumentError("x", "requires_grad=True", accepted)
        if type(x) is not torch.Tensor or torch.compiler.is_compiling():
            y: torch.Tensor = linear(
                x, self.codes, self.scale, self.low, self.bias, self.outputs, self.form.name
            )
            return y
        # Straight to the library: PyTorch's dispatcher would add tens of microseconds to each call.
        bound = self._bound
        if bound is None or self._buffers["codes"].data_ptr() != self._bound_at:  # type: ignore[union-attr]
            bound = self._bind()
        if bound is None:
            return portable_linear(x, self._panels, self.outputs, self.bias, self.form)
        return bound(x if x.is_contiguous() else x.contiguous())

    def extra_repr(self) -> str:
        """As PyTorch prints its own linear layers."""
        return f"{self.inputs} -> {self.outputs}, {self.form.name}, bias={self.bias is not None}"

    @property
    def _panels(self) -> Panels:
        return Panels(self.codes, self.scale, self.low)

    def _bind(self) -> BoundLinear | None:
        """Look anew where the weights lie: they may have been moved."""
        self._bound = bind(self._panels, self.outputs, self.bias, self.form)
        self._bound_at = self.codes.data_ptr()
        return self._bound

    def __getstate__(self) -> dict[str, Any]:
        """Addresses mean nothing in a copy."""
        return self.__dict__ | {"_bound": None}


class NarrowEmbedding(nn.Module):
    """ids [...] -> vectors float32 [..., E], from a matrix that may be the output matrix, too."""

    def __init__(self, weight: torch.Tensor, form: WeightFormat) -> None:
        """`weight` [V, E]"""
        super().__init__()
        self.matrix = NarrowLinear(weight, None, form)
        self.num_embeddings = weight.shape[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The vector of each token."""
        return self.matrix.rows(ids)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., E] times every token's vector: [..., V]."""
        scores: torch.Tensor = self.matrix(hidden)
        return scores
