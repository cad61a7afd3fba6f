"""Native RMSNorm and rotary positions, for float32 activations where no gradient is wanted.

PyTorch computes each in several passes and calls; at one token these cost more than the work.
Everything is float32, as are the sums; a row gives the same bits alone and in a batch.
"""

import ctypes

import torch

from foveal.kernels.available import present
from foveal.kernels.cpu.library import load


class _RmsNorm(ctypes.Structure):
    """`RmsNorm` in rows.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        *((name, ctypes.c_double) for name in ("eps", "offset")),
    )


class _Rotate(ctypes.Structure):
    """`Rotate` in rows.h, field by field."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "token_stride")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        ("turn_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "dim", "half")),
    )


def serves(x: torch.Tensor) -> bool:
    """Whether these kernels may take the place of PyTorch's for activations like `x`."""
    return (
        type(x) is torch.Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and present()
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), x float32 [..., size]. Nothing is checked."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    size = weight.numel()
    call = _RmsNorm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps, offset
    )
    load().foveal_rms_norm(ctypes.byref(call), torch.get_num_threads())
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads x float32 [B, H, T, D] turned by cos and sin [B or 1, 1, T, half]; contiguous.

    Nothing is checked.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = x.new_empty(x.shape)
    call = _Rotate(
        x.data_ptr(),
        *x.stride()[:3],
        *(cos.data_ptr(), sin.data_ptr()),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        y.data_ptr(),
        *x.shape,
        cos.shape[-1],
    )
    load().foveal_rotate(ctypes.byref(call), torch.get_num_threads())
    return y
