"""The operators ``torch.ops.harlora.*``: one place for their schema, argument checks, fake and autograd.

Each operator is registered once for every device. Its kernel checks the arguments, in eager mode as well as when it
is traced, and asks `dispatch` for the backend. The public functions around them take a `QuantizedWeight`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from harlora.kernels import dispatch, eager, gpu, reference
from harlora.kernels.dropout import draw_seed, limit
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
    " float scaling, float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    "qlora_linear_backward": f"(Tensor grad, Tensor? x, Tensor? t, {_QUANTIZED}, SymInt in_features, Tensor? lora_A,"
    " Tensor? lora_B, float scaling, bool[4] output_mask, float dropout=0.0, Tensor? seed=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "dora_norm": f"({_QUANTIZED}, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
    "dora_linear": f"(Tensor x, {_QUANTIZED}, SymInt out_features, Tensor? bias, Tensor lora_A, Tensor lora_B,"
    " float scaling, Tensor gain) -> (Tensor, Tensor)",
    "lora_pool_linear": f"(Tensor x, {_QUANTIZED}, SymInt out_features, Tensor? bias, Tensor lora_A, Tensor lora_B,"
    " Tensor offsets, Tensor index, Tensor scaling) -> (Tensor, Tensor)",
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


def check_devices(function: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
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
        check_devices(function, packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset)
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(f"{function}: dtype must be one of {COMPUTE_DTYPES}, got {dtype}")

    def run(self) -> Tensor:
        result: Tensor = dispatch.select("dequantize_4bit", self.packed.device, self.dtype)(*self)
        return result

    def fake(self) -> Tensor:
        return self.packed.new_empty(self.shape, dtype=self.dtype)


_register("dequantize_4bit", _Dequantize)


# qlora_linear -------------------------------------------------------------------------------------------------------


def check_qlora(
    function: str,
    x: Tensor,
    in_features: int,
    quantized: _Quantized,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    wide_adapter: bool = False,
) -> None:
    """Raise unless the arguments of a layer over a 4-bit weight fit each other; a wide adapter may be float32."""
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
        wide = wide_adapter and name != "bias" and tensor is not None and tensor.dtype == torch.float32
        if tensor is not None and tensor.dtype != x.dtype and not wide:
            raise TypeError(f"{function}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    check_devices(
        function, x, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset,
        bias=bias, lora_A=lora_A, lora_B=lora_B,
    )  # fmt: skip


def check_dropout(function: str, x: Tensor, dropout: float, seed: Tensor | None) -> None:
    """Raise unless dropout and its seed are given together and fit."""
    limit(dropout)  # raises
    if (seed is None) != (dropout == 0.0):
        raise ValueError(f"{function}: seed must be given with dropout and only then, got {seed} with {dropout!r}")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim()):
        raise ValueError(
            f"{function}: seed must be a scalar tensor of int64, got {seed.dtype} of shape {tuple(seed.shape)}"
        )
    check_devices(function, x, seed=seed)


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
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def quantized(self) -> _Quantized:
        return self[1:7]

    @property
    def t_shape(self) -> tuple[int, ...]:
        return (0,) if self.lora_A is None else (*self.x.shape[:-1], self.lora_A.shape[0])

    def check(self) -> None:
        if self.x.dim() == 0:
            raise ValueError("qlora_linear: x must have at least one dimension, got a scalar")
        check_qlora("qlora_linear", self.x, self.x.shape[-1], self.quantized, *self[7:11])
        check_dropout("qlora_linear", self.x, self.dropout, self.seed)

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
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def quantized(self) -> _Quantized:
        return self[3:9]

    def check(self) -> None:
        function, leading = "qlora_linear_backward", self.grad.shape[:-1]
        x, t, A, B = self.x, self.t, self.lora_A, self.lora_B
        check_qlora(function, self.grad, self.in_features, self.quantized, self.grad.shape[-1], None, A, B)
        check_dropout(function, self.grad, self.dropout, self.seed)
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
        packed, absmax, nested_absmax, nested_offset, called.lora_A, called.lora_B, called.seed,
    )  # fmt: skip
    ctx.sizes = (quant_type, blocksize, called.x.shape[-1])
    ctx.scaling, ctx.dropout = called.scaling, called.dropout
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _grad_t: Tensor | None) -> tuple[Tensor | None, ...]:
    eager.refuse_second_derivative()
    grads: list[Tensor | None] = [None] * len(_Forward._fields)
    if grad is not None:
        *tensors, lora_A, lora_B, seed = ctx.saved_tensors
        mask = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        results = torch.ops.harlora.qlora_linear_backward(
            grad, *tensors, *ctx.sizes, lora_A, lora_B, ctx.scaling, mask, ctx.dropout, seed
        )
        for position, wanted, result in zip(_DIFFERENTIABLE, mask, results, strict=True):
            grads[position] = result if wanted else None
    return tuple(grads)


torch.library.register_autograd("harlora::qlora_linear", _backward, setup_context=_setup_context)


def refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    # torch would drop the tangent of an operator without a rule for it, without a word.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{function}: forward-mode differentiation is not supported; use backward mode")


# dora_norm, dora_linear ----------------------------------------------------------------------------------------------


class _DoraNorm(NamedTuple):
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def check(self) -> None:
        A, B = self.lora_A, self.lora_B
        if A.dim() != 2 or B.dim() != 2:
            raise ValueError(
                "dora_norm: lora_A and lora_B must have shapes (rank, in_features) and (out_features, rank), "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        check_qlora("dora_norm", A, A.shape[1], self[:6], B.shape[0], None, A, B)

    def run(self) -> Tensor:
        device = self.lora_A.device
        known = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if known else nullcontext():  # some products are in float32
            result: Tensor = dispatch.select("dora_norm", device, self.lora_A.dtype)(*self)
        return result

    def fake(self) -> Tensor:
        return self.lora_B.new_empty((self.lora_B.shape[0],), dtype=_wide(self.lora_A.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_register("dora_norm", _DoraNorm)


class _DoraForward(NamedTuple):
    x: Tensor
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    out_features: int
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor

    @property
    def layer(self) -> _Forward:
        """The same without the gain."""
        return _Forward(*self[:12])

    def check(self) -> None:
        if self.x.dim() == 0:
            raise ValueError("dora_linear: x must have at least one dimension, got a scalar")
        check_qlora("dora_linear", self.x, self.x.shape[-1], self[1:7], *self[7:11])
        if tuple(self.gain.shape) != (self.out_features,) or self.gain.dtype != _wide(self.x.dtype):
            raise ValueError(
                f"dora_linear: gain must be {_wide(self.x.dtype)} of shape ({self.out_features},), "
                f"got {self.gain.dtype} of shape {tuple(self.gain.shape)}"
            )
        check_devices("dora_linear", self.x, gain=self.gain)

    def run(self) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = dispatch.select("dora_linear", self.x.device, self.x.dtype)(*self)
        return result

    def fake(self) -> tuple[Tensor, Tensor]:
        return self.layer.fake()


_register("dora_linear", _DoraForward)

_DORA_DIFFERENTIABLE = tuple(_DoraForward._fields.index(name) for name in ("x", "bias", "lora_A", "lora_B", "gain"))


def _dora_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    called, t = _DoraForward(*inputs), output[1]
    needs_A, needs_B, needs_gain = (ctx.needs_input_grad[position] for position in _DORA_DIFFERENTIABLE[2:])
    ctx.save_for_backward(
        called.x if needs_A or needs_gain else None, t if needs_B else None,
        called.packed, called.absmax, called.nested_absmax, called.nested_offset, called.lora_A, called.lora_B,
        called.gain,
    )  # fmt: skip
    ctx.sizes = (called.quant_type, called.blocksize)
    ctx.in_features = called.x.shape[-1]
    ctx.scaling = called.scaling
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)


def _dora_backward(ctx: Any, grad: Tensor | None, _grad_t: Tensor | None) -> tuple[Tensor | None, ...]:
    eager.refuse_second_derivative("dora_linear")
    grads: list[Tensor | None] = [None] * len(_DoraForward._fields)
    if grad is None:
        return tuple(grads)
    x, t, *weight, lora_A, lora_B, gain = ctx.saved_tensors
    quantized = (*weight, *ctx.sizes)
    needs_x, needs_bias, needs_A, needs_B, needs_gain = (ctx.needs_input_grad[at] for at in _DORA_DIFFERENTIABLE)
    results: list[Tensor | None] = [None] * 5
    if needs_x or needs_A or needs_B:
        # What reaches z = x·Ŵᵀ + scaling·t·lora_Bᵀ, rounded once.
        inner = (grad * gain).to(grad.dtype)
        mask = [needs_x, False, needs_A, needs_B]
        found = torch.ops.harlora.qlora_linear_backward(
            inner, x, t, *quantized, ctx.in_features, lora_A, lora_B, ctx.scaling, mask
        )
        results[:4] = [one if wanted else None for one, wanted in zip(found, mask, strict=True)]
    if needs_bias:
        results[1] = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    if needs_gain:
        # z is computed again: kept, it would take as much memory as y; and (y - bias) / gain is lost where gain is 0.
        z = torch.ops.harlora.qlora_linear(x, *quantized, grad.shape[-1], None, lora_A, lora_B, ctx.scaling)[0]
        results[4] = (grad.to(gain.dtype) * z).reshape(-1, grad.shape[-1]).sum(dim=0)
    for position, result in zip(_DORA_DIFFERENTIABLE, results, strict=True):
        grads[position] = result
    return tuple(grads)


torch.library.register_autograd("harlora::dora_linear", _dora_backward, setup_context=_dora_setup_context)


# lora_pool_linear ---------------------------------------------------------------------------------------------------


class _Pool(NamedTuple):
    x: Tensor
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    out_features: int
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    offsets: Tensor
    adapter: Tensor  # index in the schema: a tuple has a method of that name
    scaling: Tensor

    def check(self) -> None:
        function, x = "lora_pool_linear", self.x
        if x.dim() == 0:
            raise ValueError(f"{function}: x must have at least one dimension, got a scalar")
        check_qlora(function, x, x.shape[-1], self[1:7], *self[7:11])
        if self.scaling.dim() != 1:
            raise ValueError(f"{function}: scaling must have shape (adapters,), got {tuple(self.scaling.shape)}")
        adapters = self.scaling.shape[0]
        for name, tensor, shape, dtype in (
            ("offsets", self.offsets, (adapters + 1,), torch.int64),
            ("index", self.adapter, tuple(x.shape[:-1]), torch.int64),
            ("scaling", self.scaling, (adapters,), torch.float32),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{function}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype != dtype:
                raise TypeError(f"{function}: {name} must be {dtype}, got {tensor.dtype}")
        check_devices(function, x, offsets=self.offsets, index=self.adapter, scaling=self.scaling)

    def run(self) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = dispatch.select("lora_pool_linear", self.x.device, self.x.dtype)(*self)
        return result

    def fake(self) -> tuple[Tensor, Tensor]:
        x = self.x
        return (
            x.new_empty((*x.shape[:-1], self.out_features)),
            x.new_empty((*x.shape[:-1], self.lora_A.shape[0])),
        )


_register("lora_pool_linear", _Pool)

_POOL_DIFFERENTIABLE = tuple(_Pool._fields.index(name) for name in ("x", "bias", "lora_A", "lora_B"))


def _pool_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    called, t = _Pool(*inputs), output[1]
    needs_x, _, needs_A, needs_B = (ctx.needs_input_grad[position] for position in _POOL_DIFFERENTIABLE)
    ctx.save_for_backward(
        called.x if needs_A else None, t if needs_B else None,
        called.packed, called.absmax, called.nested_absmax, called.nested_offset,
        called.lora_A if needs_x else None, called.lora_B if needs_x or needs_A else None,
        called.offsets, called.adapter, called.scaling,
    )  # fmt: skip
    ctx.sizes = (called.quant_type, called.blocksize, called.x.shape[-1])
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)


def _pool_backward(ctx: Any, grad: Tensor | None, _grad_t: Tensor | None) -> tuple[Tensor | None, ...]:
    # u = scaling·dY·lora_B in the columns of each row's adapter: dX = dY·Ŵ + u·lora_A, dA = uᵀ·x, dB = dYᵀ·t.
    eager.refuse_second_derivative("lora_pool_linear")
    grads: list[Tensor | None] = [None] * len(_Pool._fields)
    if grad is None:
        return tuple(grads)
    x, t, *weight, lora_A, lora_B, offsets, index, scaling = ctx.saved_tensors
    needs_x, needs_bias, needs_A, needs_B = (ctx.needs_input_grad[position] for position in _POOL_DIFFERENTIABLE)
    rows = grad.reshape(-1, grad.shape[-1])
    results: list[Tensor | None] = [None] * 4
    if needs_x or needs_A:
        u = reference.lora_pool_low(rows, lora_B.T, offsets, index.reshape(-1), scaling)
        if needs_x:
            base = torch.ops.harlora.qlora_linear_backward(
                rows, None, None, *weight, *ctx.sizes, None, None, 1.0, [True, False, False, False]
            )[0]
            results[0] = torch.addmm(base, u, lora_A).view(*grad.shape[:-1], ctx.sizes[2])
        if needs_A:
            results[2] = u.T @ x.reshape(-1, x.shape[-1])
    if needs_bias:
        results[1] = rows.sum(dim=0)
    if needs_B:
        results[3] = rows.T @ t.reshape(len(rows), t.shape[-1])
    for position, result in zip(_POOL_DIFFERENTIABLE, results, strict=True):
        grads[position] = result
    return tuple(grads)


torch.library.register_autograd("harlora::lora_pool_linear", _pool_backward, setup_context=_pool_setup_context)


# Public functions ---------------------------------------------------------------------------------------------------


def check_weight(function: str, x: Tensor, weight: QuantizedWeight) -> None:
    """Raise ValueError unless ``weight`` is a matrix that x can be multiplied by."""
    if len(weight.shape) != 2:
        raise ValueError(f"{function}: weight must have shape (out_features, in_features), got {weight.shape}")
    if x.dim() == 0:
        raise ValueError(f"{function}: x must have at least one dimension, got a scalar")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: x.shape[-1] must equal in_features={weight.shape[1]}, got x of shape {tuple(x.shape)}"
        )


# Asked for once: torch.compile of torch 2.11 does not trace the question.
_WITH_AUTOCAST = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where that is on, as it treats the input of nn.Linear."""
    device = x.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


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
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A linear layer over a 4-bit weight with a low-rank adapter, ``(..., out_features)``.

    y = x·Ŵᵀ + bias + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ, Ŵ the dequantised weight.

    Gradients flow to x, bias, lora_A and lora_B. Backward keeps x·lora_Aᵀ and x, and no dequantised copy of the
    weight. Under autocast all arguments are used in its dtype, otherwise bias and adapter in that of ``x``.

    x: ``(..., in_features)``, float32, bfloat16, float16 or float64.
    weight: of shape ``(out_features, in_features)``.
    bias: ``(out_features,)``; lora_A: ``(rank, in_features)``; lora_B: ``(out_features, rank)``.
    dropout: the share of the values of x that the adapter does not see, at least 0 and below 1; in steps of 2⁻¹⁶.
        Backward computes anew which they are, so neither a mask nor the dropped x is kept.
    seed: which values are dropped: a scalar int64 tensor on the device of x; by default one is drawn there.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: Dettmers et al. 2023 (arXiv 2305.14314), equation 5.
    """
    quantized = weight.arguments()
    check_weight("qlora_linear", x, weight)
    if not dropout:
        seed = None
    else:
        limit(dropout)  # raises, also where there is no adapter
        if lora_A is None:
            dropout, seed = 0.0, None
        elif seed is None:
            seed = draw_seed(x.device)
    short = eager if x.is_cpu else gpu
    direct = short.qlora_linear(x, *quantized, weight.shape[0], bias, lora_A, lora_B, scaling, dropout, seed)
    if direct is not None:
        return direct
    refuse_forward_mode("qlora_linear", x, bias, lora_A, lora_B)
    x = as_autocast(x)
    bias, lora_A, lora_B = (None if tensor is None else tensor.to(x.dtype) for tensor in (bias, lora_A, lora_B))
    layer = (*quantized, weight.shape[0], bias, lora_A, lora_B, scaling)
    y: Tensor = torch.ops.harlora.qlora_linear(x, *layer, dropout, seed)[0]
    return y
