"""The short way to the compiled CPU kernels, for eager mode.

At the sizes of a HAR encoder a layer computes for a few microseconds, and the public operators' way through torch's
dispatcher in Python costs more than that. Where nothing but plain tensors in plain eager mode is at hand, the compiled
operator is called at once, with autograd by a `torch.autograd.Function`. Everything else (compilation, tracing,
transforms, autocast, other devices and dtypes, arguments that do not fit) is left to the public operators, which give
the same numbers.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from harlora.kernels import cpp, dispatch, replay
from harlora.kernels.format import QUANT_TYPES, code_table, nested_code_table
from harlora.kernels.reference import Layer as Layer

_CPU = torch.device("cpu")
_Quantized = tuple[Tensor, Tensor, Tensor, int]  # packed, absmax, code, blocksize
# As enum class Precision of csrc/cpu/kernels.h counts them.
PRECISIONS = {"float32": 0, "bfloat16": 1, "int8": 2}
_precision: ContextVar[int] = ContextVar("harlora_precision", default=0)
_operators: dict[str, Any] = {}
_served: dict[torch.dtype, bool] = {}


def reset() -> None:
    """Forget which backend serves, after ``HARLORA_BACKEND`` was changed."""
    dispatch.select.cache_clear()
    dispatch.served_by_triton.cache_clear()
    dispatch.encoder_way.cache_clear()
    replay.reset()
    _served.clear()


def _compiled(dtype: torch.dtype) -> bool:
    if dtype not in _served:
        served = dtype in cpp.DTYPES and all(
            dispatch.select(operator, _CPU, dtype) is getattr(cpp, operator)
            for operator in ("qlora_linear", "qlora_linear_backward")
        )
        if served:
            # _op is what OpOverload.__call__ calls; without its frame a call is 0.2 us shorter.
            _operators["qlora_linear"] = torch.ops.harlora_cpp.qlora_linear.default._op
        _served[dtype] = served  # last, since another thread goes by it
    return _served[dtype]


@cache
def codes() -> dict[str, Tensor]:
    """The code tables by quant_type, and that of nested scales, on the CPU."""
    return {name: code_table(name, _CPU) for name in QUANT_TYPES} | {"nested": nested_code_table(_CPU)}


@contextmanager
def inference_precision(name: str) -> Iterator[None]:
    """Within ``with``, the precision of the base product x·Ŵᵀ when nothing is differentiated and x is float32.

    name: ``"float32"``, the default everywhere; ``"bfloat16"``: x and the 16 values of the weight's code are rounded to
        bfloat16 (2⁻⁹ relatively);
        ``"int8"``: x is rounded to 8 bits with a scale for each 64 values of a row (1/254 of the largest of them), and
        the 16 values of the weight's code to 8 bits (1/254 of a block's absmax), about 1 % of a layer's output. Sums
        are float32, over integer sums of 64 products; bias and adapters stay float32. On CPUs with fast products of
        the kind: AVX512-BF16; AVX512-VNNI or AVX-VNNI. Layers that do not fit (``in_features`` no multiple of 64,
        a blocksize of 32) compute in float32, as do one or two rows where ``in_features`` is below 1024, which gain
        nothing, and what is compiled, traced or on another device.
    Raises: ValueError for another name; RuntimeError where the processor has no such products.
    """
    if name not in PRECISIONS:
        raise ValueError(f"inference_precision: name must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name != "float32":
        reason = cpp.load_extension()
        if not reason and name not in cpp.precisions():
            kernels = cpp.selected_kernels()
            reason = f"the kernels {kernels!r} on this processor have those of {', '.join(cpp.precisions())}"
        if reason:
            raise RuntimeError(f"inference_precision: requires products of {name}, but {reason}; use 'float32'")
    token = _precision.set(PRECISIONS[name])
    try:
        yield
    finally:
        _precision.reset(token)


def serves(x: Tensor) -> bool:
    """Whether the compiled kernels may be called for ``x`` past the public operators."""
    return _plain(x) and (_served.get(x.dtype) or _compiled(x.dtype))


class HeldEncoder:
    """The layers of an encoder as the compiled operator holds them, until this object is deleted.

    tensors, facts, factors: as class Layers of csrc/cpu/operators.cpp reads them.
    """

    def __init__(self, tensors: list[Tensor], facts: list[int], factors: list[float]) -> None:
        operators = torch.ops.harlora_cpp
        self.tensors = tensors
        self._number = operators.encoder_hold(tensors, facts, factors)
        self._run = operators.encoder.default._op
        weakref.finalize(self, operators.encoder_release, self._number)

    def __call__(self, patches: Tensor) -> Tensor | None:
        """The encoded tokens, or None if the tensors are not what the operator takes."""
        try:
            result: Tensor = self._run(patches, self._number, _precision.get())
        except RuntimeError:  # another dtype or device, or not contiguous: the modules serve, or say what is wrong
            return None
        return result


def _plain(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor on a CPU, and nothing watches or transforms what torch does."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled("cpu")
    )


def refuse_second_derivative(function: str = "qlora_linear") -> None:
    """Raise in a backward that is to be differentiated again (``create_graph=True``).

    As late as `once_differentiable` raises it would be too late: dX depends on lora_A and lora_B even where dY is
    constant, as under a sum, and dB on x where lora_A is frozen; those parts would be dropped without a word.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{function}: a second derivative is not supported (create_graph=True); compute the layer as "
            "F.linear(x, layer.base_weight(), layer.bias) and its adapter in plain torch"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float,
        out_features: int, quantized: _Quantized, nested: tuple[Tensor, ...],
    ) -> Tensor:  # fmt: skip
        t = None
        if lora_A is not None and ctx.needs_input_grad[3]:
            t = x.new_empty((*x.shape[:-1], lora_A.shape[0]))
        y: Tensor = torch.ops.harlora_cpp.qlora_linear.default(
            x, *quantized, out_features, bias, lora_A, lora_B, scaling, t, *nested
        )
        # x is kept for dA alone and t for dB alone.
        packed, absmax, code, blocksize = quantized
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, t, lora_A, lora_B, packed, absmax, *nested[:2])
        ctx.facts = (code, blocksize, x.shape[-1], scaling, nested[2:])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, t, lora_A, lora_B, packed, absmax, *nested = ctx.saved_tensors
        code, blocksize, in_features, scaling, nested_code = ctx.facts
        needs = ctx.needs_input_grad
        grads = (
            grad.new_empty((*grad.shape[:-1], in_features)) if needs[0] else None,
            grad.new_empty(grad.shape[-1:]) if needs[1] else None,
            torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs[2] else None,
            torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs[3] else None,
        )
        torch.ops.harlora_cpp.qlora_linear_backward.default(
            grad, x, t, packed, absmax, code, blocksize, in_features, lora_A, lora_B, scaling, *grads,
            *nested, *nested_code,
        )  # fmt: skip
        return *grads, None, None, None, None


