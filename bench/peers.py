"""The competitors: one model with the same weights and adapters, adapted by each library's means.

A competitor that is not installed, has no such dtype or device, fails, or is wrong is reported as such, never left out
in silence. Which exist: `COMPETITORS`.
"""

import contextvars
import copy
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harlora
from harlora.kernels import cpp, dispatch, eager
from harlora.nn.linear import AdaptedLinear

OURS = "harlora"
PEER = "bitsandbytes + PEFT"  # the baseline
DENSE = "dense + PEFT"


@dataclass(frozen=True)
class Competitor:
    """One way to adapt a model.

    title: what it is, exactly.
    packages: what it needs beyond torch.
    precision: of `harlora.inference_precision`; such a competitor takes part in inference alone.
    reduced: whether it rounds float32 inputs to fewer bits, which its error limit allows for.
    captured: whether its training step is one CUDA graph; such a competitor takes part in that case alone.
    colour, marker: in pictures; Okabe and Ito's colours, told apart by the colour-blind, and the markers by everyone.
    """

    title: str
    colour: str
    marker: str
    packages: tuple[str, ...] = ()
    precision: str = "float32"
    reduced: bool = False
    captured: bool = False


COMPETITORS = {
    OURS: Competitor("harlora.QLoRALinear, NF4, blocksize 64", "#d55e00", "o"),
    "harlora bfloat16": Competitor(
        "the same, inference_precision('bfloat16')", "#e69f00", "D", precision="bfloat16", reduced=True
    ),
    "harlora int8": Competitor(
        "the same, inference_precision('int8')", "#009e73", "v", precision="int8", reduced=True
    ),
    "harlora captured": Competitor(
        "the same, its training step captured into one CUDA graph", "#f0e442", ">", captured=True
    ),
    PEER: Competitor(
        "bitsandbytes.nn.Linear4bit (NF4, blocksize 64, plain scales, compute_dtype that of x) with PEFT LoRA",
        "#0072b2", "s", ("bitsandbytes", "peft"), reduced=True,
    ),
    f"{PEER}, captured": Competitor(
        "the same, its training step captured into one CUDA graph as harlora's is", "#332288", "p",
        ("bitsandbytes", "peft"), reduced=True, captured=True,
    ),
    "dequantise + matmul": Competitor(
        "harlora.dequantize_4bit, F.linear and LoRA in plain torch, which keeps the dense weight for backward",
        "#56b4e9", "P",
    ),
    "torchao NF4": Competitor(
        "torchao NF4Tensor and linear_nf4 (blocks of 64, scales in blocks of up to 256), LoRA in plain torch",
        "#882255", "X", ("torchao",),
    ),
    DENSE: Competitor("nn.Linear of x's dtype with PEFT LoRA", "#000000", "^", ("peft",)),
    f"{DENSE}, compiled": Competitor("the same under torch.compile, static shapes", "#888888", "<", ("peft",)),
    f"{DENSE}, captured": Competitor(
        "nn.Linear of x's dtype with PEFT LoRA, its training step captured into one CUDA graph", "#117733", "h",
        ("peft",), captured=True,
    ),
    "dense": Competitor("nn.Linear without an adapter: the floor for a whole model, another function", "#cc79a7", "*"),
}  # fmt: skip

_CAPTURED = [name for name, competitor in COMPETITORS.items() if competitor.captured]
_OTHERS = [name for name in COMPETITORS if not name.startswith(OURS)]
_VARIANTS = [name for name in COMPETITORS if name.startswith(f"{OURS} ")]
# Whose times are put over whose: all others' over harlora's, the baseline's over its variants', and of steps that are
# one CUDA graph each other's.
COMPARED = (
    *((name, OURS) for name in _OTHERS if name not in _CAPTURED),
    *((PEER, name) for name in _VARIANTS),
    *((other, name) for name in _VARIANTS for other in _OTHERS if {name, other} <= set(_CAPTURED)),
)

RANK, ALPHA = 16, 16
# ‖y - y₆₄‖ / ‖y₆₄‖ above which a competitor is wrong and not timed. Reduced ones go through a whole encoder, too.
ERROR_LIMIT, REDUCED_ERROR_LIMIT = 1e-4, 5e-2


def error_limit(name: str, dtype: torch.dtype) -> float:
    """The relative error from which on a competitor is wrong."""
    exact = dtype == torch.float32 and not COMPETITORS[name].reduced
    return ERROR_LIMIT if exact else REDUCED_ERROR_LIMIT


