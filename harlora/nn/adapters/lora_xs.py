"""LoRA-XS and LoRA-SB: a small square matrix between two frozen bases."""

from typing import Any

import torch
from torch import Tensor, nn

from harlora.nn.adapters.adapter import Adapter, Layer, LowRank, Site, Statistics


class LoRAXS(Adapter):
    """ΔW = s·B·R·A with B = U·S and A = Vᵀ of the weight, frozen, and R, ``(rank, rank)``, trained from zero.

    (Bałazy et al. 2024, arXiv 2405.17604, which begins at tiny random numbers instead.)
    """

    name = "lora_xs"
    title = "LoRA-XS"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__(site)
        if not 1 <= rank <= min(site.in_features, site.out_features):
            raise ValueError(
                f"{type(self).__name__}: rank must be from 1 to {min(site.in_features, site.out_features)} at "
                f"{site.path}, got {rank}"
            )
        self.rank = rank
        self.scale = alpha / rank
        self.R = nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("A", torch.zeros(rank, site.in_features))
        self.register_buffer("B", torch.zeros(site.out_features, rank))

    A: Tensor
    B: Tensor

    @torch.no_grad()
    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """Bases from the singular value decomposition of ``weight``, R zero."""
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
        self.A.copy_(Vt[: self.rank])
        self.B.copy_(U[:, : self.rank] * S[: self.rank])
        nn.init.zeros_(self.R)

    def delta(self, layer: Layer) -> LowRank:
        """s·B·(R·A)."""
        return LowRank(self.R @ self.A, self.B, self.scale)


class LoRASB(LoRAXS):
    """As LoRA-XS, with the bases and R of the first step that Adam would take on the weight (arXiv 2411.19557).

    B = U, R = S, A = Vᵀ of -rate·sign(mean gradient), so that training starts a step ahead of the layer, and a new
    adapter changes what it computes. rate: of that step.
    """

    name = "lora_sb"
    title = "LoRA-SB"
    identity_at_start = False

    def __init__(self, site: Site, *, rank: int = 8, rate: float = 1e-3) -> None:
        super().__init__(site, rank=rank, alpha=rank)
        self.rate = rate

    @classmethod
    def needs_statistics(cls, **options: Any) -> bool:
        """Always."""
        return True

    @torch.no_grad()
    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """From the singular value decomposition of that step."""
        assert statistics is not None
        U, S, Vt = torch.linalg.svd(-self.rate * statistics.gradient.sign(), full_matrices=False)
        self.A.copy_(Vt[: self.rank])
        self.B.copy_(U[:, : self.rank])
        self.R.copy_(S[: self.rank].diag())
