"""One 4-bit weight under a pool of low-rank adapters, of which each row of a batch uses its own or none."""

import torch
from torch import Tensor

from harlora.kernels.format import QuantizedWeight
from harlora.kernels.ops import as_autocast, check_weight, refuse_forward_mode


def lora_pool_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    index: Tensor,
    scaling: Tensor,
) -> Tensor:
    """A linear layer over a 4-bit weight in which each row has its own adapter, ``(..., out_features)``.

    y = x·Ŵᵀ + bias + scaling_j·(x·A_jᵀ)·B_jᵀ, j = index of the row, A_j = lora_A[offsets[j] : offsets[j + 1]],
    B_j = lora_B[:, offsets[j] : offsets[j + 1]]

    Gradients flow to x, bias, lora_A and lora_B. No value leaves the device, so the call can be captured into a CUDA
    graph and ``index`` overwritten between replays; hence values are not checked: a row whose index names no adapter
    has none. Dtypes are treated as in `qlora_linear`. NaN or infinity in an adapter's lora_B may reach all
    rows.

    x: ``(..., in_features)``, float32, bfloat16, float16 or float64.
    weight: of shape ``(out_features, in_features)``.
    bias: ``(out_features,)``.
    lora_A: ``(total_rank, in_features)``; lora_B: ``(out_features, total_rank)``: the adapters' side by side.
    offsets: ``(adapters + 1,)``, int64, from 0 to total_rank and never falling; a rank may be 0.
    index: ``(...)``, int64, from 0 to adapters - 1, or -1 for none.
    scaling: ``(adapters,)``, float32, without gradient.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: Sheng et al. 2023, S-LoRA (arXiv 2311.03285), section 5.
    """
    check_weight("lora_pool_linear", x, weight)
    if scaling.requires_grad:
        raise ValueError("lora_pool_linear: scaling must not require a gradient, which is not computed; detach it")
    refuse_forward_mode("lora_pool_linear", x, bias, lora_A, lora_B)
    x = as_autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    y: Tensor = torch.ops.harlora.lora_pool_linear(
        x, *weight.arguments(), weight.shape[0], bias, lora_A, lora_B, offsets, index, scaling
    )[0]
    return y
