"""Triton: fc2(gelu(fc1(x))) over two 4-bit layers in one launch, for small models, where launches are the cost.

Each program takes a few rows of x through both layers: a part of h = fc1(x) at a time is computed, put through GELU and
multiplied into y while it is on the chip, so that gelu(h) is never written. Backward needs h, which is written once.
Every program decodes both weights, so this pays for few rows and small weights alone (`fits`).

Backward is two launches, one for dh and dX and one for the gradients of both layers' adapters and biases, and a third
that adds the parts of their sums where the rows are shared out:

    dh = (dY·Ŵ2 + u2·A2)·gelu'(h),  u2 = scaling2·dY·B2;  dX = dh·Ŵ1 + u1·A1,  u1 = scaling1·dh·B1
    dA2 = u2ᵀ·gelu(h),  dB2 = scaling2·dYᵀ·t2,  dA1 = u1ᵀ·x,  dB1 = scaling1·dhᵀ·t1
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration
from harlora.kernels.format import nested_code_table
from harlora.kernels.reference import Layer
from harlora.kernels.triton import nf4
from harlora.kernels.triton.nf4 import INTERPRETED, cast, cdiv, power_of_two
from harlora.kernels.triton.qlora_linear import (
    FUSED_RANK,
    GRADS_COLUMNS,
    Call,
    Gradients,
    add_grads_tile,
    backward_sums,
    codes,
    dot,
    flattened,
    gelu,
    lora_grads_tile,
    low_rank_sums,
    multiprocessors,
    parts_of_rows,
    precision,
    tiles_of_grads,
)

MOST_OUT = 256  # y of a program is in registers
MOST_HIDDEN = 1024
MOST_ROWS = 4096
REGISTERS = {"maxnreg": 255}  # all there are: otherwise the assembler spills some for the sake of more programs at once


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
        active = cast(gelu(h), dtype)
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


@triton.jit
def _gelu_derivative(h):
    """Φ(h) + h·φ(h); h is float32."""
    return 0.5 * (1.0 + tl.math.erf(h * 0.7071067811865476)) + 0.3989422804014327 * h * tl.exp(-0.5 * h * h)


@triton.jit(do_not_specialize=["rows"])
def _qlora_mlp_dx_kernel(
    grad_ptr, h_ptr, packed1, packed2, absmax1, absmax2, nested1, nested2, offset1, offset2, nested_code_ptr,
    A1, A2, B1, B2, grad_x_ptr, grad_h_ptr, u1_ptr, u2_ptr,
    rows, in_features, hidden, out_features, rank1, rank2, scaling1, scaling2, stride_grad, columns,
    QUANT1: tl.constexpr, QUANT2: tl.constexpr, BLOCKSIZE1: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    NESTED1: tl.constexpr, NESTED2: tl.constexpr, RANK1: tl.constexpr, RANK2: tl.constexpr,
    PERMUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows of u2, dh and u1, and ``columns`` of dX, each where there is a tensor for it.

    Programs that share a row's columns of dX each compute its dh, and write it to copies of their own.
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_mask = m < rows
    share = tl.program_id(1)
    r1 = tl.arange(0, RANK1 if RANK1 > 0 else 16)
    r2 = tl.arange(0, RANK2 if RANK2 > 0 else 16)
    if RANK2 > 0:
        low2 = cast(
            scaling2
            * low_rank_sums(
                grad_ptr, B2, m, rows, out_features, rank2, stride_grad, 1, rank2, 0, out_features, 0, 0,
                RANK2, False, PRECISION, BLOCK_M, BLOCK_N,
            ),
            dtype,
        )  # fmt: skip
        if u2_ptr is not None:
            own = (m_mask & (share == 0))[None, :]
            tl.store(u2_ptr + (m * rank2)[None, :] + r2[:, None], low2, own & (r2 < rank2)[:, None])
    if grad_h_ptr is not None:
        nested_offset2 = 0.0
        if NESTED2:
            nested_offset2 = tl.load(offset2)
        grad_h_ptr += share.to(tl.int64) * rows * hidden
        for start in range(0, hidden, BLOCK_H):
            f = start + tl.arange(0, BLOCK_H)
            place = (m * hidden)[None, :] + f[:, None]
            grad_h, _ = backward_sums(
                grad_ptr, packed2, absmax2, nested2, nested_offset2, nested_code_ptr, B2,
                m, start, rows, out_features, hidden, rank2, stride_grad, 0, out_features,
                QUANT2, BLOCKSIZE2, NESTED2, True, False, PERMUTE, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_H,
            )  # fmt: skip
            if RANK2 > 0:
                a = tl.load(A2 + (r2 * hidden)[:, None] + f[None, :], (r2 < rank2)[:, None], other=0.0)
                grad_h = dot(tl.trans(cast(a, dtype)), low2, grad_h, PRECISION)
            h = tl.load(h_ptr + place, m_mask[None, :], other=0.0).to(tl.float32)
            low_h = cast(grad_h * _gelu_derivative(h), dtype)
            tl.store(grad_h_ptr + place, low_h, m_mask[None, :])
        tl.debug_barrier()  # dh, which is too wide for registers, is read again, by other threads than wrote it
        if RANK1 > 0:
            u1 = low_rank_sums(
                grad_h_ptr, B1, m, rows, hidden, rank1, hidden, 1, rank1, 0, hidden, 0, 0,
                RANK1, False, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            low1 = cast(scaling1 * u1, dtype)
            if u1_ptr is not None:
                own = (m_mask & (share == 0))[None, :]
                tl.store(u1_ptr + (m * rank1)[None, :] + r1[:, None], low1, own & (r1 < rank1)[:, None])
        if grad_x_ptr is not None:
            nested_offset1 = 0.0
            if NESTED1:
                nested_offset1 = tl.load(offset1)
            begin = share * columns
            for column in range(begin, tl.minimum(begin + columns, in_features), BLOCK_K):
                k = column + tl.arange(0, BLOCK_K)
                acc, _ = backward_sums(
                    grad_h_ptr, packed1, absmax1, nested1, nested_offset1, nested_code_ptr, B1,
                    m, column, rows, hidden, in_features, rank1, hidden, 0, hidden,
                    QUANT1, BLOCKSIZE1, NESTED1, True, False, PERMUTE, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                if RANK1 > 0:
                    a = tl.load(A1 + (r1 * in_features)[:, None] + k[None, :], (r1 < rank1)[:, None], other=0.0)
                    acc = dot(tl.trans(cast(a, dtype)), low1, acc, PRECISION)
                tl.store(grad_x_ptr + (m * in_features)[None, :] + k[:, None], cast(acc, dtype), m_mask[None, :])


@triton.jit(do_not_specialize=["rows", "steps", "tiles_A1", "tiles_A2", "tiles1"])
def _qlora_mlp_grads_kernel(
    x_ptr, h_ptr, u1_ptr, u2_ptr, grad_h_ptr, grad_ptr, t1_ptr, t2_ptr,
    grad_A1, grad_A2, grad_B1, grad_B2, grad_bias1, grad_bias2,
    rows, in_features, hidden, out_features, rank1, rank2, scaling1, scaling2, stride_x, stride_grad,
    steps, tiles_A1, tiles_A2, tiles1, part_A1, part_A2, part_B1, part_B2, part_bias1, part_bias2,
    WANT_B1: tl.constexpr, WANT_B2: tl.constexpr, WANT_BIAS1: tl.constexpr, WANT_BIAS2: tl.constexpr,
    RANK1: tl.constexpr, RANK2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `_lora_grads_kernel`: the first ``tiles1`` programs for fc1, the others for fc2, whose x is gelu(h)."""
    pid = tl.program_id(0)
    if pid < tiles1:
        lora_grads_tile(
            pid, x_ptr, u1_ptr, grad_h_ptr, t1_ptr, grad_A1, grad_B1, grad_bias1, rows, in_features, hidden, rank1,
            scaling1, stride_x, hidden, steps, tiles_A1, part_A1, part_B1, part_bias1, x_ptr, 0,
            WANT_B1, WANT_BIAS1, RANK1, False, False, PRECISION, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        lora_grads_tile(
            pid - tiles1, h_ptr, u2_ptr, grad_ptr, t2_ptr, grad_A2, grad_B2, grad_bias2, rows, hidden, out_features,
            rank2, scaling2, hidden, stride_grad, steps, tiles_A2, part_A2, part_B2, part_bias2, h_ptr, 0,
            WANT_B2, WANT_BIAS2, RANK2, False, True, PRECISION, BLOCK_M, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def _qlora_mlp_add_grads_kernel(
    part1, part2, grad_A1, grad_A2, grad_B1, grad_B2, grad_bias1, grad_bias2,
    size_A1, size_A2, size_B1, size_B2, size_bias1, size_bias2, parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_add_grads_kernel`, for fc1 and fc2, which the second index of the program tells apart."""
    if tl.program_id(1) == 0:
        add_grads_tile(part1, grad_A1, grad_B1, grad_bias1, size_A1, size_B1, size_bias1, parts, BLOCK)
    else:
        add_grads_tile(part2, grad_A2, grad_B2, grad_bias2, size_A2, size_B2, size_bias2, parts, BLOCK)


# Launchers ----------------------------------------------------------------------------------------------------------


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


def _ranks(*layers: Layer) -> list[int]:
    return [0 if layer[8] is None else layer[8].shape[0] for layer in layers]


def _padded(rank: int) -> int:
    return max(16, power_of_two(rank)) if rank else 0


def _pairs(fc1: Layer, fc2: Layer, *places: int) -> list[Tensor | None]:
    """The tensors of both layers in ``places``, those of a place next to each other."""
    given = [layer[place] for place in places for layer in (fc1, fc2)]
    return [tensor.contiguous() if isinstance(tensor, Tensor) else None for tensor in given]


def _weights(fc1: Layer, fc2: Layer) -> list[Tensor | None]:
    nested = fc1[2] is not None or fc2[2] is not None
    return [*_pairs(fc1, fc2, 0, 1, 2, 3), nested_code_table(fc1[0].device) if nested else None]


def _constants(x: Tensor, fc1: Layer, fc2: Layer, configuration: Configuration) -> dict[str, Any]:
    """The compile-time arguments that both kernels over the weights share; programs take BLOCK_M rows of x."""
    rows = x.numel() // x.shape[-1]
    few = rows <= 1024 or x.dtype == torch.float32 or min(fc1[5], fc2[5]) < 64  # more would not fit the registers
    return {
        "QUANT1": fc1[4], "QUANT2": fc2[4], "BLOCKSIZE1": fc1[5], "BLOCKSIZE2": fc2[5],
        "NESTED1": fc1[2] is not None, "NESTED2": fc2[2] is not None,
        "PERMUTE": configuration.permute and not INTERPRETED, "PRECISION": precision(x.dtype),
        "BLOCK_M": 16 if few else 32, **REGISTERS,
        "BLOCK_H": min(fc2[5], 64 if x.dtype != torch.float32 else 32), "BLOCK_K": min(fc1[5], 64),
    }  # fmt: skip


def qlora_mlp(
    x: Tensor, fc1: Layer, fc2: Layer, keep: bool, *, configuration: Configuration
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.qlora_mlp`, of layers that `fits` takes; h, t1 and t2 are empty without ``keep``."""
    leading, flat = x.shape[:-1], flattened(x)
    in_features, hidden, out_features, ranks = x.shape[-1], fc1[6], fc2[6], _ranks(fc1, fc2)
    y = x.new_empty((*leading, out_features))
    h = x.new_empty((*leading, hidden) if keep else 0)
    t1, t2 = (x.new_empty((*leading, rank) if keep and rank else 0) for rank in ranks)
    constants = _constants(x, fc1, fc2, configuration)
    with nf4.on_device(x):
        _qlora_mlp_fwd_kernel[(cdiv(len(flat), constants["BLOCK_M"]),)](
            flat, *_weights(fc1, fc2), *_pairs(fc1, fc2, 7, 8, 9), y, h, t1, t2,
            len(flat), in_features, hidden, out_features, *ranks, fc1[10], fc2[10], flat.stride(0),
            BIAS1=fc1[7] is not None, BIAS2=fc2[7] is not None, RANK1=_padded(ranks[0]), RANK2=_padded(ranks[1]),
            KEEP=keep, BLOCK_N=max(16, power_of_two(out_features)), num_stages=2,
            num_warps=8, **constants,
        )  # fmt: skip
    return y, h, t1, t2


def qlora_mlp_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    t1: Tensor,
    t2: Tensor,
    fc1: Layer,
    fc2: Layer,
    wanted: Sequence[bool],
    *,
    configuration: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and of bias, lora_A and lora_B of fc1, then of fc2; each empty unless ``wanted`` asks for it.

    h, t1, t2: of `qlora_mlp`; seven flags, in that order. dA and dB are of the dtype of lora_A and lora_B.
    """
    wide, flat, rows = flattened(grad), flattened(x), x.numel() // x.shape[-1]
    in_features, hidden, out_features, ranks = x.shape[-1], fc1[6], fc2[6], _ranks(fc1, fc2)
    want_x, want_A1, want_A2 = wanted[0], wanted[2], wanted[5]
    constants = _constants(x, fc1, fc2, configuration)
    grad_x = x.new_empty(x.shape) if want_x else None
    u1, u2 = (
        x.new_empty((rows, rank)) if rank and want_A else None
        for rank, want_A in zip(ranks, (want_A1, want_A2), strict=True)
    )
    tiles = cdiv(rows, constants["BLOCK_M"])
    # With few rows programs would be few, so that they share the columns of dX as well.
    blocks = cdiv(in_features, constants["BLOCK_K"])
    each = cdiv(blocks, max(1, min(blocks, multiprocessors(x.device) // tiles))) if want_x else blocks
    shares = cdiv(blocks, each)
    grad_h = x.new_empty((shares, rows, hidden)) if any(wanted[:4]) else None
    with nf4.on_device(x):
        if grad_h is not None or u2 is not None:
            _qlora_mlp_dx_kernel[(tiles, shares)](
                wide, h, *_weights(fc1, fc2), *_pairs(fc1, fc2, 8, 9), grad_x, grad_h, u1, u2,
                rows, in_features, hidden, out_features, *ranks, fc1[10], fc2[10], wide.stride(0),
                each * constants["BLOCK_K"], RANK1=_padded(ranks[0]) if want_x or want_A1 else 0,
                RANK2=_padded(ranks[1]), BLOCK_N=64 if x.dtype != torch.float32 else 32, num_warps=4, num_stages=2,
                **constants,
            )  # fmt: skip
        grads = _adapter_grads(wide, flat, h, t1, t2, u1, u2, grad_h, fc1, fc2, wanted[1:], configuration)
    return grad.new_empty(0) if grad_x is None else grad_x, *grads


def _adapter_grads(
    grad: Tensor, x: Tensor, h: Tensor, t1: Tensor, t2: Tensor, u1: Tensor | None, u2: Tensor | None,
    grad_h: Tensor | None, fc1: Layer, fc2: Layer, wanted: Sequence[bool], configuration: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dbias, dA and dB of fc1, then of fc2, each empty unless ``wanted`` asks for it."""
    masks, ranks = (wanted[:3], wanted[3:]), _ranks(fc1, fc2)
    calls = [
        Call(layer[:6], configuration, len(x), in_features, layer[6], rank, x.dtype, x.device)
        for layer, in_features, rank in zip((fc1, fc2), (x.shape[1], fc1[6]), ranks, strict=True)
    ]
    (tiles_A1, tiles1), (tiles_A2, tiles2) = (
        tiles_of_grads(call, want_A and call.rank > 0, want_bias or (want_B and call.rank > 0))
        for call, (want_bias, want_A, want_B) in zip(calls, masks, strict=True)
    )
    block_m, parts, steps = parts_of_rows(calls[0], tiles1 + tiles2)
    both = [
        Gradients(call, x.dtype if layer[8] is None else layer[8].dtype, mask, parts, 1)
        for call, layer, mask in zip(calls, (fc1, fc2), masks, strict=True)
    ]
    if tiles1 + tiles2:
        places = [part for pair in zip(both[0].parts, both[1].parts, strict=True) for part in pair]
        # What is not wanted no program reads, but the compiler needs pointers.
        _qlora_mlp_grads_kernel[(tiles1 + tiles2, parts)](
            x, h, *(grad if each is None else each for each in (u1, u2, grad_h)), grad, t1, t2, *places,
            *(len(x), x.shape[1], fc1[6], fc2[6], *ranks, fc1[10], fc2[10], x.stride(0), grad.stride(0)),
            steps, tiles_A1, tiles_A2, tiles1, *(place.stride(1) for place in places),
            WANT_B1=wanted[2], WANT_B2=wanted[5], WANT_BIAS1=wanted[0], WANT_BIAS2=wanted[3],
            RANK1=max(16, _padded(ranks[0])), RANK2=max(16, _padded(ranks[1])), PRECISION=precision(x.dtype),
            BLOCK_M=block_m, BLOCK_C=GRADS_COLUMNS, num_warps=4, num_stages=3, **REGISTERS,
        )  # fmt: skip
        together = [each.together for each in both if each.together is not None]
        if together:
            grads = [grad for pair in zip(both[0].grads, both[1].grads, strict=True) for grad in pair]
            sizes = [size for pair in zip(both[0].sizes, both[1].sizes, strict=True) for size in pair]
            most = max(each.shape[2] for each in together)
            _qlora_mlp_add_grads_kernel[(cdiv(most, 256), 2)](
                together[0], together[-1], *grads, *sizes, parts, BLOCK=256, num_warps=4
            )
    results = [each.grads[place][0] for each in both for place in (2, 0, 1)]
    return results[0], results[1], results[2], results[3], results[4], results[5]
