"""The operators ``torch.ops.harlora.*``: one place for their schema, argument checks, fake and autograd.

Each operator is registered once for every device. Its kernel checks the arguments, in eager mode as well as when it
is traced, and asks `dispatch` for the backend. The public functions around them take a `QuantizedWeight`.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from harlora.kernels import dispatch, eager
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

Four = tuple[Tensor, Tensor, Tensor, Tensor]
_Quantized = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]  # the arguments of _QUANTIZED


class Arguments(Protocol):
    """The arguments of one operator, in the order of its schema, and what it does with them."""

    def __init__(self, *arguments: Any) -> None:
        """Take the arguments as torch passes them."""

    def check(self) -> None:
        """Raise unless they fit the operator and each other; symbolic sizes are fine."""

    def run(self) -> Any:
        """Compute the result on real tensors."""

    def fake(self) -> Any:
        """Make tensors with the shapes and dtypes of the result, without values."""


def _register(operator: str, arguments: type[Arguments]) -> None:
    """Register the one kernel and the fake of an operator; both check their arguments first."""

    def kernel(*given: Any) -> Any:
        called = arguments(*given)
        called.check()
        return called.run()

    def fake(*given: Any) -> Any:
        called = arguments(*given)
        called.check()
        return called.fake()

    torch.library.impl(f"harlora::{operator}", "CompositeExplicitAutograd")(kernel)
    torch.library.register_fake(f"harlora::{operator}")(fake)


def _check_devices(function: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{function}: {name} is on {tensor.device}, required {first.device} like the first argument; "
                "move the layer or its input"
            )


# quantize_4bit ------------------------------------------------------------------------------------------------------


class _Quantize(NamedTuple):
    weight: Tensor
    quant_type: str
    blocksize: int
    double_quant: bool

    def check(self) -> None:
        check_format("quantize_4bit", self.quant_type, self.blocksize)
        if self.weight.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"quantize_4bit: weight must be float32, bfloat16 or float16, got {self.weight.dtype}; convert it first"
            )
        if self.weight.numel() == 0:
            raise ValueError(
                f"quantize_4bit: weight must have at least one value, got shape {tuple(self.weight.shape)}"
            )

    def run(self) -> Four:
        quantize = dispatch.select("quantize_4bit", self.weight.device, self.weight.dtype)
        result: Four = quantize(self.weight.detach(), *self[1:])
        return result

    def fake(self) -> Four:
        weight, nested = self.weight, self.double_quant
        blocks = -(-weight.numel() // self.blocksize)
        return (
            weight.new_empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8),
            weight.new_empty((blocks,), dtype=torch.uint8 if nested else torch.float32),
            weight.new_empty((-(-blocks // NESTED_BLOCKSIZE) if nested else 0,), dtype=torch.float32),
            weight.new_empty(() if nested else (0,), dtype=torch.float32),
        )


_register("quantize_4bit", _Quantize)


# dequantize_4bit ----------------------------------------------------------------------------------------------------


class _Dequantize(NamedTuple):
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    shape: Sequence[int]
    dtype: torch.dtype

    def check(self) -> None:
        packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype = self
        function = "dequantize_4bit"
        check_format(function, quant_type, blocksize)
        check_packed(function, prod(shape), packed, absmax, nested_absmax, nested_offset, blocksize)
        _check_devices(function, packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset)
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(f"{function}: dtype must be one of {COMPUTE_DTYPES}, got {dtype}")

    def run(self) -> Tensor:
        result: Tensor = dispatch.select("dequantize_4bit", self.packed.device, self.dtype)(*self)
        return result

    def fake(self) -> Tensor:
        return self.packed.new_empty(self.shape, dtype=self.dtype)


_register("dequantize_4bit", _Dequantize)


# qlora_linear -------------------------------------------------------------------------------------------------------


def _check_qlora(
    function: str,
    x: Tensor,
    in_features: int,
    quantized: _Quantized,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> None:
    packed, absmax, nested_absmax, nested_offset, quant_type, blocksize = quantized
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


class _Forward(NamedTuple):
    x: Tensor
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    out_features: int
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float

    @property
    def quantized(self) -> _Quantized:
        return self[1:7]

    @property
    def t_shape(self) -> tuple[int, ...]:
        return (0,) if self.lora_A is None else (*self.x.shape[:-1], self.lora_A.shape[0])

    def check(self) -> None:
        if self.x.dim() == 0:
            raise ValueError("qlora_linear: x must have at least one dimension, got a scalar")
        _check_qlora("qlora_linear", self.x, self.x.shape[-1], self.quantized, *self[7:11])

    def run(self) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = dispatch.select("qlora_linear", self.x.device, self.x.dtype)(*self)
        return result

    def fake(self) -> tuple[Tensor, Tensor]:
        return self.x.new_empty((*self.x.shape[:-1], self.out_features)), self.x.new_empty(self.t_shape)


_register("qlora_linear", _Forward)


class _Backward(NamedTuple):
    grad: Tensor
    x: Tensor | None
    t: Tensor | None
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    in_features: int
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    output_mask: Sequence[bool]

    @property
    def quantized(self) -> _Quantized:
        return self[3:9]

    def check(self) -> None:
        function, leading = "qlora_linear_backward", self.grad.shape[:-1]
        x, t, A, B = self.x, self.t, self.lora_A, self.lora_B
        _check_qlora(function, self.grad, self.in_features, self.quantized, self.grad.shape[-1], None, A, B)
        if self.output_mask[2] and (x is None or A is None or x.shape != (*leading, self.in_features)):
            raise ValueError(f"{function}: the gradient of lora_A requires x of shape (..., in_features) and lora_A")
        if self.output_mask[3] and (t is None or B is None or t.shape != (*leading, B.shape[1])):
            raise ValueError(f"{function}: the gradient of lora_B requires t of shape (..., rank) and lora_B")

    def run(self) -> Four:
        result: Four = dispatch.select("qlora_linear_backward", self.grad.device, self.grad.dtype)(*self)
        return result

    def fake(self) -> Four:
        grad, mask = self.grad, self.output_mask
        empty = (0,)
        return (
            grad.new_empty((*grad.shape[:-1], self.in_features) if mask[0] else empty),
            grad.new_empty((grad.shape[-1],) if mask[1] else empty),
            grad.new_empty(self.lora_A.shape if mask[2] and self.lora_A is not None else empty),
            grad.new_empty(self.lora_B.shape if mask[3] and self.lora_B is not None else empty),
        )


_register("qlora_linear_backward", _Backward)

# Positions of the differentiable arguments of qlora_linear.
_DIFFERENTIABLE = tuple(_Forward._fields.index(name) for name in ("x", "bias", "lora_A", "lora_B"))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    called, t = _Forward(*inputs), output[1]
    _, _, needs_A, needs_B = (ctx.needs_input_grad[position] for position in _DIFFERENTIABLE)
    packed, absmax, nested_absmax, nested_offset, quant_type, blocksize = called.quantized
    # x is kept for dA alone and t for dB alone; the dequantised weight is not kept at all.
    ctx.save_for_backward(
        called.x if needs_A else None, t if needs_B else None,
        packed, absmax, nested_absmax, nested_offset, called.lora_A, called.lora_B,
    )  # fmt: skip
    ctx.sizes = (quant_type, blocksize, called.x.shape[-1])
    ctx.scaling = called.scaling
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _grad_t: Tensor | None) -> tuple[Tensor | None, ...]:
    eager.refuse_second_derivative()
    grads: list[Tensor | None] = [None] * len(_Forward._fields)
    if grad is not None:
        *tensors, lora_A, lora_B = ctx.saved_tensors
        mask = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        results = torch.ops.harlora.qlora_linear_backward(grad, *tensors, *ctx.sizes, lora_A, lora_B, ctx.scaling, mask)
        for position, wanted, result in zip(_DIFFERENTIABLE, mask, results, strict=True):
            grads[position] = result if wanted else None
    return tuple(grads)


torch.library.register_autograd("harlora::qlora_linear", _backward, setup_context=_setup_context)


def _refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    # torch would drop the tangent of an operator without a rule for it, without a word.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{function}: forward-mode differentiation is not supported; use backward mode")


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
    quantized = (
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, weight.quant_type, weight.blocksize,
    )  # fmt: skip
    if len(weight.shape) != 2:
        raise ValueError(f"qlora_linear: weight must have shape (out_features, in_features), got {weight.shape}")
    if x.dim() and x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"qlora_linear: x.shape[-1] must equal in_features={weight.shape[1]}, got x of shape {tuple(x.shape)}"
        )
    direct = eager.qlora_linear(x, *quantized, weight.shape[0], bias, lora_A, lora_B, scaling)
    if direct is not None:
        return direct
    _refuse_forward_mode("qlora_linear", x, bias, lora_A, lora_B)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))  # as autocast treats nn.Linear
    bias, lora_A, lora_B = (None if tensor is None else tensor.to(x.dtype) for tensor in (bias, lora_A, lora_B))
    y: Tensor = torch.ops.harlora.qlora_linear(x, *quantized, weight.shape[0], bias, lora_A, lora_B, scaling)[0]
    return y
