"""What every operator means, in plain PyTorch: the oracle of the tests and the backend of last resort.

Arithmetic follows bitsandbytes 0.50.2 on CUDA (`csrc/kernels.cu`), which its CPU kernels do not always do.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harlora.kernels.dropout import dropped
from harlora.kernels.format import NESTED_BLOCKSIZE, code_table, nested_code_table

# FP4 codes by rising magnitude, and the bounds between them: the constants of the CUDA kernel, which are not quite
# the midpoints (0.583333 for 0.58333331) that bitsandbytes uses on CPUs.
_FP4_BY_MAGNITUDE = (0, 1, 6, 7, 4, 5, 2, 3)
_FP4_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


@cache
def bounds(quant_type: str, device: torch.device) -> Tensor:
    """What a value must exceed for each further code, float32: of NF4 ``(15,)``; of FP4 ``(7,)``, for magnitudes."""
    if quant_type == "fp4":
        return torch.tensor(_FP4_BOUNDS, dtype=torch.float32, device=device)
    code = code_table("nf4", device)
    return (code[:-1] + code[1:]) / 2


def _in_blocks(flat: Tensor, blocksize: int) -> Tensor:
    """``flat`` as ``(blocks, blocksize)``, the last block filled up with zeros."""
    return F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def _search(values: Tensor, limits: Tensor) -> Tensor:
    """How many limits each value exceeds, int32; 0 for NaN, which is 0 · inf in a block of zeros."""
    return torch.where(values.isnan(), 0, torch.bucketize(values, limits, out_int32=True))


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed, absmax, nested_absmax and nested_offset of ``weight``; the last two are empty without double_quant.

    A value takes the code whose upper bound it does not exceed (ties go down); a block of zeros takes code 0.
    """
    blocks = _in_blocks(weight.reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(dim=1)
    flat = (blocks * (1.0 / absmax)[:, None]).reshape(-1)[: weight.numel()]
    limits = bounds(quant_type, flat.device)
    if quant_type == "nf4":
        code = _search(flat, limits)
    else:
        order = torch.tensor(_FP4_BY_MAGNITUDE, dtype=torch.int32, device=flat.device)
        code = order[_search(flat.abs(), limits)] | ((flat < 0).int() << 3)
    # The spare half byte of an odd number of values is what 0 quantises to.
    spare = 7 if quant_type == "nf4" else 0
    pairs = F.pad(code.to(torch.uint8), (0, code.numel() % 2), value=spare).view(-1, 2)
    packed = (pairs[:, :1] << 4) | pairs[:, 1:]
    if not double_quant:
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    return packed, *quantize_scales(absmax)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes of ``absmax``, nested_absmax and nested_offset."""
    offset = absmax.mean()
    centred = _in_blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested_absmax = centred.abs().amax(dim=1)
    table = nested_code_table(absmax.device)
    scaled = (centred * (1.0 / nested_absmax)[:, None]).reshape(-1)[: absmax.numel()]
    nested_code = _search(scaled, (table[:-1] + table[1:]) / 2)
    return nested_code.to(torch.uint8), nested_absmax, offset


def scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """The scale of each block, ``(blocks,)``, float32: absmax itself, or decoded from its 8 bits."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    table = nested_code_table(absmax.device)
    nested = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return table[absmax.int()] * nested + nested_offset


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Code · scale, ``shape``: computed in float32, rounded once to ``dtype``."""
    code = code_table(quant_type, packed.device)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # (256, 2): the two codes of a byte
    flat = pairs[packed.reshape(-1).int()].view(-1)[: prod(shape)]
    scale = scales(absmax, nested_absmax, nested_offset)
    return (_in_blocks(flat, blocksize) * scale[:, None]).view(-1)[: flat.numel()].view(shape).to(dtype)


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
) -> tuple[Tensor, Tensor]:
    """Y = x·Ŵᵀ + bias + scaling·t·lora_Bᵀ and t = x·lora_Aᵀ, which backward needs; t is empty without adapter.

    With a seed, t = dropped(x)·lora_Aᵀ (dropout.py).
    """
    shape = (out_features, x.shape[-1])
    weight = dequantize_4bit(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, x.dtype)
    y = F.linear(x, weight, bias)
    if lora_A is None or lora_B is None:
        return y, x.new_empty(0)
    if seed is not None:
        x = dropped(x.reshape(-1, x.shape[-1]), dropout, seed).view(x.shape)
    t = x @ lora_A.T
    return y.add(t @ lora_B.T, alpha=scaling), t


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, bias, lora_A and lora_B, each empty unless ``output_mask`` asks for it.

    With u = scaling·dY·lora_B: dX = dY·Ŵ + u·lora_A, dbias = Σ dY, dA = uᵀ·x, dB = scaling·dYᵀ·t. With a seed u·lora_A
    and the x of dA are dropped as x was.

    grad: ``(..., out_features)``; x: ``(..., in_features)``, for dA alone; t: ``(..., rank)``, for dB alone.
    """
    grad_x, grad_bias, grad_A, grad_B = (grad.new_empty(0) for _ in range(4))
    want_x, want_bias, want_A, want_B = output_mask
    rows = grad.reshape(-1, grad.shape[-1])
    u = None if lora_B is None else scaling * (rows @ lora_B)
    if want_x:
        shape = (grad.shape[-1], in_features)
        # Without a name the weight goes before what is added is computed, and no third tensor of that size is made.
        grad_x = rows @ dequantize_4bit(
            packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, grad.dtype
        )
        if u is not None and lora_A is not None:
            low = u @ lora_A
            grad_x += low if seed is None else dropped(low, dropout, seed)
        grad_x = grad_x.view(*grad.shape[:-1], in_features)
    if want_bias:
        grad_bias = rows.sum(dim=0)
    if want_A:
        assert x is not None
        assert u is not None
        flat = x.reshape(-1, in_features)
        grad_A = u.T @ (flat if seed is None else dropped(flat, dropout, seed))
    if want_B:
        assert t is not None
        grad_B = scaling * (rows.T @ t.reshape(len(rows), t.shape[-1]))
    return grad_x, grad_bias, grad_A, grad_B


# The arguments of qlora_linear after x: one layer.
Layer = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, str, int, int, Tensor | None, Tensor | None, Tensor | None, float
]


