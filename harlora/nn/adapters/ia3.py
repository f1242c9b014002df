"""(IA)³: a factor for each channel (Liu et al. 2022, arXiv 2205.05638)."""

import torch
from torch import nn

from harlora.nn.adapters.adapter import Adapter, Gain, Layer, LowRank, Site


class IA3(Adapter):
    """y' = l ⊙ y of a layer; of one named in ``inputs``, by default fc2, l ⊙ x goes in instead. l is 1 at first.

    The paper scales keys, values, and what enters the last layer of the feed-forward part: adapt k, v and fc2.
    """

    name = "ia3"
    title = "(IA)³"

    def __init__(self, site: Site, *, inputs: tuple[str, ...] = ("fc2",)) -> None:
        super().__init__(site)
        self.of_inputs = site.path.rpartition(".")[2] in inputs
        self.scale = nn.Parameter(torch.ones(site.in_features if self.of_inputs else site.out_features))

    def gain(self, layer: Layer, delta: LowRank | None) -> Gain:
        """The factors, on the way in or out, the bias included."""
        return Gain(inputs=self.scale) if self.of_inputs else Gain(outputs=self.scale, of_bias=True)
