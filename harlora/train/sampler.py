"""Which windows an epoch takes: some at random, or those that teach the most."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLERS = ("uniform", "quality")


def squared_gradient(logits: Tensor, truth: Tensor) -> Tensor:
    """‖∂ℓ/∂logits‖² of the cross-entropy of each window, ``(n,)``, without gradient."""
    p = logits.detach().float().softmax(dim=1)
    return p.square().sum(dim=1) - 2 * p.gather(1, truth[:, None])[:, 0] + 1


def standardised(terms: Tensor) -> Tensor:
    """Each row less its mean and over its standard deviation, those of the numbers that are not NaN; 0 for NaN."""
    mean = terms.nanmean(dim=-1, keepdim=True)
    deviation = (terms - mean).square().nanmean(dim=-1, keepdim=True).sqrt()
    return ((terms - mean) / deviation.clamp(min=1e-12)).nan_to_num(0.0)


class Sampler:
    """Draws, without replacement, a share of the training windows for each epoch, any as likely as any other.

    samples: ``(n,)``, the indices of the windows. share: of them that an epoch takes.
    drawn: how often each has been, ``(n,)``.
    """

    def __init__(self, samples: Tensor, share: float) -> None:
        self.samples = samples
        self.count = max(2, round(share * len(samples)))
        self.drawn = torch.zeros(len(samples))

    def order(self) -> Tensor:
        """Positions in the samples of the next ``count`` that training takes; from torch's random numbers."""
        chosen = self._draw()
        self.drawn[chosen] += 1
        return chosen

    def _draw(self) -> Tensor:
        return torch.randperm(len(self.samples))[: self.count]

    def observe(self, indices: Tensor, logits: Tensor, truth: Tensor) -> None:
        """Take note of what the model makes of the windows at ``indices`` in a step of training."""

    def state(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on."""
        return {"drawn": self.drawn}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, value in self.state().items():
            value.copy_(state[name])


class QualitySampler(Sampler):
    """Draws windows with p ∝ exp(Q / τ), Q = α₁·‖∂ℓ‖² + α₂·Δℓ + α₃·ΔC (TsqLoRA, arXiv 2509.18585).

    ‖∂ℓ‖²: of the gradient in the logits, that of the softmax's error, which the step computes anyway; the source does
    not say of which parameters. Δℓ: how far the window's loss fell since it was last drawn. ΔC: the source does not
    define it; here how far the probability of its label rose since then. All three are standardised over the windows
    that have them, so that weights mean the same in every dataset; a window that has none yet counts as the average
    one. They come from the steps of training, so nothing is computed twice.

    quality: α₁, α₂, α₃ and τ.
    """

    def __init__(self, samples: Tensor, share: float, quality: Sequence[float]) -> None:
        super().__init__(samples, share)
        self.weights, self.temperature = torch.tensor(quality[:3], dtype=torch.float32), quality[3]
        self.place = torch.full((int(samples.max()) + 1,), -1)
        self.place[samples] = torch.arange(len(samples))
        self.terms = torch.full((3, len(samples)), torch.nan)  # ‖∂ℓ‖², Δℓ, ΔC
        self.loss = torch.full((len(samples),), torch.nan)
        self.confidence = torch.full((len(samples),), torch.nan)

    @torch.no_grad()
    def observe(self, indices: Tensor, logits: Tensor, truth: Tensor) -> None:
        """As `Sampler.observe`."""
        place = self.place[indices.cpu()]
        loss = F.cross_entropy(logits.float(), truth, reduction="none").cpu()
        confidence, squared = (-loss).exp(), squared_gradient(logits, truth).cpu()
        self.terms[:, place] = torch.stack([squared, self.loss[place] - loss, confidence - self.confidence[place]])
        self.loss[place], self.confidence[place] = loss, confidence

    def quality(self) -> Tensor:
        """Q of each window, ``(n,)``; 0 of one that is like the average."""
        return self.weights @ standardised(self.terms)

    def _draw(self) -> Tensor:
        # Those highest in Q / τ plus Gumbel noise are drawn as from the softmax of Q / τ, one after the other.
        noise = -torch.empty(len(self.samples)).exponential_().log()
        chosen = (self.quality() / self.temperature + noise).topk(self.count).indices
        return chosen[torch.randperm(self.count)]

    def state(self) -> dict[str, Tensor]:
        """As `Sampler.state`: also the terms, and what the next differences are from."""
        return {**super().state(), "terms": self.terms, "loss": self.loss, "confidence": self.confidence}
