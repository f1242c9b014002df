"""LoRA-GA: LoRA whose first step follows the gradient of the weight (Wang et al. 2024, arXiv 2407.05000)."""

from typing import Any

import torch
from torch import Tensor

from harlora.nn.adapters.adapter import Site, Statistics
from harlora.nn.adapters.lora import Replaced


class LoRAGA(Replaced):
    """B from the first ``rank`` left singular vectors of the mean gradient, A from the next ``rank`` right ones, so
    that a first step of both is the best change of rank 2·rank along the gradient.

    Scaled as the paper's stable start: ‖out‖^¼ / √γ. stable_gamma: that γ.
    """

    name = "lora_ga"
    title = "LoRA-GA"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0, stable_gamma: float = 16.0) -> None:
        super().__init__(site, rank=rank, alpha=alpha)
        if 2 * rank > min(site.in_features, site.out_features):
            raise ValueError(
                f"LoRA-GA: rank must be at most {min(site.in_features, site.out_features) // 2} at {site.path}, "
                f"got {rank}"
            )
        self.stable_gamma = stable_gamma

    @classmethod
    def needs_statistics(cls, **options: Any) -> bool:
        """Always."""
        return True

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """From the singular value decomposition of the gradient."""
        assert statistics is not None
        U, _, Vt = torch.linalg.svd(statistics.gradient, full_matrices=False)
        size = self.site.out_features**0.25 / self.stable_gamma**0.5
        self.begin(size * Vt[self.rank : 2 * self.rank], size * U[:, : self.rank])
