"""Triton: one 4-bit weight under a pool of adapters, of which each row of x uses its own or none.

    y = x·Ŵᵀ + bias + t·lora_Bᵀ,  t = scaling_j·x·A_jᵀ in the columns of the row's adapter j, 0 in all others

lora_A and lora_B hold all adapters beside each other, so that ranks may differ and a rank of 0 takes no room. One
launch computes t, `qlora_linear` the rest with this t. Tiles of t that no row uses are not computed, and `qlora_linear`
mostly leaves out the steps of the rank that a tile of rows has no use for, so rows that are sorted by adapter have
least to do; unsorted ones have the same result. Which adapter a row uses is read by the kernels alone: nothing waits
for the device, and a CUDA graph that was captured takes other adapters when ``index`` is overwritten.

Source: S-LoRA (Sheng et al. 2023, arXiv 2311.03285), section 5, over a 4-bit weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration
from harlora.kernels.triton import nf4, qlora_linear
from harlora.kernels.triton.nf4 import cast, cdiv
from harlora.kernels.triton.qlora_linear import dot


@triton.jit(do_not_specialize=["rows", "adapters"])
def _lora_pool_kernel(
    x_ptr, lora_A_ptr, offsets_ptr, index_ptr, scaling_ptr, t_ptr, rows, in_features, rank, adapters, stride_x,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of t, ``(BLOCK_M, BLOCK_R)``."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    r = (tl.program_id(0) // tiles_m) * BLOCK_R + tl.arange(0, BLOCK_R)
    adapter = tl.load(index_ptr + m, m < rows, other=-1)
    known = (adapter >= 0) & (adapter < adapters)  # no read past the offsets, whatever index holds
    begin = tl.load(offsets_ptr + adapter, known, other=0)
    end = tl.load(offsets_ptr + adapter + 1, known, other=0)
    scaling = tl.load(scaling_ptr + adapter, known, other=0.0)
    own = (r[None, :] >= begin[:, None]) & (r[None, :] < end[:, None]) & (r < rank)[None, :]
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if tl.max(tl.max(own.to(tl.int32), axis=1), axis=0) > 0:
        for first in range(0, in_features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            mask = k < in_features
            x = tl.load(x_ptr + (m * stride_x)[:, None] + k[None, :], (m < rows)[:, None] & mask[None, :], other=0.0)
            a = tl.load(
                lora_A_ptr + (r.to(tl.int64) * in_features)[:, None] + k[None, :],
                (r < rank)[:, None] & mask[None, :], other=0.0,
            )  # fmt: skip
            t = dot(x, tl.trans(a), t, PRECISION)
    t = tl.where(own, t * scaling[:, None], 0.0)
    tl.store(t_ptr + (m * rank)[:, None] + r[None, :], cast(t, dtype), (m < rows)[:, None] & (r < rank)[None, :])


def lora_pool_low(x: Tensor, lora_A: Tensor, offsets: Tensor, index: Tensor, scaling: Tensor) -> Tensor:
    """As `reference.lora_pool_low`."""
    flat, lora_A, rank = qlora_linear.flattened(x), lora_A.contiguous(), len(lora_A)
    t = x.new_empty((len(flat), rank))
    if t.numel():
        block_m, block_r = 16 if len(flat) <= 16 else 32, 32
        tiles = cdiv(len(flat), block_m) * cdiv(rank, block_r)
        with nf4.on_device(x):
            _lora_pool_kernel[(tiles,)](
                flat, lora_A, offsets.contiguous(), index.contiguous(), scaling.contiguous(), t, len(flat),
                x.shape[-1], rank, len(scaling), flat.stride(0), PRECISION=qlora_linear.precision(x.dtype),
                BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=64 if x.dtype != torch.float32 else 32, num_warps=4,
                num_stages=4,
            )  # fmt: skip
    return t.view(*x.shape[:-1], rank)


def lora_pool_linear(
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
    offsets: Tensor,
    index: Tensor,
    scaling: Tensor,
    *,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """As `reference.lora_pool_linear`."""
    t = lora_pool_low(x, lora_A, offsets, index, scaling)
    return qlora_linear.qlora_linear(
        x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features, bias, None, lora_B, 1.0,
        configuration=configuration, t=t,
    )  # fmt: skip
