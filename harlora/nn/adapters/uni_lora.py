"""Uni-LoRA: the factors of all layers are read from one trained vector (arXiv 2506.00799)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Adapter, Layer, LowRank, Site, Statistics


class SharedVector(nn.Module):
    """The one vector, and which of its entries each number of each layer's factors is.

    A number is an entry over the square root of how often that entry is read, so that the map keeps lengths; every
    entry is read as often as any other, to within one. The map is made anew from its seed, so a file has the vector.
    """

    index: Tensor
    factor: Tensor

    def __init__(self, sites: Sequence[Site], rank: int, size: int, seed: int) -> None:
        super().__init__()
        counts = [rank * (site.in_features + site.out_features) for site in sites]
        total = sum(counts)
        size = size or max(1, total // 32)
        if not 1 <= size <= total:
            raise ValueError(f"Uni-LoRA: size must be from 1 to the {total} numbers of all factors, got {size}")
        self.rank = rank
        self.counts = counts
        self.values = nn.Parameter(torch.empty(size).uniform_(-0.02, 0.02))
        index = torch.arange(total)[torch.randperm(total, generator=torch.Generator().manual_seed(seed))] % size
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("factor", torch.bincount(index, minlength=size).rsqrt(), persistent=False)

    def part(self, site: Site) -> Tensor:
        """The numbers of one layer, A's before B's."""
        first = sum(self.counts[: site.index])
        return (self.values * self.factor)[self.index[first : first + self.counts[site.index]]]


class UniLoRA(Adapter):
    """ΔW = s·B·A, s = alpha / rank, both factors from the vector. As in the paper a new adapter is a small change.

    size: entries of the vector, for the whole model; by default a 32nd of all the numbers. seed: of its map.
    """

    name = "uni_lora"
    title = "Uni-LoRA"
    identity_at_start = False

    def __init__(
        self, site: Site, bank: nn.Module, *, rank: int = 8, alpha: float = 16.0, size: int = 0, seed: int = 0
    ) -> None:
        super().__init__(site)
        assert isinstance(bank, SharedVector)
        if rank != bank.rank:
            raise ValueError(f"Uni-LoRA: rank must be that of all layers, {bank.rank}, got {rank} at {site.path}")
        self.rank = rank
        self.scale = alpha / rank
        self.shared = [bank]  # in a list, so that the vector is a part of the first layer's adapter alone
        if site.index == 0:
            self.vector = bank

    @classmethod
    def bank(cls, sites: Sequence[Site], *, rank: int = 8, size: int = 0, seed: int = 0, **_: object) -> nn.Module:
        """The vector of the model."""
        return SharedVector(sites, rank, size, seed)

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """Nothing; the vector has been drawn."""

    def delta(self, layer: Layer) -> LowRank:
        """s·B·A."""
        vector = self.shared[0]
        assert isinstance(vector, SharedVector)
        A, B = vector.part(self.site).split([self.rank * self.site.in_features, self.rank * self.site.out_features])
        return LowRank(A.view(self.rank, -1), B.view(-1, self.rank), self.scale)
