"""DoRA over a 4-bit weight: the direction of Ŵ + scaling·lora_B·lora_A with a learnt magnitude for each output."""

import torch
from torch import Tensor

from harlora.kernels.format import QuantizedWeight
from harlora.kernels.ops import as_autocast, check_devices, check_qlora, check_weight, refuse_forward_mode


def dora_norm(weight: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """‖Ŵ + scaling·lora_B·lora_A‖ of each row, ``(out_features,)``: the magnitude at which DoRA changes nothing.

    Float32, or float64 with adapters in it; not differentiable, as `dora_linear` takes it for a constant.

    weight: of shape ``(out_features, in_features)``.
    lora_A: ``(rank, in_features)``; lora_B: ``(out_features, rank)``.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"dora_norm: weight must have shape (out_features, in_features), got {weight.shape}")
    if lora_B.shape[:1] != weight.shape[:1]:
        raise ValueError(f"dora_norm: lora_B must have shape ({weight.shape[0]}, rank), got {tuple(lora_B.shape)}")
    norm: Tensor = torch.ops.harlora.dora_norm(*weight.arguments(), lora_A.detach(), lora_B.detach(), scaling)
    return norm


def dora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """A linear layer over a 4-bit weight with DoRA, ``(..., out_features)``.

    y = gain·(x·Ŵᵀ + scaling·(x·lora_Aᵀ)·lora_Bᵀ) + bias, gain = magnitude / ‖Ŵ + scaling·lora_B·lora_A‖ of each row

    Gradients flow to x, bias, lora_A, lora_B and magnitude, with the norm a constant (section 4.3 of the paper, and
    PEFT). Backward keeps x and x·lora_Aᵀ; for magnitude it computes the layer without gain again, which takes no more
    memory and does not divide by a magnitude that is 0. Dtypes are treated as in `qlora_linear`; gain is float32.

    x: ``(..., in_features)``, float32, bfloat16, float16 or float64.
    weight: of shape ``(out_features, in_features)``; a row whose norm is 0 has no direction, and gives NaN.
    bias, magnitude: ``(out_features,)``; lora_A: ``(rank, in_features)``; lora_B: ``(out_features, rank)``.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: Liu et al. 2024 (arXiv 2402.09353), equation 5.
    """
    check_weight("dora_linear", x, weight)
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(f"dora_linear: magnitude must have shape ({weight.shape[0]},), got {tuple(magnitude.shape)}")
    if not magnitude.is_floating_point():
        raise TypeError(f"dora_linear: magnitude must be of a floating-point dtype, got {magnitude.dtype}")
    refuse_forward_mode("dora_linear", x, bias, lora_A, lora_B, magnitude)
    x = as_autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    quantized = weight.arguments()
    check_qlora("dora_linear", x, weight.shape[1], quantized, weight.shape[0], bias, lora_A, lora_B)
    check_devices("dora_linear", x, magnitude=magnitude)
    norm = dora_norm(weight, lora_A, lora_B, scaling)
    gain = magnitude.to(norm.dtype) / norm
    y: Tensor = torch.ops.harlora.dora_linear(x, *quantized, weight.shape[0], bias, lora_A, lora_B, scaling, gain)[0]
    return y