def qlora_qkv(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """Y ``(3, …, out_features)`` and t ``(3, …, rank)`` of three layers of one size over one x."""
    results = [qlora_linear(x, *layer) for layer in layers]
    return torch.stack([y for y, _ in results]), torch.stack([t for _, t in results])


def qlora_qkv_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    layers: Sequence[Layer],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DX, the sum over the layers, and of each dbias, dA and dB, stacked; each empty unless it is wanted."""
    sums = [
        qlora_linear_backward(
            grad, x, t[i] if t.numel() else None, *layer[:6], x.shape[-1], layer[8], layer[9], layer[10], wanted
        )
        for i, (grad, layer) in enumerate(zip(grads, layers, strict=True))
    ]
    grad_x, *others = (torch.stack(each) for each in zip(*sums, strict=True))
    return grad_x.sum(0), others[0], others[1], others[2]


def qlora_mlp(x: Tensor, fc1: Layer, fc2: Layer, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y = fc2(gelu(h)) of h = fc1(x); with ``keep`` also h and the t of both layers, else empty."""
    h, t1 = qlora_linear(x, *fc1)
    y, t2 = qlora_linear(F.gelu(h), *fc2)
    nothing = x.new_empty(0)
    return (y, h, t1, t2) if keep else (y, nothing, nothing, nothing)


def qlora_mlp_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    t1: Tensor,
    t2: Tensor,
    fc1: Layer,
    fc2: Layer,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and of bias, lora_A and lora_B of fc1, then of fc2; each empty unless ``wanted`` asks for it.

    h, t1, t2: of `qlora_mlp`; ``wanted`` has seven flags, in that order.
    """
    first, second = tuple(wanted[:4]), (any(wanted[:4]), *wanted[4:])
    inner, bias2, A2, B2 = qlora_linear_backward(
        grad, F.gelu(h), t2, *fc2[:6], h.shape[-1], fc2[8], fc2[9], fc2[10], second
    )
    if not any(first):
        nothing = grad.new_empty(0)
        return nothing, nothing, nothing, nothing, bias2, A2, B2
    grad_h = torch.ops.aten.gelu_backward(inner, h)
    x, bias1, A1, B1 = qlora_linear_backward(grad_h, x, t1, *fc1[:6], x.shape[-1], fc1[8], fc1[9], fc1[10], first)
    return x, bias1, A1, B1, bias2, A2, B2


# The blocks of an encoder --------------------------------------------------------------------------------------------

Norm = tuple[Tensor, Tensor, float]  # weight, bias and eps of a LayerNorm
# norm1, q, k, v, o, norm2, fc1 and fc2 of a pre-LayerNorm transformer block.
Block = tuple[Norm, Layer, Layer, Layer, Layer, Norm, Layer, Layer]
# Which gradients of a block are wanted: of bias, lora_A and lora_B of q, k and v together, of o, of fc1, of fc2.
BlockWanted = tuple[bool, ...]


def layer_norm(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension; mean and 1 / deviation of each row, ``(2, rows)``."""
    weight, bias, eps = norm
    n, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return n, torch.stack([mean.flatten(), inverse.flatten()])


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q·kᵀ / √size)·v of each head, ``(windows, tokens, heads · size)``, of qkv ``(3, windows, tokens, …)``."""
    q, k, v = qkv.unflatten(-1, (heads, -1)).transpose(-2, -3)
    weight = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weight @ v).transpose(-2, -3).flatten(-2)


def encoder_blocks(x: Tensor, blocks: Sequence[Block], norm: Norm, heads: int, keep: bool) -> list[Tensor]:
    """The last norm of what the blocks make of x ``(windows, tokens, width)``, and with ``keep`` what backward needs.

    Kept are of each block x, norm1(x) and its mean and 1 / deviation, q, k and v as ``(3, …)`` and their t, attention,
    the t of o, s = x + o(attention), norm2(s) and its mean and 1 / deviation, fc1(norm2(s)) and the t of fc1 and fc2;
    then what enters the last norm, and its mean and 1 / deviation. x itself is not repeated.
    """
    kept: list[Tensor] = []
    for norm1, q, k, v, o, norm2, fc1, fc2 in blocks:
        n1, stats1 = layer_norm(x, norm1)
        qkv, t = qlora_qkv(n1, (q, k, v))
        attended = attention(qkv, heads)
        projected, t_o = qlora_linear(attended, *o)
        s = x + projected
        n2, stats2 = layer_norm(s, norm2)
        y, h, t1, t2 = qlora_mlp(n2, fc1, fc2, True)
        kept += [x, n1, stats1, qkv, t, attended, t_o, s, n2, stats2, h, t1, t2]
        x = s + y
    encoded, stats = layer_norm(x, norm)
    return [encoded, *kept[1:], x, stats] if keep else [encoded]


def encoder_blocks_backward(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    blocks: Sequence[Block],
    norm: Norm,
    heads: int,
    wanted: tuple[bool, Sequence[BlockWanted]],
) -> list[Tensor]:
    """The gradients that are ``wanted``: of x, and block by block of its layers, those of q, k and v stacked."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        copies: list[Any] = []
        leaves: list[tuple[list[Tensor | None], bool]] = []
        for (norm1, *layers, norm2, fc1, fc2), wants in zip(blocks, wanted[1], strict=True):
            own = [
                [None if each is None else each.detach().requires_grad_() for each in layer[7:10]]
                for layer in (*layers, fc1, fc2)
            ]
            made = [(*layer[:7], *values, layer[10]) for layer, values in zip((*layers, fc1, fc2), own, strict=True)]
            copies.append((norm1, *made[:4], norm2, *made[4:]))
            groups = [[own[i][field] for i in range(3)] for field in range(3)] + [[each] for o in own[3:] for each in o]
            leaves += zip(groups, wants, strict=True)
        encoded = encoder_blocks(x, copies, norm, heads, False)[0]
        sources = [x, *(each for group, want in leaves if want for each in group if each is not None)]
        grads = iter(torch.autograd.grad(encoded, sources, grad))
        grad_x = next(grads)
        found = [
            torch.stack([next(grads) for _ in group]) if len(group) > 1 else next(grads)
            for group, want in leaves if want
        ]  # fmt: skip
    return [grad_x, *found] if wanted[0] else found


