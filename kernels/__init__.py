"""Functions on tensors: 4-bit quantisation and the linear layer over a 4-bit weight with a low-rank adapter."""

from harlora.kernels.eager import inference_precision
from harlora.kernels.format import QuantizedWeight
from harlora.kernels.ops import dequantize_4bit, qlora_linear, quantize_4bit

__all__ = ["QuantizedWeight", "dequantize_4bit", "inference_precision", "qlora_linear", "quantize_4bit"]
