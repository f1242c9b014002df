"""Putting adapters into any model: choose layers by name, replace, freeze, merge."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harlora.nn.adapters import ADAPTERS, Adapter, Schedule, Site, Statistics
from harlora.nn.adapters.adapter import LowRank
from harlora.nn.adapters.lora import LoRA
from harlora.nn.adapters.matryoshka import Nested
from harlora.nn.adapters.post import squeeze
from harlora.nn.linear import AdaptedLinear, LoRALinear, QLoRALinear, _is_quantized

Model = TypeVar("Model", bound=nn.Module)

ALL_LINEAR = "all-linear"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Every layer of ``model`` that carries an adapter, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and (module.rank or module.adapter is not None):
            yield path, module


def apply_lora(
    model: Model,
    target_modules: Sequence[str] | str,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Model:
    """``model`` itself, its target layers replaced by `LoRALinear`, all parameters but the adapters frozen.

    Adapters that other layers have already stay as they are.
    target_modules, rank_pattern, alpha_pattern, Raises: as in `apply_qlora`.
    """

    def adapt(path: str, linear: nn.Linear) -> LoRALinear:
        return LoRALinear.from_linear(
            linear,
            rank=matched(rank_pattern, path, rank),
            alpha=matched(alpha_pattern, path, alpha),
            dropout=dropout,
            rslora=rslora,
        )

    return _replace("apply_lora", model, target_modules, adapt)


def apply_qlora(
    model: Model,
    target_modules: Sequence[str] | str,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Model:
    """``model`` itself, its target layers replaced by `QLoRALinear`, all parameters but the adapters frozen.

    Adapters that other layers have already stay as they are.
    target_modules: as in PEFT. A list of names, each matching a layer whose path is it or ends in ``.`` and it; or a
    regular expression that a whole path must match; or ``"all-linear"``.
    rank_pattern, alpha_pattern: as in PEFT, other values for the layers whose path a key matches, as a regular
    expression for all of the path or for its end after a ``.``.
    The other arguments are those of `QLoRALinear`.
    The fast path of an ``nn.TransformerEncoderLayer``, which would not run the new layers, is switched off for good.
    Raises: ValueError if nothing matches, a match is no ``nn.Linear``, carries an adapter already, is the model
    itself, or is the ``out_proj`` of an ``nn.MultiheadAttention``, whose weight that module reads without running the
    layer. The model is unchanged then.
    """

    def adapt(path: str, linear: nn.Linear) -> QLoRALinear:
        return QLoRALinear.from_linear(
            linear,
            rank=matched(rank_pattern, path, rank),
            alpha=matched(alpha_pattern, path, alpha),
            dropout=dropout,
            rslora=rslora,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
        )

    return _replace("apply_qlora", model, target_modules, adapt)


def apply_adapter(
    model: Model,
    method: str,
    target_modules: Sequence[str] | str,
    *,
    quantize: bool = False,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    start: bool = True,
    **options: Any,
) -> Model:
    """``model`` itself, its target layers with adapters of ``method``, all parameters but adapters frozen.

    Adapters that other layers have already stay as they are.
    method: a name in `harlora.nn.adapters.ADAPTERS`. quantize: over weights in 4 bits (quant_type, blocksize,
    double_quant), or else over the dense ones. dropout: on the input of the low-rank branch. statistics: of each target
    layer as `gather_statistics` has them, for the methods that start from data. start: without, new adapters wait for
    a state to be loaded. options: of the method, as `adapter_options` has them.
    target_modules, rank_pattern, alpha_pattern, Raises: as in `apply_qlora`; also if the method has no such option or
    wants statistics.
    """
    if method not in ADAPTERS:
        raise ValueError(f"apply_adapter: unknown method {method!r}; required one of {', '.join(ADAPTERS)}")
    kind = ADAPTERS[method]
    options = read_options(method, options)
    patterns = {"rank": rank_pattern or {}, "alpha": alpha_pattern or {}}
    read_options(method, {name: 1 for name, pattern in patterns.items() if pattern})
    targets = _targets("apply_adapter", model, target_modules)
    replacements: dict[int, AdaptedLinear] = {}
    sites = [
        Site(path, index, len(targets), linear.in_features, linear.out_features)
        for index, (path, linear) in enumerate(targets)
    ]
    bank = kind.bank(sites, **options)
    shared = () if bank is None else (bank.to(targets[0][1].weight.device),)
    for site, (path, linear) in zip(sites, targets, strict=True):
        if _is_quantized(linear):
            raise ValueError(f"apply_adapter: {path} is in 4 bits already; {method} starts from the dense weight")
        chosen = {name: matched(pattern, path, None) for name, pattern in patterns.items()}
        chosen = {**options, **{name: value for name, value in chosen.items() if value is not None}}
        adapter = kind(site, *shared, **chosen).to(linear.weight.device)
        found = (statistics or {}).get(path)
        if start:
            if kind.needs_statistics(**chosen) and found is None:
                raise ValueError(f"apply_adapter: {method} starts from statistics; {path} has none (gather_statistics)")
            adapter.start(linear.weight.detach().float(), found)
        four_bits = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
        replacements[id(linear)] = adapter_over(
            linear, adapter, chosen, dropout=dropout, four_bits=four_bits if quantize else None
        )
    _freeze(model)
    _swap(model, replacements)
    return model


def adapter_options(method: str) -> dict[str, Any]:
    """The options of a method in `harlora.nn.adapters.ADAPTERS`, with their defaults."""
    parameters = signature(ADAPTERS[method]).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.kind is entry.KEYWORD_ONLY}


def read_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of a method, some perhaps as text, such as ``"0.5"``, ``"true"`` or ``"1,2,4"``, as it takes them.

    Raises: ValueError if the method has no such option, or a value is not of its type.
    """
    known = adapter_options(method)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}; required some of {', '.join(known) or 'none'}")
    read: dict[str, Any] = {}
    for name, value in options.items():
        kind: type = type(known[name])
        try:
            if kind is tuple:
                parts = value.split(",") if isinstance(value, str) else value
                read[name] = tuple(int(part) if str(part).isdigit() else part for part in parts)
            elif kind is bool:
                read[name] = {"true": True, "false": False}[str(value).lower()]
            elif kind is str or isinstance(value, str) or (kind is float and isinstance(value, (int, float))):
                read[name] = kind(value)
            elif type(value) is kind:
                read[name] = value
            else:
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{method}: {name} must be of type {kind.__name__}, got {value!r}") from error
    return read


