"""4-bit QLoRA layers for PyTorch, and human activity recognition from motion sensors adapted with them."""

from harlora import models
from harlora.kernels import QuantizedWeight, dequantize_4bit, inference_precision, qlora_linear, quantize_4bit
from harlora.nn import (
    LoRALinear,
    QLoRALinear,
    apply_lora,
    apply_qlora,
    load_adapter,
    merge_adapters,
    save_adapter,
)

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "QLoRALinear",
    "QuantizedWeight",
    "apply_lora",
    "apply_qlora",
    "dequantize_4bit",
    "inference_precision",
    "load_adapter",
    "merge_adapters",
    "models",
    "qlora_linear",
    "quantize_4bit",
    "save_adapter",
]
