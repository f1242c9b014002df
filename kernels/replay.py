"""Launches of Triton's kernels, recorded once and repeated on other tensors by the extension (csrc/gpu/launches.cpp).

What Python takes to choose a configuration, to allocate and to launch is several times what a small layer computes for.
It depends on sizes, strides and dtypes alone, so it is done once for each of them: `run` watches a function that
launches kernels, keeps which kernels it launched with which tensors, and hands that to one compiled call from then on.
torch's own products and copies into memory that is there (`_PRODUCTS`) are repeated as well. A function that computes
anything else is not recorded and is called every time.
"""

import struct
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harlora.kernels import cpp

DRIVER = "libcuda.so.1"
ATTEMPTS = 3  # the first call of a configuration also checks it, which is more than launches
MOST = 4096  # recordings

# As ScalarType of c10 counts them.
_DTYPES = {
    torch.uint8: 0, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7,
    torch.bfloat16: 15,
}  # fmt: skip
_DEVICES = {"cpu": 0, "cuda": 1}
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_strided.default, _aten.empty_like.default,
}  # fmt: skip
_VIEWS = {
    _aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default, _aten.t.default,
    _aten.transpose.int, _aten.permute.default, _aten.slice.Tensor, _aten.select.int, _aten.unsqueeze.default,
    _aten.detach.default, _aten.alias.default, _aten.as_strided.default,
}  # fmt: skip

# What is repeated beside launches, by the numbers of launches.h.
_PRODUCTS = {_aten.mm.out: 2, _aten.addmm.out: 1, _aten.addmm_.default: 1, _aten.copy_.default: 3}
_CUDA = {
    "harlora_cpp::qlora_gemv": 4, "harlora_cpp::qlora_gemm": 5, "harlora_cpp::qlora_mma": 6,
    "harlora_cpp::encoder_blocks": 7, "harlora_cpp::qlora_dx": 8, "harlora_cpp::lora_grads": 9,
}  # fmt: skip

# Operators that compute nothing: they answer how much of something there is.
_QUESTIONS = {"harlora_cpp::encoder_room", "harlora_cpp::encoder_shared_bytes"}

refused: dict[Hashable, str] = {}  # why there is no recording under a key, where one was tried
remembered: dict[Hashable, Any] = {}  # what callers know of their keys, until `reset`
_held: dict[Hashable, int] = {}  # the number of a recording, or minus the attempts that failed
_needed: dict[int, Any] = {}  # what must live as long as a recording: kernels, tables
_outdated: list[int] = []  # recordings without a key, which another thread may still be about to repeat
_recording = threading.RLock()  # a function that is watched may itself repeat others


def reset() -> None:
    """Forget all recordings."""
    _forget(list(_needed))
    _outdated.clear()
    _held.clear()
    refused.clear()
    remembered.clear()


def _forget(numbers: Sequence[int]) -> None:
    for number in numbers:
        torch.ops.harlora_cpp.launches_release(number)
        del _needed[number]


def _make_room() -> None:
    """Before there are more recordings than `MOST`, forget those that were outdated the last time, and outdate all."""
    if len(_held) >= MOST:
        _forget(_outdated)
        _outdated[:] = _needed
        _held.clear()
        refused.clear()


def remember(key: Hashable, value: Any) -> None:
    """Keep ``value`` in `remembered`."""
    if len(remembered) >= 4 * MOST:
        remembered.clear()
    remembered[key] = value


def known(key: Hashable) -> bool:
    """Whether there is a recording under ``key``."""
    return _held.get(key, 0) > 0


