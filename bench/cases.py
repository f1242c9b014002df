"""What is measured: each case supplies its set-up and what its result should be; `run` times them all alike.

Layers of the HAR encoder (192 wide), of small encoders (768), and of language models of 7 and 70 billion parameters
(4096 and 8192); whole encoders; and steps of fine-tuning.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.bench import peers
from harlora.models import MAE, Classifier, MAEConfig
from harlora.models.mae import patchify
from harlora.train.capture import TrainingStep

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
MODELS = {"A": MAEConfig(), "B": MAEConfig(ffn=384, patch_size=16)}  # the package's default; a smaller one
CLASSES = 6
STEP_WINDOWS = 64

HAR = ((192, 192), (192, 512), (512, 192), (192, 768))
SMALL = ((768, 768), (768, 3072))
BILLIONS_7 = ((4096, 4096), (4096, 14336), (14336, 4096))
BILLIONS_70 = ((8192, 8192), (8192, 28672))

DIRECTIONS = ("forward", "backward", "both")
CAPTURED = tuple(name for name, competitor in peers.COMPETITORS.items() if competitor.captured)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Packed weights from this size on are measured on several copies in turn: a model of such layers reads each from
# memory, while one layer called again and again would find its own in the last cache.
LARGE = 2**24
MOST_COPIES = 16
CHECKED_ROWS = 512

Call = Callable[[], object]


class Contender(NamedTuple):
    call: Call  # what is timed
    relative_error: float


class Case(NamedTuple):
    facts: Mapping[str, Any]  # which case, of what size: the columns of its rows
    contenders: Mapping[str, Callable[[], Contender]]  # by competitor; making one may raise
    grad: bool  # False: timed under no_grad
    held_bytes: int = 0  # about what its models take beyond those of the case before


@dataclass(frozen=True)
class Layers:
    """One adapted layer, for each of several numbers of rows.

    direction: forward (inference: eval mode, no_grad), backward (train mode: dX, dA, dB of a graph that is kept), or
        both (train mode: forward, then backward).
    """

    in_features: int
    out_features: int
    rows: tuple[int, ...]
    direction: str = "forward"
    dtype: str = "float32"
    rank: int = peers.RANK


@dataclass(frozen=True)
class Plan:
    """What a run measures, in this order: the first is what is left when time is short."""

    layers: tuple[Layers, ...]
    models: tuple[str, ...]
    windows: tuple[int, ...]
    competitors: tuple[str, ...]
    compiled_rows: tuple[int, ...] = ()  # of layers that are also measured under torch.compile, which takes seconds
    steps: bool = True

    def count(self) -> int:
        """How many cases."""
        return sum(len(layer.rows) for layer in self.layers) + len(self.models) * (len(self.windows) + self.steps)

    def cases(self, device: torch.device, cache_bytes: int) -> Iterator[Case]:
        """The cases; what one needs is made when it is reached."""
        whole = "bfloat16" if device.type == "cuda" else "float32"
        for model in self.models:
            yield from self._encoders(model, device, whole)
            if self.steps:
                yield self._step(model, device, whole)
        for layers in self.layers:
            yield from self._layers(layers, device, cache_bytes)

    def _chosen(self, *left_out: str) -> list[str]:
        return [name for name in self.competitors if name not in left_out]

    def _layers(self, size: Layers, device: torch.device, cache_bytes: int) -> Iterator[Case]:
        dtype = DTYPES[size.dtype]
        base = nn.Sequential(nn.Linear(size.in_features, size.out_features, dtype=dtype, device=device))
        weights = size.in_features * size.out_features
        packed_bytes = weights * 9 // 16  # codes and one float32 scale for each block of 64
        copies = min(MOST_COPIES, 1 + 2 * cache_bytes // packed_bytes) if weights >= LARGE else 1
        names = self._chosen("dense", *CAPTURED)
        if size.direction != "forward" or size.dtype != "float32" or device.type != "cpu":
            names = [name for name in names if peers.COMPETITORS[name].precision == "float32"]
        made = {
            name: cache(partial(_adapted, name, base, ["0"], copies, size.rank, size.direction != "forward"))
            for name in names
        }
        # Three competitors hold it dense, all of them once in float32 to be checked with.
        held = 4 * weights * (3 * copies + len(names))
        for rows in size.rows:
            x = torch.randn(rows, size.in_features, dtype=dtype, device=device)
            flop = 2 * rows * (weights + size.rank * (size.in_features + size.out_features))
            backward = 2 * rows * (weights + 2 * size.rank * (size.in_features + size.out_features))
            facts = {
                "case": "layer", "in_features": size.in_features, "out_features": size.out_features, "rows": rows,
                "direction": size.direction, "dtype": size.dtype, "rank": size.rank, "weight_copies": copies,
                "flop": {"forward": flop, "backward": backward, "both": flop + backward}[size.direction],
                "packed_bytes": packed_bytes,
            }  # fmt: skip
            measure = _forward_layer if size.direction == "forward" else partial(_trained_layer, size.direction)
            contenders = {
                name: partial(measure, made[name], x)
                for name in names
                if not name.endswith("compiled") or rows in self.compiled_rows
            }
            yield Case(facts, contenders, grad=size.direction != "forward", held_bytes=held)
            held = 0

    def _encoders(self, model: str, device: torch.device, dtype: str) -> Iterator[Case]:
        base = MAE(MODELS[model]).encoder.eval().to(device, DTYPES[dtype])
        left_out = [name for name, c in peers.COMPETITORS.items() if c.precision != "float32" and device.type != "cpu"]
        names = self._chosen(*left_out, *CAPTURED)
        made = {name: cache(partial(_encoder, name, base)) for name in names}
        for windows in self.windows:
            x = torch.randn(windows, MODELS[model].window, MODELS[model].channels, dtype=DTYPES[dtype], device=device)
            facts = {
                "case": "encoder", "model": model, "windows": windows, "tokens": MODELS[model].tokens,
                "direction": "forward", "dtype": dtype, "rank": peers.RANK,
            }  # fmt: skip
            yield Case(facts, {name: partial(_forward, made[name], x) for name in names}, grad=False)

    def _step(self, model: str, device: torch.device, dtype: str) -> Case:
        """One step of fine-tuning: forward, cross-entropy, backward, AdamW over adapters and head, in train mode."""
        config = MODELS[model]
        base = Classifier(MAE(config).encoder, CLASSES).to(device, DTYPES[dtype])
        for module in base.modules():
            if isinstance(module, nn.Dropout):  # of the head; its random zeros would differ between competitors
                module.p = 0.0
        x = torch.randn(STEP_WINDOWS, config.window, config.channels, dtype=DTYPES[dtype], device=device)
        labels = torch.arange(STEP_WINDOWS, device=device) % CLASSES
        facts = {
            "case": "step", "model": model, "windows": STEP_WINDOWS, "tokens": config.tokens, "direction": "both",
            "dtype": dtype, "rank": peers.RANK,
        }  # fmt: skip
        reduced = [name for name, competitor in peers.COMPETITORS.items() if competitor.precision != "float32"]
        names = self._chosen("dense", *reduced, *(CAPTURED if device.type != "cuda" else ()))
        return Case(facts, {name: partial(_step, name, base, x, labels) for name in names}, grad=True)


def plan(preset: str, device: torch.device) -> Plan:
    """What ``"quick"``, ``"standard"`` or ``"full"`` measures on a kind of device."""
    cuda = device.type == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    reduced = tuple(name for name, competitor in peers.COMPETITORS.items() if competitor.precision != "float32")
    everyone = tuple(name for name in peers.COMPETITORS if name not in (reduced if cuda else CAPTURED))

    def layers(shapes: Sequence[tuple[int, int]], rows: Sequence[int], *directions: str, **more: Any) -> list[Layers]:
        return [
            Layers(*shape, tuple(rows), direction, **{"dtype": dtype, **more})
            for shape in shapes
            for direction in directions
        ]

    if preset == "quick":
        chosen = [
            *layers([(192, 192), (192, 768)], (1, 64, 512), "forward"),
            *layers([(192, 768)], (64,), "backward", "both"),
            *layers([(4096, 4096)], (1, 64), "forward"),
            *layers([(4096, 4096)], (64,), "both"),
        ]
        # Hundreds of times slower on a row of a large layer, and slow to make: it would take most of the time.
        rivals = tuple(name for name in everyone if name != "torchao NF4")
        return Plan(tuple(chosen), ("A",), (1, 64), rivals, compiled_rows=(64,) if cuda else ())
    if preset == "standard" and cuda:
        shapes = [(4096, 4096), (8192, 8192), (4096, 14336), (192, 192), (192, 768), *SMALL]
        chosen = layers(shapes, (1, 8, 32, 128, 512, 2048, 8192), "forward", "both")
        # A machine with a GPU may be lent for minutes; compiling takes a third of one for some cases.
        rivals = tuple(name for name in everyone if not name.endswith("compiled") and name != "torchao NF4")
        return Plan(tuple(chosen), ("A", "B"), (1, 64, 512), rivals)
    rows = (1, 8, 16, 32, 64, 128, 512, 2048)
    shapes = [*HAR, (4096, 4096)]
    chosen = [*layers(shapes, rows, "forward"), *layers(shapes, (1, 64, 512), "backward", "both")]
    if preset == "standard":
        return Plan(tuple(chosen), ("A", "B"), (1, 64), everyone, compiled_rows=(1, 64))
    large = [*SMALL, *BILLIONS_7, *BILLIONS_70]
    other = "float32" if cuda else "bfloat16"
    chosen = [
        *layers([*HAR, *large], (*rows, 8192), "forward"),
        *layers([*HAR, *large], (1, 8, 64, 512, 2048, 8192), "backward", "both"),
        *layers([(192, 768), (4096, 4096)], (1, 64, 512), *DIRECTIONS, dtype=other),
        *(
            layer
            for rank in (1, 4, 64, 128)
            for layer in layers([(192, 768), (4096, 4096)], (1, 64, 512), "forward", "both", rank=rank)
        ),
    ]
    return Plan(tuple(chosen), ("A", "B"), (1, 8, 64, 512), everyone, compiled_rows=(1, 64, 512))


class _Adapted(NamedTuple):
    layers: list[Callable[..., Any]]
    adapters: list[list[nn.Parameter]]
    reference: Any  # in float32: in float64 those of all competitors at once are too large


def _flat(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for pair in peers.adapters(model) for parameter in pair]


def _adapted(name: str, base: nn.Sequential, targets: Sequence[str], copies: int, rank: int, train: bool) -> _Adapted:
    models: list[Any] = [peers.adapt(name, base, targets, rank) for _ in range(copies)]
    reference: Any = peers.exact(models[0], base, targets)
    layers = [peers.called(name, peers.compiled(name, model.train(train)[0])) for model in models]
    return _Adapted(layers, [_flat(model) for model in models], reference[0])


def _worst(errors: Sequence[float]) -> float:
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


@torch.no_grad()
def _forward_layer(made: Callable[[], _Adapted], x: Tensor) -> Contender:
    layers, _, reference = made()
    # Rows do not depend on each other; float64 is slow.
    rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS), device=x.device).round().long()
    wanted = copy.deepcopy(reference).double()(x[rows].double())
    errors = [peers.relative_error([layer(x)[rows]], [wanted]) for layer in layers]
    error = _worst(errors)
    return Contender(_in_turn([partial(layer, x) for layer in layers]), error)


def _trained_layer(direction: str, made: Callable[[], _Adapted], x: Tensor) -> Contender:
    layers, adapters, reference = made()
    x = x.clone().requires_grad_()
    exact = copy.deepcopy(reference).double()
    doubled = x.detach().double().requires_grad_()
    wanted_y = exact(doubled)
    grad = torch.randn_like(wanted_y, dtype=x.dtype)
    wanted = torch.autograd.grad(wanted_y, [doubled, exact.lora_A, exact.lora_B], grad.double())
    errors = []
    for layer, parameters in zip(layers, adapters, strict=True):
        y = layer(x)
        found = torch.autograd.grad(y, [x, *parameters], grad)
        # Each by itself: dX is larger than dA and dB together and would hide them.
        pairs = zip((y, *found), (wanted_y, *wanted), strict=True)
        errors += [peers.relative_error([one], [other]) for one, other in pairs]
    error = _worst(errors)

    def both(layer: Callable[..., Any], parameters: list[nn.Parameter]) -> object:
        return torch.autograd.grad(layer(x), [x, *parameters], grad)

    if direction == "both":
        return Contender(_in_turn([partial(both, *each) for each in zip(layers, adapters, strict=True)]), error)
    graphs = [layer(x) for layer in layers]
    calls = [
        partial(torch.autograd.grad, y, [x, *parameters], grad, retain_graph=True)
        for y, parameters in zip(graphs, adapters, strict=True)
    ]
    return Contender(_in_turn(calls), error)


def _in_turn(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _encoder(name: str, base: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    model = peers.adapt(name, base, TARGETS)
    reference = peers.exact(model, base, TARGETS).double().eval()
    exact = partial(_module_by_module, reference)
    if name.startswith("harlora") or name.endswith("compiled"):
        return peers.called(name, peers.compiled(name, model.eval())), exact
    # The model looks first whether harlora can run it in one call, which is no part of what others do.
    return partial(_module_by_module, model.eval()), exact


def _module_by_module(encoder: Any, x: Tensor) -> Tensor:
    tokens: Tensor = encoder.patch_embed(patchify(x, encoder.config.patch_size)) + encoder.positions
    for block in encoder.blocks:
        normed, attention = block.norm1(tokens), block.attention
        q, k, v = (
            layer(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer in (attention.q, attention.k, attention.v)
        )
        tokens = tokens + attention.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        tokens = tokens + block.fc2(F.gelu(block.fc1(block.norm2(tokens))))
    last: Tensor = encoder.norm(tokens)
    return last


def _classified(model: Any, x: Tensor) -> Tensor:
    logits: Tensor = model.head(_module_by_module(model.encoder, x).mean(dim=1))
    return logits


@torch.no_grad()
def _forward(made: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]], x: Tensor) -> Contender:
    model, reference = made()
    return Contender(partial(model, x), peers.relative_error([model(x)], [reference(x.double())]))


def _step(name: str, base: Classifier, x: Tensor, labels: Tensor) -> Contender:
    model: Any = peers.adapt(name, base, TARGETS)
    reference: Any = peers.exact(model, base, TARGETS).double()
    for classifier in (model, reference):
        classifier.train().head.requires_grad_(True)
    called = peers.compiled(name, model)
    if not name.startswith(peers.OURS) and called is model:  # as in `_encoder`
        called = partial(_classified, model)
    parameters = _trainable(model)
    wanted = torch.autograd.grad(F.cross_entropy(reference(x.double()), labels), _trainable(reference))
    if peers.COMPETITORS[name].captured:
        return _captured_step(model, called, x, labels, parameters, wanted)
    found = torch.autograd.grad(F.cross_entropy(called(x), labels), parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=x.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(called(x), labels).backward()
        optimizer.step()

    return Contender(step, _gradient_error(model, found, wanted))


def _gradient_error(model: nn.Module, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of those of every lora_A, every lora_B and the head: together, one would hide the others."""
    adapters = len(_flat(model))
    groups = slice(0, adapters, 2), slice(1, adapters, 2), slice(adapters, None)
    return _worst([peers.relative_error(found[group], wanted[group]) for group in groups])


def _captured_step(
    model: nn.Module, called: Callable[..., Any], x: Tensor, labels: Tensor, parameters: list[nn.Parameter],
    wanted: Sequence[Tensor],
) -> Contender:  # fmt: skip
    """The same step as one CUDA graph; checked are the gradients of its first replay, which are at the same weights."""
    rate = torch.tensor(1e-4, device=x.device)
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=True)
    step = TrainingStep(model, lambda x, labels: F.cross_entropy(called(x), labels), optimizer, capture=True)
    step(x, labels)
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Without TrainingStep's own look at whether the graph still holds, which others would not need.
    replay = partial(step, x, labels) if step._graph is None else step._graph.replay
    return Contender(replay, _gradient_error(model, found, wanted))


def _trainable(model: Any) -> list[nn.Parameter]:
    return [*_flat(model), *model.head.parameters()]
