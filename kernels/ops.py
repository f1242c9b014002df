"""The operators ``torch.ops.harlora.*``: one place for their schema, argument checks, fake and autograd.

Each operator is registered once for every device. Its kernel checks the arguments, in eager mode as well as when it
is traced, and asks `dispatch` for the backend. The public functions around them take a `QuantizedWeight`.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import dispatch, reference
from harlora.kernels.format import (
    NESTED_BLOCKSIZE,
    WEIGHT_DTYPES,
    QuantizedWeight,
    check_format,
    check_packed,
)

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # float64 for gradcheck

_QUANTIZED = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, str quant_type, int blocksize"
_SCHEMAS = {
    "quantize_4bit": "(Tensor weight, str quant_type, int blocksize, bool double_quant)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "dequantize_4bit": f"({_QUANTIZED}, SymInt[] shape, ScalarType dtype) -> Tensor",
    "qlora_linear": f"(Tensor x, {_QUANTIZED}, SymInt out_features, Tensor? bias, Tensor? lora_A, Tensor? lora_B,"
    " float scaling) -> (Tensor, Tensor)",
    "qlora_linear_backward": f"(Tensor grad, Tensor? x, Tensor? t, {_QUANTIZED}, SymInt in_features, Tensor? lora_A,"
    " Tensor? lora_B, float scaling, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"harlora::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


# quantize_4bit ------------------------------------------------------------------------------------------------------


def _check_quantize(weight: Tensor, quant_type: str, blocksize: int) -> None:
    check_format("quantize_4bit", quant_type, blocksize)
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"quantize_4bit: weight must be float32, bfloat16 or float16, got {weight.dtype}; convert it first"
        )
    if weight.numel() == 0:
        raise ValueError(f"quantize_4bit: weight must have at least one value, got shape {tuple(weight.shape)}")


@torch.library.impl("harlora::quantize_4bit", "CompositeExplicitAutograd")
def _quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_quantize(weight, quant_type, blocksize)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = dispatch.select("quantize_4bit", weight.device)(
        weight.detach(), quant_type, blocksize, double_quant
    )
    return result


@torch.library.register_fake("harlora::quantize_4bit")
def _quantize_4bit_fake(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_quantize(weight, quant_type, blocksize)
    blocks = -(-weight.numel() // blocksize)
    packed = weight.new_empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8)
    absmax = weight.new_empty((blocks,), dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty((-(-blocks // NESTED_BLOCKSIZE) if double_quant else 0,), dtype=torch.float32)
    offset = weight.new_empty(() if double_quant else (0,), dtype=torch.float32)
    return packed, absmax, nested, offset


# dequantize_4bit ----------------------------------------------------------------------------------------------------


def _check_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    check_format("dequantize_4bit", quant_type, blocksize)
    check_packed("dequantize_4bit", prod(shape), packed, absmax, nested_absmax, nested_offset, blocksize)
    _check_devices("dequantize_4bit", packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset)
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(f"dequantize_4bit: dtype must be one of {COMPUTE_DTYPES}, got {dtype}")


@torch.library.impl("harlora::dequantize_4bit", "CompositeExplicitAutograd")
def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    _check_dequantize(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype)
    return _dense(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype)


def _dense(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    scale = reference.scales(absmax, nested_absmax, nested_offset)
    dispatch.select("dequantize_4bit", packed.device)(packed, scale, quant_type, blocksize, out)
    return out


@torch.library.register_fake("harlora::dequantize_4bit")
def _dequantize_4bit_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    _check_dequantize(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype)
    return packed.new_empty(shape, dtype=dtype)


# qlora_linear -------------------------------------------------------------------------------------------------------


def _check_devices(function: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{function}: {name} is on {tensor.device}, required {first.device} like the first argument; "
                "move the layer or its input"
            )


def _check_qlora(
    function: str,
    x: Tensor,
    in_features: int,
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
) -> None:
    if x.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{function}: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check_format(function, quant_type, blocksize)
    if packed.numel() != (out_features * in_features + 1) // 2:
        raise ValueError(
            f"{function}: x.shape[-1] must equal in_features of the packed weight, which with out_features="
            f"{out_features} has {2 * packed.numel()} values, got x of shape {tuple(x.shape)}"
        )
    check_packed(function, out_features * in_features, packed, absmax, nested_absmax, nested_offset, blocksize)
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"{function}: lora_A and lora_B must be given together or not at all")
    rank = lora_A.shape[0] if lora_A is not None and lora_A.dim() else 0
    for name, tensor, shape in (
        ("bias", bias, (out_features,)),
        ("lora_A", lora_A, (rank, in_features)),
        ("lora_B", lora_B, (out_features, rank)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{function}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{function}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    _check_devices(
        function, x, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset,
        bias=bias, lora_A=lora_A, lora_B=lora_B,
    )  # fmt: skip


def _check_forward(x: Tensor, *quantized_and_rest: Any) -> None:
    if x.dim() == 0:
        raise ValueError("qlora_linear: x must have at least one dimension, got a scalar")
    _check_qlora("qlora_linear", x, x.shape[-1], *quantized_and_rest)


@torch.library.impl("harlora::qlora_linear", "CompositeExplicitAutograd")
def _qlora_linear(
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
) -> tuple[Tensor, Tensor]:
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    _check_forward(x, *quantized, out_features, bias, lora_A, lora_B)
    weight = _dense(*quantized, (out_features, x.shape[-1]), x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y, t = dispatch.select("qlora_linear", x.device)(rows, weight, bias, lora_A, lora_B, scaling)
    rank = () if lora_A is None else (lora_A.shape[0],)
    return y.view(*x.shape[:-1], out_features), t.view(*x.shape[:-1], *rank) if rank else t


@torch.library.register_fake("harlora::qlora_linear")
def _qlora_linear_fake(
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
) -> tuple[Tensor, Tensor]:
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    _check_forward(x, *quantized, out_features, bias, lora_A, lora_B)
    t = x.new_empty(0) if lora_A is None else x.new_empty((*x.shape[:-1], lora_A.shape[0]))
    return x.new_empty((*x.shape[:-1], out_features)), t


_Quantized = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]


def _check_backward(
    grad: Tensor, x: Tensor | None, t: Tensor | None, quantized: _Quantized, in_features: int,
    lora_A: Tensor | None, lora_B: Tensor | None, output_mask: Sequence[bool],
) -> None:  # fmt: skip
    function = "qlora_linear_backward"
    _check_qlora(function, grad, in_features, *quantized, grad.shape[-1], None, lora_A, lora_B)
    if output_mask[2] and (x is None or lora_A is None or x.shape != (*grad.shape[:-1], in_features)):
        raise ValueError(f"{function}: the gradient of lora_A requires x of shape (..., {in_features}) and lora_A")
    if output_mask[3] and (t is None or lora_B is None or t.shape != (*grad.shape[:-1], lora_B.shape[1])):
        raise ValueError(f"{function}: the gradient of lora_B requires t of shape (..., rank) and lora_B")


@torch.library.impl("harlora::qlora_linear_backward", "CompositeExplicitAutograd")
def _qlora_linear_backward(
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
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    _check_backward(grad, x, t, quantized, in_features, lora_A, lora_B, output_mask)
    out_features = grad.shape[-1]
    weight = _dense(*quantized, (out_features, in_features), grad.dtype) if output_mask[0] else None
    grad_x, grad_bias, grad_A, grad_B = dispatch.select("qlora_linear_backward", grad.device)(
        grad.reshape(-1, out_features),
        None if x is None else x.reshape(-1, in_features),
        None if t is None or lora_B is None else t.reshape(-1, lora_B.shape[1]),
        weight,
        lora_A,
        lora_B,
        scaling,
        output_mask,
    )
    return grad_x.view(*grad.shape[:-1], in_features) if output_mask[0] else grad_x, grad_bias, grad_A, grad_B


@torch.library.register_fake("harlora::qlora_linear_backward")
def _qlora_linear_backward_fake(
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
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    _check_backward(grad, x, t, quantized, in_features, lora_A, lora_B, output_mask)
    empty = (0,)
    return (
        grad.new_empty((*grad.shape[:-1], in_features) if output_mask[0] else empty),
        grad.new_empty((grad.shape[-1],) if output_mask[1] else empty),
        grad.new_empty(lora_A.shape if output_mask[2] and lora_A is not None else empty),
        grad.new_empty(lora_B.shape if output_mask[3] and lora_B is not None else empty),
    )


# Positions of the differentiable arguments of qlora_linear.
_X, _BIAS, _LORA_A, _LORA_B = 0, 8, 9, 10


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, _, _, lora_A, lora_B, scaling) = inputs
    t = output[1]
    needs = ctx.needs_input_grad
    # x is kept for dA alone and t for dB alone; the dequantised weight is not kept at all.
    keep_x = x if needs[_LORA_A] else None
    keep_t = t if needs[_LORA_B] else None
    ctx.save_for_backward(keep_x, keep_t, packed, absmax, nested_absmax, nested_offset, lora_A, lora_B)
    ctx.rest = (quant_type, blocksize, x.shape[-1])
    ctx.scaling = scaling
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _grad_t: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 12
    if grad is not None:
        x, t, packed, absmax, nested_absmax, nested_offset, lora_A, lora_B = ctx.saved_tensors
        positions = (_X, _BIAS, _LORA_A, _LORA_B)
        mask = [ctx.needs_input_grad[position] for position in positions]
        results = torch.ops.harlora.qlora_linear_backward(
            grad, x, t, packed, absmax, nested_absmax, nested_offset, *ctx.rest, lora_A, lora_B, ctx.scaling, mask
        )
        for position, wanted, result in zip(positions, mask, results, strict=True):
            grads[position] = result if wanted else None
    return tuple(grads)


torch.library.register_autograd("harlora::qlora_linear", _backward, setup_context=_setup_context)


# Public functions ---------------------------------------------------------------------------------------------------


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> QuantizedWeight:
    """``weight`` in 4 bits, exactly as bitsandbytes stores it.

    code = nearest of 16 values to weight / absmax, absmax = the largest magnitude in its block.

    weight: any shape, float32, bfloat16 or float16; not differentiable.
    quant_type: ``"nf4"`` (Dettmers et al. 2023, arXiv 2305.14314) or ``"fp4"``.
    blocksize: 32, 64, 128, … 4096 values.
    double_quant: store absmax itself in 8 bits, which takes 0.127 bits a weight instead of 0.5 at blocksize 64.
    Raises: ValueError or TypeError if an argument is not as above, or a value of ``weight`` is not finite.
    """
    weight = weight.detach()
    checkable = weight.is_floating_point() and not weight.is_meta and not torch.compiler.is_compiling()
    if checkable and not weight.isfinite().all():
        raise ValueError("quantize_4bit: weight must be finite, got a NaN or infinite value; check the checkpoint")
    packed, absmax, nested_absmax, nested_offset = torch.ops.harlora.quantize_4bit(
        weight, quant_type, blocksize, double_quant
    )
    return QuantizedWeight(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax if double_quant else None,
        nested_offset=nested_offset if double_quant else None,
        quant_type=quant_type,
        blocksize=blocksize,
        dtype=weight.dtype,
        shape=tuple(weight.shape),
    )


def dequantize_4bit(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a quantised weight, of its shape: code · absmax in float32, rounded once to ``dtype``.

    dtype: of the result; by default what the weight had before it was quantised.
    """
    result: Tensor = torch.ops.harlora.dequantize_4bit(
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, weight.quant_type,
        weight.blocksize, weight.shape, dtype or weight.dtype,
    )  # fmt: skip
    return result


