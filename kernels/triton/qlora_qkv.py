"""Triton: three 4-bit layers over one x, as attention projects its q, k and v, in one launch forward.

For small models, where launches are the cost and not the arithmetic. Each layer is as in qlora_linear.py; backward adds
the three dX in one launch and computes all six gradients of adapters in another. The layers must be alike in all but
their values (`alike`) and their adapters narrow enough to be fused.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration
from harlora.kernels.format import nested_code_table
from harlora.kernels.reference import Layer
from harlora.kernels.triton import nf4
from harlora.kernels.triton.nf4 import cast, cdiv, power_of_two
from harlora.kernels.triton.qlora_linear import (
    FUSED_RANK,
    GRADS_COLUMNS,
    Call,
    Gradients,
    backward_sums,
    dot,
    flattened,
    forward_sums,
    lora_grads_tile,
    parts_of_rows,
    precision,
    tiles_of_grads,
)


@triton.jit
def pick(which, first, second, third):
    """One of three pointers or numbers."""
    if which == 0:
        chosen = first
    elif which == 1:
        chosen = second
    else:
        chosen = third
    return chosen


@triton.jit(do_not_specialize=["rows"])
def _qlora_qkv_fwd_kernel(
    x_ptr, packed_q, packed_k, packed_v, absmax_q, absmax_k, absmax_v, nested_q, nested_k, nested_v,
    offset_q, offset_k, offset_v, nested_code_ptr, bias_q, bias_k, bias_v, A_q, A_k, A_v, B_q, B_k, B_v,
    y_ptr, t_ptr, rows, out_features, in_features, rank, scaling_q, scaling_k, scaling_v, stride_x,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the y of one layer; y is ``(3, rows, out_features)``, t ``(3, rows, rank)``."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    pid_n = tl.program_id(0) // tiles_m
    which = pid_n // tiles_n
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = ((pid_n % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    nested_offset = 0.0
    nested_ptr = nested_q
    if NESTED:
        nested_offset = tl.load(pick(which, offset_q, offset_k, offset_v))
        nested_ptr = pick(which, nested_q, nested_k, nested_v)
    A_ptr = A_q
    if RANK > 0:
        A_ptr = pick(which, A_q, A_k, A_v)
    acc, t = forward_sums(
        x_ptr, pick(which, packed_q, packed_k, packed_v), pick(which, absmax_q, absmax_k, absmax_v), nested_ptr,
        nested_offset, nested_code_ptr, A_ptr,
        n, m, rows, out_features, in_features, rank, stride_x, 0, in_features, 0, 0,
        QUANT_TYPE, BLOCKSIZE, NESTED, ALIGNED, WIDE, PERMUTE, RANK, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = which.to(tl.int64) * rows + m
    if RANK > 0:
        r = tl.arange(0, RANK)
        low = cast(t, dtype)
        if pid_n % tiles_n == 0:
            tl.store(t_ptr + (row * rank)[None, :] + r[:, None], low, (m < rows)[None, :] & (r < rank)[:, None])
        b = tl.load(
            pick(which, B_q, B_k, B_v) + (n * rank)[:, None] + r[None, :],
            (n < out_features)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        acc += pick(which, scaling_q, scaling_k, scaling_v) * dot(
            cast(b, dtype), low, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION
        )
    if BIAS:
        bias = tl.load(pick(which, bias_q, bias_k, bias_v) + n, n < out_features, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    tl.store(
        y_ptr + (row * out_features)[None, :] + n[:, None], cast(acc, dtype),
        (m < rows)[None, :] & (n < out_features)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _qlora_qkv_dx_kernel(
    grad_q, grad_k, grad_v, packed_q, packed_k, packed_v, absmax_q, absmax_k, absmax_v, nested_q, nested_k, nested_v,
    offset_q, offset_k, offset_v, nested_code_ptr, A_q, A_k, A_v, B_q, B_k, B_v, grad_x_ptr, u_ptr,
    rows, out_features, in_features, rank, scaling_q, scaling_k, scaling_v, stride_q, stride_k, stride_v,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PERMUTE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dX, the sum over the layers; u is ``(3, rows, rank)``."""
    dtype: tl.constexpr = grad_q.dtype.element_ty
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_k = tl.program_id(0) // tiles_m
    m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = pid_k * BLOCK_K
    k = column + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for which in range(3):
        nested_offset = 0.0
        nested_ptr = nested_q
        if NESTED:
            nested_offset = tl.load(pick(which, offset_q, offset_k, offset_v))
            nested_ptr = pick(which, nested_q, nested_k, nested_v)
        B_ptr = B_q
        if RANK > 0:
            B_ptr = pick(which, B_q, B_k, B_v)
        part, u = backward_sums(
            pick(which, grad_q, grad_k, grad_v), pick(which, packed_q, packed_k, packed_v),
            pick(which, absmax_q, absmax_k, absmax_v), nested_ptr, nested_offset, nested_code_ptr, B_ptr,
            m, column, rows, out_features, in_features, rank, pick(which, stride_q, stride_k, stride_v), 0,
            out_features,
            QUANT_TYPE, BLOCKSIZE, NESTED, ALIGNED, WIDE, PERMUTE, RANK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc += part
        if RANK > 0:
            r = tl.arange(0, RANK)
            low = cast(pick(which, scaling_q, scaling_k, scaling_v) * u, dtype)
            if pid_k == 0:
                row = m + which * rows.to(tl.int64)
                tl.store(u_ptr + (row * rank)[None, :] + r[:, None], low, (m < rows)[None, :] & (r < rank)[:, None])
            a = tl.load(
                pick(which, A_q, A_k, A_v) + (r * in_features)[:, None] + k[None, :],
                (r < rank)[:, None] & (k < in_features)[None, :], other=0.0,
            )  # fmt: skip
            acc = dot(tl.trans(cast(a, dtype)), low, acc, PRECISION)
    tl.store(
        grad_x_ptr + (m * in_features)[None, :] + k[:, None], cast(acc, dtype),
        (m < rows)[None, :] & (k < in_features)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles_A"])
def _qlora_qkv_grads_kernel(
    x_ptr, u_ptr, grad_q, grad_k, grad_v, t_ptr, grad_A_ptr, grad_B_ptr, grad_bias_ptr,
    rows, in_features, out_features, rank, scaling_q, scaling_k, scaling_v, stride_x, stride_q, stride_k, stride_v,
    steps, tiles_A, part_A, part_B, part_bias,
    WANT_B: tl.constexpr, WANT_BIAS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `_lora_grads_kernel`, for the layer that is the third index of the program; parts lie within layers."""
    which = tl.program_id(2)
    layer = which.to(tl.int64)
    parts = tl.num_programs(1)
    lora_grads_tile(
        tl.program_id(0), x_ptr, u_ptr + layer * rows * rank, pick(which, grad_q, grad_k, grad_v),
        t_ptr + layer * rows * rank,
        grad_A_ptr + layer * parts * part_A, grad_B_ptr + layer * parts * part_B,
        grad_bias_ptr + layer * parts * part_bias, rows, in_features, out_features, rank,
        pick(which, scaling_q, scaling_k, scaling_v), stride_x, pick(which, stride_q, stride_k, stride_v), steps,
        tiles_A, part_A, part_B, part_bias, x_ptr, 0,
        WANT_B, WANT_BIAS, RANK, False, False, PRECISION, BLOCK_M, BLOCK_C,
    )  # fmt: skip


# Launchers ----------------------------------------------------------------------------------------------------------


def alike(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether layers over one x differ in nothing but their values, so that one launch serves them."""
    kinds = {
        (nested is None, offset is None, *facts, bias is None, None if A is None else (A.shape, A.dtype))
        for _, _, nested, offset, *facts, bias, A, _, _ in layers
    }
    rank = 0 if layers[0][8] is None else layers[0][8].shape[0]
    # A size of 1 would be a constant to the compiler, of which `pick` cannot choose one.
    return len(kinds) == 1 and rank <= FUSED_RANK and x.shape[-1] > 1 and layers[0][6] > 1


def _call(x: Tensor, rows: int, in_features: int, layers: Sequence[Layer], configuration: Configuration) -> Call:
    out_features, A = layers[0][6], layers[0][8]
    rank = 0 if A is None else A.shape[0]
    return Call(layers[0][:6], configuration, rows, in_features, out_features, rank, x.dtype, x.device)


def _weights(layers: Sequence[Layer]) -> list[object]:
    table = None if layers[0][2] is None else nested_code_table(layers[0][0].device)
    return [*(layer[field] for field in range(4) for layer in layers), table]


def _each(layers: Sequence[Layer], *fields: int) -> list[Tensor | None]:
    given = [layer[field] for field in fields for layer in layers]
    return [tensor.contiguous() if isinstance(tensor, Tensor) else None for tensor in given]


def qlora_qkv(x: Tensor, layers: Sequence[Layer], *, configuration: Configuration) -> tuple[Tensor, Tensor]:
    """Y ``(3, …, out_features)`` and t ``(3, …, rank)`` of three `alike` layers; t is empty without adapters."""
    leading, flat = x.shape[:-1], flattened(x)
    call = _call(x, len(flat), x.shape[-1], layers, configuration)
    y = x.new_empty((3, *leading, call.out_features))
    t = x.new_empty((3, *leading, call.rank) if layers[0][8] is not None else 0)
    if y.numel():
        block_m, block_n, block_k = call.tile()
        tiles = 3 * cdiv(call.rows, block_m) * cdiv(call.out_features, block_n)
        with nf4.on_device(x):
            _qlora_qkv_fwd_kernel[(tiles,)](
                flat, *_weights(layers), *_each(layers, 7, 8, 9), y, t, call.rows, call.out_features,
                call.in_features, call.rank, *(layer[10] for layer in layers), flat.stride(0),
                BIAS=layers[0][7] is not None, RANK=call.padded_rank,
                BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **call.constants(),
            )  # fmt: skip
    return y, t


def qlora_qkv_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    layers: Sequence[Layer],
    wanted: tuple[bool, bool, bool, bool],
    *,
    configuration: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DX, and of all layers dbias ``(3, out_features)``, dA ``(3, rank, in_features)``, dB ``(3, out_features, rank)``.

    Each is empty unless it is wanted; dA and dB need adapters.
    """
    leading, in_features, flat = x.shape[:-1], x.shape[-1], flattened(x)
    call = _call(x, len(flat), in_features, layers, configuration)
    rank, out_features = call.rank, call.out_features
    wide = [flattened(grad) for grad in grads]
    scalings, strides = [layer[10] for layer in layers], [each.stride(0) for each in wide]
    want_x, want_bias, want_A, want_B = wanted
    u = x.new_empty((3, call.rows, rank))
    # u is a product of the launch for dX, which therefore also takes place where dA alone is wanted.
    grad_x = x.new_empty((*leading, in_features) if want_x or want_A else 0)
    constants = call.constants()
    with nf4.on_device(x):
        if grad_x.numel():
            block_m, block_n, block_k = call.tile()
            block_m = min(block_m, 32)  # two sums at a time take the registers of a larger tile
            if x.dtype == torch.float32:
                constants["num_warps"] = 8
            tiles = cdiv(call.rows, block_m) * cdiv(in_features, block_k)
            _qlora_qkv_dx_kernel[(tiles,)](
                *wide, *_weights(layers), *_each(layers, 8, 9), grad_x, u, call.rows, out_features, in_features,
                rank, *scalings, *strides, RANK=call.padded_rank, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
                **constants,
            )  # fmt: skip
        tiles_A, tiles = tiles_of_grads(call, want_A, want_B or want_bias)
        block_m, parts, steps = parts_of_rows(call, 3 * tiles)
        A = layers[0][8]
        grads_of = Gradients(call, x.dtype if A is None else A.dtype, wanted[1:], parts, 3)
        grad_A, grad_B, grad_bias = grads_of.parts
        if tiles and call.rows:
            _qlora_qkv_grads_kernel[(tiles, parts, 3)](
                flat, u, *wide, t, grad_A, grad_B, grad_bias, call.rows, in_features, out_features, rank,
                *scalings, flat.stride(0), *strides, steps, tiles_A, grad_A.stride(1), grad_B.stride(1),
                grad_bias.stride(1), WANT_B=want_B, WANT_BIAS=want_bias,
                RANK=max(16, power_of_two(rank)), PRECISION=precision(x.dtype),
                BLOCK_M=block_m, BLOCK_C=GRADS_COLUMNS, num_warps=4, num_stages=3,
            )  # fmt: skip
        totals = grads_of.total()
        if not call.rows:
            for each in totals:
                each.zero_()
    return grad_x if want_x else grad_x.new_empty(0), totals[0], totals[1], totals[2]
