"""Which backend serves an operator on a device and dtype, and how its kernels are launched. The one place that chooses.

A backend is a function with the arguments of the operator. `select` returns the first of an operator's backends that
serves the device and dtype, in the order of the table; ``HARLORA_BACKEND``, read when an operator first runs, names one
instead. The first time a backend other than the reference is chosen on a device it must agree with the reference on a
small probe; one that does not is left out from then on, with one warning that names it.

Triton's kernels also have a configuration, chosen by device, dtype and shape (configurations.py), and each of these
must agree with the reference the first time it is used on a device, in the format and dtype it is used with.

Orders and configurations are the tables' here, or what ``harlora doctor --tune`` measured on this device (tuning.py).
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import configurations, cpp, cuda, reference, tuning
from harlora.kernels.configurations import Configuration
from harlora.kernels.format import QUANT_TYPES

ENVIRONMENT = "HARLORA_BACKEND"
BACKENDS = ("reference", "cpp", "triton")
OPERATORS = (
    "quantize_4bit", "dequantize_4bit", "qlora_linear", "qlora_linear_backward", "dora_norm", "dora_linear",
    "lora_pool_linear",
)  # fmt: skip
# Which of Triton's files has an operator, and whose configurations its kernels are launched with, if any's.
_TRITON = {
    "quantize_4bit": ("nf4", ""),
    "dequantize_4bit": ("nf4", ""),
    "qlora_linear": ("qlora_linear", "qlora_linear"),
    "qlora_linear_backward": ("qlora_linear", "qlora_linear_backward"),
    "dora_norm": ("dora", ""),
    "dora_linear": ("dora", "qlora_linear"),
    "lora_pool_linear": ("lora_pool", "qlora_linear"),
    "qlora_qkv": ("qlora_qkv", "qlora_linear"),
    "qlora_qkv_backward": ("qlora_qkv", "qlora_linear_backward"),
    "qlora_mlp": ("qlora_mlp", "qlora_linear"),
    "qlora_mlp_backward": ("qlora_mlp", "qlora_linear_backward"),
    "encoder_blocks": ("encoder", ""),
    "encoder_blocks_backward": ("encoder", ""),
}


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    name: what ``HARLORA_BACKEND`` calls it.
    device_type: the kind of device it serves, or None for all.
    dtypes: which dtypes of the weight, result or input it serves, or None for all.
    on_request: why it serves only where ``HARLORA_BACKEND`` names it; empty for one that serves by default.
    """

    name: str
    function: Callable[..., Any]
    device_type: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    on_request: str = ""


UNVERIFIED = "it has not yet run correctly on such a device"
IN_THE_TABLE = "the table of configurations names its ways where they are faster than Triton's"


@cache
def backends(operator: str) -> tuple[Backend, ...]:
    """The backends of ``operator``, first choice first, the reference last."""
    table: list[Backend] = []
    if not load_triton():
        configured = _TRITON[operator][1] != ""
        function = partial(_triton, operator) if configured else _launcher(operator)
        table.append(Backend("triton", function, "cuda", cpp.DTYPES if operator != "dequantize_4bit" else None))
        if _module("nf4").INTERPRETED:
            table.append(Backend("triton", function, "cpu", table[0].dtypes, "Triton's interpreter runs it, slowly"))
    if not cpp.load_extension():
        function = getattr(cpp, operator)
        if cpp.has_kernel(operator, "cpu"):
            table.append(Backend("cpp", function, "cpu", cpp.DTYPES))
        if operator in cuda.WAYS:
            table.append(Backend("cpp", partial(_cuda, operator), "cuda", cpp.DTYPES, IN_THE_TABLE))
        elif cpp.has_kernel(operator, "cuda"):
            table.append(Backend("cpp", function, "cuda", on_request=UNVERIFIED))
    return (*table, Backend("reference", getattr(reference, operator)))


# Triton -------------------------------------------------------------------------------------------------------------


@cache
def load_triton() -> str:
    """Import Triton's kernels; an empty string, or the reason why they do not serve."""
    try:
        nf4 = _module("nf4")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if not torch.cuda.is_available() and not nf4.INTERPRETED:
        return (
            "it is for NVIDIA GPUs and torch sees none; TRITON_INTERPRET=1 in the environment runs it on CPUs, slowly"
        )
    return ""


