"""Linear layers with adapters, and what puts them into a model and onto disk."""

from harlora.nn.adapter_files import load_adapter, save_adapter
from harlora.nn.apply import adapted_layers, apply_lora, apply_qlora, merge_adapters
from harlora.nn.linear import AdaptedLinear, LoRALinear, QLoRALinear

__all__ = [
    "AdaptedLinear",
    "LoRALinear",
    "QLoRALinear",
    "adapted_layers",
    "apply_lora",
    "apply_qlora",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
]
