"""Adapters of other methods than plain LoRA, over dense weights and over weights in 4 bits.

A new method is one file with a subclass of `Adapter`, and a line here.
"""

from harlora.nn.adapters.adalora import AdaLoRA
from harlora.nn.adapters.adapter import Adapter, Gain, Layer, LowRank, Schedule, Site, Statistics
from harlora.nn.adapters.dora import DoRA
from harlora.nn.adapters.hydra import Hydra
from harlora.nn.adapters.ia3 import IA3
from harlora.nn.adapters.lora import LoRA
from harlora.nn.adapters.lora_ga import LoRAGA
from harlora.nn.adapters.lora_xs import LoRASB, LoRAXS
from harlora.nn.adapters.matryoshka import DyLoRA, MatryoshkaLoRA
from harlora.nn.adapters.one_bit import OneBitLoRA
from harlora.nn.adapters.paca import PaCA
from harlora.nn.adapters.pissa import PiSSA
from harlora.nn.adapters.squeeze import LoRASqueeze
from harlora.nn.adapters.tsqlora import TsqLoRA
from harlora.nn.adapters.uni_lora import UniLoRA

_KINDS: tuple[type[Adapter], ...] = (
    LoRA, DoRA, PiSSA, LoRAGA, LoRAXS, LoRASB, MatryoshkaLoRA, DyLoRA, AdaLoRA, IA3, PaCA, OneBitLoRA, Hydra,
    UniLoRA, TsqLoRA, LoRASqueeze,
)  # fmt: skip
ADAPTERS = {kind.name: kind for kind in _KINDS}

__all__ = ["ADAPTERS", "Adapter", "Gain", "Layer", "LoRA", "LowRank", "Schedule", "Site", "Statistics"]
