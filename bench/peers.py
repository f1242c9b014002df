"""The competitors: the same model with the same weights and adapters, adapted by four libraries' means.

H  harlora.QLoRALinear: NF4, blocksize 64, float32
H16, H8  the same layers within harlora.inference_precision("bfloat16"), P's precision, or ("int8"), where the processor
   has it
P  bitsandbytes' Linear4bit with PEFT's LoRA: the same codes and scales, compute_dtype float32. In eval mode on a CPU
   with avx512_bf16 it computes in bfloat16 all the same, and says so nowhere; hence every result carries its error.
D  float32 nn.Linear with PEFT's LoRA
F  float32 nn.Linear without an adapter, torch's modules one by one: the floor for a whole model; it computes something
   else than the others
"""

import contextvars
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

# bitsandbytes tries `from kernels import get_kernel`; the folder of that name at the repository's root, which is on
# the path when the interpreter was started there with -m or -c, must not answer. Hence imports below code.
# ruff: noqa: E402
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]

import bitsandbytes
import peft
from bitsandbytes.backends.cpu import ops as bitsandbytes_cpu
from peft.tuners.lora import LoraLayer

import harlora
from harlora.nn.linear import AdaptedLinear

RANK, ALPHA = 16, 16
TITLES = {
    "H": "harlora.QLoRALinear, NF4, blocksize 64, float32",
    "H16": "the same, inference_precision('bfloat16')",
    "H8": "the same, inference_precision('int8')",
    "P": "bitsandbytes.nn.Linear4bit (NF4, blocksize 64, plain scales, compute_dtype=float32) with PEFT LoRA",
    "D": "float32 nn.Linear with PEFT LoRA",
    "F": "float32 nn.Linear, no adapter",
}
PRECISIONS = {"H": "float32", "H16": "bfloat16", "H8": "int8"}
# ‖y - y₆₄‖ / ‖y₆₄‖ above which a competitor is wrong and not timed. Reduced ones go through a whole encoder, too.
ERROR_LIMIT = {"H": 1e-4, "H16": 5e-2, "H8": 5e-2, "P": 5e-2, "D": 1e-4, "F": 1e-4}


def called(name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a competitor calls: ``model``, for H16 and H8 with the precision set once and for all its calls."""
    if PRECISIONS.get(name, "float32") == "float32":
        return model
    context = contextvars.copy_context()
    context.run(harlora.inference_precision(PRECISIONS[name]).__enter__)
    return partial(context.run, model)


def bitsandbytes_kernel() -> str:
    """Which 4-bit product of bitsandbytes serves in eval mode: it prefers one from a hub, if it can be had."""
    if not bitsandbytes.functional.has_avx512bf16():
        return "dequantise and multiply in float32"
    hub = getattr(bitsandbytes_cpu, "gemm_4bit_forward_kernel", None) is not None
    return "bfloat16, kernels-community/quantization-bitsandbytes" if hub else "bfloat16, its own"


def adapt(name: str, model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """A copy of ``model`` whose layers at ``targets`` are those of a competitor, with trained-looking adapters.

    All parameters but the adapters are frozen. P must not see eval mode before its training is over: evaluation
    repacks the weight, and training on it loses the gradient.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    if name in PRECISIONS:
        harlora.apply_qlora(model, targets, rank=RANK, alpha=ALPHA)
    elif name == "P":
        _quantize_(model, targets)
        _inject_(model, targets)
    elif name == "D":
        _inject_(model, targets)
    else:
        assert name == "F", name
    generator = torch.Generator().manual_seed(0)
    for lora_A, lora_B in adapters(model):
        nn.init.normal_(lora_A, std=lora_A.shape[1] ** -0.5, generator=generator)
        nn.init.normal_(lora_B, std=0.1, generator=generator)  # the branch then weighs about as much as the base
    return model


def exact(adapted: nn.Module, model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """``model`` in float64 with the dequantised weights and the adapters of ``adapted``: what that should compute.

    Its own arithmetic is PEFT's over nn.Linear. To be made before ``adapted``, if a P, runs in eval mode.
    """
    reference = copy.deepcopy(model).requires_grad_(False)
    layers = _adapted_layers(adapted)
    if layers:
        _inject_(reference, targets)
    reference.double()
    for layer, other in zip(_adapted_layers(reference), layers, strict=True):
        layer.base_layer.weight.data.copy_(_dequantized(other))
    with torch.no_grad():
        for pair, others in zip(adapters(reference), adapters(adapted), strict=True):
            for tensor, other in zip(pair, others, strict=True):
                tensor.copy_(other)
    return reference


def adapters(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """lora_A and lora_B of every adapted layer, in the model's order, which is the same for all competitors."""
    return [
        (layer.lora_A, layer.lora_B)
        if isinstance(layer, AdaptedLinear)
        else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for layer in _adapted_layers(model)
    ]


def relative_error(values: Iterable[Tensor], references: Iterable[Tensor]) -> float:
    """‖values - references‖ / ‖references‖ over all tensors together, in float64; NaN if any value is."""
    pairs = [(v.detach().double(), r.detach()) for v, r in zip(values, references, strict=True)]
    difference = sum((v - r).square().sum() for v, r in pairs)
    size = sum(r.square().sum() for _, r in pairs)
    return float((difference / size).sqrt())


def _adapted_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear | LoraLayer)]


def _dequantized(layer: nn.Module) -> Tensor:
    if isinstance(layer, AdaptedLinear):
        return layer.base_weight()
    weight = layer.base_layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.data


def _quantize_(model: nn.Module, targets: Sequence[str]) -> None:
    for path, linear in list(model.named_modules()):
        if not (isinstance(linear, nn.Linear) and any(f".{path}".endswith(f".{target}") for target in targets)):
            continue
        # Plain scales as H has them; nested ones, the default, would cost P another dequantisation in training.
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.float32,
            compress_statistics=False, quant_type="nf4",
        )  # fmt: skip
        layer.load_state_dict(linear.state_dict())
        layer.to("cpu")  # quantises
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.requires_grad_(False))


def _inject_(model: nn.Module, targets: Sequence[str]) -> None:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(targets))
    peft.inject_adapter_in_model(config, model)