def qlora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """A linear layer over a 4-bit weight with a low-rank adapter, ``(..., out_features)``.

    y = x·Ŵᵀ + bias + scaling·(x·lora_Aᵀ)·lora_Bᵀ, Ŵ the dequantised weight.

    Gradients flow to x, bias, lora_A and lora_B. Backward keeps x·lora_Aᵀ and x, and no dequantised copy of the
    weight. Under autocast all arguments are used in its dtype, otherwise bias and adapter in that of ``x``.

    x: ``(..., in_features)``, float32, bfloat16, float16 or float64.
    weight: of shape ``(out_features, in_features)``.
    bias: ``(out_features,)``; lora_A: ``(rank, in_features)``; lora_B: ``(out_features, rank)``.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: Dettmers et al. 2023 (arXiv 2305.14314), equation 5.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"qlora_linear: weight must have shape (out_features, in_features), got {weight.shape}")
    if x.dim() and x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"qlora_linear: x.shape[-1] must equal in_features={weight.shape[1]}, got x of shape {tuple(x.shape)}"
        )
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))  # as autocast treats nn.Linear
    bias, lora_A, lora_B = (None if tensor is None else tensor.to(x.dtype) for tensor in (bias, lora_A, lora_B))
    y: Tensor = torch.ops.harlora.qlora_linear(
        x, weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, weight.quant_type,
        weight.blocksize, weight.shape[0], bias, lora_A, lora_B, scaling,
    )[0]  # fmt: skip
    return y
