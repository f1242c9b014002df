"""LoRA-Squeeze during training: a LoRA of high rank that is squeezed to a lower one step by step (arXiv 2602.10993)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harlora.nn.adapters.adapter import Layer, LowRank, Site
from harlora.nn.adapters.lora import LoRA
from harlora.nn.adapters.post import squeeze


class LoRASqueeze(LoRA):
    """ΔW = s·B·A, s = alpha / rank, of ``first_rank`` at first, by default 4·rank, and of ``rank`` at the end.

    ``times`` times between the shares ``begin`` and ``end`` of the steps the product is replaced by the nearest one of
    a lower rank, from the singular value decomposition; ranks fall by the same factor each time. How far apart, and in
    which steps, the source does not say.
    """

    name = "squeeze"
    title = "LoRA-Squeeze"
    held: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        first_rank: int = 0,
        times: int = 4,
        begin: float = 0.2,
        end: float = 0.7,
    ) -> None:
        first_rank = first_rank or min(4 * rank, site.in_features, site.out_features)
        if not 1 <= rank <= first_rank:
            raise ValueError(f"LoRA-Squeeze: rank must be from 1 to first_rank={first_rank}, got {rank}")
        if times < 1 or not 0 <= begin < end <= 1:
            raise ValueError(
                f"LoRA-Squeeze: required times >= 1 and 0 <= begin < end <= 1, got {times}, {begin} and {end}"
            )
        super().__init__(site, rank=first_rank, alpha=alpha * first_rank / rank)
        self.last_rank, self.times, self.begin, self.end = rank, times, begin, end
        self.register_buffer("held", torch.tensor(first_rank))

    def delta(self, layer: Layer) -> LowRank:
        """s·B·A of the rows that are held; the others are zero."""
        inside = torch.arange(self.rank, device=self.A.device) < self.held
        return LowRank(inside[:, None] * self.A, self.B, self.scale)

    @torch.no_grad()
    def squeeze(self, rank: int) -> None:
        """Replace the product by the nearest one of ``rank``."""
        held = int(self.held)
        if rank < held:
            smaller = squeeze(LowRank(self.A[:held], self.B[:, :held]), rank)
            self.A.zero_()[: len(smaller.A)] = smaller.A
            self.B.zero_()[:, : len(smaller.A)] = smaller.B
            self.held.fill_(rank)

    def file_state(self) -> dict[str, Tensor]:
        """Without the rows that are gone."""
        held = int(self.held)
        return {"A": self.A[:held], "B": self.B[:, :held], "held": self.held}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """As `file_state` gave it."""
        held = int(state["held"])
        with torch.no_grad():
            self.A.zero_()[:held] = state["A"]
            self.B.zero_()[:, :held] = state["B"]
            self.held.fill_(held)

    @classmethod
    def schedule(cls, layers: Sequence[Layer]) -> "Squeezing":
        """Of all layers together."""
        return Squeezing([layer.adapter for layer in layers if isinstance(layer.adapter, LoRASqueeze)])


class Squeezing:
    """The ranks, as training goes on."""

    def __init__(self, adapters: Sequence[LoRASqueeze]) -> None:
        self.adapters = list(adapters)

    def state(self) -> dict[str, Tensor]:
        """Nothing: what each adapter holds says where it is."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def after_step(self, done: float) -> None:
        """After each step, with the share of all steps that is done."""
        for adapter in self.adapters:
            if done >= adapter.begin:
                passed = min(1.0, (done - adapter.begin) / (adapter.end - adapter.begin))
                number = 1 + int(passed * (adapter.times - 1)) if adapter.times > 1 else 1
                fall = (adapter.last_rank / adapter.rank) ** (number / adapter.times)
                adapter.squeeze(max(adapter.last_rank, round(adapter.rank * fall)))
