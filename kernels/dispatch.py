"""Which backend serves an operator on a device. The one place that chooses.

A backend is a function with the arguments of the operator's reference. `select` returns the first of an operator's
backends that serves the device, in the order of the table; ``HARLORA_BACKEND`` names one instead. The first time a
backend other than the reference is chosen on a device it must agree with the reference on a small probe; one that
does not is left out from then on, with one warning that names it.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import reference
from harlora.kernels.format import BLOCKSIZES, QUANT_TYPES, code_table

ENVIRONMENT = "HARLORA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    name: what ``HARLORA_BACKEND`` calls it.
    device_type: the kind of device it serves, or None for all.
    verified: False as long as it has not run correctly on a real device; such a backend serves only on request.
    probe: True if it agrees with the reference on a device, for the check at first use.
    """

    name: str
    function: Callable[..., Any]
    device_type: str | None = None
    verified: bool = True
    probe: Callable[[Callable[..., Any], torch.device], bool] | None = None


def _probe_dequantize(function: Callable[..., Any], device: torch.device) -> bool:
    packed = (torch.arange(333, device=device) * 7919 % 256).to(torch.uint8)
    for quant_type in QUANT_TYPES:
        for blocksize in BLOCKSIZES[:2]:
            scale = torch.linspace(0.5, 2.0, -(-665 // blocksize), device=device)
            expected, found = (torch.empty(665, device=device) for _ in range(2))
            reference.dequantize_4bit(packed, scale, quant_type, blocksize, expected)
            function(packed, scale, quant_type, blocksize, found)
            if not torch.equal(expected, found):
                return False
    return True


def _dequantize_4bit_cpp(packed: Tensor, scale: Tensor, quant_type: str, blocksize: int, out: Tensor) -> None:
    code = code_table(quant_type, packed.device)
    torch.ops.harlora_cpp.dequantize_4bit(packed.contiguous(), scale.contiguous(), code, blocksize, out)


_REFERENCE = {
    name: Backend("reference", getattr(reference, name))
    for name in ("quantize_4bit", "dequantize_4bit", "qlora_linear", "qlora_linear_backward")
}


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
    return ""


@cache
def backends(operator: str) -> tuple[Backend, ...]:
    """The backends of ``operator``, first choice first, the reference last."""
    table: list[Backend] = []
    if operator == "dequantize_4bit" and not load_extension():
        for device_type, verified in (("cpu", True), ("cuda", False)):
            key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
            if torch._C._dispatch_has_kernel_for_dispatch_key("harlora_cpp::dequantize_4bit", key):
                table.append(Backend("cpp", _dequantize_4bit_cpp, device_type, verified, _probe_dequantize))
    return (*table, _REFERENCE[operator])


@cache
def _agrees(operator: str, backend: Backend, device: torch.device) -> bool:
    if backend.probe is None or backend.probe(backend.function, device):
        return True
    warnings.warn(
        f"harlora: backend {backend.name!r} of {operator} disagrees with the reference on {device} and is not used; "
        "please report this with the output of `python -m torch.utils.collect_env`",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def select(operator: str, device: torch.device) -> Callable[..., Any]:
    """The function that serves ``operator`` on ``device``.

    Raises: ValueError if ``HARLORA_BACKEND`` names a backend that exists for no operator; RuntimeError if it names
    one that disagrees with the reference here.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    table = backends(operator)
    if forced:
        if forced not in {"reference", "cpp"}:
            raise ValueError(f"{ENVIRONMENT} must be 'reference' or 'cpp', got {forced!r}; unset it for the default")
        if forced == "cpp" and load_extension():
            raise RuntimeError(f"{ENVIRONMENT}=cpp, but the extension does not serve: {load_extension()}")
    for backend in table:
        if backend.device_type not in (None, device.type):
            continue
        if forced and forced != backend.name and backend.name != "reference":
            continue
        if not forced and not backend.verified:
            continue
        if _agrees(operator, backend, device):
            return backend.function
        if forced == backend.name:
            raise RuntimeError(f"{ENVIRONMENT}={forced}: {operator} disagrees with the reference on {device}")
    raise AssertionError(operator)  # the reference serves every device
