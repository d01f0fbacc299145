"""Norm, rotation and experts in the form that machines are fast at, and the precision they compute in.

Shapes:  B batch   T tokens   D hidden   H heads   d head width   E experts   N = B * T   k experts of a token
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision that matrix products of this tensor run in: autocast's where it is on."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # meta tensors know no autocast
    return torch.get_autocast_dtype(device) if on else x.dtype


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight in `dtype`, rms in float32: (..., D), weight (D,) -> (..., D).

    Its own backward keeps x and one number a row, where autograd would keep and walk through every step of the formula:
    with n = x / rms(x) and h = grad * weight, dx = (h - n mean(h n)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm * norm / x.shape[-1] + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(dtype) * weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        h = grad.float() * weight
        mean = (h * normed).sum(-1, keepdim=True) / x.shape[-1]  # (..., 1)
        grad_x = h.addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight in the precision of the matrix products: (..., D), weight (D,) -> (..., D).

    In the one kernel that CUDA has for it; torch.compile makes one of the formula.
    """
    dtype = compute_dtype(x)
    if x.device.type == "cuda" and x.dtype == weight.dtype and not torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return Normalise.apply(x, weight, eps, dtype)


class Rotate(torch.autograd.Function):
    """Turn each pair (a, b) = (x[i], x[i + d/2]) to (a cos - b sin, b cos + a sin): (B, T, H, d) -> (B, T, H, d).

    The gradient is the turn back: nothing but the tables is kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return turned(grad, *ctx.saved_tensors, sign=-1), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    out = x * cos
    out_a, out_b = out.chunk(2, dim=-1)
    out_a.addcmul_(b, sin, value=-sign)
    out_b.addcmul_(a, sin, value=sign)
    return out


def each_expert(experts: nn.ModuleList, x: Tensor, counts: Tensor) -> Tensor:
    """x (N k, D) sorted by expert, counts (E,) -> (N k, D).

    An expert without tokens runs on an empty slice, so that its gradient is zero and not None (DDP waits for it).
    """
    slices = x.split(counts.tolist())
    return torch.cat([expert(part) for expert, part in zip(experts, slices, strict=True)])


def grouped_experts(experts: nn.ModuleList, x: Tensor, counts: Tensor) -> Tensor:
    """The same as one product per matrix, with the slice borders left on the device."""
    ends = counts.cumsum(0, dtype=torch.int32)

    def product(x: Tensor, name: str) -> Tensor:
        weights = torch.stack([getattr(expert, name).weight for expert in experts]).to(x.dtype)  # (E, out, in)
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)

    return product(F.silu(product(x, "gate_proj")) * product(x, "up_proj"), "down_proj")


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether the grouped product has a kernel for these tensors: bfloat16, rows of whole 16 bytes, capability 9.

    On older GPUs torch fetches the borders for every product, six times a layer and step, and goes expert by expert.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or any(size % 8 for size in weight.shape):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def are_plain(experts: nn.ModuleList) -> bool:
    """Whether the weights are all that the experts' layers compute with: an adapter (LoRA) stands beside them."""
    return all(type(layer) is nn.Linear for expert in experts for layer in expert.children())
