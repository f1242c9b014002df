"""The layer's ways in CUDA C++: what each serves, and the calls. dispatch.py chooses between them and Triton's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import cpp
from harlora.kernels.configurations import GEMV_ROWS
from harlora.kernels.format import code_table

STEP = 64  # values of k that must have one scale, for qlora_gemv.cu


def qlora_gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.qlora_linear`, for what `serves`; lora_A and lora_B may be float32, rounded as they are read."""
    rows, rank = x.numel() // x.shape[-1], 0 if lora_A is None else lora_A.shape[0]
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    y, t = x.new_empty(rows, out_features), x.new_empty((rows, rank) if lora_A is not None else 0)
    nested = cpp.nested_scales(nested_absmax, nested_offset)
    bias, lora_A, lora_B = (None if each is None else each.contiguous() for each in (bias, lora_A, lora_B))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    torch.ops.harlora_cpp.qlora_gemv(
        flat, packed, absmax, code_table(quant_type, x.device), blocksize, bias, lora_A, lora_B, scaling, y, t, *nested,
        stream=stream,
    )  # fmt: skip
    leading = x.shape[:-1]
    return y.view(*leading, out_features), t.view(*leading, rank) if lora_A is not None else t


def _serves_gemv(x: Tensor, *arguments: Any) -> bool:
    packed, *_, blocksize, out_features, _, lora_A, lora_B, _ = arguments[:11]
    seed = arguments[12] if len(arguments) > 12 else None
    in_features = x.shape[-1]
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and 0 < x.numel() <= GEMV_ROWS * in_features
        and out_features > 0 and blocksize >= STEP and in_features % blocksize == 0
        and seed is None
        and all(each is None or each.dtype in (x.dtype, torch.float32) for each in (lora_A, lora_B))
        and all(each is None or each.data_ptr() % 16 == 0 for each in (x, packed, lora_A))
    )  # fmt: skip


# The ways of each operator, fastest first.
WAYS: dict[str, dict[str, Callable[..., Any]]] = {"qlora_linear": {"gemv": qlora_gemv}}
_SERVES: dict[str, Callable[..., bool]] = {"gemv": _serves_gemv}
PROVEN_ROWS = {"gemv": GEMV_ROWS - 1}  # of the problem on which a way is proven: of the columns of a product not all


def serves(operator: str, way: str, *arguments: Any) -> bool:
    """Whether a way is for such arguments of ``operator``, on a GPU."""
    if way not in WAYS.get(operator, {}) or cpp.load_extension() or not cpp.has_kernel(f"qlora_{way}", "cuda"):
        return False
    return arguments[0].is_cuda and _SERVES[way](*arguments)
