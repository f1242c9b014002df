"""Triton: the linear layer over a 4-bit weight with a low-rank adapter, forward and backward.

    y = x·Ŵᵀ + bias + scaling·t·lora_Bᵀ,  t = x·lora_Aᵀ
    dX = dY·Ŵ + u·lora_A,  u = scaling·dY·lora_B,  dA = uᵀ·x,  dB = scaling·dYᵀ·t

Three ways, which a `Configuration` names:

- ``direct``: one launch. Each program decodes its part of the weight in registers, multiplies on tensor cores and adds
  bias and adapter before it writes; t (or u) is summed up beside it from the same x (or dY).
- ``split``: for few rows. The programs share the sum among them as well, t being one more tile, and write float32
  parts; a second launch adds them in order, so that the result does not depend on which program was first.
- ``dense``: for many rows. The library's products write bias + scaling·t·lora_Bᵀ (or u·lora_A), rounded to the dtype of
  y, and add to it x·Ŵᵀ (or dY·Ŵ), for which the weight is dequantised in chunks of bounded size.

For other families of adapters the forward also takes a ``gain`` for each column of y before bias (DoRA), and a t that
was computed elsewhere and may be zero for most of the rank (a pool of adapters).

Tokens are the last dimension of the products (yᵀ = Ŵ·xᵀ), so that the decoded weight is the operand that tensor cores
of sm_90 take from registers. Where blocks do not cross rows the codes alone are multiplied, and the float32 sum of each
step scaled, unless there are many tokens. A shape with odd rows or blocks across rows takes the general way: the same
sums, by the index.

Numbers that change from call to call are not specialised (``do_not_specialize``): one row must not be compiled apart
from two, which would take a second and leave what was compiled last unchecked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration, tf32_allowed
from harlora.kernels.dropout import limit as dropout_limit
from harlora.kernels.dropout import rescale as dropout_rescale
from harlora.kernels.format import nested_code_table
from harlora.kernels.triton import nf4
from harlora.kernels.triton.dropout import dropped, kept, rescale
from harlora.kernels.triton.nf4 import INTERPRETED, cast, cdiv, power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_RANK = 32  # up to this rank t is summed up in the kernel that reads x; its sums take registers
CHUNK_BYTES = 2**25  # of dequantised weight: what stays in the last cache of the large GPUs
CHUNK_STEP = 128  # rows or columns: what of y and dX a chunk writes begins at whole tiles of the library's products
MOST_TILES_WITH_DROPOUT = 8  # of y next to each other, each of which computes anew what is dropped of x; not measured
GRADS_COLUMNS = 64  # of dA, or rows of dB, that a program sums up
WORKSPACE_BYTES = 2**26  # of parts of sums


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Acc + a·b in float32. The interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _any(tile):
    """Whether a value of ``tile`` is not zero; NaN is not."""
    return tl.max(tl.max((tile.to(tl.float32) != 0.0).to(tl.int32), axis=0), axis=0) > 0


@triton.jit
def codes(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, row, mask, first, in_features,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes of ``BLOCK`` columns from ``first`` on of some rows, which are of one block, and its scale for each row."""
    byte = tl.load(
        packed_ptr + (row * (in_features // 2))[:, None] + (first // 2 + tl.arange(0, BLOCK // 2))[None, :],
        mask[:, None],
        other=0,
    )
    scale = nf4.scales(
        absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr,
        row * (in_features // BLOCKSIZE) + first // BLOCKSIZE, mask, NESTED,
    )  # fmt: skip
    return nf4.decode(byte, QUANT_TYPE, DTYPE, PERMUTE), scale


@triton.jit
def forward_sums(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, lora_A_ptr,
    row, m, rows, out_features, in_features, rank, stride_x, begin, end, seed, limit,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ŵ·xᵀ ``(BLOCK_N, BLOCK_M)`` and, unless RANK is 0, tᵀ ``(RANK, BLOCK_M)``, over columns ``begin`` to ``end``.

    With DROPOUT t is of the kept values of x, which are not yet multiplied.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    t = tl.zeros((RANK if RANK > 0 else 16, BLOCK_M), tl.float32)
    r = tl.arange(0, RANK if RANK > 0 else 16)
    n_mask, m_mask = row < out_features, m < rows
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_mask = k < in_features
        if ALIGNED:  # in_features is a multiple of BLOCK_K
            x = tl.load(x_ptr + (m * stride_x)[:, None] + k[None, :], m_mask[:, None], other=0.0)
            code, scale = codes(
                packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, row, n_mask, first,
                in_features, QUANT_TYPE, BLOCKSIZE, NESTED, PERMUTE, dtype, BLOCK_K,
            )  # fmt: skip
            if BLOCK_M < 128:
                part = dot(code, tl.trans(x), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
                acc += part * scale[:, None]
            else:  # scaling the sums takes more instructions than scaling the codes, and their registers
                acc = dot(cast(code.to(tl.float32) * scale[:, None], dtype), tl.trans(x), acc, PRECISION)
        else:
            x = tl.load(x_ptr + (m * stride_x)[:, None] + k[None, :], m_mask[:, None] & k_mask[None, :], other=0.0)
            weight = nf4.gather(
                packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr,
                (row * in_features)[:, None] + k[None, :], n_mask[:, None] & k_mask[None, :],
                QUANT_TYPE, BLOCKSIZE, NESTED, WIDE,
            )  # fmt: skip
            acc = dot(cast(weight, dtype), tl.trans(x), acc, PRECISION)
        if RANK > 0:
            a = tl.load(
                lora_A_ptr + (r * in_features)[:, None] + k[None, :], (r < rank)[:, None] & k_mask[None, :], other=0.0
            )
            if DROPOUT:
                x = tl.where(kept(seed, m, first, limit, BLOCK_K), x, 0.0)
            t = dot(cast(a, dtype), tl.trans(x), t, PRECISION)
    return acc, t


@triton.jit(do_not_specialize=["rows", "limit"])
def _qlora_linear_fwd_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, bias_ptr, gain_ptr,
    lora_A_ptr, lora_B_ptr, y_ptr, t_ptr, rows, out_features, in_features, rank, scaling, stride_x, seed_ptr, limit,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, FUSED: tl.constexpr, SPARSE: tl.constexpr,
    BIAS: tl.constexpr, GAIN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y; with FUSED also t, which the first tile of each row writes, otherwise t is read.

    SPARSE: steps of the rank in which the tile's t is zero are left out.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_n = tl.program_id(0) // tiles_m
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    nested_offset = 0.0
    if NESTED:
        nested_offset = tl.load(nested_offset_ptr)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc, t = forward_sums(
        x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, lora_A_ptr,
        n, m, rows, out_features, in_features, rank, stride_x, 0, in_features, seed, limit,
        QUANT_TYPE, BLOCKSIZE, NESTED, ALIGNED, WIDE, PERMUTE, RANK if FUSED else 0, DROPOUT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if DROPOUT:
        t *= rescale(limit)
    if RANK > 0:
        STEP: tl.constexpr = RANK if FUSED else 32
        for first in range(0, RANK, STEP):
            r = first + tl.arange(0, STEP)
            place, inside = (m * rank)[None, :] + r[:, None], (m < rows)[None, :] & (r < rank)[:, None]
            if FUSED:
                low = cast(t, dtype)
                if pid_n == 0:
                    tl.store(t_ptr + place, low, inside)
            else:
                low = tl.load(t_ptr + place, inside, other=0.0)
            if not SPARSE or _any(low):
                b = tl.load(
                    lora_B_ptr + (n * rank)[:, None] + r[None, :],
                    (n < out_features)[:, None] & (r < rank)[None, :], other=0.0,
                )  # fmt: skip
                acc += scaling * dot(cast(b, dtype), low, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
    if GAIN:
        acc *= tl.load(gain_ptr + n, n < out_features, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, n < out_features, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + (m * out_features)[None, :] + n[:, None], cast(acc, dtype),
        (m < rows)[None, :] & (n < out_features)[:, None],
    )  # fmt: skip


@triton.jit
def low_rank_sums(
    x_ptr, low_ptr, m, rows, columns, rank, stride_x, stride_low_r, stride_low_c, begin, end, seed, limit,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """low·xᵀ ``(RANK, BLOCK_M)`` over columns ``begin`` to ``end`` of x; low is ``(rank, columns)`` by its strides.

    DROPOUT: as in `forward_sums`.
    """
    r = tl.arange(0, RANK)
    acc = tl.zeros((RANK, BLOCK_M), tl.float32)
    for first in range(begin, end, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = c < columns
        x = tl.load(x_ptr + (m * stride_x)[:, None] + c[None, :], (m < rows)[:, None] & mask[None, :], other=0.0)
        low = tl.load(
            low_ptr + (r * stride_low_r)[:, None] + (c.to(tl.int64) * stride_low_c)[None, :],
            (r < rank)[:, None] & mask[None, :], other=0.0,
        )  # fmt: skip
        if DROPOUT:
            x = tl.where(kept(seed, m, first, limit, BLOCK), x, 0.0)
        acc = dot(cast(low, x_ptr.dtype.element_ty), tl.trans(x), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "limit"])
def _qlora_linear_fwd_split_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, lora_A_ptr, part_ptr,
    t_part_ptr, rows, out_features, in_features, rank, stride_x, steps, seed_ptr, limit,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of ``steps`` columns of the sums of one tile of y, or of t, which is the tile after the last of y."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_n = tl.program_id(0) // tiles_m
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, in_features)
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part_row = tl.program_id(1).to(tl.int64) * rows + m
    if pid_n < tl.cdiv(out_features, BLOCK_N):
        nested_offset = 0.0
        if NESTED:
            nested_offset = tl.load(nested_offset_ptr)
        n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        acc, _ = forward_sums(
            x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, lora_A_ptr,
            n, m, rows, out_features, in_features, rank, stride_x, begin, end, 0, 0,
            QUANT_TYPE, BLOCKSIZE, NESTED, ALIGNED, WIDE, PERMUTE, 0, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(
            part_ptr + (part_row * out_features)[None, :] + n[:, None], acc,
            (m < rows)[None, :] & (n < out_features)[:, None],
        )  # fmt: skip
    elif RANK > 0:
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
        t = low_rank_sums(
            x_ptr, lora_A_ptr, m, rows, in_features, rank, stride_x, in_features, 1, begin, end, seed, limit,
            RANK, DROPOUT, PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        r = tl.arange(0, RANK)
        tl.store(t_part_ptr + (part_row * rank)[None, :] + r[:, None], t, (m < rows)[None, :] & (r < rank)[:, None])


@triton.jit
def backward_sums(
    grad_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, lora_B_ptr,
    m, column, rows, out_features, in_features, rank, stride_grad, begin, end,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(dY·Ŵ)ᵀ ``(BLOCK_K, BLOCK_M)`` and, unless RANK is 0, (dY·lora_B)ᵀ, over rows ``begin`` to ``end`` of Ŵ."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    u = tl.zeros((RANK if RANK > 0 else 16, BLOCK_M), tl.float32)
    r = tl.arange(0, RANK if RANK > 0 else 16)
    k = column + tl.arange(0, BLOCK_K)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_mask = n < out_features
        row = n.to(tl.int64)
        grad = tl.load(
            grad_ptr + (m * stride_grad)[:, None] + n[None, :], (m < rows)[:, None] & n_mask[None, :], other=0.0
        )
        if ALIGNED:  # the tile is within one block of each row
            code, scale = codes(
                packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, row, n_mask, column,
                in_features, QUANT_TYPE, BLOCKSIZE, NESTED, PERMUTE, dtype, BLOCK_K,
            )  # fmt: skip
            weight = cast(code.to(tl.float32) * scale[:, None], dtype)
        else:
            weight = cast(
                nf4.gather(
                    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr,
                    (row * in_features)[:, None] + k[None, :], n_mask[:, None] & (k < in_features)[None, :],
                    QUANT_TYPE, BLOCKSIZE, NESTED, WIDE,
                ),
                dtype,
            )  # fmt: skip
        acc = dot(tl.trans(weight), tl.trans(grad), acc, PRECISION)
        if RANK > 0:
            b = tl.load(
                lora_B_ptr + (row * rank)[:, None] + r[None, :], n_mask[:, None] & (r < rank)[None, :], other=0.0
            )
            u = dot(tl.trans(cast(b, dtype)), tl.trans(grad), u, PRECISION)
    return acc, u


@triton.jit(do_not_specialize=["rows", "limit"])
def _qlora_linear_dx_kernel(
    grad_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, lora_A_ptr, lora_B_ptr,
    grad_x_ptr, u_ptr, rows, out_features, in_features, rank, scaling, stride_grad, seed_ptr, limit,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, FUSED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dX; with FUSED also u, which the first tile of each row writes, otherwise u is read."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_k = tl.program_id(0) // tiles_m
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = pid_k * BLOCK_K
    k = column + tl.arange(0, BLOCK_K)
    nested_offset = 0.0
    if NESTED:
        nested_offset = tl.load(nested_offset_ptr)
    acc, u = backward_sums(
        grad_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, lora_B_ptr,
        m, column, rows, out_features, in_features, rank, stride_grad, 0, out_features,
        QUANT_TYPE, BLOCKSIZE, NESTED, ALIGNED, WIDE, PERMUTE, RANK if FUSED else 0, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if RANK > 0:
        STEP: tl.constexpr = RANK if FUSED else 32
        total = acc
        if DROPOUT:
            total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for first in range(0, RANK, STEP):
            r = first + tl.arange(0, STEP)
            place, inside = (m * rank)[None, :] + r[:, None], (m < rows)[None, :] & (r < rank)[:, None]
            if FUSED:
                low = cast(scaling * u, dtype)
                if pid_k == 0:
                    tl.store(u_ptr + place, low, inside)
            else:
                low = tl.load(u_ptr + place, inside, other=0.0)
            a = tl.load(
                lora_A_ptr + (r * in_features)[:, None] + k[None, :],
                (r < rank)[:, None] & (k < in_features)[None, :], other=0.0,
            )  # fmt: skip
            total = dot(tl.trans(cast(a, dtype)), low, total, PRECISION)
        if DROPOUT:
            keep = kept(tl.load(seed_ptr), m, column, limit, BLOCK_K)
            acc += tl.where(tl.trans(keep), total * rescale(limit), 0.0)
        else:
            acc = total
    tl.store(
        grad_x_ptr + (m * in_features)[None, :] + k[:, None], cast(acc, dtype),
        (m < rows)[None, :] & (k < in_features)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _qlora_linear_dx_split_kernel(
    grad_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, lora_B_ptr, part_ptr,
    u_part_ptr, rows, out_features, in_features, rank, stride_grad, steps,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of ``steps`` rows of Ŵ of the sums of one tile of dX, or of u, which is the tile after the last of dX."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_k = tl.program_id(0) // tiles_m
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, out_features)
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part_row = tl.program_id(1).to(tl.int64) * rows + m
    if pid_k < tl.cdiv(in_features, BLOCK_K):
        nested_offset = 0.0
        if NESTED:
            nested_offset = tl.load(nested_offset_ptr)
        k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        acc, _ = backward_sums(
            grad_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, lora_B_ptr,
            m, pid_k * BLOCK_K, rows, out_features, in_features, rank, stride_grad, begin, end,
            QUANT_TYPE, BLOCKSIZE, NESTED, ALIGNED, WIDE, PERMUTE, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(
            part_ptr + (part_row * in_features)[None, :] + k[:, None], acc,
            (m < rows)[None, :] & (k < in_features)[:, None],
        )  # fmt: skip
    elif RANK > 0:
        u = low_rank_sums(
            grad_ptr, lora_B_ptr, m, rows, out_features, rank, stride_grad, 1, rank, begin, end, 0, 0,
            RANK, False, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        r = tl.arange(0, RANK)
        tl.store(u_part_ptr + (part_row * rank)[None, :] + r[:, None], u, (m < rows)[None, :] & (r < rank)[:, None])


@triton.jit(do_not_specialize=["rows", "parts", "limit"])
def _add_parts_kernel(
    part_ptr, low_part_ptr, other_ptr, bias_ptr, gain_ptr, out_ptr, low_ptr, rows, columns, rank, before, after,
    stride_other_c, stride_other_r, parts, seed_ptr, limit,
    RANK: tl.constexpr, FUSED: tl.constexpr, SPARSE: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gain·(Σ parts + after·low·otherᵀ) + bias, with low = before·Σ of its own parts, or, unless FUSED, read.

    Forward: low is t, other lora_B. Backward: low is u, other lora_Aᵀ, and with DROPOUT their product is dropped as x
    was. SPARSE: as in `_qlora_linear_fwd_kernel`.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_c = tl.program_id(0) // tiles_m
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = (pid_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask = (m < rows)[:, None] & (c < columns)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    row = m
    for _ in range(parts):
        acc += tl.load(part_ptr + (row * columns)[:, None] + c[None, :], mask, other=0.0)
        row += rows
    if RANK > 0:
        STEP: tl.constexpr = RANK if FUSED else 32
        if DROPOUT:
            after *= tl.where(kept(tl.load(seed_ptr), m, pid_c * BLOCK_C, limit, BLOCK_C), rescale(limit), 0.0)
        for first in range(0, RANK, STEP):
            r = first + tl.arange(0, STEP)
            inside = (m < rows)[:, None] & (r < rank)[None, :]
            place = (m * rank)[:, None] + r[None, :]
            if FUSED:
                total = tl.zeros((BLOCK_M, STEP), tl.float32)
                row = m
                for _ in range(parts):
                    total += tl.load(low_part_ptr + (row * rank)[:, None] + r[None, :], inside, other=0.0)
                    row += rows
                low = cast(before * total, dtype)
                if pid_c == 0:
                    tl.store(low_ptr + place, low, inside)
            else:
                low = tl.load(low_ptr + place, inside, other=0.0)
            if not SPARSE or _any(low):
                other = tl.load(
                    other_ptr + (c * stride_other_c)[None, :] + (r * stride_other_r)[:, None],
                    (c < columns)[None, :] & (r < rank)[:, None], other=0.0,
                )  # fmt: skip
                acc += after * dot(low, cast(other, dtype), tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
    if GAIN:
        acc *= tl.load(gain_ptr + c, c < columns, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + c, c < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + (m * columns)[:, None] + c[None, :], cast(acc, dtype), mask)


@triton.jit
def gelu(h):
    """h·Φ(h), exactly, as torch's default; h is float32."""
    return 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))


@triton.jit
def lora_grads_tile(
    pid, x_ptr, u_ptr, grad_ptr, t_ptr, grad_A_ptr, grad_B_ptr, grad_bias_ptr, rows, in_features, out_features, rank,
    scaling, stride_x, stride_grad, steps, tiles_A, part_A, part_B, part_bias, seed_ptr, limit,
    WANT_B: tl.constexpr, WANT_BIAS: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What program ``pid`` of `_lora_grads_kernel` does; with GELU the layer's x is the GELU of what is read."""
    begin = tl.program_id(1).to(tl.int64) * steps
    end = tl.minimum(begin + steps, rows)
    r = tl.arange(0, RANK)
    if pid < tiles_A:
        k = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_C, RANK), tl.float32)
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
        for first in range(begin, end, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            wide = tl.load(
                x_ptr + (m * stride_x)[:, None] + k[None, :], (m < end)[:, None] & (k < in_features)[None, :],
                other=0.0,
            )  # fmt: skip
            if GELU:
                wide = cast(gelu(wide.to(tl.float32)), wide.dtype)
            if DROPOUT:
                wide = tl.where(kept(seed, m, pid * BLOCK_C, limit, BLOCK_C), wide, 0.0)
            low = tl.load(u_ptr + (m * rank)[:, None] + r[None, :], (m < end)[:, None] & (r < rank)[None, :], other=0.0)
            acc = dot(tl.trans(wide), low, acc, PRECISION)
        if DROPOUT:
            acc *= rescale(limit)
        grad_A_ptr += tl.program_id(1).to(tl.int64) * part_A
        tl.store(
            grad_A_ptr + (r * in_features)[None, :] + k[:, None], cast(acc, grad_A_ptr.dtype.element_ty),
            (r < rank)[None, :] & (k < in_features)[:, None],
        )  # fmt: skip
    else:
        n = (pid - tiles_A) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_C, RANK), tl.float32)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(begin, end, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            wide = tl.load(
                grad_ptr + (m * stride_grad)[:, None] + n[None, :], (m < end)[:, None] & (n < out_features)[None, :],
                other=0.0,
            )  # fmt: skip
            if WANT_BIAS:
                total += tl.sum(wide.to(tl.float32), axis=0)
            if WANT_B:
                low = tl.load(
                    t_ptr + (m * rank)[:, None] + r[None, :], (m < end)[:, None] & (r < rank)[None, :], other=0.0
                )
                acc = dot(tl.trans(wide), low, acc, PRECISION)
        if WANT_B:
            grad_B_ptr += tl.program_id(1).to(tl.int64) * part_B
            tl.store(
                grad_B_ptr + (n.to(tl.int64) * rank)[:, None] + r[None, :],
                cast(scaling * acc, grad_B_ptr.dtype.element_ty), (n < out_features)[:, None] & (r < rank)[None, :],
            )  # fmt: skip
        if WANT_BIAS:
            grad_bias_ptr += tl.program_id(1).to(tl.int64) * part_bias
            tl.store(grad_bias_ptr + n, cast(total, grad_bias_ptr.dtype.element_ty), n < out_features)


@triton.jit(do_not_specialize=["rows", "steps", "tiles_A", "limit"])
def _lora_grads_kernel(
    x_ptr, u_ptr, grad_ptr, t_ptr, grad_A_ptr, grad_B_ptr, grad_bias_ptr, rows, in_features, out_features, rank,
    scaling, stride_x, stride_grad, steps, tiles_A, part_A, part_B, part_bias, seed_ptr, limit,
    WANT_B: tl.constexpr, WANT_BIAS: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns of dA = uᵀ·x, or rows of dB = scaling·dYᵀ·t with those of dbias = Σ dY, over ``steps`` rows of x and dY.

    Each program reads its columns of x or dY once, in order; no two write to one place.
    """
    lora_grads_tile(
        tl.program_id(0), x_ptr, u_ptr, grad_ptr, t_ptr, grad_A_ptr, grad_B_ptr, grad_bias_ptr, rows, in_features,
        out_features, rank, scaling, stride_x, stride_grad, steps, tiles_A, part_A, part_B, part_bias, seed_ptr, limit,
        WANT_B, WANT_BIAS, RANK, DROPOUT, False, PRECISION, BLOCK_M, BLOCK_C,
    )  # fmt: skip


@triton.jit
def add_grads_tile(
    part_ptr, grad_A_ptr, grad_B_ptr, grad_bias_ptr, size_A, size_B, size_bias, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """``BLOCK`` values of dA, dB and dbias of a layer from the parts of their sums, which lie one after the other."""
    total = size_A + size_B + size_bias
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(part_ptr + c, c < total, other=0.0)
        part_ptr += total
    tl.store(grad_A_ptr + c, cast(acc, grad_A_ptr.dtype.element_ty), c < size_A)
    c -= size_A
    tl.store(grad_B_ptr + c, cast(acc, grad_B_ptr.dtype.element_ty), (c >= 0) & (c < size_B))
    c -= size_B
    tl.store(grad_bias_ptr + c, cast(acc, grad_bias_ptr.dtype.element_ty), (c >= 0) & (c < size_bias))


@triton.jit(do_not_specialize=["parts"])
def _add_grads_kernel(
    part_ptr, grad_A_ptr, grad_B_ptr, grad_bias_ptr, size_A, size_B, size_bias, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """dA, dB and dbias of each of several layers that are alike, the parts added in order."""
    layer = tl.program_id(1).to(tl.int64)
    add_grads_tile(
        part_ptr + layer * parts * (size_A + size_B + size_bias), grad_A_ptr + layer * size_A,
        grad_B_ptr + layer * size_B, grad_bias_ptr + layer * size_bias, size_A, size_B, size_bias, parts, BLOCK,
    )  # fmt: skip


# Launchers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What the launches of one call share."""

    quantized: tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]
    configuration: Configuration
    rows: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    given: bool = False  # whether t is given
    dropout: float = 0.0
    seed: Tensor | None = None  # there is dropout where this is given
    forward: bool = True  # or backward

    @property
    def aligned(self) -> bool:
        """Whether no block crosses rows."""
        return self.in_features % self.quantized[5] == 0

    def tile(self) -> tuple[int, int, int]:
        """Rows of x, out_features and in_features of a tile."""
        chosen = self.configuration
        if self.aligned:  # its columns are scaled together, so there are not more of them than in a block
            return chosen.block_rows, chosen.block_out, min(chosen.block_in, self.quantized[5])
        return min(chosen.block_rows, 32), min(chosen.block_out, 32), min(chosen.block_in, 32)  # indices take registers

    @property
    def fused(self) -> bool:
        """Whether the product with the narrow side of the adapter is computed by the kernel that needs it."""
        return self.rank <= FUSED_RANK and not self.given and not self.apart

    @property
    def apart(self) -> bool:
        """Whether t would take random numbers of x in too many programs, so that it is computed once, ahead of them."""
        tiles = cdiv(self.out_features, self.tile()[1]) if self.configuration.way == "direct" else 1
        return self.seed is not None and self.forward and tiles > MOST_TILES_WITH_DROPOUT

    @property
    def sparse(self) -> bool:
        """Whether steps of the rank in which t is zero are left out; in the general way registers spill with it."""
        return self.given and self.aligned

    @property
    def padded_rank(self) -> int:
        """The rank in the kernels: a power of two of at least 16, or a multiple of 32."""
        if not self.rank:
            return 0
        return max(16, power_of_two(self.rank)) if self.fused else 32 * cdiv(self.rank, 32)

    @property
    def permute(self) -> bool:
        """Whether codes are decoded by byte permutes; in float32 with more rows registers of some tiles spill then."""
        few = self.dtype != torch.float32 or self.configuration.block_rows <= 16
        return self.configuration.permute and few and not INTERPRETED

    def weight(self) -> tuple[Tensor | None, ...]:
        """The tensors of the weight as kernels take them."""
        packed, absmax, nested_absmax, nested_offset, *_ = self.quantized
        table = None if nested_absmax is None else nested_code_table(self.device)
        return packed, absmax, nested_absmax, nested_offset, table

    def drops(self, here: bool = True) -> dict[str, object]:
        """What kernels take of dropout, if it is for them at all."""
        seed = self.seed if here and self.rank else None
        return {"seed_ptr": seed, "limit": dropout_limit(self.dropout), "DROPOUT": seed is not None}

    def constants(self) -> dict[str, object]:
        """The compile-time arguments that all kernels over the weight share."""
        return {
            "QUANT_TYPE": self.quantized[4], "BLOCKSIZE": self.quantized[5], "NESTED": self.quantized[2] is not None,
            "ALIGNED": self.aligned, "WIDE": self.in_features * self.out_features >= 2**31,
            "PRECISION": precision(self.dtype),
            "PERMUTE": self.permute,
            "num_warps": self.configuration.num_warps, "num_stages": self.configuration.num_stages,
        }  # fmt: skip

    def parts(self, tiles: int, length: int, step: int, columns: int) -> tuple[int, int]:
        """Into how many parts a sum of ``length`` is cut, and the length of one, a multiple of ``step``."""
        wanted = self.configuration.programs * multiprocessors(self.device) // max(1, tiles)
        room = WORKSPACE_BYTES // max(1, 4 * self.rows * columns)
        steps = cdiv(length, step)
        parts = max(1, min(wanted, room, steps // 4))
        each = cdiv(steps, parts)
        return cdiv(steps, each), each * step


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors ``device`` has; 4 under the interpreter, where it only decides how work is cut."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three TF32 products, about as exact as float32, or one, where torch may as well."""
    return "tf32" if dtype != torch.float32 or tf32_allowed() else "tf32x3"


def flattened(tensor: Tensor) -> Tensor:
    """``tensor`` as ``(rows, features)`` whose rows are contiguous each."""
    flat = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return flat if flat.stride(1) == 1 or not flat.numel() else flat.contiguous()


def qlora_linear(
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
    *,
    configuration: Configuration,
    gain: Tensor | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.qlora_linear`; with gain, y = gain·(x·Ŵᵀ + scaling·t·lora_Bᵀ) + bias.

    lora_A, lora_B: of the dtype of x, or float32, which is rounded to it as it is read.
    gain: ``(out_features,)``, float32.
    t: ``(rows, rank)`` of the dtype of x, contiguous, in place of x·lora_Aᵀ; lora_A is then None, and steps of the rank
        in which a tile of t is zero are left out, unless the way is ``dense`` or blocks cross rows.
    """
    leading, in_features, flat, given = x.shape[:-1], x.shape[-1], flattened(x), t is not None
    rank = 0 if lora_B is None else lora_B.shape[1]
    call = Call(
        (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize), configuration,
        len(flat), in_features, out_features, rank, x.dtype, x.device, given, dropout, seed,
    )  # fmt: skip
    y = x.new_empty((len(flat), out_features))
    if t is None:
        t = x.new_empty((len(flat), rank) if lora_A is not None else 0)
    lora_A, lora_B, bias = (None if each is None else each.contiguous() for each in (lora_A, lora_B, bias))
    if y.numel():
        with nf4.on_device(x):
            if lora_A is not None and not (call.fused and configuration.way != "dense"):
                seen = flat if seed is None else dropped(flat, dropout, seed)
                torch.mm(seen, rounded(lora_A, x.dtype).T, out=t)
            if configuration.way == "dense":
                lora_B = None if lora_B is None else rounded(lora_B, x.dtype)
                _forward_dense(call, flat, bias, gain, t, lora_B, scaling, y)
            elif configuration.way == "split":
                _forward_split(call, flat, bias, gain, lora_A, lora_B, scaling, y, t)
            else:
                _forward_direct(call, flat, bias, gain, lora_A, lora_B, scaling, y, t)
    return y.view(*leading, out_features), t.view(*leading, rank) if lora_B is not None else t


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, by a copy that replay.py can repeat."""
    return tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype).copy_(tensor)


def _forward_direct(
    call: Call,
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    y: Tensor,
    t: Tensor,
) -> None:
    block_m, block_n, block_k = call.tile()
    tiles = cdiv(call.rows, block_m) * cdiv(call.out_features, block_n)
    _qlora_linear_fwd_kernel[(tiles,)](
        x, *call.weight(), bias, gain, A, B, y, t, call.rows, call.out_features, call.in_features, call.rank, scaling,
        x.stride(0), BIAS=bias is not None, GAIN=gain is not None, RANK=call.padded_rank, FUSED=call.fused,
        SPARSE=call.sparse, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **call.drops(call.fused),
        **call.constants(),
    )  # fmt: skip


def _forward_split(
    call: Call,
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    y: Tensor,
    t: Tensor,
) -> None:
    low, (block_m, block_n, block_k) = call.padded_rank if call.fused else 0, call.tile()
    tiles = cdiv(call.rows, block_m) * (cdiv(call.out_features, block_n) + (low > 0))
    parts, steps = call.parts(tiles, call.in_features, block_k, call.out_features)
    part = torch.empty((parts, *y.shape), dtype=torch.float32, device=y.device)
    t_part = torch.empty((parts, *t.shape), dtype=torch.float32, device=y.device) if low else None
    _qlora_linear_fwd_split_kernel[(tiles, parts)](
        x, *call.weight(), A, part, t_part, call.rows, call.out_features, call.in_features, call.rank, x.stride(0),
        steps, RANK=low, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **call.drops(low > 0), **call.constants(),
    )  # fmt: skip
    kept_sums = 1.0 if call.seed is None else dropout_rescale(call.dropout)
    _add_parts(call, part, t_part, B, bias, gain, y, t, kept_sums, scaling, (call.rank, 1))


def _add_parts(
    call: Call, part: Tensor, low_part: Tensor | None, other: Tensor | None, bias: Tensor | None,
    gain: Tensor | None, out: Tensor, low: Tensor, before: float, after: float, strides: tuple[int, int],
) -> None:  # fmt: skip
    block_m, block_c = 16, 32
    tiles = cdiv(call.rows, block_m) * cdiv(out.shape[1], block_c)
    _add_parts_kernel[(tiles,)](
        part, low_part, other, bias, gain, out, low, call.rows, out.shape[1], call.rank, before, after, *strides,
        len(part), RANK=call.padded_rank, FUSED=call.fused, SPARSE=call.sparse, BIAS=bias is not None,
        GAIN=gain is not None, PRECISION=precision(call.dtype), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
        num_stages=2, **call.drops(not call.forward),
    )  # fmt: skip


def _forward_dense(
    call: Call,
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    t: Tensor,
    lora_B: Tensor | None,
    scaling: float,
    y: Tensor,
) -> None:
    # A gain multiplies the rows of Ŵ and lora_B. Bias alone is left to the product, which adds it as it writes.
    if not call.rank:
        lora_B = None
    if lora_B is not None:
        if gain is not None:
            lora_B = (gain[:, None] * lora_B).to(lora_B.dtype)
        if bias is None:
            y.addmm_(t, lora_B.T, beta=0, alpha=scaling)  # with beta 0 what y holds is not read
        else:
            torch.addmm(bias, t, lora_B.T, alpha=scaling, out=y)
    together = _chunk(call.out_features, call.in_features * x.element_size(), CHUNK_STEP)
    chunk = x.new_empty((together, call.in_features))
    for first in range(0, call.out_features, together):
        weight = chunk[: min(together, call.out_features - first)]
        last = first + len(weight)
        nf4.dequantize_region(*call.quantized, call.in_features, first * call.in_features, weight)
        if gain is not None:
            weight.mul_(gain[first:last, None])
        if lora_B is not None:
            y[:, first:last].addmm_(x, weight.T)
        elif bias is not None:
            torch.addmm(bias[first:last], x, weight.T, out=y[:, first:last])
        else:
            torch.mm(x, weight.T, out=y[:, first:last])


def _chunk(length: int, size: int, step: int) -> int:
    """How many rows or columns of the weight, of ``size`` bytes each, a chunk has: a multiple of ``step``, or all."""
    return max(1, min(length, max(step, CHUNK_BYTES // max(1, size) // step * step)))


def qlora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    output_mask: Sequence[bool],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    configuration: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.qlora_linear_backward`; dA and dB are of the dtype of lora_A and lora_B, as in `qlora_linear`."""
    want_x, want_bias, want_A, want_B = output_mask
    leading, out_features, flat = grad.shape[:-1], grad.shape[-1], flattened(grad)
    rank = 0 if lora_B is None else lora_B.shape[1]
    call = Call(
        (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize), configuration,
        len(flat), in_features, out_features, rank, grad.dtype, grad.device, dropout=dropout, seed=seed, forward=False,
    )  # fmt: skip
    grad_x, grad_bias, grad_A, grad_B = (grad.new_empty(0) for _ in range(4))
    lora_A, lora_B = (None if each is None else each.contiguous() for each in (lora_A, lora_B))
    u = grad.new_empty((len(flat), rank)) if lora_B is not None and (want_x or want_A) else None
    with nf4.on_device(grad):
        inside = want_x and call.fused and configuration.way != "dense" and flat.numel() > 0
        if u is not None and lora_B is not None and not inside:
            u.addmm_(flat, rounded(lora_B, grad.dtype), beta=0, alpha=scaling)  # with beta 0 what u holds is not read
        if want_x:
            grad_x = grad.new_empty((len(flat), in_features))
            if not out_features:
                grad_x.zero_()
            elif grad_x.numel():
                {"direct": _dx_direct, "split": _dx_split, "dense": _dx_dense}[configuration.way](
                    call, flat, lora_A, lora_B, scaling, grad_x, u
                )
            grad_x = grad_x.view(*leading, in_features)
        if want_bias or want_A or want_B:
            grad_bias, grad_A, grad_B = _lora_grads(
                call,
                flat,
                None if x is None else flattened(x),
                None if t is None else flattened(t),
                u,
                scaling,
                grad.dtype if lora_A is None else lora_A.dtype,
                output_mask,
            )
    return grad_x, grad_bias, grad_A, grad_B


def _dx_direct(
    call: Call, grad: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, grad_x: Tensor, u: Tensor | None
) -> None:
    block_m, block_n, block_k = call.tile()
    tiles = cdiv(call.rows, block_m) * cdiv(call.in_features, block_k)
    _qlora_linear_dx_kernel[(tiles,)](
        grad, *call.weight(), A, B, grad_x, u, call.rows, call.out_features, call.in_features, call.rank, scaling,
        grad.stride(0), RANK=call.padded_rank, FUSED=call.fused, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        **call.drops(), **call.constants(),
    )  # fmt: skip


def _dx_split(
    call: Call, grad: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, grad_x: Tensor, u: Tensor | None
) -> None:
    low, (block_m, block_n, block_k) = call.padded_rank if call.fused else 0, call.tile()
    tiles = cdiv(call.rows, block_m) * (cdiv(call.in_features, block_k) + (low > 0))
    parts, steps = call.parts(tiles, call.out_features, block_n, call.in_features)
    part = torch.empty((parts, *grad_x.shape), dtype=torch.float32, device=grad.device)
    u_part = torch.empty((parts, call.rows, call.rank), dtype=torch.float32, device=grad.device) if low else None
    _qlora_linear_dx_split_kernel[(tiles, parts)](
        grad, *call.weight(), B, part, u_part, call.rows, call.out_features, call.in_features, call.rank,
        grad.stride(0), steps, RANK=low, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **call.constants(),
    )  # fmt: skip
    _add_parts(
        call, part, u_part, A, None, None, grad_x, grad_x if u is None else u, scaling, 1.0, (1, call.in_features)
    )


def _dx_dense(
    call: Call, grad: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, grad_x: Tensor, u: Tensor | None
) -> None:
    adapter = (u, rounded(A, grad.dtype)) if u is not None and A is not None and call.rank else None
    if adapter is not None:
        torch.mm(*adapter, out=grad_x)
        if call.seed is not None:
            dropped(grad_x, call.dropout, call.seed, grad_x)
    size, blocksize = call.out_features * grad.element_size(), call.quantized[5]
    # Whole blocks are dequantised fastest; a chunk has them unless one column of blocks is larger than that.
    step = max(CHUNK_STEP, blocksize) if blocksize * size <= CHUNK_BYTES else CHUNK_STEP
    together = _chunk(call.in_features, size, step)
    chunk = grad.new_empty((call.out_features, together))
    for first in range(0, call.in_features, together):
        last = min(first + together, call.in_features)
        weight = chunk[:, : last - first]
        nf4.dequantize_region(*call.quantized, call.in_features, first, weight)
        if adapter is not None:
            grad_x[:, first:last].addmm_(grad, weight)
        else:
            torch.mm(grad, weight, out=grad_x[:, first:last])


def tiles_of_grads(call: Call, want_A: bool, want_wide: bool) -> tuple[int, int]:
    """How many programs sum up dA, and how many dA, dB and dbias together."""
    tiles_A = cdiv(call.in_features, GRADS_COLUMNS) if want_A else 0
    return tiles_A, tiles_A + (cdiv(call.out_features, GRADS_COLUMNS) if want_wide else 0)


def parts_of_rows(call: Call, tiles: int) -> tuple[int, int, int]:
    """How the rows are cut for ``tiles`` of gradients of adapters: rows of a step, parts, rows of a part.

    Tiles of few columns alone would leave most of a GPU idle, so the rows are shared out, too.
    """
    spills = call.dtype == torch.float32 or (call.seed is not None and call.rank > 64)  # with more rows
    block_m = 32 if spills else 64
    steps = cdiv(call.rows, block_m)
    wanted = max(1, min(2 * multiprocessors(call.device) // max(1, tiles), steps // 4))
    each = cdiv(steps, wanted)
    return block_m, max(1, cdiv(steps, each)) if each else 1, each * block_m


def _lora_grads(
    call: Call,
    grad: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    u: Tensor | None,
    scaling: float,
    adapter_dtype: torch.dtype,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dbias, dA and dB, each empty unless ``mask`` asks for it."""
    _, want_bias, want_A, want_B = mask
    rows, in_features, out_features, rank = call.rows, call.in_features, call.out_features, call.rank
    if rank > 128 or not rows or not rank or not out_features:  # sums of such tiles do not fit the registers
        seen = x if x is None or call.seed is None else dropped(x, call.dropout, call.seed)
        return (
            grad.sum(dim=0) if want_bias else grad.new_empty(0),
            (u.T @ seen).to(adapter_dtype) if want_A and u is not None and seen is not None else grad.new_empty(0),
            (scaling * (grad.T @ t)).to(adapter_dtype) if want_B and t is not None else grad.new_empty(0),
        )
    tiles_A, tiles = tiles_of_grads(call, want_A, want_B or want_bias)
    block_m, parts, steps = parts_of_rows(call, tiles)
    grads = Gradients(call, adapter_dtype, mask[1:], parts, 1)
    grad_A, grad_B, grad_bias = grads.parts
    # Where dA is not wanted no program reads x and u, but the compiler needs pointers.
    _lora_grads_kernel[(tiles, parts)](
        grad if x is None else x, grad if u is None else u, grad, t, grad_A, grad_B, grad_bias,
        rows, in_features, out_features, rank, scaling,
        0 if x is None else x.stride(0), grad.stride(0), steps, tiles_A,
        grad_A.stride(1), grad_B.stride(1), grad_bias.stride(1), WANT_B=want_B, WANT_BIAS=want_bias,
        RANK=max(16, power_of_two(rank)), PRECISION=precision(call.dtype), BLOCK_M=block_m, BLOCK_C=GRADS_COLUMNS,
        num_warps=4 if rank <= 64 else 8, num_stages=3, **call.drops(want_A),
    )  # fmt: skip
    grad_bias, grad_A, grad_B = grads.total()
    return grad_bias.view(grad_bias.shape[1:]), grad_A.view(grad_A.shape[1:]), grad_B.view(grad_B.shape[1:])


class Gradients:
    """Memory for dbias, dA and dB of some layers, and for the parts of their sums where there is more than one.

    mask: which of the three are wanted.
    parts: of dA, dB and dbias, ``(layers, parts, …)``, for the kernels to write to.
    together: all parts, ``(layers, parts, Σ sizes)``, float32, or None where there is one and nothing to add.
    """

    def __init__(self, call: Call, adapter_dtype: torch.dtype, mask: Sequence[bool], parts: int, layers: int) -> None:
        rank, wanted = call.rank, (mask[1], mask[2], mask[0])
        shapes = ((rank, call.in_features), (call.out_features, rank), (call.out_features,))
        dtypes = (adapter_dtype, adapter_dtype, call.dtype)
        self.sizes = [math.prod(shape) if want else 0 for shape, want in zip(shapes, wanted, strict=True)]
        self.grads = [
            torch.empty((layers, *shape) if want else (layers, 0), dtype=dtype, device=call.device)
            for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
        ]
        self.together: Tensor | None = None
        if parts == 1 or not sum(self.sizes):
            self.parts = [grad.unsqueeze(1) for grad in self.grads]
            return
        self.together = torch.empty((layers, parts, sum(self.sizes)), dtype=torch.float32, device=call.device)
        starts = (0, self.sizes[0], self.sizes[0] + self.sizes[1])
        self.parts = [self.together[:, :, start : start + size] for start, size in zip(starts, self.sizes, strict=True)]

    def total(self) -> list[Tensor]:
        """Dbias, dA and dB, ``(layers, …)``, empty where not wanted."""
        if self.together is not None:
            layers, parts, total = self.together.shape
            _add_grads_kernel[(cdiv(total, 256), layers)](
                self.together, *self.grads, *self.sizes, parts, BLOCK=256, num_warps=4
            )
        grad_A, grad_B, grad_bias = self.grads
        return [grad_bias, grad_A, grad_B]
