"""DoRA: the direction of the weight changes by LoRA, its magnitude by a factor of each row (arXiv 2402.09353)."""

import torch
from torch import Tensor, nn

from harlora.kernels import dora_linear, dora_norm
from harlora.nn.adapters.adapter import Gain, Layer, LowRank, Site, Statistics
from harlora.nn.adapters.lora import LoRA


class DoRA(LoRA):
    """W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ of each row, m trained from ‖W‖.

    The norm is a constant for the gradient (section 4.3), and comes from the terms ‖W‖², W·Aᵀ and A·Aᵀ, without
    W + s·B·A being formed.
    """

    name = "dora"
    title = "DoRA"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16.0, rslora: bool = False) -> None:
        super().__init__(site, rank=rank, alpha=alpha, rslora=rslora)
        self.magnitude = nn.Parameter(torch.ones(site.out_features))

    @torch.no_grad()
    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """As LoRA, the magnitude that of the weight."""
        super().start(weight, statistics)
        self.magnitude.copy_(weight.norm(dim=1))

    def gain(self, layer: Layer, delta: LowRank | None) -> Gain:
        """The magnitude over the norm."""
        return Gain(outputs=self.magnitude / self.norm(layer))

    @torch.no_grad()
    def norm(self, layer: Layer) -> Tensor:
        """‖W + s·B·A‖ of each row, ``(out_features,)``."""
        quantized = getattr(layer, "quantized_weight", None)
        if quantized is not None:
            return dora_norm(quantized(), self.A, self.B, self.scale)
        weight = layer.base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, A, B = (tensor.to(wide) for tensor in (weight, self.A, self.B))
        cross = (B * (weight @ A.T)).sum(dim=1)
        gram = (B @ (A @ A.T) * B).sum(dim=1)
        return (weight.square().sum(dim=1) + 2 * self.scale * cross + self.scale**2 * gram).clamp(min=0).sqrt()

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        """In one operator over a 4-bit weight."""
        quantized = getattr(layer, "quantized_weight", None)
        if quantized is None or (layer.dropout and layer.training):
            return super().forward(layer, x)
        return dora_linear(x, quantized(), layer.bias, self.A, self.B, self.magnitude, self.scale)
