"""y = x W^T + bias with narrow weights: native on a CPU, in portable PyTorch anywhere else.

Weights are stored in a few bits (`kernels.portable.panels`), activations and sums are float32.
Registered as the operator `foveal::linear`, so that `torch.compile` and `torch.export` keep it
whole; it has no backward pass.
"""

import torch
import torch.nn.functional as F

from foveal.core.errors import ArgumentError
from foveal.kernels.available import native
from foveal.kernels.cpu.linear import BoundLinear
from foveal.kernels.portable.panels import Panels, WeightFormat, decode_parts, parse_weights


def bind(
    panels: Panels, outputs: int, bias: torch.Tensor | None, form: WeightFormat
) -> BoundLinear | None:
    """For many calls with one matrix; None where there is no native kernel for it."""
    if panels.codes.device.type != "cpu" or not native().present:
        return None
    return BoundLinear(panels, outputs, bias, form)


def portable_linear(
    x: torch.Tensor, panels: Panels, outputs: int, bias: torch.Tensor | None, form: WeightFormat
) -> torch.Tensor:
    """float32 [..., K] to [..., N]; only some rows of the matrix are widened at a time."""
    parts = [F.linear(x, rows) for _, rows in decode_parts(panels, outputs, form)]
    y = torch.cat(parts, dim=-1)
    return y if bias is None else y + bias


@torch.library.custom_op("foveal::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    low: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    form: str,
) -> torch.Tensor:
    """float32 [..., K] to [..., outputs]. Raises `ArgumentError` for another dtype or K."""
    panels, parsed = Panels(codes, scale, low), parse_weights(form)
    check_input(x, codes.shape[1])
    bound = bind(panels, outputs, bias, parsed)
    if bound is None:
        return portable_linear(x, panels, outputs, bias, parsed)
    return bound(x.contiguous())


@linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    low: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    form: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def check_input(x: torch.Tensor, inputs: int) -> None:
    """Raises `ArgumentError` for activations that do not fit a matrix of narrow weights."""
    if x.dtype != torch.float32 or x.shape[-1:] != (inputs,):
        got = f"{x.dtype} of shape {list(x.shape)}"
        raise ArgumentError("x", got, f"torch.float32 of shape [..., {inputs}]")
