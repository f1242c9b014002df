"""Triton: the blocks of a small pre-LayerNorm transformer, as one sequence of launches forward and one backward.

    s = x + o(attention(q(n), k(n), v(n))),  n = norm1(x);  x' = s + fc2(gelu(fc1(norm2(s))));  after the last, norm(x')

What lies between the 4-bit layers has kernels here: LayerNorm with the residual sum before it, and softmax attention of
short sequences. The layers are launched as qlora_qkv.py, qlora_linear.py and qlora_mlp.py launch them. Nothing but
launches and allocations takes place, so that replay.py can repeat all of it in one call: eager Python between the
layers took ten times what they compute for.

Attention is one program for each window and head, which has all of its q, k and v in registers; backward computes the
probabilities anew. LayerNorms are frozen: of them only the gradient towards x is computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels.configurations import Configuration
from harlora.kernels.reference import Block, BlockWanted, Norm
from harlora.kernels.triton import nf4
from harlora.kernels.triton.nf4 import cast, cdiv, power_of_two
from harlora.kernels.triton.qlora_linear import dot, precision, qlora_linear, qlora_linear_backward
from harlora.kernels.triton.qlora_mlp import fits as mlp_fits
from harlora.kernels.triton.qlora_mlp import qlora_mlp, qlora_mlp_backward
from harlora.kernels.triton.qlora_qkv import alike, qlora_qkv, qlora_qkv_backward

MOST_TOKENS = 64
MOST_HEAD = 64  # width of a head

# How qlora_qkv, qlora_linear (as o) and qlora_mlp are launched.
Configurations = tuple[Configuration, Configuration, Configuration]


@triton.jit(do_not_specialize=["rows"])
def _residual_norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, s_ptr, n_ptr, stats_ptr, rows, width, eps,
    ADD: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of s = x + y and of n = LayerNorm(s); with KEEP also mean and 1 / deviation, ``(2, rows)``.

    Without ADD s is x. The norm is that of the sum as it is rounded, which backward reads.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    place, mask = (m * width)[:, None] + c[None, :], (m < rows)[:, None] & inside[None, :]
    s = tl.load(x_ptr + place, mask, other=0.0).to(tl.float32)
    if ADD:
        rounded = cast(s + tl.load(y_ptr + place, mask, other=0.0).to(tl.float32), dtype)
        tl.store(s_ptr + place, rounded, mask)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, axis=1) / width
    centred = tl.where(inside[None, :], s - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    if KEEP:
        tl.store(stats_ptr + m, mean, m < rows)
        tl.store(stats_ptr + rows + m, inverse, m < rows)
    weight = tl.load(weight_ptr + c, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, inside, other=0.0).to(tl.float32)
    tl.store(n_ptr + place, cast(centred * inverse[:, None] * weight[None, :] + bias[None, :], dtype), mask)


@triton.jit(do_not_specialize=["rows"])
def _residual_norm_dx_kernel(
    grad_ptr, s_ptr, stats_ptr, weight_ptr, residual_ptr, grad_s_ptr, rows, width,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of ds = dn·∂n/∂s, and with ADD the gradient that came past the norm added to it."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    place, mask = (m * width)[:, None] + c[None, :], (m < rows)[:, None] & inside[None, :]
    mean = tl.load(stats_ptr + m, m < rows, other=0.0)
    inverse = tl.load(stats_ptr + rows + m, m < rows, other=0.0)
    s = tl.load(s_ptr + place, mask, other=0.0).to(tl.float32)
    unit = tl.where(inside[None, :], (s - mean[:, None]) * inverse[:, None], 0.0)
    weight = tl.load(weight_ptr + c, inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask, other=0.0).to(tl.float32) * weight[None, :]
    along = tl.sum(grad * unit, axis=1) / width
    grad = (grad - (tl.sum(grad, axis=1) / width)[:, None] - unit * along[:, None]) * inverse[:, None]
    if ADD:
        grad += tl.load(residual_ptr + place, mask, other=0.0).to(tl.float32)
    tl.store(grad_s_ptr + place, cast(grad, grad_s_ptr.dtype.element_ty), mask)


@triton.jit
def _probabilities(q, k, scale, inside, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(scale·q·kᵀ) ``(TOKENS, TOKENS)``, over the keys that are ``inside``, float32."""
    score = scale * dot(q, tl.trans(k), tl.zeros((TOKENS, TOKENS), tl.float32), PRECISION)
    score = tl.where(inside[None, :], score, float("-inf"))
    weight = tl.exp(score - tl.max(score, axis=1)[:, None])
    return weight / tl.sum(weight, axis=1)[:, None]


