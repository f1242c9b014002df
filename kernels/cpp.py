"""The compiled backend: the operators' arguments as the extension takes them, and its probes."""

import contextlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from harlora.kernels import reference, tuning
from harlora.kernels.dropout import limit
from harlora.kernels.format import code_table, nested_code_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENVIRONMENT = "HARLORA_CPU"
KERNELS = ("avx512bf16", "avx512", "avx2", "portable")


@cache
def extension_path() -> Path | None:
    """Where the compiled extension lies, or None if it was not built."""
    found = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    return found[0] if found else None


@cache
def load_extension() -> str:
    """Load the compiled extension; an empty string, or the reason why it does not serve."""
    path = extension_path()
    if path is None:
        return "it was not built: install with a C++ compiler and `pip install --no-build-isolation`"
    try:
        torch.ops.load_library(path)
    except OSError as error:  # built for another machine or an older torch
        return f"{path} does not load: {error}"
    # Threads of OpenMP, torch's own too, do not survive a fork: a child that waits for them never ends.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    tuned = tuning.table("cpu", path).get("kernels")
    if tuned in KERNELS and not os.environ.get(ENVIRONMENT):
        with contextlib.suppress(RuntimeError):  # another processor of the same name
            select_kernels(tuned)
    return ""


# Operators without a kernel of their own, and the one they are composed of.
_COMPOSED = {"dora_norm": "dequantize_4bit", "dora_linear": "qlora_linear", "lora_pool_linear": "qlora_linear"}


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether the loaded extension has ``operator``, or what it is composed of, for a kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"harlora_cpp::{_COMPOSED.get(operator, operator)}", key)


def select_kernels(name: str = "") -> str:
    """Which CPU kernels serve from now on: avx512bf16, avx512, avx2 or portable; by default the best of this processor.

    ``HARLORA_CPU`` in the environment sets it from the start. Returns the name.
    Raises: RuntimeError if this processor does not run them.
    """
    chosen: str = torch.ops.harlora_cpp.select_kernels(name)
    return chosen


def nested_scales(nested_absmax: Tensor | None, nested_offset: Tensor | None) -> tuple[Tensor | None, ...]:
    """The last arguments of every operator over a quantised weight; none for plain scales, which is cheaper."""
    return () if nested_absmax is None else (nested_absmax, nested_offset, nested_code_table(nested_absmax.device))


def selected_kernels() -> str:
    """The name of the CPU kernels that serve."""
    name: str = torch.ops.harlora_cpp.kernels()
    return name