def gather_statistics(
    model: nn.Module, target_modules: Sequence[str] | str, losses: Iterable[Tensor]
) -> dict[str, Statistics]:
    """What the gradients of ``losses`` in the weights of the target layers are, by path.

    losses: a scalar a batch, each computed by ``model`` as it is asked for, so a generator.
    target_modules, Raises: as in `apply_qlora`; also if there is no loss. The model is unchanged.
    """
    targets = _targets("gather_statistics", model, target_modules)
    weights = [linear.weight for _, linear in targets]
    trained = [weight.requires_grad for weight in weights]
    summed = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    squared = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    sensitivity = [0.0] * len(weights)
    count = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for loss in losses:
            count += 1
            for index, gradient in enumerate(torch.autograd.grad(loss, weights)):
                summed[index] += gradient
                squared[index] += gradient.float().square()
                sensitivity[index] += float((gradient * weights[index].detach()).abs().mean())
    finally:
        for weight, before in zip(weights, trained, strict=True):
            weight.requires_grad_(before)
    if not count:
        raise ValueError("gather_statistics: losses has none; give one loss or more")
    return {
        path: Statistics(total / count, squares, product / count)
        for (path, _), total, squares, product in zip(targets, summed, squared, sensitivity, strict=True)
    }


def penalty(model: nn.Module) -> Callable[[], Tensor] | None:
    """What the loss of ``model`` is to be raised by in each step, or None where its adapters want nothing."""
    adapters = [layer.adapter for _, layer in adapted_layers(model) if layer.adapter is not None]
    wanting = [adapter for adapter in adapters if type(adapter).penalty is not Adapter.penalty]
    return (lambda: torch.stack([adapter.penalty() for adapter in wanting]).sum()) if wanting else None


