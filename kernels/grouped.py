"""Several layers in one launch of Triton's kernels, in eager mode; on CPUs eager.py has their like.

What is compiled, traced, under autocast or out of the ordinary in another way takes the layers one by one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from harlora.kernels import dispatch, eager
from harlora.kernels.reference import Layer


def serves(x: Tensor) -> bool:
    """Whether Triton's kernels may be called for ``x`` past the public operators."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dim() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(x.device.type)
        and dispatch.served_by_triton(x.device, x.dtype)
    )


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Any, launch: Any, backward: Any, *values: Any) -> tuple[Tensor, ...]:
        layers = [(*packed, *values[4 * i : 4 * i + 4]) for i, packed in enumerate(quantized)]
        y, t = launch(x, layers)
        adapters = [tensor for layer in layers for tensor in layer[8:10]]
        packed = [tensor for layer in layers for tensor in layer[:4]]
        ctx.save_for_backward(x, t, *adapters, *packed)
        ctx.facts = [(layer[4:7], layer[10]) for layer in layers]
        ctx.launch = backward
        return y[0], y[1], y[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        eager.refuse_second_derivative()
        x, t, *tensors = ctx.saved_tensors
        adapters, packed = tensors[:6], tensors[6:]
        layers = [
            (*packed[4 * i : 4 * i + 4], *facts, None, *adapters[2 * i : 2 * i + 2], scaling)
            for i, (facts, scaling) in enumerate(ctx.facts)
        ]
        needs = ctx.needs_input_grad
        wanted = (needs[0], *(any(needs[4 + place :: 4]) for place in range(3)))
        grad_x, *stacked = ctx.launch(grads, x, t, layers, wanted)
        results: list[Tensor | None] = [grad_x if needs[0] else None, None, None, None]
        for i in range(3):
            results += [each[i] if needs[4 + 4 * i + place] else None for place, each in enumerate(stacked)]
            results.append(None)  # scaling
        return tuple(results)


def _in_dtype_of(x: Tensor, *layers: Layer) -> Any:
    return tuple(
        (*layer[:7], *(None if tensor is None else tensor.to(x.dtype) for tensor in layer[7:10]), layer[10])
        for layer in layers
    )


def qlora_qkv(x: Tensor, q: Layer, k: Layer, v: Layer) -> tuple[Tensor, ...] | None:
    """Three layers over one ``x``, or None where they have to run one by one.

    The sums of `qlora_linear` for each; backward adds the three gradients of x in one launch.
    """
    if not serves(x):
        return None
    from harlora.kernels.triton.qlora_qkv import alike

    layers = _in_dtype_of(x, q, k, v)
    if not alike(x, layers):
        return None
    forward, backward = (dispatch.group(name, x, layers) for name in ("qlora_qkv", "qlora_qkv_backward"))
    if forward is None or backward is None:
        return None
    values = [value for layer in layers for value in layer[7:]]
    result: tuple[Tensor, ...] = _QKV.apply(x, [layer[:7] for layer in layers], forward, backward, *values)
    return result


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Any, launch: Any, *values: Any) -> Tensor:
        fc1, fc2 = ((*packed, *values[4 * i : 4 * i + 4]) for i, packed in enumerate(quantized))
        y: Tensor
        y, h, t1, t2 = launch(x, fc1, fc2, True)
        ctx.save_for_backward(x, h, t1, t2, *fc1[8:10], *fc2[8:10], *fc1[:4], *fc2[:4])
        ctx.facts = [(layer[4:6], layer[10]) for layer in (fc1, fc2)]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        eager.refuse_second_derivative()
        x, h, t1, t2, A1, B1, A2, B2, *packed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        (facts1, scaling1), (facts2, scaling2) = ctx.facts
        backward = dispatch.select("qlora_linear_backward", x.device, x.dtype)
        first = [needs[0], *needs[3:6]]
        second = [any(first), *needs[7:10]]
        inner, *grads2 = backward(
            grad, F.gelu(h) if second[2] else None, t2 if B2 is not None else None, *packed[4:], *facts2, h.shape[-1],
            A2, B2, scaling2, second,
        )  # fmt: skip
        grad_x, grads1 = None, [None] * 3
        if any(first):
            grad_x, *grads1 = backward(
                torch.ops.aten.gelu_backward(inner, h), x if first[2] else None, t1 if B1 is not None else None,
                *packed[:4], *facts1, x.shape[-1], A1, B1, scaling1, first,
            )  # fmt: skip
        results = [grad_x, None, None, *grads1, None, *grads2, None]
        return tuple(result if needed else None for result, needed in zip(results, needs, strict=True))


def qlora_mlp(x: Tensor, fc1: Layer, fc2: Layer) -> Tensor | None:
    """``fc2(gelu(fc1(x)))``, or None where the layers have to run one by one.

    Backward keeps x, fc1(x) and x·lora_Aᵀ of both layers, and computes gelu(fc1(x)) anew.
    """
    if not serves(x):
        return None
    from harlora.kernels.triton.qlora_mlp import fits

    layers = _in_dtype_of(x, fc1, fc2)
    if not fits(x, *layers):
        return None
    launch = dispatch.group("qlora_mlp", x, layers)
    if launch is None:
        return None
    values = [value for layer in layers for value in layer[7:]]
    if not torch.is_grad_enabled() or not any(isinstance(v, Tensor) and v.requires_grad for v in (x, *values)):
        result: Tensor = launch(x, *layers, False)[0]
        return result
    trained: Tensor = _MLP.apply(x, [layer[:7] for layer in layers], launch, *values)
    return trained