class _Dropped(torch.autograd.Function):
    """As `_Linear`, with dropout of the adapter's input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, out_features: int,
        quantized: tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int], dropout: float, seed: Tensor,
    ) -> Tensor:  # fmt: skip
        y, t = cpp.qlora_linear(x, *quantized, out_features, bias, lora_A, lora_B, scaling, dropout, seed)
        _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_A else None, t if needs_B else None, lora_A, lora_B, seed, *quantized[:4])
        ctx.facts = (*quantized[4:], x.shape[-1])
        ctx.scaling, ctx.dropout = scaling, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, t, lora_A, lora_B, seed, *packed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        arguments = (grad, x, t, *packed, *ctx.facts, lora_A, lora_B, ctx.scaling, needs, ctx.dropout, seed)
        grads = cpp.qlora_linear_backward(*arguments)
        wanted = (each if needed else None for each, needed in zip(grads, needs, strict=True))
        return *wanted, None, None, None, None, None


_Description = tuple[list[Tensor], list[int], list[float]]


def _describe(in_features: int, layers: tuple[Layer, ...]) -> _Description:
    """``layers`` as class Layers of csrc/cpu/operators.cpp reads them."""
    tensors: list[Any] = []
    facts = [in_features]
    factors = []
    for layer in layers:
        packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features, bias, A, B, scaling = layer
        tensors += (packed, absmax, code_table(quant_type, _CPU))
        if nested_absmax is not None:
            tensors += (nested_absmax, nested_offset, nested_code_table(_CPU))
        rank = 0 if A is None else A.shape[0]
        facts += (out_features, blocksize, nested_absmax is not None, bias is not None, rank)
        if bias is not None:
            tensors.append(bias)
        if rank:
            tensors += (A, B)
            factors.append(scaling)
    return tensors, facts, factors


def _wanted(needs: tuple[bool, ...]) -> list[int]:
    """The compiled backward's ``wanted``, of the needs of x and then of bias, lora_A and lora_B of each layer."""
    return [int(needs[0]), *(needs[i] + 2 * needs[i + 1] + 4 * needs[i + 2] for i in range(1, len(needs), 3))]


