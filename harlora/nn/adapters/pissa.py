"""PiSSA: LoRA that starts at the principal part of the weight (Meng et al. 2024, arXiv 2404.02948)."""

import torch
from torch import Tensor

from harlora.nn.adapters.adapter import Site, Statistics
from harlora.nn.adapters.lora import Replaced


class PiSSA(Replaced):
    """B = U·√S / √s and A = √S·Vᵀ / √s of the ``rank`` largest singular values; the rest of the weight is frozen.

    Over 4 bits the rest is quantised, which loses less where the weight's spectrum has spikes.
    """

    name = "pissa"
    title = "PiSSA"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__(site, rank=rank, alpha=alpha)
        if rank > min(site.in_features, site.out_features):
            raise ValueError(
                f"PiSSA: rank must be at most {min(site.in_features, site.out_features)} at {site.path}, got {rank}"
            )

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """From the singular value decomposition of ``weight``."""
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
        root = (S[: self.rank] / self.scale).sqrt()
        self.begin(root[:, None] * Vt[: self.rank], U[:, : self.rank] * root)