def schedule(model: nn.Module) -> Schedule | None:
    """What the adapters of ``model`` want done after each step of training, or None.

    Raises: ValueError if those of several methods want something.
    """
    layers: dict[type[Adapter], list[AdaptedLinear]] = {}
    for _, layer in adapted_layers(model):
        if layer.adapter is not None:
            layers.setdefault(type(layer.adapter), []).append(layer)
    wanting = [kind for kind in layers if kind.schedule.__func__ is not Adapter.schedule.__func__]  # type: ignore[attr-defined]
    if len(wanting) > 1:
        raise ValueError(
            f"schedule: one method may have one, got {' and '.join(kind.name for kind in wanting)}; train them apart"
        )
    return wanting[0].schedule(layers[wanting[0]]) if wanting else None


def adapter_over(
    linear: nn.Linear,
    adapter: Adapter,
    options: Mapping[str, Any],
    *,
    dropout: float,
    four_bits: Mapping[str, Any] | None = None,
) -> AdaptedLinear:
    """A layer with ``adapter``, which was made with ``options``, over the weight of ``linear``.

    four_bits: the format to quantise the weight to, as `quantize_4bit` takes it, or None.
    """
    adapter.options = dict(options)
    weight = linear.weight.detach().float()
    base = adapter.base(weight)
    changed = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    changed.weight = linear.weight if base is weight else nn.Parameter(base.to(linear.weight.dtype))
    changed.bias = linear.bias
    layer: AdaptedLinear
    if four_bits is None:
        layer = LoRALinear.from_linear(changed, rank=0, dropout=dropout)
    else:
        layer = QLoRALinear.from_linear(changed, rank=0, dropout=dropout, **four_bits)
    return layer.attach(adapter).train(linear.training)


def merge_adapters(model: Model) -> Model:
    """``model`` itself, every adapted layer replaced by the ``nn.Linear`` it merges to, in place."""
    if any(getattr(module, "input_dependent", False) for module in model.modules()):
        raise ValueError(
            "merge_adapters: which adapter a pool uses depends on its input; merge a model with one adapter"
        )
    merged = {id(layer): layer.merge() for layer in model.modules() if isinstance(layer, AdaptedLinear)}
    if id(model) in merged:
        raise ValueError("merge_adapters: model is itself an adapted layer; call its merge()")
    _swap(model, merged)
    return model


@contextmanager
def at_rank(model: nn.Module, rank: int, *, squeezed: bool = False) -> Iterator[None]:
    """``model`` with every low-rank change of at most ``rank``, until the context ends.

    Of each change the first ``rank`` rows and columns stay, with the factor for that rank where a method has one; or,
    squeezed, it is the nearest change of that rank (LoRA-Squeeze).
    Raises: ValueError unless the adapters are those of LoRA, MatryoshkaLoRA or DyLoRA and ``rank`` is 1 or more.
    """
    if rank < 1:
        raise ValueError(f"at_rank: rank must be at least 1, got {rank}")
    lowered: list[tuple[Tensor, Tensor, LowRank, float]] = []
    for path, layer in adapted_layers(model):
        adapter = layer.adapter
        A: Tensor
        B: Tensor
        if adapter is None:
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            A, B = layer.lora_A, layer.lora_B
            change = LowRank(A, B, layer.scaling)
        elif type(adapter) is LoRA or isinstance(adapter, Nested):
            A, B = adapter.A, adapter.B
            change = adapter.cut(adapter.served) if isinstance(adapter, Nested) else LowRank(A, B, adapter.scale)
        else:
            raise ValueError(f"at_rank: {adapter.name} at {path} cannot be cut; required lora, matryoshka or dylora")
        least, scale = min(rank, len(change.A)), change.scale
        if squeezed:
            change = squeeze(change, least)
        elif isinstance(adapter, Nested):
            change = adapter.cut(least)
        else:
            change = LowRank(A[:least], B[:, :least], scale)
        lowered.append((A, B, change, scale))
    with torch.no_grad():
        before = [(A.clone(), B.clone()) for A, B, *_ in lowered]
        changed = [(change.A * (change.scale / scale), change.B.clone()) for _, _, change, scale in lowered]
        try:
            for (A, B, *_), (newA, newB) in zip(lowered, changed, strict=True):
                A.zero_()[: len(newA)] = newA
                B.zero_()[:, : len(newA)] = newB
            yield
        finally:
            for (A, B, *_), (oldA, oldB) in zip(lowered, before, strict=True):
                A.copy_(oldA)
                B.copy_(oldB)