class _Group(torch.autograd.Function):
    """What _QKV and _MLP share; their arguments after the first two are bias, lora_A and lora_B of each layer."""

    @staticmethod
    def keep(ctx: Any, description: _Description, *computed: Tensor) -> None:
        ctx.save_for_backward(*computed, *description[0])
        ctx.facts = description[1:]

    @staticmethod
    def gradients(ctx: Any, operator: Any, count: int, *grads_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        saved = ctx.saved_tensors
        grads = operator(*grads_y, *saved[:count], saved[count:], *ctx.facts, _wanted(needs))
        wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
        return wanted[0], None, *wanted[1:]


class _QKV(_Group):
    @staticmethod
    def forward(ctx: Any, x: Tensor, description: _Description, *_: Tensor | None) -> tuple[Tensor, ...]:
        *y, t = torch.ops.harlora_cpp.qlora_qkv.default(x, *description)
        _Group.keep(ctx, description, x, t)
        return tuple(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Group.gradients(ctx, torch.ops.harlora_cpp.qlora_qkv_backward.default, 2, *grads)


class _MLP(_Group):
    @staticmethod
    def forward(ctx: Any, x: Tensor, description: _Description, *_: Tensor | None) -> Tensor:
        y: Tensor
        y, inner, t = torch.ops.harlora_cpp.qlora_mlp.default(x, *description, True)
        _Group.keep(ctx, description, x, inner, t)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Group.gradients(ctx, torch.ops.harlora_cpp.qlora_mlp_backward.default, 3, *grads)


def _grouped(function: type[_Group], operator: str, keep: tuple[bool, ...], x: Tensor, *layers: Layer) -> Any:
    if torch.compiler.is_compiling() or not serves(x) or x.dtype is not torch.float32 or not x.dim():
        return None
    parameters = [tensor for layer in layers for tensor in layer[7:10]]
    try:
        description = _describe(x.shape[-1], layers)
        if not torch.is_grad_enabled() or not any(p is not None and p.requires_grad for p in (x, *parameters)):
            return getattr(torch.ops.harlora_cpp, operator).default(x, *description, *keep, _precision.get())
        # All of them keep x; layers whose lora_A does not train do not need it.
        if any(layer[8] is not None and not layer[8].requires_grad for layer in layers):
            return None
        return function.apply(x, description, *parameters)
    except RuntimeError:  # another dtype or shape: the layers serve one by one, or say what is wrong
        return None


def qlora_qkv(x: Tensor, q: Layer, k: Layer, v: Layer) -> tuple[Tensor, Tensor, Tensor] | None:
    """Three layers over one ``x``, float32, or None where they have to run one by one.

    The same numbers as from `qlora_linear` for each; backward adds the three gradients of x as it computes them.
    """
    result = _grouped(_QKV, "qlora_qkv", (), x, q, k, v)
    return None if result is None else result[:3]


def qlora_mlp(x: Tensor, fc1: Layer, fc2: Layer) -> Tensor | None:
    """fc2(gelu(fc1(x))), float32, or None where the layers have to run one by one.

    Backward keeps x, fc1(x) and x·lora_Aᵀ of both layers, and computes gelu(fc1(x)) anew.
    """
    result = _grouped(_MLP, "qlora_mlp", (False,), x, fc1, fc2)
    return result if result is None or isinstance(result, Tensor) else result[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.heads = heads
        y: Tensor = torch.ops.harlora_cpp.attention.default(q, k, v, heads)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return *torch.ops.harlora_cpp.attention_backward.default(grad, *ctx.saved_tensors, ctx.heads), None


def attention_serves(x: Tensor) -> bool:
    """Whether `attention` takes what is projected from ``x``: up to 256 tokens, whose scores fit a cache."""
    return serves(x) and x.dim() == 3 and x.shape[1] <= 256


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor | None:
    """softmax(q·kᵀ / √size)·v by heads of that size, or None where torch's own has to serve.

    q, k, v: ``(windows, tokens, width)``, float32, contiguous, the values of a head side by side.
    """
    if not attention_serves(q):
        return None
    try:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attention.apply(q, k, v, heads)
        y: Tensor = torch.ops.harlora_cpp.attention.default(q, k, v, heads)
    except RuntimeError:
        return None
    return y


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
) -> Tensor | None:
    """The output of the operator of that name, or None where only the public operator serves."""
    if torch.compiler.is_compiling() or not serves(x) or (lora_A is not None and lora_A.dtype is not x.dtype):
        return None
    code = code_table(quant_type, _CPU)
    nested: Any = () if nested_absmax is None else (nested_absmax, nested_offset, nested_code_table(_CPU))
    try:
        if seed is not None:
            quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
            dropped: Tensor = _Dropped.apply(x, bias, lora_A, lora_B, scaling, out_features, quantized, dropout, seed)
            return dropped
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (lora_A is not None and lora_A.requires_grad)
            or (lora_B is not None and lora_B.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            return _Linear.apply(
                x, bias, lora_A, lora_B, scaling, out_features, (packed, absmax, code, blocksize), nested
            )
        operator = _operators["qlora_linear"]
        if not nested and not _precision.get():
            return operator(x, packed, absmax, code, blocksize, out_features, bias, lora_A, lora_B, scaling)
        return operator(
            x, packed, absmax, code, blocksize, out_features, bias, lora_A, lora_B, scaling, None,
            *(nested or (None, None, None)), _precision.get(),
        )  # fmt: skip
    except RuntimeError:  # adapters of another dtype, or a mistake: the public operator converts, or says which
        return None
