"""TsqLoRA: ranks go to the layers whose weights matter most (arXiv 2509.18585)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harlora.nn.adapters.adapter import Layer, LowRank, Site, Statistics
from harlora.nn.adapters.lora import LoRA

_SMOOTHING = 0.85


class TsqLoRA(LoRA):
    """ΔW = s·B·diag(kept)·A, s = alpha / rank, ``rank`` the mean of all layers, which never changes.

    Ranks are shared out by S = E|W ⊙ ∂W| of each layer: at the start by that of some batches, later by that of every
    ``every``-th step, smoothed, ``changes`` times between the shares ``begin`` and ``end`` of the steps. A layer that
    is to have fewer gives up the rows of least ‖A_i‖·‖B_i‖; one that is to have more, up to ``most``, by default
    2·rank, gets rows whose B is zero, so that nothing jumps. The source publishes S but no rule for ranks: this one is
    a reconstruction. Its other half, which windows are trained on, is the setting `sampler`.
    """

    name = "tsqlora"
    title = "TsqLoRA"
    capturable = False  # layers are watched in some steps
    kept: Tensor
    sensitivity: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        most: int = 0,
        changes: int = 8,
        every: int = 4,
        begin: float = 0.1,
        end: float = 0.7,
    ) -> None:
        most = most or 2 * rank
        if not 1 <= rank <= most:
            raise ValueError(f"TsqLoRA: rank must be from 1 to most={most}, got {rank}")
        if changes < 0 or every < 1 or not 0 <= begin < end <= 1:
            raise ValueError(
                "TsqLoRA: required changes >= 0, every >= 1 and 0 <= begin < end <= 1, got "
                f"{changes}, {every}, {begin} and {end}"
            )
        super().__init__(site, rank=most, alpha=alpha * most / rank)
        self.mean_rank, self.most = rank, most
        self.changes, self.every, self.begin, self.end = changes, every, begin, end
        self.register_buffer("kept", torch.arange(most) < rank)
        self.register_buffer("sensitivity", torch.zeros(()), persistent=False)

    @classmethod
    def needs_statistics(cls, **options: Any) -> bool:
        """Always."""
        return True

    @torch.no_grad()
    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """As LoRA, its sensitivity that of the batches."""
        assert statistics is not None
        super().start(weight, statistics)
        self.sensitivity.fill_(statistics.sensitivity)

    def delta(self, layer: Layer) -> LowRank:
        """s·B·diag(kept)·A."""
        return LowRank(self.kept[:, None] * self.A, self.B, self.scale)

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Keep ``rank`` rows: the most important of those there are, or new ones beside them."""
        importance = self.A.norm(dim=1) * self.B.norm(dim=0)
        order = torch.where(self.kept, importance, -1.0).argsort(descending=True, stable=True)
        new = torch.zeros_like(self.kept)
        new[order[:rank]] = True
        self.B.mul_(self.kept & new)  # of a row that goes or comes it is zero
        self.kept.copy_(new)

    def file_state(self) -> dict[str, Tensor]:
        """Without the rows that are not kept."""
        return {"A": self.A[self.kept], "B": self.B[:, self.kept], "kept": self.kept}

    @torch.no_grad()
    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """As `file_state` gave it."""
        self.kept.copy_(state["kept"])
        self.A.zero_()[self.kept] = state["A"]
        self.B.zero_()[:, self.kept] = state["B"]

    @classmethod
    def schedule(cls, layers: Sequence[Layer]) -> "BySensitivity":
        """Of all layers together."""
        return BySensitivity(layers)


class BySensitivity:
    """The ranks of all layers, as training goes on."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = [layer for layer in layers if isinstance(layer.adapter, TsqLoRA)]
        self.adapters = [layer.adapter for layer in self.layers if isinstance(layer.adapter, TsqLoRA)]
        self.steps = self.changed = 0
        self.hooks: list[Any] = []
        if any(bool(adapter.sensitivity) for adapter in self.adapters):  # loaded ones have none; their ranks stay
            self.share_out()
        self._observe()

    def state(self) -> dict[str, Tensor]:
        """Sensitivities, and where it is in its course."""
        seen = torch.stack([adapter.sensitivity for adapter in self.adapters])
        return {"sensitivity": seen, "course": torch.tensor([self.steps, self.changed])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for adapter, value in zip(self.adapters, state["sensitivity"], strict=True):
            adapter.sensitivity.copy_(value)
        self.steps, self.changed = state["course"].tolist()
        self._observe()

    def after_step(self, done: float) -> None:
        """After each step, with the share of all steps that is done."""
        first = self.adapters[0]
        self.steps += 1
        due = int((done - first.begin) / (first.end - first.begin) * first.changes) if done >= first.begin else 0
        if min(due, first.changes) > self.changed:
            self.changed = min(due, first.changes)
            self.share_out()
        self._observe()

    def _observe(self) -> None:
        """Watch the next step if it is one of those that are watched."""
        first = self.adapters[0]
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if self.steps % first.every == 0 and self.changed < first.changes:
            self.hooks = [layer.register_forward_hook(_watch) for layer in self.layers]

    def share_out(self) -> None:
        """Give each layer the rank that its sensitivity earns."""
        first = self.adapters[0]
        ranks = shares(
            [float(adapter.sensitivity) for adapter in self.adapters], first.mean_rank * len(self.adapters), first.most
        )
        for adapter, rank in zip(self.adapters, ranks, strict=True):
            adapter.resize(rank)


def shares(weights: Sequence[float], total: int, most: int) -> list[int]:
    """``total`` in whole parts proportional to ``weights``, each from 1 to ``most``, which they must allow.

    The next one goes to whom it leaves with the most weight a part (the method of D'Hondt).
    """
    parts = [1] * len(weights)
    for _ in range(total - len(weights)):
        open_ = [index for index, part in enumerate(parts) if part < most]
        parts[max(open_, key=lambda index: weights[index] / (parts[index] + 1))] += 1
    return parts


def _watch(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    watched: Tensor = _Watched.apply(output, inputs[0].detach(), layer)
    return watched


class _Watched(torch.autograd.Function):
    """The output of a layer, whose backward takes note of the layer's sensitivity."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        rows, inputs = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (gradient, x))
        of_weight = rows.T @ inputs
        product = (of_weight * layer.base_weight()).abs().mean()
        layer.adapter.sensitivity.lerp_(product.to(layer.adapter.sensitivity), 1 - _SMOOTHING)
        return gradient, None, None