# DoRA ---------------------------------------------------------------------------------------------------------------


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of weight + scaling·lora_B·lora_A, in the dtype of ``weight``."""
    return torch.addmm(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling).norm(dim=1)


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
    """‖Ŵ + scaling·lora_B·lora_A‖ of each row, float32, or float64 with adapters in it."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    shape = (len(lora_B), lora_A.shape[1])
    weight = dequantize_4bit(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype)
    return row_norms(weight, lora_A, lora_B, scaling)


def with_gain(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Gain·z + bias in the dtype of ``z``."""
    return (gain * z if bias is None else torch.addcmul(bias.to(gain.dtype), gain, z.to(gain.dtype))).to(z.dtype)


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
) -> tuple[Tensor, Tensor]:
    """Y = gain·(x·Ŵᵀ + scaling·t·lora_Bᵀ) + bias and t = x·lora_Aᵀ."""
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    z, t = qlora_linear(x, *quantized, out_features, None, lora_A, lora_B, scaling)
    return with_gain(z, gain, bias), t


# A pool of adapters -------------------------------------------------------------------------------------------------


def lora_pool_low(x: Tensor, lora_A: Tensor, offsets: Tensor, index: Tensor, scaling: Tensor) -> Tensor:
    """Scaling_j·x·lora_Aᵀ in the columns of the adapter j = index of each row, 0 in all others.

    Columns ``offsets[j]`` to ``offsets[j + 1]`` are those of adapter j.
    """
    low = x @ lora_A.T
    if not len(scaling):
        return torch.zeros_like(low)
    known = (index >= 0) & (index < len(scaling))
    adapter = torch.where(known, index, 0)
    column = torch.arange(len(lora_A), device=x.device)
    own = (column >= offsets[adapter][..., None]) & (column < offsets[adapter + 1][..., None]) & known[..., None]
    return torch.where(own, low * scaling[adapter][..., None], 0.0).to(x.dtype)


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
) -> tuple[Tensor, Tensor]:
    """Y = x·Ŵᵀ + bias + t·lora_Bᵀ, and t of `lora_pool_low`."""
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    y, _ = qlora_linear(x, *quantized, out_features, bias, None, None, 1.0)
    t = lora_pool_low(x, lora_A, offsets, index, scaling)
    return y + t @ lora_B.T, t