def absent(name: str) -> str:
    """Why a competitor cannot take part here at all; empty if it can."""
    competitor = COMPETITORS[name]
    missing = [package for package in competitor.packages if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if competitor.captured and not torch.cuda.is_available():
        return "CUDA graphs need an NVIDIA GPU"
    if competitor.precision != "float32":
        reason = cpp.load_extension()
        if reason or competitor.precision not in cpp.precisions():
            return reason or f"the kernels {cpp.selected_kernels()} on this processor have no such products"
    return ""


def participants(device: torch.device) -> dict[str, dict[str, Any]]:
    """What each competitor is, the versions it runs on, which kernel computes where that can be told, and absence."""
    found: dict[str, dict[str, Any]] = {}
    for name, competitor in COMPETITORS.items():
        versions = {package: _version(package) for package in competitor.packages}
        facts: dict[str, Any] = {"title": competitor.title, "versions": versions}
        if reason := absent(name):
            facts["absent"] = reason
        found[name] = facts
    found[OURS]["kernel"] = _own_kernel(device)
    if "absent" not in found[PEER] and device.type == "cpu":
        found[PEER]["cpu_kernel"] = _bitsandbytes_kernel()
    return found


def called(name: str, model: Callable[..., Any]) -> Callable[..., Any]:
    """What a competitor calls: ``model``, where it has a precision of its own with that set once and for all."""
    precision = COMPETITORS[name].precision
    if precision == "float32":
        return model
    # What inference_precision does, without its exit.
    context = contextvars.copy_context()
    context.run(eager._precision.set, eager.PRECISIONS[precision])
    return partial(context.run, model)


def compiled(name: str, model: Callable[..., Any]) -> Callable[..., Any]:
    """``model``, through torch.compile for the competitor that is."""
    if not name.endswith("compiled"):
        return model
    import torch._dynamo
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # graphs that are kept are run backward more than once
    torch._dynamo.config.recompile_limit = 1000  # every number of rows is compiled for itself
    return torch.compile(model, dynamic=False)


def adapt(name: str, model: nn.Module, targets: Sequence[str], rank: int = RANK) -> nn.Module:
    """A copy of ``model`` whose layers at ``targets`` are those of a competitor, with trained-looking adapters.

    All parameters but the adapters are frozen. bitsandbytes' layers must not see eval mode before their training is
    over: evaluation repacks the weight, and training on it loses the gradient.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if name.startswith(OURS):
        harlora.apply_qlora(model, targets, rank=rank, alpha=ALPHA)
    elif name.startswith(PEER):
        _replace_(model, targets, _bitsandbytes_layer)
        _inject_(model, targets, rank)
    elif name.startswith(DENSE):
        _inject_(model, targets, rank)
    elif name == "dequantise + matmul":
        _replace_(model, targets, partial(_Plain, _Dequantised, rank))
    elif name == "torchao NF4":
        _replace_(model, targets, partial(_Plain, _Torchao, rank))
    else:
        assert name == "dense", name
    generator = torch.Generator().manual_seed(0)
    for lora_A, lora_B in adapters(model):
        for parameter, std in ((lora_A, lora_A.shape[1] ** -0.5), (lora_B, 0.1)):
            # The branch then weighs about as much as the base. Drawn on the CPU, so that devices agree.
            drawn = torch.empty(parameter.shape, device="cpu").normal_(std=std, generator=generator)
            # PEFT and harlora make them float32 over a half-precision weight; all competitors' have the dtype of x.
            parameter.data = drawn.to(parameter.device, dtype)
    return model


def exact(adapted: nn.Module, model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """``model`` with the dequantised weights and the adapters of ``adapted``: in float64, what that should compute.

    Returned in float32, which holds all weights exactly; the caller takes it to float64.
    Its layers are `_Plain`: F.linear and the branch in plain torch. To be made before ``adapted``, if bitsandbytes',
    runs in eval mode.
    """
    reference = copy.deepcopy(model).requires_grad_(False)
    layers = _adapted_layers(adapted)
    if layers:
        rank = adapters(adapted)[0][0].shape[0]
        _replace_(reference, targets, partial(_Plain, _Dense, rank))
    reference.float()
    with torch.no_grad():
        for layer, other in zip(_adapted_layers(reference), layers, strict=True):
            layer.base.weight.copy_(_dequantized(other))
        for pair, others in zip(adapters(reference), adapters(adapted), strict=True):
            for tensor, other in zip(pair, others, strict=True):
                tensor.copy_(other)
    return reference


def adapters(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """lora_A and lora_B of every adapted layer, in the model's order, which is the same for all competitors."""
    pairs = []
    for layer in _adapted_layers(model):
        pair = (layer.lora_A, layer.lora_B)
        if not isinstance(layer, AdaptedLinear | _Plain):
            pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        pairs.append(pair)
    return pairs


def relative_error(values: Iterable[Tensor], references: Iterable[Tensor]) -> float:
    """‖values - references‖ / ‖references‖ over all tensors together, in float64; NaN if any value is."""
    pairs = [(v.detach().double(), r.detach()) for v, r in zip(values, references, strict=True)]
    difference = torch.stack([(v - r).square().sum() for v, r in pairs]).sum()
    size = torch.stack([r.square().sum() for _, r in pairs]).sum()
    return float((difference / size).sqrt())


class _Dequantised(nn.Module):
    """A 4-bit weight, dequantised anew in every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = harlora.quantize_4bit(linear.weight)
        self.bias = linear.bias

    def dense(self) -> Tensor:
        return harlora.dequantize_4bit(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


class _Torchao(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        # Its nested scales come in whole blocks of 256 scales; a small weight has no whole number of them.
        nested = math.gcd(weight.numel() // 64, 256)
        self.weight = nn.Parameter(_torchao().to_nf4(weight, 64, nested), requires_grad=False)
        self.bias = linear.bias

    def dense(self) -> Tensor:
        weight: Any = self.weight
        return weight.get_original_weight()

    def forward(self, x: Tensor) -> Tensor:
        y = _torchao().linear_nf4(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Dense(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        device = linear.weight.device
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device=device)
        self.load_state_dict(linear.state_dict())

    def dense(self) -> Tensor:
        return self.weight


class _Plain(nn.Module):
    """A base layer with the LoRA branch beside it, in plain torch."""

    def __init__(self, base: Callable[[nn.Linear], nn.Module], rank: int, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight
        self.base = base(linear).requires_grad_(False)
        self.lora_A = nn.Parameter(weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(weight.new_empty(linear.out_features, rank))
        self.scaling = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


def _adapted_layers(model: nn.Module) -> list[Any]:
    # PEFT's layers are known by their base_layer: PEFT itself may be missing.
    return [
        module
        for module in model.modules()
        if isinstance(module, AdaptedLinear | _Plain) or hasattr(module, "base_layer")
    ]


def _dequantized(layer: Any) -> Tensor:
    if isinstance(layer, AdaptedLinear):
        return layer.base_weight()
    if isinstance(layer, _Plain):
        return layer.base.dense()  # type: ignore[operator]
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        values: Tensor = _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
        return values
    dense: Tensor = weight.data
    return dense


def _replace_(model: nn.Module, targets: Sequence[str], make: Callable[[nn.Linear], nn.Module]) -> None:
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and any(f".{path}".endswith(f".{target}") for target in targets):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, make(linear))


def _bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    nn4 = _bitsandbytes().nn
    # Plain scales as ours has them; nested ones, the default, would cost it another dequantisation in training.
    layer = nn4.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype,
        compress_statistics=False, quant_type="nf4", device="meta",
    )  # fmt: skip
    # Quantised from the weight itself: from a copy in the layer's own float32, backward would dequantise to float32.
    layer.weight = nn4.Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    layer.bias = linear.bias
    return layer.to(linear.weight.device).requires_grad_(False)  # quantises, on a GPU too


def _inject_(model: nn.Module, targets: Sequence[str], rank: int) -> None:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(targets))
    peft.inject_adapter_in_model(config, model)


def _bitsandbytes() -> Any:
    # It tries `from kernels import get_kernel`; the folder of that name in harlora's sources, which is on the path when
    # the interpreter was started there with -m or -c, must not answer.
    # What it then says of a missing package is in the result: cpu_kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kept = sys.path[:]
    sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "kernels" / "eager.py").is_file()]
    try:
        import bitsandbytes
    finally:
        sys.path[:] = kept
    return bitsandbytes


def _bitsandbytes_kernel() -> str:
    """Which 4-bit product serves in eval mode on CPUs: it prefers one from a hub, if it can be had."""
    bitsandbytes = _bitsandbytes()
    from bitsandbytes.backends.cpu import ops

    if not bitsandbytes.functional.has_avx512bf16():
        return "dequantise and multiply in float32"
    hub = getattr(ops, "gemm_4bit_forward_kernel", None) is not None
    return "bfloat16, kernels-community/quantization-bitsandbytes" if hub else "bfloat16, its own"


def _torchao() -> Any:
    try:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    except ImportError:  # before 0.17
        from torchao.dtypes import nf4tensor as nf4_tensor
    return nf4_tensor


def _own_kernel(device: torch.device) -> str:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    served = dispatch.select("qlora_linear", device, dtype)
    name = next(backend.name for backend in dispatch.backends("qlora_linear") if backend.function is served)
    if (name, device.type) == ("triton", "cuda") and not cpp.load_extension() and cpp.has_kernel("qlora_gemv", "cuda"):
        return "triton, and CUDA C++ where the table of configurations has it"
    return f"{name}, {cpp.selected_kernels()}" if (name, device.type) == ("cpp", "cpu") else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
