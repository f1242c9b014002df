"""Putting adapters into any model: choose layers by name, replace, freeze, merge."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from harlora.nn.linear import AdaptedLinear, LoRALinear, QLoRALinear, _is_quantized

Model = TypeVar("Model", bound=nn.Module)

ALL_LINEAR = "all-linear"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Every layer of ``model`` that carries an adapter, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.rank:
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

    target_modules: as in PEFT. A list of names, each matching a layer whose path is it or ends in ``.`` and it; or a
    regular expression that a whole path must match; or ``"all-linear"``.
    rank_pattern, alpha_pattern: as in PEFT, other values for the layers whose path a key matches, as a regular
    expression for all of the path or for its end after a ``.``.
    The other arguments are those of `QLoRALinear`.
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


def merge_adapters(model: Model) -> Model:
    """``model`` itself, every adapted layer replaced by the ``nn.Linear`` it merges to, in place."""
    merged = {id(layer): layer.merge() for layer in model.modules() if isinstance(layer, AdaptedLinear)}
    if id(model) in merged:
        raise ValueError("merge_adapters: model is itself an adapted layer; call its merge()")
    _swap(model, merged)
    return model


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
    model.requires_grad_(False)
    _swap(model, replacements)
    return model


def _swap(model: nn.Module, replacements: dict[int, AdaptedLinear] | dict[int, nn.Linear]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


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
