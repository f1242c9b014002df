"""Functions on tensors: 4-bit quantisation and linear layers over a 4-bit weight with low-rank adapters."""

from harlora.kernels.dora import dora_linear, dora_norm
from harlora.kernels.eager import inference_precision
from harlora.kernels.format import QuantizedWeight
from harlora.kernels.lora_pool import lora_pool_linear
from harlora.kernels.ops import dequantize_4bit, qlora_linear, quantize_4bit

__all__ = [
    "QuantizedWeight",
    "dequantize_4bit",
    "dora_linear",
    "dora_norm",
    "inference_precision",
    "lora_pool_linear",
    "qlora_linear",
    "quantize_4bit",
]