def _module(name: str) -> ModuleType:
    return import_module(f"harlora.kernels.triton.{name}")


def _launcher(operator: str) -> Callable[..., Any]:
    """The launcher of Triton's kernels of ``operator``."""
    function: Callable[..., Any] = getattr(_module(_TRITON[operator][0]), operator)
    return function


@cache
def _table(device: torch.device) -> configurations.Table:
    if device.type != "cuda":  # under the interpreter
        return configurations.tables()["sm_90"]
    given = configurations.tables()[configurations.target(torch.cuda.get_device_capability(device))]
    return {**given, **tuning.measured_configurations(device)}


def configuration(
    operator: str, device: torch.device, dtype: torch.dtype, rows: int, weights: int,
    can: Callable[[Configuration], bool] | None = None,
) -> Configuration:  # fmt: skip
    """How the kernels of ``operator`` are launched for ``rows`` of x over ``weights`` values of the weight.

    can: whether a configuration of CUDA C++ serves the call and is fast; by default none is.
    """
    return configurations.choose(_table(device), operator, dtype, rows, weights, can)


def launcher(operator: str, chosen: Configuration | tuple[Configuration, ...]) -> Callable[..., Any]:
    """The function for ``operator`` with a configuration; it takes the operator's arguments."""
    if isinstance(chosen, Configuration) and chosen.way in configurations.CUDA_WAYS:
        way = cuda.WAYS[operator][chosen.way]
        given = {name: value for name, value in (("tile", chosen.block_rows), ("parts", chosen.parts)) if value}
        return partial(way, **given) if given else way
    return partial(_launcher(operator), configuration=chosen)


def serves(operator: str, chosen: Configuration, *arguments: Any) -> bool:
    """Whether a configuration is right for such arguments, as found out the first time; warns once if it is not."""
    wide, in_features, _, quantized, A = _sizes(operator, arguments)
    # Where these two operators have the seed of dropout, which need not be given.
    place = {"qlora_linear": 13, "qlora_linear_backward": 15}.get(operator, len(arguments))
    drops = any(seed is not None for seed in arguments[place:])
    return _proven(_probe(operator, chosen, wide.device, wide.dtype, in_features, quantized, A, drops))


def _probe(
    operator: str,
    chosen: Configuration | tuple[Configuration, ...],
    device: torch.device,
    dtype: torch.dtype,
    in_features: int,
    quantized: tuple[Any, ...],
    A: Tensor | None,
    dropout: bool = False,
) -> "_Probe":
    rank = 0 if A is None else A.shape[0]
    nested, quant_type, blocksize = quantized[2] is not None, quantized[4], quantized[5]
    return _Probe(
        operator, chosen, device, dtype, in_features % blocksize == 0, in_features % 2 == 0, quant_type, blocksize,
        nested, 0 if not rank else max(16, 1 << (rank - 1).bit_length()), dtype if A is None else A.dtype,
        dropout,
    )  # fmt: skip


def group(operator: str, x: Tensor, layers: tuple[reference.Layer, ...]) -> Callable[..., Any] | None:
    """Triton's function for ``operator`` over layers that are alike, or None where they have to run one by one.

    They do where one launch would not do for the layers together, or proved wrong.
    """
    rows, weights = x.numel() // max(1, x.shape[-1]), len(layers) * x.shape[-1] * layers[0][6]
    chosen = configuration(_TRITON[operator][1], x.device, x.dtype, rows, weights)
    if chosen.way == "dense" or (chosen.way == "split" and len(layers) > 1):
        return None
    for layer in layers:  # each has a format of its own where they need not be alike
        in_features = 2 * layer[0].numel() // layer[6]
        if not _proven(_probe(operator, chosen, x.device, x.dtype, in_features, layer[:6], layer[8])):
            return None
    return launcher(operator, chosen)


