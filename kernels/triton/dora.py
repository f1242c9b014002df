"""Triton: DoRA over a 4-bit weight: the norms of the rows of Ŵ + s·B·A, and the layer that divides by them.

    ‖Ŵ + s·B·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ  for each row w of Ŵ and b of B = lora_B, with A = lora_A

so that neither B·A nor Ŵ is ever formed: one pass over the packed weight gives ‖w‖² and Ŵ·Aᵀ, the Gram matrix A·Aᵀ is
``rank²``. The layer itself is `qlora_linear` with magnitude / norm as its ``gain``.

Accuracy: ‖w‖² is summed in float32 from float32 values; A·w and the Gram term are float32 sums of products in the dtype
of lora_A. What is rounded is of the order of (‖w‖ + ‖s·b·A‖)², so where adapter and weight nearly cancel, the relative
error of the norm grows by the square of how much larger they are than their sum; a negative sum is taken as 0.

Source: Liu et al. 2024 (arXiv 2402.09353), equation 5, and "Scaling DoRA" for the three terms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration
from harlora.kernels.triton import nf4, qlora_linear
from harlora.kernels.triton.nf4 import cast, cdiv, power_of_two
from harlora.kernels.triton.qlora_linear import codes, dot

# Its arithmetic is little beside decoding, so one tile serves every size. With 4 warps the sums of 64 ranks spill.
_CONFIGURATION = Configuration("direct", 16, 32, 64, num_warps=8, num_stages=3, permute=False)
_RANKS = 64  # how much of the rank is summed up at once, half of it with indices in registers; each decodes anew


@triton.jit
def _dora_norm_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, lora_A_ptr, lora_B_ptr, gram_ptr,
    norm_ptr, out_features, in_features, rank, scaling,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The norms of ``BLOCK_N`` rows."""
    dtype: tl.constexpr = lora_A_ptr.dtype.element_ty
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    n_mask = row < out_features
    nested_offset = 0.0
    if NESTED:
        nested_offset = tl.load(nested_offset_ptr)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first_rank in range(0, RANK, STEP):
        r = first_rank + tl.arange(0, STEP)
        squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        cross = tl.zeros((BLOCK_N, STEP), tl.float32)  # of these rows of Ŵ and of A
        for first in range(0, in_features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_mask = k < in_features
            a = tl.load(
                lora_A_ptr + (r * in_features)[:, None] + k[None, :], (r < rank)[:, None] & k_mask[None, :], other=0.0
            )
            if ALIGNED:  # in_features is a multiple of BLOCK_K
                # Decoded to float32: the codes' rounding to 16 bits is the same in every row and would not average out.
                code, scale = codes(
                    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, row, n_mask, first,
                    in_features, QUANT_TYPE, BLOCKSIZE, NESTED, False, tl.float32, BLOCK_K,
                )  # fmt: skip
                squares += code * code * (scale * scale)[:, None]
                part = dot(cast(code, dtype), tl.trans(a), tl.zeros((BLOCK_N, STEP), tl.float32), PRECISION)
                cross += part * scale[:, None]
            else:
                weight = nf4.gather(
                    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr,
                    (row * in_features)[:, None] + k[None, :], n_mask[:, None] & k_mask[None, :],
                    QUANT_TYPE, BLOCKSIZE, NESTED, WIDE,
                )  # fmt: skip
                squares += weight * weight
                cross = dot(cast(weight, dtype), tl.trans(a), cross, PRECISION)
        if first_rank == 0:
            total += tl.sum(squares, axis=1)
        both = tl.zeros((BLOCK_N, STEP), tl.float32)  # b·(A·Aᵀ)
        for other_rank in range(0, RANK, STEP):
            q = other_rank + tl.arange(0, STEP)
            b = tl.load(
                lora_B_ptr + (row * rank)[:, None] + q[None, :], n_mask[:, None] & (q < rank)[None, :], other=0.0
            )
            gram = tl.load(
                gram_ptr + (q * rank)[:, None] + r[None, :], (q < rank)[:, None] & (r < rank)[None, :], other=0.0
            )
            both = dot(b.to(tl.float32), gram, both, GRAM_PRECISION)
        b = tl.load(lora_B_ptr + (row * rank)[:, None] + r[None, :], n_mask[:, None] & (r < rank)[None, :], other=0.0)
        total += scaling * tl.sum(b.to(tl.float32) * (2.0 * cross + scaling * both), axis=1)
    # Not tl.maximum, which would make 0 of a NaN.
    tl.store(norm_ptr + row, tl.sqrt(tl.where(total < 0.0, 0.0, total)), n_mask)


def dora_norm(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """As `reference.dora_norm`."""
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    (rank, in_features), out_features = lora_A.shape, len(lora_B)
    norm = torch.empty(out_features, dtype=torch.float32, device=lora_A.device)
    call = qlora_linear.Call(
        (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize), _CONFIGURATION,
        0, in_features, out_features, rank, lora_A.dtype, lora_A.device,
    )  # fmt: skip
    _, block_n, block_k = call.tile()
    constants = call.constants()
    del constants["PERMUTE"]
    step = min(_RANKS if call.aligned else _RANKS // 2, max(16, power_of_two(rank)))
    if out_features:
        with nf4.on_device(lora_A):
            wide = lora_A.float()
            _dora_norm_kernel[(cdiv(out_features, block_n),)](
                *call.weight(), lora_A, lora_B, wide @ wide.T, norm, out_features, in_features, rank, scaling,
                RANK=step * max(1, cdiv(rank, step)), STEP=step,
                GRAM_PRECISION=qlora_linear.precision(torch.float32), BLOCK_N=block_n, BLOCK_K=block_k, **constants,
            )  # fmt: skip
    return norm


def dora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor,
    *,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """As `reference.dora_linear`."""
    return qlora_linear.qlora_linear(
        x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features, bias, lora_A, lora_B,
        scaling, configuration=configuration, gain=gain.contiguous(),
    )  # fmt: skip