def precisions() -> list[str]:
    """What inference may be rounded to with the CPU kernels that serve, on this processor."""
    names: str = torch.ops.harlora_cpp.precisions()
    return names.split()


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.quantize_4bit`."""
    bounds = reference.bounds(quant_type, weight.device)
    packed, absmax = torch.ops.harlora_cpp.quantize_4bit(weight.contiguous(), bounds, blocksize, quant_type == "fp4")
    if not double_quant:
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    return packed, *reference.quantize_scales(absmax)


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
    """As `reference.dequantize_4bit`."""
    device = packed.device
    out = torch.empty(shape, dtype=dtype, device=device)
    code = code_table(quant_type, device)
    if device.type == "cpu":
        nested = nested_scales(nested_absmax, nested_offset)
        torch.ops.harlora_cpp.dequantize_4bit(packed, absmax, code, blocksize, out, *nested)
    else:  # its kernel takes decoded scales
        absmax = reference.scales(absmax, nested_absmax, nested_offset)
        stream = torch.cuda.current_stream(device).cuda_stream
        torch.ops.harlora_cpp.dequantize_4bit(packed, absmax, code, blocksize, out, stream=stream)
    return out


def dropped(x: Tensor, dropout: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """As `dropout.dropped`, into ``out`` if given, which may be ``x``."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    torch.ops.harlora_cpp.dropout(x, seed, limit(dropout), out)
    return out


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
    """As `reference.qlora_linear`; with dropout the adapter's products are torch's."""
    if seed is not None and lora_A is not None and lora_B is not None:
        quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
        y, _ = qlora_linear(x, *quantized, out_features, bias, None, None, 1.0)
        low = dropped(x.reshape(-1, x.shape[-1]), dropout, seed) @ lora_A.T
        y.view(-1, out_features).addmm_(low, lora_B.T, alpha=scaling)
        return y, low.view(*x.shape[:-1], lora_A.shape[0])
    t = None if lora_A is None else x.new_empty((*x.shape[:-1], lora_A.shape[0]))
    y = torch.ops.harlora_cpp.qlora_linear(
        x, packed, absmax, code_table(quant_type, x.device), blocksize, out_features, bias, lora_A, lora_B, scaling, t,
        *nested_scales(nested_absmax, nested_offset),
    )  # fmt: skip
    return y, x.new_empty(0) if t is None else t


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
    """As `reference.qlora_linear_backward`."""
    if seed is not None and lora_A is not None and lora_B is not None:
        quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
        want_x, want_bias, want_A, want_B = output_mask
        grad_x = grad.new_empty(0)
        if want_x:
            mask = [True, False, False, False]
            grad_x = qlora_linear_backward(grad, None, None, *quantized, in_features, None, None, 1.0, mask)[0]
            low = scaling * (grad.reshape(-1, grad.shape[-1]) @ lora_B) @ lora_A
            grad_x.view(low.shape).add_(dropped(low, dropout, seed, low))
        if want_A and x is not None:
            x = dropped(x.reshape(-1, in_features), dropout, seed).view(x.shape)
        mask = [False, want_bias, want_A, want_B]
        others = qlora_linear_backward(grad, x, t, *quantized, in_features, lora_A, lora_B, scaling, mask)[1:]
        return grad_x, *others
    shapes = (
        (*grad.shape[:-1], in_features),
        grad.shape[-1:],
        None if lora_A is None else lora_A.shape,
        None if lora_B is None else lora_B.shape,
    )
    grads = [
        grad.new_empty(shape) if wanted and shape is not None else None
        for wanted, shape in zip(output_mask, shapes, strict=True)
    ]
    torch.ops.harlora_cpp.qlora_linear_backward(
        grad, x, t, packed, absmax, code_table(quant_type, grad.device), blocksize, in_features, lora_A, lora_B,
        scaling, *grads, *nested_scales(nested_absmax, nested_offset),
    )  # fmt: skip
    grad_x, grad_bias, grad_A, grad_B = (grad.new_empty(0) if value is None else value for value in grads)
    return grad_x, grad_bias, grad_A, grad_B


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
    """As `reference.dora_norm`."""
    shape = (len(lora_B), lora_A.shape[1])
    weight = dequantize_4bit(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, torch.float32)
    return reference.row_norms(weight, lora_A, lora_B, scaling)


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
    """As `reference.dora_linear`."""
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    z, t = qlora_linear(x, *quantized, out_features, None, lora_A, lora_B, scaling)
    return reference.with_gain(z, gain, bias), t


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
    """As `reference.lora_pool_linear`; on the CPU, where values may be looked at, the rows of each adapter alone."""
    quantized = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    y, _ = qlora_linear(x, *quantized, out_features, bias, None, None, 1.0)
    if x.device.type != "cpu":
        t = reference.lora_pool_low(x, lora_A, offsets, index, scaling)
        return y + t @ lora_B.T, t
    rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, out_features)
    t = x.new_zeros(*x.shape[:-1], len(lora_A))
    low = t.view(len(rows), len(lora_A))
    flat, bounds, factors = index.reshape(-1), offsets.tolist(), scaling.tolist()
    order = flat.argsort(stable=True)
    adapters, counts = flat[order].unique_consecutive(return_counts=True)
    for j, chosen in zip(adapters.tolist(), order.split(counts.tolist()), strict=True):
        if 0 <= j < len(factors):
            own = slice(bounds[j], bounds[j + 1])
            product = rows[chosen] @ lora_A[own].T * factors[j]
            low[chosen, own] = product
            sums.index_add_(0, chosen, product @ lora_B[:, own].T)
    return y, t
