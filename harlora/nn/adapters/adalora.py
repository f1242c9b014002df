"""AdaLoRA: ranks move during training to the layers where they matter (Zhang et al. 2023, arXiv 2303.10512)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Adapter, Layer, LowRank, Site, Statistics

_SMOOTHING = 0.85  # β₁ and β₂ of the paper


class AdaLoRA(Adapter):
    """ΔW = s·P·diag(λ)·Q with P and Q near orthogonal by a penalty, λ zero at first, s = alpha / rank.

    Training begins with ``first_rank`` at every layer, by default half as much again as ``rank``. Between the shares
    ``begin`` and ``end`` of the steps the triplets of least importance in the whole model are switched off, until
    ``rank`` a layer is left on average; the number falls with the third power, as in the paper. Importance: |λ·∂λ| and
    the means of |p·∂p| over the triplet's column of P and row of Q, each smoothed and times its smoothed uncertainty.

    orthogonality: what the penalty ‖PᵀP - 1‖ + ‖QQᵀ - 1‖ counts for in the loss, in the mean over layers.
    """

    name = "adalora"
    title = "AdaLoRA"

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        first_rank: int = 0,
        orthogonality: float = 0.1,
        begin: float = 0.1,
        end: float = 0.7,
    ) -> None:
        super().__init__(site)
        first_rank = first_rank or rank + rank // 2
        if not 1 <= rank <= first_rank:
            raise ValueError(f"AdaLoRA: rank must be from 1 to first_rank={first_rank}, got {rank}")
        if not 0 <= begin < end <= 1:
            raise ValueError(f"AdaLoRA: required 0 <= begin < end <= 1, got {begin} and {end}")
        self.rank, self.first_rank = rank, first_rank
        self.scale = alpha / rank
        self.orthogonality = orthogonality
        self.begin, self.end = begin, end
        self.P = nn.Parameter(torch.empty(site.out_features, first_rank))
        self.singular = nn.Parameter(torch.zeros(first_rank))
        self.Q = nn.Parameter(torch.empty(first_rank, site.in_features))

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """P and Q at random, λ zero."""
        nn.init.normal_(self.P, std=0.02)
        nn.init.normal_(self.Q, std=0.02)
        nn.init.zeros_(self.singular)

    def delta(self, layer: Layer) -> LowRank:
        """s·P·diag(λ)·Q."""
        return LowRank(self.singular[:, None] * self.Q, self.P, self.scale)

    def penalty(self) -> Tensor:
        """How far P and Q are from orthogonal."""
        one = torch.eye(self.first_rank, device=self.P.device, dtype=self.P.dtype)
        distance = (self.P.T @ self.P - one).norm() + (self.Q @ self.Q.T - one).norm()
        return self.orthogonality / self.site.count * distance

    def file_state(self) -> dict[str, Tensor]:
        """Without the triplets that are switched off, unless all are, as of a new adapter."""
        kept = self.singular != 0
        if not kept.any():
            kept = torch.ones_like(kept)
        return {"P": self.P[:, kept], "singular": self.singular[kept], "Q": self.Q[kept], "kept": kept}

    @torch.no_grad()
    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """As `file_state` gave it; of triplets that are not there all is zero."""
        kept = state["kept"]
        self.P.zero_()[:, kept] = state["P"]
        self.singular.zero_()[kept] = state["singular"]
        self.Q.zero_()[kept] = state["Q"]

    @classmethod
    def schedule(cls, layers: Sequence[Layer]) -> "Budget":
        """Of all layers together."""
        return Budget([layer.adapter for layer in layers if isinstance(layer.adapter, AdaLoRA)])


class Budget:
    """Which triplets of all layers are kept, as training goes on."""

    def __init__(self, adapters: Sequence[AdaLoRA]) -> None:
        self.adapters = list(adapters)
        device = self.adapters[0].P.device
        count = sum(p.numel() for adapter in self.adapters for p in (adapter.singular, adapter.P, adapter.Q))
        self.kept = torch.ones(sum(adapter.first_rank for adapter in self.adapters), dtype=torch.bool, device=device)
        self.sensitivity = torch.zeros(count, device=device)
        self.uncertainty = torch.zeros(count, device=device)
        self.final = False

    def state(self) -> dict[str, Tensor]:
        """Which are kept, whether for good, and what their importance is smoothed from."""
        smoothed = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        return {"kept": self.kept, **smoothed, "final": torch.tensor(self.final)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for value, name in ((self.kept, "kept"), (self.sensitivity, "sensitivity"), (self.uncertainty, "uncertainty")):
            value.copy_(state[name])
        # States of before did not say. The count alone does not: rounded, it is the last one before ``end``.
        self.final = bool(state["final"]) if "final" in state else int(self.kept.sum()) == self.number(1.0)

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """After each step, with the share of all steps that is done."""
        first = self.adapters[0]
        if not self.final:
            scores = self.importance()
            if done >= first.begin:
                passed = min(1.0, (done - first.begin) / (first.end - first.begin))
                self.kept.zero_()
                self.kept[scores.topk(self.number(passed)).indices] = True
            self.final = done >= first.end
        for adapter, kept in zip(self.adapters, self.kept.split([a.first_rank for a in self.adapters]), strict=True):
            # Zero, not masked, so that a triplet which matters again can come back; at the end none does.
            adapter.singular.mul_(kept)

    def importance(self) -> Tensor:
        """Of each triplet of all layers, the last step's gradients taken into account."""
        now = []
        for adapter in self.adapters:
            assert adapter.singular.grad is not None
            assert adapter.P.grad is not None
            assert adapter.Q.grad is not None
            now += [
                adapter.singular * adapter.singular.grad,
                (adapter.P * adapter.P.grad).T,
                adapter.Q * adapter.Q.grad,
            ]
        flat = torch.cat([part.abs().flatten() for part in now])
        self.sensitivity.lerp_(flat, 1 - _SMOOTHING)
        self.uncertainty.lerp_((flat - self.sensitivity).abs(), 1 - _SMOOTHING)
        parts = (self.sensitivity * self.uncertainty).split([part.numel() for part in now])
        # One number a triplet of each part: its own for λ, the mean over its column of P and row of Q.
        each = [part.view(len(like), -1).mean(dim=1) for part, like in zip(parts, now, strict=True)]
        return torch.cat([sum(each[i : i + 3]) for i in range(0, len(each), 3)])

    def number(self, passed: float) -> int:
        """Triplets of all layers after that share of the time in which they become fewer."""
        most = sum(adapter.first_rank for adapter in self.adapters)
        least = sum(adapter.rank for adapter in self.adapters)
        return round(least + (most - least) * (1 - passed) ** 3)
