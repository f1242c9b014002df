"""LoRA: a low-rank change, B·A (Hu et al. 2021, arXiv 2106.09685)."""

import math

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Adapter, Layer, LowRank, Site, Statistics


class LoRA(Adapter):
    """ΔW = s·B·A, s = alpha / rank, or alpha / √rank with ``rslora`` (Kalajdzievski 2023, arXiv 2312.03732).

    A: ``(rank, in_features)``, drawn at random; B: ``(out_features, rank)``, zero at first.
    rslora: as above. frozen_A: train B alone, which keeps x·Aᵀ in place of x for backward (as HypeLoRA's calibration
    study freezes it, and LoRA-FA, arXiv 2308.03303).
    """

    name = "lora"
    title = "LoRA"

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 16.0, rslora: bool = False, frozen_A: bool = False
    ) -> None:
        super().__init__(site)
        if rank < 1:
            raise ValueError(f"{type(self).__name__}: rank must be at least 1, got {rank}")
        self.rank = rank
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.A = nn.Parameter(torch.empty(rank, site.in_features), requires_grad=not frozen_A)
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """A at random as in ``nn.Linear``, B zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def delta(self, layer: Layer) -> LowRank:
        """s·B·A."""
        return LowRank(self.A, self.B, self.scale)


class Replaced(LoRA):
    """A LoRA that starts at a part of the weight, which it takes out of the frozen one, so that nothing changes.

    A0, B0: where it started; with them the frozen weight W - s·B0·A0 can be made anew from the layer's own.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0, rslora: bool = False) -> None:
        super().__init__(site, rank=rank, alpha=alpha, rslora=rslora)
        self.register_buffer("A0", torch.zeros(rank, site.in_features))
        self.register_buffer("B0", torch.zeros(site.out_features, rank))

    @torch.no_grad()
    def begin(self, A: Tensor, B: Tensor) -> None:
        """Start at ``A`` and ``B``."""
        for factor, start, value in ((self.A, self.A0, A), (self.B, self.B0, B)):
            factor.copy_(value)
            start.copy_(value)

    @torch.no_grad()
    def change(self, layer: Layer) -> LowRank | None:
        """s·(B·A - B0·A0), of twice the rank; None over 4 bits, where that much was not what the weight lost."""
        if hasattr(layer, "quantized_weight"):
            return None
        return LowRank(torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1), self.scale)

    def same_base(self, other: Adapter) -> bool:
        """Whether both started at the same factors."""
        return (
            isinstance(other, Replaced)
            and torch.equal(self.A0, other.A0.to(self.A0.device))
            and torch.equal(self.B0, other.B0.to(self.B0.device))
        )

    def base(self, weight: Tensor) -> Tensor:
        """W - s·B0·A0."""
        return weight - self.scale * (self.B0 @ self.A0).to(weight)
