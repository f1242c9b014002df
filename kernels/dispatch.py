"""Which backend serves an operator on a device and dtype. The one place that chooses.

A backend is a function with the arguments of the operator. `select` returns the first of an operator's backends that
serves the device and dtype, in the order of the table; ``HARLORA_BACKEND``, read when an operator first runs, names one
instead. The first time a backend other than the reference is chosen on a device it must agree with the reference on a
small probe; one that does not is left out from then on, with one warning that names it.

The order is the table's here, or what ``harlora doctor --tune`` measured on this device (tuning.py).
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import cpp, reference, tuning
from harlora.kernels.format import QUANT_TYPES

ENVIRONMENT = "HARLORA_BACKEND"
OPERATORS = ("quantize_4bit", "dequantize_4bit", "qlora_linear", "qlora_linear_backward")


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    name: what ``HARLORA_BACKEND`` calls it.
    device_type: the kind of device it serves, or None for all.
    dtypes: which dtypes of the weight, result or input it serves, or None for all.
    verified: False as long as it has not run correctly on a real device; such a backend serves only on request.
    """

    name: str
    function: Callable[..., Any]
    device_type: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    verified: bool = True


@cache
def backends(operator: str) -> tuple[Backend, ...]:
    """The backends of ``operator``, first choice first, the reference last."""
    table: list[Backend] = []
    if not cpp.load_extension():
        function = getattr(cpp, operator)
        if cpp.has_kernel(operator, "cpu"):
            table.append(Backend("cpp", function, "cpu", cpp.DTYPES))
        if cpp.has_kernel(operator, "cuda"):
            table.append(Backend("cpp", function, "cuda", verified=False))
    return (*table, Backend("reference", getattr(reference, operator)))


def _problems(operator: str, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments for the comparison with the reference: small, odd, and one past a block."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    problems: list[tuple[Any, ...]] = []
    for quant_type in QUANT_TYPES:
        for rows, in_features, out_features, rank, blocksize in ((3, 65, 17, 2, 32), (20, 192, 40, 5, 64)):
            weight = draw(out_features, in_features)
            if operator == "quantize_4bit":
                problems.append((weight, quant_type, blocksize, rank == 2))
                continue
            *packed, nested_absmax, offset = reference.quantize_4bit(weight, quant_type, blocksize, rank == 2)
            nested = (nested_absmax, offset) if rank == 2 else (None, None)
            quantized = (*packed, *nested, quant_type, blocksize)
            if operator == "dequantize_4bit":
                problems.append((*quantized, (out_features, in_features), torch.float32))
                continue
            x, grad, t = draw(rows, in_features), draw(rows, out_features), draw(rows, rank)
            bias, lora_A, lora_B = draw(out_features), draw(rank, in_features), draw(out_features, rank)
            if operator == "qlora_linear":
                problems += [(x[:n], *quantized, out_features, bias, lora_A, lora_B, 0.5) for n in (1, rows)]
            else:
                problems.append((grad, x, t, *quantized, in_features, lora_A, lora_B, 0.5, [True] * 4))
    return problems


def _same(operator: str, backend: Backend, arguments: tuple[Any, ...]) -> bool:
    expected, found = getattr(reference, operator)(*arguments), backend.function(*arguments)
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    if operator in {"quantize_4bit", "dequantize_4bit"}:
        return all(torch.equal(one, other) for one, other in pairs)
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in pairs)


@cache
def agrees(operator: str, backend: Backend, device: torch.device) -> bool:
    """Whether ``backend`` gives the reference's results on a small probe; computed once, with a warning if not."""
    if backend.name == "reference":
        return True
    if all(_same(operator, backend, arguments) for arguments in _problems(operator, device)):
        return True
    warnings.warn(
        f"harlora: backend {backend.name!r} of {operator} disagrees with the reference on {device} and is not used; "
        "please report this with the output of `python -m torch.utils.collect_env`",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def refusal(operator: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``backend`` may not serve, whatever it computes; empty if it may."""
    forced = os.environ.get(ENVIRONMENT, "")
    if backend.device_type not in (None, device.type):
        return f"it is for {backend.device_type}"
    if backend.dtypes and dtype not in backend.dtypes:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if forced and forced != backend.name and backend.name != "reference":
        return f"{ENVIRONMENT}={forced}"
    if not forced and not backend.verified:
        return f"it has not yet run correctly on such a device; {ENVIRONMENT}={backend.name} asks for it"
    return ""


def ordered(operator: str, device: torch.device, dtype: torch.dtype) -> list[Backend]:
    """The backends of ``operator`` in the order in which they are asked: the user's own, if measured on this device."""
    known = list(backends(operator))
    if os.environ.get(ENVIRONMENT):
        return known
    order = tuning.table(device.type, cpp.extension_path()).get("order", {})
    names = order.get(f"{operator} {str(dtype).removeprefix('torch.')}", [])
    return sorted(known, key=lambda backend: names.index(backend.name) if backend.name in names else len(names))


@cache
def select(operator: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that serves ``operator`` on ``device``; ``dtype`` is that of the weight, result or input.

    Raises: ValueError if ``HARLORA_BACKEND`` names a backend that exists for no operator; RuntimeError if it names
    one that disagrees with the reference here.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    if forced:
        if forced not in {"reference", "cpp"}:
            raise ValueError(f"{ENVIRONMENT} must be 'reference' or 'cpp', got {forced!r}; unset it for the default")
        if forced == "cpp" and cpp.load_extension():
            raise RuntimeError(f"{ENVIRONMENT}=cpp, but the extension does not serve: {cpp.load_extension()}")
    for backend in ordered(operator, device, dtype):
        if refusal(operator, backend, device, dtype):
            continue
        if agrees(operator, backend, device):
            return backend.function
        if forced == backend.name:
            raise RuntimeError(f"{ENVIRONMENT}={forced}: {operator} disagrees with the reference on {device}")
    raise AssertionError(operator)  # the reference serves everything
