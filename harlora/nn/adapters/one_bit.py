"""1-bit adapters: LoRA whose factors are stored in one bit a number (Jie et al. 2023, arXiv 2307.16867)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from harlora.nn.adapters.adapter import Layer, LowRank
from harlora.nn.adapters.lora import LoRA


class OneBitLoRA(LoRA):
    """A LoRA that computes with two levels of each factor; gradients pass as if it were the factor itself.

    The levels are the means of the numbers below and above the mean of all, which leave the least squared error and
    are their own levels; of normal variables they are mean ± 0.80·std. The paper's code has ± 0.6745·std, the medians.
    B starts at zero and stays exactly zero until it has moved, so that a new adapter changes nothing. Files have a bit
    a number and two levels a factor. frozen_A: train B alone.
    """

    name = "one_bit"
    title = "1-bit LoRA"

    def delta(self, layer: Layer) -> LowRank:
        """s·B̂·Â."""
        return LowRank(binary(self.A), binary(self.B), self.scale)

    def file_state(self) -> dict[str, Tensor]:
        """Bits and levels of both factors."""
        state = {}
        for name, factor in (("A", self.A), ("B", self.B)):
            above, low, high = levels(factor.detach())
            bits = torch.zeros(-(-above.numel() // 8) * 8, dtype=torch.uint8, device=above.device)
            bits[: above.numel()] = above.flatten()
            weights = (2 ** torch.arange(8, device=above.device)).to(torch.uint8)
            state[f"{name}_bits"] = (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)
            state[f"{name}_levels"] = torch.stack([low, high])
        return state

    @torch.no_grad()
    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """Both factors in their two levels."""
        for name, factor in (("A", self.A), ("B", self.B)):
            packed, (low, high) = state[f"{name}_bits"], state[f"{name}_levels"]
            bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            factor.copy_(torch.where(bits.flatten()[: factor.numel()].bool(), high, low).view(factor.shape))


def levels(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``values`` are at least their mean, and the means of those that are not and of those that are."""
    wide = values.double()  # so that the mean of equal numbers is that number
    above = wide >= wide.mean()
    high = (wide * above).sum() / above.sum().clamp(min=1)
    low = (wide * ~above).sum() / (~above).sum().clamp(min=1)
    return above, low.to(values.dtype), high.to(values.dtype)


def binary(values: Tensor) -> Tensor:
    """``values`` in two levels, with the gradient of the identity."""
    with torch.no_grad():
        above, low, high = levels(values)
        rounded = torch.where(above, high, low)
    return rounded + (values - values.detach())  # plus nothing, exactly
