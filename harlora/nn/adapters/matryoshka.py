"""MatryoshkaLoRA and DyLoRA: one adapter that can be cut to lower ranks after training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Layer, LowRank, Site
from harlora.nn.adapters.lora import LoRA


class Nested(LoRA):
    """A LoRA whose first q rows and columns, times its own factor for rank q, are an adapter of rank q.

    ranks: those it is trained for, the highest being ``rank``; by default the powers of 2 up to it.
    served: the rank that is used outside of training, by default ``rank``; it may be set at any time.
    """

    factors: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        rslora: bool = False,
        ranks: tuple[int, ...] = (),
        served: int = 0,
    ) -> None:
        super().__init__(site, rank=rank, alpha=alpha, rslora=rslora)
        self.ranks = tuple(ranks) or (*(2**k for k in range(rank.bit_length()) if 2**k < rank), rank)
        if sorted(set(self.ranks)) != list(self.ranks) or self.ranks[0] < 1 or self.ranks[-1] != rank:
            raise ValueError(f"{type(self).__name__}: ranks must rise from 1 or more to rank={rank}, got {self.ranks}")
        self.alpha, self.rslora = alpha, rslora
        self.served = served or rank
        factors = [[self.factor(q) * (row < q) for row in range(rank)] for q in self.ranks]
        self.register_buffer("factors", torch.tensor(factors), persistent=False)  # of each row, by trained rank

    @property
    def served(self) -> int:
        """The rank that is used outside of training."""
        return int(self.options.get("served") or self.rank)

    @served.setter
    def served(self, rank: int) -> None:
        if not 1 <= rank <= self.rank:
            raise ValueError(f"{type(self).__name__}: served must be from 1 to rank={self.rank}, got {rank}")
        self.options["served"] = 0 if rank == self.rank else rank  # as an option, so that files have it

    def factor(self, rank: int) -> float:
        """The scaling at ``rank``."""
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def cut(self, rank: int) -> LowRank:
        """The adapter of ``rank``."""
        return LowRank(self.A[:rank], self.B[:, :rank], self.factor(rank))

    def delta(self, layer: Layer) -> LowRank:
        """In training that of `trained`, otherwise that of ``served``."""
        return self.trained() if self.training else self.cut(self.served)

    def served_delta(self, layer: Layer) -> LowRank:
        """That of ``served``."""
        return self.cut(self.served)

    def trained(self) -> LowRank:
        """The change in a training step."""
        raise NotImplementedError


class MatryoshkaLoRA(Nested):
    """ΔW = B·diag(P)·A in training, P_i the sum of the factors of all ranks that have row i: every rank learns in every
    step (IST-DASLab/MatryoshkaLoRA, algorithm 1).

    ranks: those that can be served, the highest being ``rank``; by default the powers of 2 up to it. served: the one
    that is used outside of training, by default ``rank``.
    """

    name = "matryoshka"
    title = "MatryoshkaLoRA"

    def trained(self) -> LowRank:
        """All ranks at once."""
        return LowRank(self.factors.sum(dim=0)[:, None] * self.A, self.B)


class Draw(nn.Module):
    """The random number that decides the rank of all layers, until the layer that ran first runs again."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.zeros(1), persistent=False)
        self.first: int | None = None

    def of(self, index: int) -> Tensor:
        """The number, ``(1,)``, from 0 to below 1, for the layer of that index; it is drawn anew for the first one."""
        if self.first is None:
            self.first = index
        if self.first == index:
            self.number.uniform_()
        return self.number


class DyLoRA(Nested):
    """In each pass of training one of the ranks, drawn at random, the same in all layers (Valipour et al. 2023, arXiv
    2210.07558).

    ranks: those that can be served, the highest being ``rank``; by default the powers of 2 up to it. served: the one
    that is used outside of training, by default ``rank``.
    """

    name = "dylora"
    title = "DyLoRA"

    def __init__(
        self,
        site: Site,
        bank: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        rslora: bool = False,
        ranks: tuple[int, ...] = (),
        served: int = 0,
    ) -> None:
        super().__init__(site, rank=rank, alpha=alpha, rslora=rslora, ranks=ranks, served=served)
        self.shared = [bank]  # in a list, so that it is a part of the first layer's adapter alone
        if site.index == 0:
            self.draw = bank

    @classmethod
    def bank(cls, sites: Sequence[Site], **_: object) -> nn.Module:
        """What the ranks are drawn by."""
        return Draw()

    def trained(self) -> LowRank:
        """One rank, drawn from torch's random numbers; its other rows times zero, so that shapes never change."""
        draw = self.shared[0]
        assert isinstance(draw, Draw)
        number = draw.of(self.site.index).to(self.A.device)
        which = (number * len(self.ranks)).long()
        return LowRank(self.factors[which].view(-1, 1) * self.A, self.B)


def aurac(scores: Sequence[float], ranks: Sequence[int]) -> float:
    """Area under the scores by rank, over the range of ranks (trapezoids); the mean where there is one rank."""
    x, y = (torch.tensor(list(values), dtype=torch.float64) for values in (ranks, scores))
    return float(torch.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y.mean())