def encoder_blocks(
    x: Tensor, blocks: Sequence[reference.Block], norm: reference.Norm, heads: int, train: bool
) -> list[Callable[..., Any]] | None:
    """The function for an encoder's blocks, all of one size, and if they ``train`` its backward, or None.

    Triton's as for `group`; each part is proven, and the whole on a small problem. Or that of CUDA C++, where it was
    asked for or is in the table.
    """
    at_once = encoder_way(x.device, x.dtype, x.numel() // x.shape[-1])
    if not train and encodes(at_once, x, blocks, norm, heads):
        return [launcher("encoder_blocks", at_once)]
    return encoder_launches(x, blocks, heads, train)


def encodes(
    chosen: Configuration, x: Tensor, blocks: Sequence[reference.Block], norm: reference.Norm, heads: int
) -> bool:
    """Whether a configuration of CUDA C++ is one for such an encoder, and right."""
    if chosen.way != "encoder" or not cuda.serves_encoder(x, blocks, norm, heads, chosen.block_rows):
        return False
    fc1 = blocks[0][6]
    probe = _probe("encoder_blocks", chosen, x.device, x.dtype, x.shape[-1], fc1[:6], fc1[8])
    return _proven(replace(probe, shape=(x.shape[1], heads, x.shape[2])))


def encoder_launches(
    x: Tensor, blocks: Sequence[reference.Block], heads: int, train: bool
) -> list[Callable[..., Any]] | None:
    """Triton's functions for an encoder's blocks, as `encoder_blocks` returns them."""
    if not served_by_triton(x.device, x.dtype) or not _module("encoder").fits(x, blocks, heads):
        return None
    functions: list[Callable[..., Any]] = []
    for suffix in ("", "_backward") if train else ("",):
        for _, q, k, v, o, _, fc1, fc2 in blocks:
            groups = {"qlora_qkv": (q, k, v), "qlora_linear": (o,), "qlora_mlp": (fc1, fc2)}
            parts = [group(name + suffix, x, layers) for name, layers in groups.items()]
            if None in parts:
                return None
        chosen = tuple(part.keywords["configuration"] for part in parts if isinstance(part, partial))
        fc1, operator = blocks[0][6], "encoder_blocks" + suffix
        probe = _probe(operator, chosen, x.device, x.dtype, x.shape[-1], fc1[:6], fc1[8])
        if not _proven(replace(probe, shape=(x.shape[1], heads, x.shape[2]))):
            return None
        functions.append(launcher(operator, chosen))
    return functions


@cache
def encoder_way(device: torch.device, dtype: torch.dtype, rows: int) -> Configuration:
    """How an encoder's blocks are computed for ``rows`` rows of x in all: as the table says, or was asked for.

    One launch of CUDA C++ counts where it serves them; else they are launched one after the other.
    """
    forced, title = os.environ.get(ENVIRONMENT), f"encoder_blocks {8 * dtype.itemsize}"
    if device.type == "cuda" and dtype.itemsize == 2:
        if forced == "cpp":
            return Configuration("encoder")
        if not forced and title in _table(device):
            return configuration("encoder_blocks", device, dtype, rows, 0, lambda _: True)
    return Configuration("launches")


def encodes_at_once(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether an encoder's blocks are to be one launch."""
    return encoder_way(device, dtype, rows).way == "encoder"


def _sizes(operator: str, arguments: tuple[Any, ...]) -> tuple[Tensor, int, int, tuple[Any, ...], Tensor | None]:
    """Of a call: x or dY, in_features, out_features, the quantised weight and lora_A."""
    wide = arguments[0]
    if operator == "qlora_linear_backward":
        in_features, out_features, quantized, A = arguments[9], wide.shape[-1], arguments[3:9], arguments[10]
    else:
        in_features, out_features, quantized, A = wide.shape[-1], arguments[7], arguments[1:7], arguments[9]
    return wide, in_features, out_features, quantized, A


def _triton(operator: str, *arguments: Any) -> Any:
    """The operator by Triton's kernels, or by the reference where their configuration proved wrong."""
    function = proven_function(operator, *arguments)
    return _by_reference(operator, *arguments) if function is None else function(*arguments)


def proven_function(operator: str, *arguments: Any) -> Callable[..., Any] | None:
    """The function for such arguments, or None where their configuration proved wrong or cannot be proven now."""
    wide, in_features, out_features, *_ = _sizes(operator, arguments)
    rows = wide.numel() // max(1, wide.shape[-1])
    size = (wide.device, wide.dtype, rows, in_features * out_features)

    def can(chosen: Configuration) -> bool:
        return cuda.serves(operator, chosen.way, *arguments) and cuda.worth(chosen, *arguments)

    chosen = configuration(_TRITON[operator][1], *size, can)
    return launcher(operator, chosen) if serves(operator, chosen, *arguments) else None


def _cuda(operator: str, *arguments: Any) -> Any:
    """The operator by CUDA C++ where one of its ways serves such arguments, or by the reference."""
    wide = arguments[0]
    rows = wide.numel() // max(1, wide.shape[-1])
    for way in cuda.WAYS[operator]:
        chosen = Configuration(way, cuda.tile_of(way, rows))  # named, so that it is what is proven
        if cuda.serves(operator, way, *arguments) and serves(operator, chosen, *arguments):
            return launcher(operator, chosen)(*arguments)
    return _by_reference(operator, *arguments)


def _by_reference(operator: str, *arguments: Any) -> Any:
    """The reference, for which float32 adapters beside a half-precision x are rounded first, and dA and dB widened."""
    wide, *_, A = _sizes(operator, arguments)
    function = getattr(reference, operator)
    if A is None or A.dtype == wide.dtype:
        return function(*arguments)
    backward = operator == "qlora_linear_backward"
    first = 10 if backward else 9
    adapters = (each.to(wide.dtype) for each in arguments[first : first + 2])
    result = function(*arguments[:first], *adapters, *arguments[first + 2 :])
    return (*result[:2], *(each.to(A.dtype) for each in result[2:])) if backward else result


@dataclass(frozen=True)
class _Probe:
    """What a configuration is proven for: all that decides which kernels are compiled, in short.

    shape: of an encoder's blocks: tokens, heads and width.
    """

    operator: str
    configuration: Configuration | tuple[Configuration, ...]
    device: torch.device
    dtype: torch.dtype
    aligned: bool
    even: bool
    quant_type: str
    blocksize: int
    nested: bool
    rank: int
    adapter_dtype: torch.dtype
    dropout: bool = False
    shape: tuple[int, ...] = ()


_wrong: dict[_Probe, str] = {}


def wrong_configurations() -> list[str]:
    """Each configuration of Triton's kernels that was used here, did not agree with the reference and is left out."""
    return [
        f"the configuration {probe.configuration} of {probe.operator} {why} on {probe.device} in {probe.dtype}"
        for probe, why in _wrong.items()
        if why
    ]


def _proven(probe: _Probe) -> bool:
    """Whether a configuration agrees with the reference; computed once, with a warning that names it if not."""
    if probe not in _wrong:
        if probe.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            warnings.warn(
                f"harlora: {probe.operator} is captured into a CUDA graph before it ran once with such arguments, and "
                "cannot be checked; the reference is captured instead. Run the model once before capturing",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        try:
            with torch.autocast(probe.device.type, enabled=False):  # it would round the reference
                _wrong[probe] = _disagreement(probe)
        except torch.OutOfMemoryError:
            raise  # which says nothing of the configuration
        except Exception as error:  # what a compiler or a driver may raise is not for us to know
            _wrong[probe] = f"fails ({type(error).__name__}: {error})"
        if _wrong[probe]:
            warnings.warn(
                f"harlora: {wrong_configurations()[-1]} and is not used; please report this with the output of "
                "`harlora doctor --json`",
                RuntimeWarning,
                stacklevel=2,
            )
    return not _wrong[probe]


def _disagreement(probe: _Probe) -> str:
    """How the configuration differs from the reference on a problem of several tiles; empty if it agrees."""
    make = _problem_of_blocks if probe.shape else _problem_of_tiles
    given = make(probe, probe.dtype, adapter_dtype=probe.adapter_dtype)
    exact = make(probe, torch.float32, rounded=probe.dtype)
    if probe.dropout:
        given, exact = (with_dropout(arguments, probe.device) for arguments in (given, exact))
    expected = getattr(reference, probe.operator)(*exact)
    # Sums of products rounded to the dtype: an error of several units in its last place. A wrong index is of order 1.
    allowed = 1e-3 if probe.dtype == torch.float32 else 16 * torch.finfo(probe.dtype).eps
    if probe.dtype == torch.float32 and probe.shape and configurations.tf32_allowed():
        allowed = 16 * torch.finfo(torch.float16).eps  # whose precision TF32 has, through all products in a row
    for chosen in _in_other_parts(probe.configuration):
        found = launcher(probe.operator, chosen)(*given)
        for which, (one, other) in enumerate(zip(expected, found, strict=True)):
            error = float((other.float() - one).abs().max() / one.abs().max()) if one.numel() else 0.0
            if not error <= allowed:
                return f"disagrees with the reference by {error:.1e} in result {which}"
    return ""


def _in_other_parts(chosen: Any) -> list[Any]:
    """A configuration as it is launched on a small problem, and as on a large one: with a sum in parts or in one."""
    if not isinstance(chosen, Configuration) or chosen.parts or chosen.way not in cuda.OTHER_PARTS:
        return [chosen]
    return [chosen, replace(chosen, parts=cuda.OTHER_PARTS[chosen.way])]


# Choice -------------------------------------------------------------------------------------------------------------


def problem(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    quant_type: str,
    blocksize: int,
    nested: bool,
    *,
    rounded: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Arguments of ``operator``, random, in ``dtype``, A and B in ``adapter_dtype``, of values that ``rounded`` has."""
    size = (rows, in_features, out_features, rank, quant_type, blocksize, nested)
    if operator.startswith(("qlora_mlp", "qlora_qkv")):
        return _problem_of_several(operator, device, dtype, *size, seed, rounded=rounded, adapter_dtype=adapter_dtype)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, variance: int = 1) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu") / variance**0.5
        return values.to(rounded or dtype).to(device, dtype)

    weight = torch.randn(out_features, in_features, generator=generator, device="cpu").to(device) / in_features**0.5
    if operator == "quantize_4bit":
        return weight.to(dtype), quant_type, blocksize, nested
    packed, absmax, nested_absmax, offset = reference.quantize_4bit(weight, quant_type, blocksize, nested)
    scales = (absmax, nested_absmax, offset) if nested else (absmax, None, None)
    quantized = (packed, *scales, quant_type, blocksize)
    if operator == "dequantize_4bit":
        return *quantized, (out_features, in_features), dtype
    needs_adapter = operator in ("dora_norm", "dora_linear", "lora_pool_linear")
    A = draw(rank, in_features, variance=in_features) if rank or needs_adapter else None
    B = draw(out_features, rank, variance=max(1, rank)) if rank or needs_adapter else None
    if adapter_dtype is not None and A is not None and B is not None:
        A, B = A.to(adapter_dtype), B.to(adapter_dtype)
    x, t = draw(rows, in_features), draw(rows, rank) if rank else None
    if operator == "qlora_linear":
        return x, *quantized, out_features, draw(out_features), A, B, 0.5
    if operator == "dora_norm":
        return *quantized, A, B, 0.5
    if operator == "dora_linear":
        gain = draw(out_features).to(torch.promote_types(dtype, torch.float32))
        return x, *quantized, out_features, draw(out_features), A, B, 0.5, gain
    if operator == "lora_pool_linear":
        offsets = torch.tensor([0, rank // 3, rank // 3, rank], device=device)
        index = torch.arange(-1, rows - 1, device=device) % 4 - 1  # none, and each adapter, one of which is empty
        scaling = torch.tensor([0.5, 1.0, 2.0], device=device)
        return x, *quantized, out_features, draw(out_features), A, B, offsets, index, scaling
    grad = draw(rows, out_features, variance=out_features)
    return grad, x if rank else None, t, *quantized, in_features, A, B, 0.5, [True, True, rank > 0, rank > 0]


def with_dropout(arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Arguments of qlora_linear or its backward with a third of the adapter's input dropped."""
    return *arguments, 0.3, torch.tensor(0x123456789ABCDEF, device=device)


def _problem_of_several(
    operator: str, device: torch.device, dtype: torch.dtype, rows: int, in_features: int, out_features: int, rank: int,
    quant_type: str, blocksize: int, nested: bool, seed: int, **given: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """As `problem`, of operators over several layers."""
    made: Callable[..., Any] = partial(problem, "qlora_linear", device, dtype, **given)
    if operator.startswith("qlora_mlp"):  # whose second weight has whole blocks in its rows as well
        facts = (rank, quant_type, blocksize, nested)
        sizes = [(rows, in_features, 2 * blocksize, *facts), (rows, 2 * blocksize, 40, *facts)]
        (x, *fc1), (h, *fc2) = (made(*size, seed=2 * seed + i) for i, size in enumerate(sizes))
        if operator == "qlora_mlp":
            return x, tuple(fc1), tuple(fc2), True
        (_, _, t1, *_), (grad, _, t2, *_) = (
            problem("qlora_linear_backward", device, dtype, *size, **given, seed=2 * seed + i)
            for i, size in enumerate(sizes)
        )
        t1, t2 = (x.new_empty(0) if t is None else t for t in (t1, t2))
        return grad, x, h, t1, t2, tuple(fc1), tuple(fc2), (True, *2 * (True, rank > 0, rank > 0))
    size = (rows, in_features, out_features, rank, quant_type, blocksize, nested)
    calls = [made(*size, seed=3 * seed + i) for i in range(3)]
    x, layers = calls[0][0], [call[1:] for call in calls]
    if operator == "qlora_qkv":
        return x, layers
    backward = [problem("qlora_linear_backward", device, dtype, *size, **given, seed=3 * seed + i) for i in range(3)]
    t = torch.stack([call[2] for call in backward]) if rank else x.new_empty(0)
    return [call[0] for call in backward], x, t, layers, (True, True, rank > 0, rank > 0)


def _problem_of_tiles(probe: _Probe, dtype: torch.dtype, **given: Any) -> tuple[Any, ...]:
    """As `problem`, of several tiles of the configuration."""
    chosen = probe.configuration
    assert isinstance(chosen, Configuration)
    rows = 2 * chosen.block_rows + 1 if chosen.block_rows else cuda.PROVEN_ROWS.get(chosen.way, 70)
    # Past two tiles, and of a multiple of 16 as most layers are: any other number would be compiled apart from theirs.
    out_features = 2 * (chosen.block_out or 64) + 16
    in_features = max(8 * (chosen.block_in or 64), 2 * probe.blocksize)
    if not probe.aligned:
        in_features += 10 if probe.even else 9
    size = (rows, in_features, out_features, probe.rank, probe.quant_type, probe.blocksize, probe.nested)
    return problem(probe.operator, probe.device, dtype, *size, **given)


def problem_of_encoder(
    device: torch.device, dtype: torch.dtype, windows: int, tokens: int, heads: int, width: int, hidden: int,
    count: int, rank: int, quant_type: str, blocksize: int, nested: bool, *, seed: int = 0, **given: Any,
) -> tuple[Tensor, list[reference.Block], reference.Norm, int]:  # fmt: skip
    """As `problem`: x, ``count`` blocks of an encoder, its last norm, and heads."""
    made: Callable[..., Any] = partial(problem, "qlora_linear", device, dtype, **given)
    facts, sizes = (rank, quant_type, blocksize, nested), [*[(width, width)] * 4, (width, hidden), (hidden, width)]
    (x, *_) = made(windows * tokens, width, 1, 0, *facts[1:], seed=seed)
    layers = [made(1, *sizes[i % 6], *facts, seed=seed + i)[1:] for i in range(6 * count)]
    vectors = [made(1, 1, width, 0, *facts[1:], seed=seed + i)[8] for i in range(4 * count + 2)]
    norms = [(vectors[2 * i], vectors[2 * i + 1], 1e-5) for i in range(2 * count + 1)]
    blocks: list[Any] = [
        (norms[2 * i], *layers[6 * i : 6 * i + 4], norms[2 * i + 1], *layers[6 * i + 4 : 6 * i + 6])
        for i in range(count)
    ]
    return x.view(windows, tokens, width), blocks, norms[-1], heads


def _problem_of_blocks(probe: _Probe, dtype: torch.dtype, **given: Any) -> tuple[Any, ...]:
    """As `problem`, of two blocks of an encoder and three windows."""
    facts = (probe.rank, probe.quant_type, probe.blocksize, probe.nested)
    tokens, heads, width = probe.shape
    # Whole blocks in the rows of fc2 for Triton; one launch must find room in shared memory, as for the encoder itself.
    hidden = min(2 * probe.blocksize, 512) if isinstance(probe.configuration, Configuration) else 2 * probe.blocksize
    x, blocks, norm, _ = problem_of_encoder(probe.device, dtype, 3, tokens, heads, width, hidden, 2, *facts, **given)
    if probe.operator == "encoder_blocks":  # what one launch computes has nothing kept for backward
        return x, blocks, norm, heads, not isinstance(probe.configuration, Configuration)
    forward = replace(probe, operator="encoder_blocks")
    exact = _problem_of_blocks(forward, torch.float32, rounded=probe.dtype)
    grad = problem("qlora_linear", probe.device, dtype, 3 * tokens, width, 1, *facts, **given, seed=99)[0]
    _, *kept = reference.encoder_blocks(*exact)
    kept = [each if each.dim() == 2 else each.to(dtype) for each in kept]  # mean and deviation stay float32
    return (
        grad.view_as(x), x, kept, blocks, norm, heads, (True, [(True, probe.rank > 0, probe.rank > 0) * 4] * 2)
    )  # fmt: skip


def _problems(operator: str, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments for the comparison with the reference: small, odd, and one past a block."""
    sizes = [(1, 192, 40, 5), (3, 65, 17, 2), (20, 192, 40, 5)]
    problems = [
        problem(operator, device, torch.float32, *size, quant_type, 32 if size[3] == 2 else 64, size[3] == 2)
        for quant_type in QUANT_TYPES
        for size in sizes
    ]
    if operator in configurations.OPERATORS:
        problems.append(with_dropout(problems[-1], device))
    return problems


def _same(operator: str, backend: Backend, arguments: tuple[Any, ...]) -> bool:
    expected, found = getattr(reference, operator)(*arguments), backend.function(*arguments)
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    if operator in {"quantize_4bit", "dequantize_4bit"}:
        return all(torch.equal(one, other) for one, other in pairs)
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in pairs)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Without what the caller's context does to operators: the first call may be under autocast, or traced."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


@cache
def agrees(operator: str, backend: Backend, device: torch.device) -> bool:
    """Whether ``backend`` gives the reference's results on a small probe; computed once, with a warning if not."""
    if backend.name == "reference":
        return True
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"harlora: {operator} is captured into a CUDA graph before it ran once on {device}, and cannot be checked; "
            "run the model once before capturing"
        )
    with _undisturbed(device):
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
    if not forced and backend.on_request:
        return f"{backend.on_request}; {ENVIRONMENT}={backend.name} asks for it"
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
        if forced not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT} must be one of {BACKENDS}, got {forced!r}; unset it for the default")
        if forced == "cpp" and cpp.load_extension():
            raise RuntimeError(f"{ENVIRONMENT}=cpp, but the extension does not serve: {cpp.load_extension()}")
        if forced == "triton" and load_triton():
            raise RuntimeError(f"{ENVIRONMENT}=triton, but Triton's kernels do not serve: {load_triton()}")
    for backend in ordered(operator, device, dtype):
        if refusal(operator, backend, device, dtype):
            continue
        if agrees(operator, backend, device):
            return backend.function
        if forced == backend.name:
            raise RuntimeError(f"{ENVIRONMENT}={forced}: {operator} disagrees with the reference on {device}")
    raise AssertionError(operator)  # the reference serves everything


@cache
def served_by_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels serve the layer on ``device``, forward and backward."""
    functions = {backend.function for operator in configurations.OPERATORS for backend in backends(operator)
                 if backend.name == "triton"}  # fmt: skip
    return all(select(operator, device, dtype) in functions for operator in configurations.OPERATORS)
