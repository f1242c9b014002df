"""Hydra: one branch beside the layer and one behind it (Kim et al. 2023, arXiv 2309.06922)."""

import math

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Adapter, Layer, LowRank, Site, Statistics


class Hydra(Adapter):
    """ΔW = s·(B_p·A_p + B_s·A_s·W): half the rank in parallel, half in sequence, as one branch with A = [A_p; A_s·W].

    The paper's sequential branch sees the bias too; here it does not, so that the change is one of the weight.
    """

    name = "hydra"
    title = "Hydra"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__(site)
        if rank < 2 or rank % 2:
            raise ValueError(f"Hydra: rank must be even and at least 2, got {rank}")
        self.rank = rank
        self.scale = alpha / rank
        self.A_parallel = nn.Parameter(torch.empty(rank // 2, site.in_features))
        self.A_sequential = nn.Parameter(torch.empty(rank // 2, site.out_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """Both A at random, B zero."""
        for factor in (self.A_parallel, self.A_sequential):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def delta(self, layer: Layer) -> LowRank:
        """One branch for both."""
        weight = layer.base_weight().to(self.A_sequential.dtype)
        return LowRank(torch.cat([self.A_parallel, self.A_sequential @ weight]), self.B, self.scale)
