"""What an adapter is: a function from its parameters to how the weight of one linear layer changes.

W' = diag(outputs)·(W + scale·B·A)·diag(inputs), with factors and gains that a method builds once a step from whatever
it trains. Forward, merging, counting and files follow from that alone and exist once, so a method is its parameters,
their start, and one or two functions. The low-rank branch runs in the same fused operators as LoRA's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A layer that is adapted.

    path: in the model. index: among its ``count`` adapted layers, in the model's order.
    """

    path: str
    index: int
    count: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LowRank:
    """A change of the weight, scale·B·A.

    A: ``(rank, in_features)``; B: ``(out_features, rank)``.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        """The change, ``(out_features, in_features)``."""
        return self.scale * (self.B @ self.A)


@dataclass(frozen=True)
class Gain:
    """Factors of the rows and columns of the changed weight.

    outputs: ``(out_features,)`` or None; inputs: ``(in_features,)`` or None; of_bias: whether outputs scale the bias.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    of_bias: bool = False


@dataclass(frozen=True)
class Statistics:
    """What one pass over data says of a layer, for methods that start from it.

    gradient: the mean gradient of the loss in the weight, ``(out_features, in_features)``.
    squared: the sum over batches of its squares, the same shape. sensitivity: the mean of |weight ⊙ gradient|, over
    batches and numbers.
    """

    gradient: Tensor
    squared: Tensor
    sensitivity: float


class Layer(Protocol):
    """What an adapter sees of the layer that it changes, which is an `AdaptedLinear`."""

    bias: nn.Parameter | None
    dropout: float
    training: bool

    @property
    def adapter(self) -> "Adapter | None":
        """What changes the layer."""

    def product(self, x: Tensor, bias: Tensor | None, delta: LowRank | None) -> Tensor:
        """x·(W + ΔW)ᵀ + bias."""

    def base_weight(self) -> Tensor:
        """The frozen weight, dense."""

    def register_forward_hook(self, hook: Any) -> Any:
        """As that of ``nn.Module``."""


class Schedule(Protocol):
    """What changes adapters as training goes on, other than the optimiser."""

    def after_step(self, done: float) -> None:
        """Called after each step, its gradients still there, with the share of all steps that is done."""

    def state(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on as if it had not been, beside the adapters' parameters."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""


class Adapter(nn.Module):
    """How one layer's weight changes; the base class changes nothing.

    A method's class has a ``name`` and a ``title`` for readers, takes its options as keywords after the site, and
    defines `delta`, `gain` or both.
    identity_at_start: a new adapter computes what the layer did without it.
    capturable: a training step may be a CUDA graph, which Python has no part in once it is recorded.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    identity_at_start: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.options: dict[str, Any] = {}  # as it was made, for files

    @classmethod
    def needs_statistics(cls, **options: Any) -> bool:
        """Whether `start` requires `Statistics` where an adapter is made with these options."""
        return False

    def start(self, weight: Tensor, statistics: Statistics | None) -> None:
        """Set the parameters for a new adapter over ``weight``, ``(out_features, in_features)``, float32."""

    def base(self, weight: Tensor) -> Tensor:
        """The weight to freeze under this adapter, given the layer's own; most leave it as it is."""
        return weight

    def delta(self, layer: Layer) -> LowRank | None:
        """The change of the weight, differentiable in the adapter's parameters."""
        return None

    def served_delta(self, layer: Layer) -> LowRank | None:
        """What `delta` is outside of training, whatever the mode."""
        return self.delta(layer)

    def gain(self, layer: Layer, delta: LowRank | None) -> Gain | None:
        """The gains, differentiable in the adapter's parameters."""
        return None

    def low_rank(self, layer: Layer) -> LowRank:
        """The change where it is nothing but that. Raises: KeyError where it is more."""
        delta = self.delta(layer) if self._only_low_rank() else None
        if delta is None:
            raise KeyError("adapter")
        return delta

    def _only_low_rank(self) -> bool:
        return type(self).gain is Adapter.gain and type(self).forward is Adapter.forward

    @torch.no_grad()
    def change(self, layer: Layer) -> LowRank | None:
        """What the layer's own weight, not that which was frozen, changes by, where that is low-rank; or None."""
        if type(self).base is not Adapter.base or not self._only_low_rank():
            return None
        return self.served_delta(layer)

    def same_base(self, other: "Adapter") -> bool:
        """Whether an adapter of the same method is over the same frozen weight, given the same layer."""
        return True

    @classmethod
    def bank(cls, sites: Sequence[Site], **options: Any) -> nn.Module | None:
        """What the adapters of all ``sites`` share, which each is then given after its site; or None."""
        return None

    @classmethod
    def schedule(cls, layers: Sequence[Layer]) -> Schedule | None:
        """What is done after each step of training with all layers of the model that carry such adapters, or None."""
        return None

    def penalty(self) -> Tensor:
        """What the loss is raised by, a scalar."""
        raise NotImplementedError

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        """What ``layer`` computes of ``x`` with this adapter, ``(..., out_features)``."""
        delta = self.delta(layer)
        gain = self.gain(layer, delta)
        if gain is None:
            return layer.product(x, layer.bias, delta)
        if gain.inputs is not None:
            x = x * gain.inputs.to(x.dtype)
        bias = layer.bias
        if gain.outputs is None:
            return layer.product(x, bias, delta)
        inside = gain.of_bias or bias is None
        y = layer.product(x, bias if inside else None, delta) * gain.outputs.to(x.dtype)
        return y if inside or bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain layer that computes the same, in float32 or wider."""
        weight = layer.base_weight()
        bias: Tensor | None = layer.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(wide)
        delta = self.served_delta(layer)
        gain = self.gain(layer, delta) or Gain()
        if delta is not None:
            weight = weight + delta.dense().to(wide)
        if gain.outputs is not None:
            weight = weight * gain.outputs.to(wide)[:, None]
            if gain.of_bias and bias is not None:
                bias = bias * gain.outputs.to(bias.dtype)
        if gain.inputs is not None:
            weight = weight * gain.inputs.to(wide)
        return weight, bias

    def file_state(self) -> dict[str, Tensor]:
        """The tensors that a file has of this adapter, by name."""
        return dict(self.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `file_state` gave.

        Raises: KeyError, RuntimeError or ValueError if it is of another adapter.
        """
        self.load_state_dict(dict(state))

    def trainable(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