def run(key: Hashable, inputs: list[Tensor], function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What ``function`` returns, new tensors, by its recording where there is one.

    key: decides, with sizes, strides and dtypes of the inputs, what the function does.
    inputs: all tensors it reads, the first of them on the device it launches on.
    """
    held = _held.get(key, 0)
    if held > 0:
        stream = torch._C._cuda_getCurrentRawStream(inputs[0].get_device())
        found: Sequence[Tensor] = _launch()(inputs, held, stream)
        return found or function()
    if held <= -ATTEMPTS or not inputs[0].is_cuda or cpp.load_extension():
        return function()
    with _recording:
        _make_room()
        reason: list[str] = []
        result, number = record(inputs, function, DRIVER, reason)
        if number:
            refused.pop(key, None)
            _held[key] = number
        elif not torch.cuda.is_current_stream_capturing():  # where a recording cannot be seen to be right
            refused[key] = reason[0]
            _held[key] = held - 1
    return result


@cache
def _launch() -> Any:
    # _op is what OpOverload.__call__ calls; without its frame a call is shorter.
    return torch.ops.harlora_cpp.launches_run.default._op


class _Product(NamedTuple):
    """A product that is not a launch: what launches_hold calls it, and its tensors, numbers and factors in order."""

    work: int
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int, ...] = ()
    beta: float = 0.0
    alpha: float = 0.0


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Product | None:
    """What ``func`` is called for, if it can be repeated."""
    if func in _PRODUCTS:
        work, out = _PRODUCTS[func], kwargs.get("out", args[0])
        if work == 1:
            beta, alpha = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
            return _Product(work, (out, *args[:3]), (), beta, alpha)
        return _Product(work, (out, *args[:2]) if work == 2 else args[:2])
    if func._schema.name not in _CUDA:
        return None
    work, tensors, numbers, scaling = _CUDA[func._schema.name], [], [], 0.0
    if func._schema.name == "harlora_cpp::encoder_blocks":
        x, of_layers, *sizes, eps, factors, code, y, tile, parts = args[:13]
        numbers = [*map(int, sizes), tile, parts, len(eps), *map(_bits, (*eps, *factors))]
        return _Product(work, (x, y, code, *(args[13:] or (None,)), *of_layers), tuple(numbers))
    for place, argument in enumerate(func._schema.arguments):  # each kind in its order
        value: Any = args[place] if place < len(args) else None
        if argument.name == "scaling":
            scaling = value
        elif str(argument.type) == "int":
            numbers += [] if argument.name == "stream" else [value]
        else:
            tensors.append(value)
    return _Product(work, tuple(tensors), tuple(numbers), 0.0, scaling)


class _Watch(TorchDispatchMode):
    """Sees what torch does meanwhile: what it allocates and multiplies, and whether it computes anything else.

    steps: gets the products, in turn with what others add to it.
    """

    def __init__(self, steps: list[Any] | None = None) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.steps = [] if steps is None else steps
        self.computed = ""  # the first of what else it computes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif func not in _VIEWS and func._schema.name not in _QUESTIONS:
            product = _product(func, args, kwargs or {})
            if product is None:
                self.computed = self.computed or func._schema.name
            else:
                self.steps.append(product)
        return result


@contextmanager
def launches() -> Iterator[list[Any]]:
    """What this thread launches meanwhile by Triton: kernel, grid, arguments and options of each."""
    launched: list[Any] = []
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:  # CUDA C++ may serve without
        yield launched
        return
    thread, original = threading.get_ident(), JITFunction.run

    def run_and_note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if threading.get_ident() == thread:
            launched.append((kernel, grid, args, kwargs))
        return kernel

    with patch.object(JITFunction, "run", run_and_note):
        yield launched


def record(
    inputs: list[Tensor], function: Callable[[], Sequence[Tensor]], driver: str, reason: list[str] | None = None
) -> tuple[Sequence[Tensor], int]:
    """What ``function`` returns, and the number under which its launches are held, 0 if they cannot be repeated.

    reason: gets why not.
    """
    with launches() as launched, _Watch(launched) as watch:
        result = function()
    number, why = 0, f"it computes {watch.computed}" if watch.computed else "" if launched else "it launches nothing"
    if not why:
        try:
            facts, needed = _facts(inputs, watch.allocated, result, launched)
            number = torch.ops.harlora_cpp.launches_hold(facts, driver)
        except (_UnrepeatableError, AttributeError, KeyError, RuntimeError) as error:
            # The last three: another version of Triton describes its kernels in another way; there is no such driver.
            why = f"its launches cannot be described ({type(error).__name__}: {error})"
    if number and any(isinstance(step, _Product) and step.work in _CUDA.values() for step in launched):
        why = _difference(inputs, number, result)
    if why:
        if number:
            torch.ops.harlora_cpp.launches_release(number)
        if reason is not None:
            reason.append(why)
        return result, 0
    _needed[number] = needed
    return result, number


def _difference(inputs: list[Tensor], number: int, result: Sequence[Tensor]) -> str:
    """How a recording differs from ``result``, whose very bits it should give; empty if it does not.

    Warns of what a recording never should, since calls are then right, but take longer, and nothing else would tell.
    """
    if torch.cuda.is_current_stream_capturing():
        return "a graph is captured, in which it cannot be compared"
    stream = torch._C._cuda_getCurrentRawStream(inputs[0].get_device())
    try:
        again: Sequence[Tensor] = torch.ops.harlora_cpp.launches_run(inputs, number, stream)
    except RuntimeError as error:
        why = f"it fails ({error})"
    else:
        if not again:
            return "its inputs are not what was recorded"
        pairs = enumerate(zip(again, result, strict=True))
        other = [
            i
            for i, (one, of) in pairs
            if one.shape != of.shape or not torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, of)))
        ]
        if not other:
            return ""
        why = f"it gives other bits in result {other[0]}"
    warnings.warn(
        f"harlora: a recording of kernels is not used, since {why}; calls take longer. Please report this with the "
        "output of `harlora doctor --json`",
        RuntimeWarning,
        stacklevel=2,
    )
    return why


class _UnrepeatableError(Exception):
    """Something about the launches that the extension does not repeat."""


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The memory from a tensor's first value to its last."""
    if not tensor.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _place(pointer: int, extents: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Which of the tensors a pointer is into, and how far."""
    for which, (begin, end) in enumerate(extents):
        if begin <= pointer < end:
            return which, pointer - begin
    return None


def _facts(
    inputs: Sequence[Tensor], allocated: Sequence[Tensor], result: Sequence[Tensor], launched: Sequence[Any]
) -> tuple[list[int], Any]:
    """The recording as launches_hold reads it, and what must live as long."""
    given = [_extent(tensor) for tensor in inputs]
    apart = sorted(extent for extent in given if extent[1])
    if any(end > begin for (_, end), (begin, _) in pairwise(apart)):
        raise _UnrepeatableError  # two arguments are one tensor now and may be two in another call
    if any(begin % 16 for begin, _ in given):
        raise _UnrepeatableError
    made = [_extent(tensor) for tensor in allocated]
    needed: list[Any] = []
    launches: list[int] = []
    for step in launched:
        if isinstance(step, _Product):
            launches += _product_facts(step, inputs, allocated, given, made, needed)
            continue
        kernel, grid, args, kwargs = step
        metadata, signature = kernel.metadata, kernel.src.signature
        if (
            getattr(metadata, "num_ctas", 1) != 1
            or metadata.global_scratch_size or metadata.profile_scratch_size
            or metadata.launch_cooperative_grid or metadata.launch_pdl
        ):  # fmt: skip
            raise _UnrepeatableError
        values = dict(zip(kernel.src.fn.arg_names, args, strict=False)) | kwargs
        parameters = []
        for name, kind in signature.items():
            if kind != "constexpr":
                parameters.append(_parameter(kind, values[name], given, made, needed))
        parameters += [(3, 0, 0), (3, 0, 0)]  # Triton's own scratch memory, of which there is none
        grid = (*grid, 1, 1)[:3]
        launches += [0, kernel.function, *grid, 32 * metadata.num_warps, metadata.shared, len(parameters)]
        launches += [number for parameter in parameters for number in parameter]
        needed.append(kernel)
    sizes = [tuple(tensor.shape) for tensor in allocated]
    outputs = []
    for tensor in result:
        if not tensor.is_contiguous():
            raise _UnrepeatableError
        place = _place(tensor.data_ptr(), made) if tensor.numel() else None
        if tensor.numel() and (place is None or place[1] or tensor.numel() != allocated[place[0]].numel()):
            raise _UnrepeatableError
        if place is None:
            outputs.append(len(sizes))
            sizes.append(tuple(tensor.shape))
            allocated = [*allocated, tensor]
        else:
            outputs.append(place[0])
            sizes[place[0]] = tuple(tensor.shape)
    if len(set(outputs)) < len(outputs):
        raise _UnrepeatableError
    first = inputs[0].device
    facts = [_DEVICES[first.type], inputs[0].get_device(), len(inputs)]
    for tensor in inputs:
        facts += [_DTYPES[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride()]
    facts.append(len(sizes))
    for tensor, shape in zip(allocated, sizes, strict=True):
        facts += [_DTYPES[tensor.dtype], len(shape), *shape]
    return [*facts, len(outputs), *outputs, len(launched), *launches], needed


def _product_facts(
    product: _Product, inputs: Sequence[Tensor], allocated: Sequence[Tensor], given: Sequence[tuple[int, int]],
    made: Sequence[tuple[int, int]], needed: list[Any],
) -> list[int]:  # fmt: skip
    """A product as launches_hold reads it."""
    facts = [product.work, len(product.tensors)]
    for tensor in product.tensors:
        facts += [3] if tensor is None else _view(tensor, inputs, allocated, given, made, needed)
    return [*facts, len(product.numbers), *product.numbers, _bits(product.beta), _bits(product.alpha)]


def _bits(factor: float) -> int:
    """A float64 as launches_hold reads it."""
    bits: int = struct.unpack("<q", struct.pack("<d", factor))[0]
    return bits


def _view(
    tensor: Tensor, inputs: Sequence[Tensor], allocated: Sequence[Tensor], given: Sequence[tuple[int, int]],
    made: Sequence[tuple[int, int]], needed: list[Any],
) -> list[int]:  # fmt: skip
    """A tensor of a product: a part of an input or buffer, or a table that is there for good."""
    layout = [tensor.dim(), *tensor.shape, *tensor.stride()]
    begin, end = _extent(tensor)
    if not end > begin:
        # An empty t, of which there is a buffer of that size.
        for number, other in enumerate(allocated):
            if other is tensor:
                return [1, number, 0, *layout]
        raise _UnrepeatableError
    for which, extents, tensors in ((0, given, inputs), (1, made, allocated)):
        place = _place(begin, extents)
        if place is not None:
            number, offset = place
            if end > extents[number][1] or tensors[number].dtype != tensor.dtype:
                raise _UnrepeatableError
            return [which, number, offset // tensor.element_size(), *layout]
    needed.append(tensor)
    return [2, begin, _DTYPES[tensor.dtype], *layout]


def _parameter(
    kind: str, value: Any, given: Sequence[tuple[int, int]], made: Sequence[tuple[int, int]], needed: list[Any]
) -> tuple[int, int, int]:
    """One parameter of a kernel as launches_hold reads it."""
    if kind.startswith("*"):
        pointer = value.data_ptr()
        for which, extents in ((0, given), (1, made)):
            if place := _place(pointer, extents):
                return (which, *place)
        needed.append(value)  # a table that is there for good: nothing was computed meanwhile
        return 3, pointer, 0
    if kind in ("i32", "u32"):
        return 2, value & 0xFFFFFFFF, 0
    if kind in ("i64", "u64"):
        return 3, value, 0
    if kind == "fp32":
        return 2, struct.unpack("<I", struct.pack("<f", value))[0], 0
    raise _UnrepeatableError
