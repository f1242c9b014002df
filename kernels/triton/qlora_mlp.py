"""Triton: fc2(gelu(fc1(x))) over two 4-bit layers in one launch, for small models, where launches are the cost.

Each program takes a few rows of x through both layers: a part of h = fc1(x) at a time is computed, put through GELU and
multiplied into y while it is on the chip, so that gelu(h) is never written. Backward needs h, which is written once.
Every program decodes both weights, so this pays for few rows and small weights alone (`fits`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration
from harlora.kernels.format import nested_code_table
from harlora.kernels.reference import Layer
from harlora.kernels.triton import nf4
from harlora.kernels.triton.nf4 import INTERPRETED, cast, cdiv, power_of_two
from harlora.kernels.triton.qlora_linear import FUSED_RANK, codes, dot, flattened, precision

MOST_OUT = 256  # y of a program is in registers
MOST_HIDDEN = 1024
MOST_ROWS = 4096


@triton.jit
def _gelu(h):
    """h·Φ(h), exactly, as torch's default; h is float32."""
    return 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def _qlora_mlp_fwd_kernel(
    x_ptr, packed1, packed2, absmax1, absmax2, nested1, nested2, offset1, offset2, nested_code_ptr,
    bias1, bias2, A1, A2, B1, B2, y_ptr, h_ptr, t1_ptr, t2_ptr,
    rows, in_features, hidden, out_features, rank1, rank2, scaling1, scaling2, stride_x,
    QUANT1: tl.constexpr, QUANT2: tl.constexpr, BLOCKSIZE1: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    NESTED1: tl.constexpr, NESTED2: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RANK1: tl.constexpr,
    RANK2: tl.constexpr, KEEP: tl.constexpr, PERMUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows of y, and with KEEP of h, t1 and t2. in_features and hidden are multiples of their blocksize."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_mask, n_mask = m < rows, n < out_features
    nested_offset1 = 0.0
    if NESTED1:
        nested_offset1 = tl.load(offset1)
    nested_offset2 = 0.0
    if NESTED2:
        nested_offset2 = tl.load(offset2)
    t1 = tl.zeros((RANK1 if RANK1 > 0 else 16, BLOCK_M), tl.float32)
    r1 = tl.arange(0, RANK1 if RANK1 > 0 else 16)
    if RANK1 > 0:
        for first in range(0, in_features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + (m * stride_x)[:, None] + k[None, :], m_mask[:, None], other=0.0)
            a = tl.load(A1 + (r1 * in_features)[:, None] + k[None, :], (r1 < rank1)[:, None], other=0.0)
            t1 = dot(cast(a, dtype), tl.trans(x), t1, PRECISION)
    low1 = cast(t1, dtype)
    if RANK1 > 0 and KEEP:
        tl.store(t1_ptr + (m * rank1)[None, :] + r1[:, None], low1, m_mask[None, :] & (r1 < rank1)[:, None])
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    t2 = tl.zeros((RANK2 if RANK2 > 0 else 16, BLOCK_M), tl.float32)
    r2 = tl.arange(0, RANK2 if RANK2 > 0 else 16)
    for start in range(0, hidden, BLOCK_H):
        f = start + tl.arange(0, BLOCK_H)
        f_mask = f < hidden
        h = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        for first in range(0, in_features, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + (m * stride_x)[:, None] + k[None, :], m_mask[:, None], other=0.0)
            code, scale = codes(
                packed1, absmax1, nested1, nested_offset1, nested_code_ptr, f.to(tl.int64), f_mask, first, in_features,
                QUANT1, BLOCKSIZE1, NESTED1, PERMUTE, dtype, BLOCK_K,
            )  # fmt: skip
            h += dot(code, tl.trans(x), tl.zeros((BLOCK_H, BLOCK_M), tl.float32), PRECISION) * scale[:, None]
        if RANK1 > 0:
            b = tl.load(B1 + (f * rank1)[:, None] + r1[None, :], f_mask[:, None] & (r1 < rank1)[None, :], other=0.0)
            h += scaling1 * dot(cast(b, dtype), low1, tl.zeros((BLOCK_H, BLOCK_M), tl.float32), PRECISION)
        if BIAS1:
            h += tl.load(bias1 + f, f_mask, other=0.0).to(tl.float32)[:, None]
        if KEEP:
            tl.store(h_ptr + (m * hidden)[None, :] + f[:, None], cast(h, dtype), m_mask[None, :] & f_mask[:, None])
        active = cast(_gelu(h), dtype)
        code, scale = codes(
            packed2, absmax2, nested2, nested_offset2, nested_code_ptr, n, n_mask, start, hidden,
            QUANT2, BLOCKSIZE2, NESTED2, PERMUTE, dtype, BLOCK_H,
        )  # fmt: skip
        y += dot(code, active, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION) * scale[:, None]
        if RANK2 > 0:
            a = tl.load(A2 + (r2 * hidden)[:, None] + f[None, :], (r2 < rank2)[:, None] & f_mask[None, :], other=0.0)
            t2 = dot(cast(a, dtype), active, t2, PRECISION)
    if RANK2 > 0:
        low2 = cast(t2, dtype)
        if KEEP:
            tl.store(t2_ptr + (m * rank2)[None, :] + r2[:, None], low2, m_mask[None, :] & (r2 < rank2)[:, None])
        b = tl.load(B2 + (n * rank2)[:, None] + r2[None, :], n_mask[:, None] & (r2 < rank2)[None, :], other=0.0)
        y += scaling2 * dot(cast(b, dtype), low2, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
    if BIAS2:
        y += tl.load(bias2 + n, n_mask, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + (m * out_features)[None, :] + n[:, None], cast(y, dtype), m_mask[None, :] & n_mask[:, None])


def fits(x: Tensor, fc1: Layer, fc2: Layer) -> bool:
    """Whether one launch takes both layers: few rows, small weights whose blocks do not cross rows, narrow adapters."""
    in_features, hidden, out_features = x.shape[-1], fc1[6], fc2[6]
    ranks = [0 if layer[8] is None else layer[8].shape[0] for layer in (fc1, fc2)]
    return (
        0 < x.numel() <= MOST_ROWS * in_features
        and in_features % fc1[5] == 0
        and hidden % fc2[5] == 0
        and hidden <= MOST_HIDDEN
        and in_features <= MOST_HIDDEN
        and out_features <= MOST_OUT
        and max(ranks) <= FUSED_RANK
    )


def qlora_mlp(
    x: Tensor, fc1: Layer, fc2: Layer, keep: bool, *, configuration: Configuration
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.qlora_mlp`, of layers that `fits` takes; h, t1 and t2 are empty without ``keep``."""
    leading, flat = x.shape[:-1], flattened(x)
    in_features, hidden, out_features = x.shape[-1], fc1[6], fc2[6]
    ranks = [0 if layer[8] is None else layer[8].shape[0] for layer in (fc1, fc2)]
    y = x.new_empty((*leading, out_features))
    h = x.new_empty((*leading, hidden) if keep else 0)
    t1, t2 = (x.new_empty((*leading, rank) if keep and rank else 0) for rank in ranks)
    pairs = [
        None if one is None else one.contiguous()
        for place in (0, 1, 2, 3, 7, 8, 9)
        for one in (fc1[place], fc2[place])
        if one is None or isinstance(one, Tensor)
    ]
    nested = fc1[2] is not None or fc2[2] is not None
    block_m = 16 if len(flat) <= 1024 or x.dtype == torch.float32 else 32  # whose sums would not fit the registers
    with nf4.on_device(x):
        _qlora_mlp_fwd_kernel[(cdiv(len(flat), block_m),)](
            flat, *pairs[:8], nested_code_table(x.device) if nested else None, *pairs[8:], y, h, t1, t2,
            len(flat), in_features, hidden, out_features, *ranks, fc1[10], fc2[10], flat.stride(0),
            QUANT1=fc1[4], QUANT2=fc2[4], BLOCKSIZE1=fc1[5], BLOCKSIZE2=fc2[5], NESTED1=fc1[2] is not None,
            NESTED2=fc2[2] is not None, BIAS1=fc1[7] is not None, BIAS2=fc2[7] is not None,
            RANK1=_padded(ranks[0]), RANK2=_padded(ranks[1]), KEEP=keep,
            PERMUTE=configuration.permute and not INTERPRETED,
            PRECISION=precision(x.dtype), BLOCK_M=block_m, BLOCK_N=max(16, power_of_two(out_features)),
            BLOCK_H=min(fc2[5], 64 if x.dtype != torch.float32 else 32), BLOCK_K=min(fc1[5], 64), num_warps=8,
            num_stages=2,
        )  # fmt: skip
    return y, h, t1, t2


def _padded(rank: int) -> int:
    return max(16, power_of_two(rank)) if rank else 0
