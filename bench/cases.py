"""What is measured: each case supplies its set-up and what its result should be; `cpu.py` times them all alike."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.models import MAE, Classifier, MAEConfig
from harlora.models.mae import patchify

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
MODELS = {"A": MAEConfig(), "B": MAEConfig(ffn=384, patch_size=16)}  # the package's default; the sizes
INFERENCE = ("H", "H16", "H8", "P", "D")
CLASSES = 6
STEP_WINDOWS = 64

# Packed weights from this size on are measured on several copies in turn: a model of such layers reads each from
# memory, while one layer called again and again would find its own in the last cache.
LARGE = 2**24
COPIES = 4


Call = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    call: Callable[[], object]  # what is timed
    relative_error: float


class Case(NamedTuple):
    facts: Mapping[str, Any]  # which case, of what size: the columns of its rows
    contenders: Mapping[str, Callable[[], Contender]]  # by competitor; making one may raise
    grad: bool  # False: timed under no_grad


def layer_cases(shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> Iterator[Case]:
    """Forward of one adapted layer, in eval mode."""
    for in_features, out_features in shapes:
        base = nn.Sequential(nn.Linear(in_features, out_features))
        copies = COPIES if in_features * out_features >= LARGE else 1
        made = {name: cache(partial(_layers, name, base, copies)) for name in INFERENCE}
        for count in rows:
            x = torch.randn(count, in_features)
            facts = {
                "case": "layer", "in_features": in_features, "out_features": out_features, "rows": count,
                "weight_copies": copies,
                "flop": 2 * count * (in_features * out_features + peers.RANK * (in_features + out_features)),
                # codes and one float32 scale for each block of 64
                "packed_bytes": in_features * out_features * 9 // 16,
            }  # fmt: skip
            yield Case(facts, {name: partial(_layer, made[name], x) for name in made}, grad=False)


def encoder_cases(models: Sequence[str], windows: Sequence[int]) -> Iterator[Case]:
    """A whole encoder in eval mode, every linear layer of its blocks adapted."""
    for model in models:
        base = MAE(MODELS[model]).encoder.eval()
        made = {name: cache(partial(_encoder, name, base)) for name in (*INFERENCE, "F")}
        for count in windows:
            x = torch.randn(count, MODELS[model].window, MODELS[model].channels)
            facts = {"case": "encoder", "model": model, "windows": count, "tokens": MODELS[model].tokens}
            yield Case(facts, {name: partial(_forward, made[name], x) for name in made}, grad=False)


def step_cases(models: Sequence[str]) -> Iterator[Case]:
    """One step of fine-tuning: forward, cross-entropy, backward, AdamW over adapters and head, in train mode."""
    for model in models:
        config = MODELS[model]
        base = Classifier(MAE(config).encoder, CLASSES)
        x = torch.randn(STEP_WINDOWS, config.window, config.channels)
        labels = torch.arange(STEP_WINDOWS) % CLASSES
        facts = {"case": "step", "model": model, "windows": STEP_WINDOWS, "tokens": config.tokens}
        yield Case(facts, {name: partial(_step, name, base, x, labels) for name in "HPD"}, grad=True)


def _layers(name: str, base: nn.Sequential, copies: int) -> tuple[list[Call], nn.Module]:
    models = [peers.adapt(name, base, ["0"]) for _ in range(copies)]
    reference = peers.exact(models[0], base, ["0"])
    return [peers.called(name, model.eval()[0]) for model in models], reference[0]


@torch.no_grad()
def _layer(made: Callable[[], tuple[list[Call], nn.Module]], x: Tensor) -> Contender:
    layers, reference = made()
    wanted = reference(x.double())
    error = max(peers.relative_error([layer(x)], [wanted]) for layer in layers)
    if len(layers) == 1:
        return Contender(partial(layers[0], x), error)
    turn = itertools.cycle(layers)
    return Contender(lambda: next(turn)(x), error)


def _encoder(name: str, base: nn.Module) -> tuple[Call, Call]:
    model = peers.adapt(name, base, TARGETS)
    reference = peers.exact(model, base, TARGETS).eval()
    if name == "F":  # harlora would run the plain encoder in one call as well; F is torch's modules
        return partial(_module_by_module, model.eval()), partial(_module_by_module, reference)
    return peers.called(name, model.eval()), reference


def _module_by_module(encoder: nn.Module, x: Tensor) -> Tensor:
    tokens = encoder.patch_embed(patchify(x, encoder.config.patch_size)) + encoder.positions
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


@torch.no_grad()
def _forward(made: Callable[[], tuple[Call, Call]], x: Tensor) -> Contender:
    model, reference = made()
    return Contender(partial(model, x), peers.relative_error([model(x)], [reference(x.double())]))


def _step(name: str, base: Classifier, x: Tensor, labels: Tensor) -> Contender:
    model = peers.adapt(name, base, TARGETS)
    reference = peers.exact(model, base, TARGETS)
    for classifier in (model, reference):
        classifier.train().head.requires_grad_(True)
    error = peers.relative_error(_gradients(model, x, labels), _gradients(reference, x.double(), labels))
    optimizer = torch.optim.AdamW(_trainable(model), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return Contender(step, error)


def _trainable(model: Classifier) -> list[nn.Parameter]:
    return [p for pair in peers.adapters(model) for p in pair] + list(model.head.parameters())


def _gradients(model: Classifier, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    # Without dropout, whose random zeros would differ between the dtypes.
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in dropouts:
        module.p = 0.0
    gradients = torch.autograd.grad(F.cross_entropy(model(x), labels), _trainable(model))
    for module, p in dropouts:
        module.p = p
    return gradients
