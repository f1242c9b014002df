"""Triton: which values of an adapter's input are dropped, by kernels/dropout.py, computed where they are needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels import dropout
from harlora.kernels.triton.nf4 import cast, cdiv

ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)


@triton.jit
def kept(seed, row, first, limit, BLOCK: tl.constexpr):
    """Whether each of ``BLOCK`` columns from ``first`` on, a multiple of 8, is kept in each row, ``(rows, BLOCK)``."""
    group = (first // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint32)
    row_of = row.to(tl.uint32)[:, None] + (group * 0)[None, :]
    group_of = (row.to(tl.uint32) * 0)[:, None] + group[None, :]
    w0, w1, w2, w3 = tl.philox(seed, row_of, group_of, row_of * 0, row_of * 0, ROUNDS)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= limit


@triton.jit
def rescale(limit):
    """What kept values are multiplied by."""
    return 65536.0 / (65536 - limit).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "limit"])
def _dropout_kernel(
    x_ptr, seed_ptr, out_ptr, rows, columns, limit, stride_x, stride_out, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One tile of x with zeros where values are dropped and the others multiplied; out may be x."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = tl.program_id(0) // tiles_m * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    mask = (m < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_ptr + (m * stride_x)[:, None] + c[None, :], mask, other=0.0).to(tl.float32)
    x = tl.where(kept(tl.load(seed_ptr), m, first, limit, BLOCK_C), x * rescale(limit), 0.0)
    tl.store(out_ptr + (m * stride_out)[:, None] + c[None, :], cast(x, out_ptr.dtype.element_ty), mask)


def dropped(x: Tensor, share: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """As `dropout.dropped`, of ``x`` whose rows are contiguous each, into ``out`` if given, which may be ``x``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    block_m, block_c = 8, 256
    tiles = cdiv(len(x), block_m) * cdiv(x.shape[1], block_c)
    if tiles:
        _dropout_kernel[(tiles,)](
            x, seed, out, len(x), x.shape[1], dropout.limit(share), x.stride(0), out.stride(0), BLOCK_M=block_m,
            BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out
