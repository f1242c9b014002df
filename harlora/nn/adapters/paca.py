"""PaCA: some columns of the weight train, and backward keeps those inputs alone (arXiv 2503.01905)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Adapter, Layer, LowRank, Site, Statistics


class PaCA(Adapter):
    """ΔW = s·V at ``rank`` input columns, V trained from zero, s = alpha / rank. It is a LoRA whose A is one-hot and
    frozen, so that x·Aᵀ is those columns of x, all that backward keeps, and the base may have 4 bits.

    choose: which columns: ``"random"``, or ``"gradient"``, those with the largest squared gradients (GRFT).
    """

    name = "paca"
    title = "PaCA"
    index: Tensor

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0, choose: str = "random") -> None:
        super().__init__(site)
        if not 1 <= rank <= site.in_features:
            raise ValueError(f"PaCA: rank must be from 1 to {site.in_features} at {site.path}, got {rank}")
        if choose not in ("random", "gradient"):
            raise ValueError(f"PaCA: choose must be random or gradient, got {choose!r}")
        self.rank, self.choose = rank, choose
        self.scale = alpha / rank
        self.values = nn.Parameter(torch.zeros(site.out_features, rank))
        self.register_buffer("index", torch.zeros(rank, dtype=torch.int64))

    @classmethod
    def needs_statistics(cls, **options: Any) -> bool:
        """If columns are chosen by gradient."""
        return options.get("choose") == "gradient"

    @torch.no_grad()
    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """Choose the columns."""
        if self.choose == "gradient":
            assert statistics is not None
            chosen = statistics.squared.sum(dim=0).topk(self.rank).indices
        else:
            chosen = torch.randperm(self.site.in_features)[: self.rank].to(self.index.device)
        self.index.copy_(chosen.sort().values)
        nn.init.zeros_(self.values)

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """As `file_state` gave it. Raises: ValueError if a column is not one of the layer's."""
        index = state["index"]
        if not 0 <= int(index.min()) <= int(index.max()) < self.site.in_features:
            raise ValueError(f"PaCA: index must be from 0 to {self.site.in_features - 1}, got {index.tolist()}")
        super().load_file_state(state)

    def delta(self, layer: Layer) -> LowRank:
        """s·V at the chosen columns."""
        one_hot = torch.zeros(self.rank, self.site.in_features, device=self.values.device, dtype=self.values.dtype)
        one_hot[torch.arange(self.rank), self.index] = 1
        return LowRank(one_hot, self.values, self.scale)
