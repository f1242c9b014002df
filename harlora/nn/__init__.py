"""Linear layers with adapters, and what puts them into a model and onto disk."""

from harlora.nn.adapter_files import load_adapter, save_adapter
from harlora.nn.apply import (
    adapted_layers,
    adapter_options,
    apply_adapter,
    apply_lora,
    apply_qlora,
    at_rank,
    gather_statistics,
    merge_adapters,
)
from harlora.nn.linear import AdaptedLinear, LoRALinear, QLoRALinear
from harlora.nn.pool import AdapterPool, Router

__all__ = [
    "AdaptedLinear",
    "AdapterPool",
    "LoRALinear",
    "QLoRALinear",
    "Router",
    "adapted_layers",
    "adapter_options",
    "apply_adapter",
    "apply_lora",
    "apply_qlora",
    "at_rank",
    "gather_statistics",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
]