def matched(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key of ``pattern`` that matches ``path`` or its end after a ``.``, as PEFT does it."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def _replace(
    function: str, model: Model, target_modules: Sequence[str] | str, adapt: Callable[[str, nn.Linear], AdaptedLinear]
) -> Model:
    # A layer that the model holds under two paths stays one layer.
    replacements = {id(layer): adapt(path, layer) for path, layer in _targets(function, model, target_modules)}
    _freeze(model)
    _swap(model, replacements)
    return model


def _freeze(model: nn.Module) -> None:
    """All parameters but those of adapters that are there already, which stay as they are."""
    adapters: set[int] = set()
    for _, layer in adapted_layers(model):
        own = layer.adapter.parameters() if layer.adapter is not None else (layer.lora_A, layer.lora_B)
        adapters |= {id(parameter) for parameter in own}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def _swap(model: nn.Module, replacements: dict[int, AdaptedLinear] | dict[int, nn.Linear]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() has one that is used twice once
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    _run_every_layer(model)


def _run_every_layer(model: nn.Module) -> None:
    """Switch off the fast path of every ``nn.TransformerEncoderLayer`` with a part that is no plain layer any more.

    It reads weights without running the layers that hold them; an ``nn.TransformerEncoder`` prepares its input.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            parts = (module.linear1, module.linear2, module.norm1, module.norm2)
            if any(type(part) not in (nn.Linear, nn.LayerNorm) for part in parts):
                module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            getattr(layer, "activation_relu_or_gelu", 1) == 0 for layer in module.layers
        ):
            module.use_nested_tensor = False


def _matches(path: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _targets(function: str, model: nn.Module, target_modules: Sequence[str] | str) -> list[tuple[str, nn.Linear]]:
    everything = target_modules == ALL_LINEAR
    unusable: dict[int, str] = {}  # output projections of nn.MultiheadAttention, by their path
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            unusable[id(module.out_proj)] = f"{path}.out_proj".removeprefix(".")
    if everything and unusable:
        warnings.warn(
            f"{function}: the output projections of nn.MultiheadAttention get no adapter, since that module reads "
            f"their weight without running them: {', '.join(unusable.values())}",
            UserWarning,
            stacklevel=4,
        )
    found: list[tuple[str, nn.Linear]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if everything:
            wanted = (type(module) is nn.Linear or _is_quantized(module)) and id(module) not in unusable
        else:
            wanted = _matches(path, target_modules)
        if not wanted or any(module is other for _, other in found):
            continue
        if module is model:
            raise ValueError(f"{function}: model is itself the layer to replace; use from_linear on it")
        if id(module) in unusable:
            raise ValueError(
                f"{function}: target_modules names {path}, the output projection of an nn.MultiheadAttention, which "
                "reads its weight without running the layer: an adapter there would never train; use an attention "
                "with separate q, k, v and o layers, or leave it out"
            )
        if isinstance(module, AdaptedLinear):
            raise ValueError(f"{function}: {path} carries an adapter already; merge_adapters(model) first")
        if type(module) is not nn.Linear and not _is_quantized(module):
            raise ValueError(f"{function}: {path} must be an nn.Linear to carry an adapter, got {type(module)}")
        assert isinstance(module, nn.Linear)
        found.append((path, module))
    if not found:
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"{function}: target_modules={target_modules!r} matches no layer; the model's linear layers are: "
            f"{_shortened(linears) or 'none'}"
        )
    return found


def _shortened(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f", … ({len(listed)} in all)" if len(listed) > most else "")