@triton.jit(do_not_specialize=["rows", "tokens"])
def _attention_fwd_kernel(
    qkv_ptr, y_ptr, rows, tokens, heads, size, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(scale·q·kᵀ)·v of one window and head; qkv is ``(3, rows, heads · size)``, tokens of a window together."""
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    width = heads * size
    i, c = tl.arange(0, TOKENS), tl.arange(0, SIZE)
    row = (tl.program_id(0) // heads).to(tl.int64) * tokens + i
    place = (row * width)[:, None] + (tl.program_id(0) % heads) * size + c[None, :]
    mask, plane = (i < tokens)[:, None] & (c < size)[None, :], rows.to(tl.int64) * width
    q = tl.load(qkv_ptr + place, mask, other=0.0)
    k = tl.load(qkv_ptr + plane + place, mask, other=0.0)
    v = tl.load(qkv_ptr + 2 * plane + place, mask, other=0.0)
    weight = cast(_probabilities(q, k, scale, i < tokens, TOKENS, PRECISION), dtype)
    y = dot(weight, v, tl.zeros((TOKENS, SIZE), tl.float32), PRECISION)
    tl.store(y_ptr + place, cast(y, dtype), mask)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _attention_bwd_kernel(
    grad_ptr, qkv_ptr, grad_qkv_ptr, rows, tokens, heads, size, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and v of one window and head, laid out as they are.

    With p the probabilities: dv = pᵀ·dY, dp = dY·vᵀ, ds = scale·p·(dp - Σ p·dp), dq = ds·k, dk = dsᵀ·q.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    width = heads * size
    i, c = tl.arange(0, TOKENS), tl.arange(0, SIZE)
    row = (tl.program_id(0) // heads).to(tl.int64) * tokens + i
    place = (row * width)[:, None] + (tl.program_id(0) % heads) * size + c[None, :]
    mask, plane = (i < tokens)[:, None] & (c < size)[None, :], rows.to(tl.int64) * width
    q = tl.load(qkv_ptr + place, mask, other=0.0)
    k = tl.load(qkv_ptr + plane + place, mask, other=0.0)
    weight = _probabilities(q, k, scale, i < tokens, TOKENS, PRECISION)
    grad = tl.load(grad_ptr + place, mask, other=0.0)
    grad_v = dot(tl.trans(cast(weight, dtype)), grad, tl.zeros((TOKENS, SIZE), tl.float32), PRECISION)
    tl.store(grad_qkv_ptr + 2 * plane + place, cast(grad_v, dtype), mask)
    v = tl.load(qkv_ptr + 2 * plane + place, mask, other=0.0)
    inner = dot(grad, tl.trans(v), tl.zeros((TOKENS, TOKENS), tl.float32), PRECISION)
    score = cast(scale * weight * (inner - tl.sum(weight * inner, axis=1)[:, None]), dtype)
    grad_q = dot(score, k, tl.zeros((TOKENS, SIZE), tl.float32), PRECISION)
    tl.store(grad_qkv_ptr + place, cast(grad_q, dtype), mask)
    grad_k = dot(tl.trans(score), q, tl.zeros((TOKENS, SIZE), tl.float32), PRECISION)
    tl.store(grad_qkv_ptr + plane + place, cast(grad_k, dtype), mask)


# Launchers ----------------------------------------------------------------------------------------------------------


def attends(tokens: int, size: int, dtype: torch.dtype) -> bool:
    """Whether one program has the registers for attention of ``tokens`` tokens with heads of ``size``."""
    # Three TF32 products for one of float32 take twice the registers.
    most = MOST_TOKENS // 2 if dtype == torch.float32 and size > 16 else MOST_TOKENS
    return 0 < tokens <= most and 0 < size <= MOST_HEAD


def fits(x: Tensor, blocks: Sequence[Block], heads: int) -> bool:
    """Whether the launchers take ``(windows, tokens, width)`` x and such blocks."""
    if x.dim() != 3 or not blocks or heads < 1:
        return False
    _, tokens, width = x.shape
    hidden = blocks[0][6][6]
    return (
        width % heads == 0
        and attends(tokens, width // heads, x.dtype)
        and all(
            alike(x, qkv) and qkv[0][6] == o[6] == fc2[6] == width and fc1[6] == hidden and mlp_fits(x, fc1, fc2)
            for _, *qkv, o, _, fc1, fc2 in blocks
        )
    )  # fmt: skip


def residual_norm(x: Tensor, y: Tensor | None, norm: Norm, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """S = x + y, or x where y is None; its LayerNorm; and with ``keep`` mean and 1 / deviation ``(2, rows)``."""
    weight, bias, eps = norm
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    s = x if y is None else torch.empty_like(x)
    n, stats = torch.empty_like(x), x.new_empty((2, rows) if keep else 0, dtype=torch.float32)
    block_m, block_c = _tile(width)
    _residual_norm_fwd_kernel[(cdiv(rows, block_m),)](
        x, y, weight, bias, s, n, stats, rows, width, eps, ADD=y is not None, KEEP=keep, BLOCK_M=block_m,
        BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return s, n, stats


def residual_norm_backward(grad: Tensor, s: Tensor, stats: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """The gradient of s, with that which came past the norm."""
    rows, width = s.numel() // s.shape[-1], s.shape[-1]
    grad_s = torch.empty_like(s)
    block_m, block_c = _tile(width)
    _residual_norm_dx_kernel[(cdiv(rows, block_m),)](
        grad, s, stats, norm[0], residual, grad_s, rows, width, ADD=residual is not None, BLOCK_M=block_m,
        BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return grad_s


def _tile(width: int) -> tuple[int, int]:
    """Rows of a program, and the padded width."""
    block_c = max(16, power_of_two(width))
    return max(1, 1024 // block_c), block_c


def attention(qkv: Tensor, heads: int) -> Tensor:
    """As `reference.attention`; qkv is ``(3, windows, tokens, width)``, contiguous."""
    y = torch.empty_like(qkv[0])
    grid, arguments, constants = _heads(qkv, heads)
    _attention_fwd_kernel[grid](qkv, y, *arguments, **constants)
    return y


def attention_backward(grad: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of qkv."""
    grad_qkv = torch.empty_like(qkv)
    grid, arguments, constants = _heads(qkv, heads)
    _attention_bwd_kernel[grid](grad, qkv, grad_qkv, *arguments, **constants)
    return grad_qkv


def _heads(qkv: Tensor, heads: int) -> tuple[tuple[int], tuple[float, ...], dict[str, Any]]:
    """The grid, numbers and compile-time arguments of attention's kernels."""
    _, windows, tokens, width = qkv.shape
    size = width // heads
    padded, padded_size = max(16, power_of_two(tokens)), max(16, power_of_two(size))
    warps = padded // 16 if qkv.dtype != torch.float32 else max(padded // 16, padded * padded_size // 512)
    return (
        (windows * heads,),
        (windows * tokens, tokens, heads, size, size**-0.5),
        {"TOKENS": padded, "SIZE": padded_size, "PRECISION": precision(qkv.dtype), "num_warps": warps},
    )


def encoder_blocks(
    x: Tensor, blocks: Sequence[Block], norm: Norm, heads: int, keep: bool, *, configuration: Configurations
) -> list[Tensor]:
    """As `reference.encoder_blocks`, of x, contiguous, and blocks that `fits` takes."""
    for_qkv, for_o, for_mlp = configuration
    kept: list[Tensor] = []
    with nf4.on_device(x):
        y: Tensor | None = None
        for norm1, q, k, v, o, norm2, fc1, fc2 in blocks:
            x, n1, stats1 = residual_norm(x, y, norm1, keep)
            qkv, t = qlora_qkv(n1, (q, k, v), configuration=for_qkv)
            attended = attention(qkv, heads)
            projected, t_o = qlora_linear(attended, *o, configuration=for_o)
            s, n2, stats2 = residual_norm(x, projected, norm2, keep)
            y, h, t1, t2 = qlora_mlp(n2, fc1, fc2, keep, configuration=for_mlp)
            if keep:
                kept += [x, n1, stats1, qkv, t, attended, t_o, s, n2, stats2, h, t1, t2]
            x = s
        x, encoded, stats = residual_norm(x, y, norm, keep)
    return [encoded, *kept[1:], x, stats] if keep else [encoded]


def encoder_blocks_backward(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    blocks: Sequence[Block],
    norm: Norm,
    heads: int,
    wanted: tuple[bool, Sequence[BlockWanted]],
    *,
    configuration: Configurations,
) -> list[Tensor]:
    """As `reference.encoder_blocks_backward`, of contiguous tensors."""
    for_qkv, for_o, for_mlp = configuration
    want_x, wants = wanted
    per_block: list[list[Tensor]] = []
    every = [x, *kept]
    with nf4.on_device(grad):
        grad = residual_norm_backward(grad, every[-2], every[-1], norm, None)
        for i in reversed(range(len(blocks))):
            below = want_x or any(map(any, wants[:i]))
            if not below and not any(wants[i]):
                per_block.append([])
                continue
            norm1, q, k, v, o, norm2, fc1, fc2 = blocks[i]
            s1, n1, stats1, qkv, t, attended, t_o, s2, n2, stats2, h, t1, t2 = every[13 * i : 13 * i + 13]
            (want_bias, want_A, want_B), want_o, want_mlp = wants[i][:3], wants[i][3:6], wants[i][6:]
            into_qkv = below or want_bias or want_A or want_B
            into_o = into_qkv or any(want_o)
            of_qkv = of_o = [grad] * 3  # as long as they are when wanted
            through, *of_mlp = qlora_mlp_backward(
                grad, n2, h, t1, t2, fc1, fc2, (into_o, *want_mlp), configuration=for_mlp
            )
            if into_o:
                grad = residual_norm_backward(through, s2, stats2, norm2, grad)
                # The gradient of lora_A takes a product of the launch for that of the input, which is computed for it.
                through, *of_o = qlora_linear_backward(
                    grad, attended, t_o, *o[:6], attended.shape[-1], o[8], o[9], o[10],
                    (into_qkv or want_o[1], *want_o), configuration=for_o,
                )  # fmt: skip
            if into_qkv:
                grad_qkv = attention_backward(through, qkv, heads)
                through, *of_qkv = qlora_qkv_backward(
                    [grad_qkv[0], grad_qkv[1], grad_qkv[2]], n1, t, (q, k, v),
                    (below, want_bias, want_A, want_B), configuration=for_qkv,
                )  # fmt: skip
            if below:
                grad = residual_norm_backward(through, s1, stats1, norm1, grad)
            per_block.append([*of_qkv, *of_o, *of_mlp])
    grads = [
        found
        for of_block, wants_of in zip(reversed(per_block), wants, strict=True)
        for found, want in zip(of_block, wants_of, strict=False)
        if want
    ]
    return [grad, *grads] if want_x else grads
