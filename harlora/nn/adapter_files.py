"""Adapters on disk, in PEFT's file format: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA is written as PEFT reads it. Adapters of other methods have their own ``peft_type``, by which PEFT refuses them.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harlora.errors import InputError
from harlora.files import read_json, replacing, write_text
from harlora.nn.adapters import ADAPTERS, Adapter, LowRank, Site
from harlora.nn.apply import _swap, adapted_layers, adapter_options, adapter_over, matched, read_options
from harlora.nn.linear import AdaptedLinear, LoRALinear, QLoRALinear

Model = TypeVar("Model", bound=nn.Module)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_TYPE = "HARLORA"
_PREFIX = "base_model.model."
# Settings of PEFT's LoraConfig that change what the stored numbers mean, with the only values understood here.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),  # others change the base
}


def save_adapter(model: nn.Module, path: Path | str, *, as_lora: bool = False) -> None:
    """Write everything trained in ``model`` to the folder ``path``.

    That is what the adapters train, the biases of their layers if one of them trains, weights under adapters that
    train, and every other module that holds a trainable parameter: as PEFT's ``modules_to_save`` one of which all
    trains, of one that adapted layers lie in, or with frozen parameters, the tensors that do. PEFT and `load_adapter`
    read LoRA; an adapter of another method is written as it is, which `load_adapter` reads.

    as_lora: write the change that such an adapter makes as the factors of a LoRA, for PEFT.
    Raises: ValueError if no layer carries an adapter or the model is itself the layer, some are LoRA and some are not,
    or with ``as_lora`` one changes its weight in more than by a low-rank matrix, or is over another weight than the
    model's own where that is quantised or trains.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("save_adapter: no layer of the model carries an adapter; apply_qlora or apply_lora first")
    if "" in layers:
        raise ValueError("save_adapter: model is itself an adapted layer; give a model that holds it under a name")
    others = [name for name, layer in layers.items() if layer.adapter is not None]
    if others and len({getattr(layer.adapter, "name", None) for layer in layers.values()}) > 1:
        raise ValueError(f"save_adapter: the layers must have one method, got several, one of them at {others[0]}")
    tensors: dict[str, Tensor] = {}
    with_bias = any(layer.bias is not None and layer.bias.requires_grad for layer in layers.values())
    lora: dict[str, LowRank] = {}
    for name, layer in layers.items():
        if layer.adapter is not None and not as_lora:
            tensors |= {f"{_PREFIX}{name}.adapter.{key}": value for key, value in layer.adapter.file_state().items()}
        else:
            lora[name] = lora_change(name, layer)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = lora[name].A
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora[name].B
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            within += (f"{name}.",)
            owner = f"{_PREFIX}{name}.base_layer" if name in layers else f"{_PREFIX}{name}"
            if module.bias is not None and (module.bias.requires_grad or (with_bias and name in layers)):
                tensors[f"{owner}.bias"] = module.bias
            if isinstance(module, LoRALinear) and module.weight.requires_grad:
                if name in lora and module.adapter is not None and type(module.adapter).base is not Adapter.base:
                    raise ValueError(
                        f"save_adapter: the weight at {name} trains, which {module.adapter.name} took a part of; "
                        "save_adapter without as_lora, or merge_adapters(model)"
                    )
                tensors[f"{owner}.weight"] = module.weight
    whole = []
    for name, module in model.named_modules():
        trains = [p.requires_grad for p in module.parameters(recurse=False)]
        if isinstance(module, AdaptedLinear) or name.startswith(within) or not any(trains):
            continue
        frozen = {key for key, p in module.named_parameters(recurse=False) if not p.requires_grad}
        # PEFT would copy all that is in it, for a bias that trains the weight too.
        in_part = bool(frozen) or any(isinstance(part, AdaptedLinear) for part in module.modules())
        whole += [] if in_part else [name]
        for key, value in module.state_dict().items():
            if not in_part or ("." not in key and key not in frozen):  # what is within is saved by itself
                tensors[f"{_PREFIX}{name}.{key}" if name else f"{_PREFIX}{key}"] = value
    first = next(iter(layers.values()))
    config: dict[str, Any] = {
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "lora_dropout": first.dropout,
        "bias": "lora_only" if with_bias else "none",
        # A list would match any path that ends in one of them, for example the decoder's blocks.
        "target_modules": "|".join(re.escape(name) for name in layers),
        "modules_to_save": whole or None,
    }
    if lora:
        if len({layer.rslora for layer in layers.values()}) > 1:
            raise ValueError("save_adapter: PEFT's format has one use_rslora for all layers, the model has both")
        ranks = {name: len(factors.A) for name, factors in lora.items()}
        alphas = {
            name: layer.alpha if layer.adapter is None else lora[name].scale * ranks[name]
            for name, layer in layers.items()
        }
        rank, alpha = (next(iter(values.values())) for values in (ranks, alphas))
        config |= {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": first.rslora and first.adapter is None,
            "use_dora": False,
            "fan_in_fan_out": False,
            # From the beginning of the path, or a key would match every path that ends in it.
            "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank},
            "alpha_pattern": {f"^{re.escape(name)}": own for name, own in alphas.items() if own != alpha},
        }
    else:
        made = {name: layer.adapter for name, layer in layers.items() if layer.adapter is not None}
        config |= {
            "peft_type": OWN_TYPE,
            "method": next(iter(made.values())).name,
            "options": {name: adapter.options for name, adapter in made.items()},
            "shapes": {name: [layer.out_features, layer.in_features] for name, layer in layers.items()},
        }
    folder = Path(path)
    with replacing(folder / WEIGHTS_FILE) as temporary:
        # Clones, since safetensors refuses two names of one tensor, such as tied weights have.
        stored = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(stored, temporary)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def lora_change(name: str, layer: AdaptedLinear) -> LowRank:
    """The change of a layer's own weight, at the path ``name``, as LoRA's factors.

    Raises: ValueError if it is more than that.
    """
    if layer.adapter is None:
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        return LowRank(layer.lora_A, layer.lora_B, layer.scaling)
    changed = layer.adapter.change(layer)
    if changed is None:
        raise ValueError(
            f"{layer.adapter.name} at {name} is not a low-rank change of the weight that the model had; save_adapter "
            "without as_lora, or merge_adapters(model)"
        )
    return changed


def stored_names(folder: Path) -> set[str]:
    """The names in the model of the tensors that an adapter's file has; none if it cannot be read."""
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return {key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, OSError):
        return set()  # load_adapter says so


def load_adapter(model: Model, path: Path | str) -> Model:
    """``model`` itself with the adapter in the folder ``path``, as `save_adapter` or PEFT wrote it.

    A layer that carries an adapter of the method already, with the same options, takes the stored one, whatever its
    base; a plain ``nn.Linear`` becomes a `LoRALinear`, a `QLoRALinear` of rank 0 one with the adapter. Biases and whole
    modules in the file replace those of the model. Adapters of layers that the file does not have stay as they are.

    Raises: InputError, with the model unchanged, if a file is missing or damaged, a stored layer is not in the model,
    has another shape or an adapter with other options, or the adapter is of a kind that is not understood.
    """
    folder = Path(path)
    remedy = "give the folder that save_adapter or PEFT's save_pretrained wrote"
    config = read_json(folder / CONFIG_FILE, remedy)
    own = isinstance(config, dict) and config.get("peft_type") == OWN_TYPE
    if own:
        if config.get("method") not in ADAPTERS or not isinstance(config.get("options"), dict):
            raise InputError(
                f"{folder / CONFIG_FILE}: method must be one of {', '.join(ADAPTERS)} and options say with what, got "
                f"{config.get('method')!r}; {remedy}"
            )
    else:
        for key in ("r", "lora_alpha"):
            if not isinstance(config, dict) or not isinstance(config.get(key), (int, float)):
                raise InputError(f"{folder / CONFIG_FILE}: has no {key}; {remedy}")
        for key, values in _MUST_BE.items():
            if config.get(key, values[0]) not in values:
                convert = (
                    "; the adapter is over a weight that PEFT changed: write it with save_pretrained(folder, "
                    "path_initial_model_for_weight_conversion=...)"
                )
                raise InputError(
                    f"{folder / CONFIG_FILE}: {key} must be {' or '.join(map(repr, values))}, got {config[key]!r}"
                    f"{convert if key == 'init_lora_weights' else ''}"
                )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise InputError(f"{folder / WEIGHTS_FILE}: no such file; {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE}: not a complete safetensors file ({error}); {remedy}") from error

    new_layers, copies = (_plan_own if own else _plan)(model, folder / WEIGHTS_FILE, config, tensors)
    _swap(model, new_layers)
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    return model


def _plan(
    model: nn.Module, file: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[int, AdaptedLinear], list[tuple[Tensor, Tensor]]]:
    """The layers to replace, by identity of the old one, and the tensors to copy; raises before anything changes."""
    modules = dict(model.named_modules())
    layers: dict[str, AdaptedLinear] = {}
    new_layers: dict[int, AdaptedLinear] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    adapted = {m[1] for key in tensors if (m := re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight", key))}
    if not adapted:
        raise InputError(f"{file}: has no key like {_PREFIX}….lora_A.weight; required a LoRA adapter")
    for name in sorted(adapted):
        old = modules.get(name)
        rank = matched(config.get("rank_pattern"), name, config["r"])
        alpha = matched(config.get("alpha_pattern"), name, config["lora_alpha"])
        rslora = bool(config.get("use_rslora"))
        dropout = float(config.get("lora_dropout", 0.0))
        if isinstance(old, QLoRALinear) and not old.rank and old.adapter is None:
            layers[name] = new_layers[id(old)] = old.over_same(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        elif isinstance(old, AdaptedLinear):
            if old.rank != rank or not math.isclose(old.scaling, alpha / (math.sqrt(rank) if rslora else rank)):
                raise InputError(
                    f"{file}: {name} has rank {rank}, alpha {alpha:g} and use_rslora {rslora}, the model has rank "
                    f"{old.rank}, alpha {old.alpha:g} and rslora {old.rslora}; apply the adapter with the file's"
                )
            layers[name] = old
        elif type(old) is nn.Linear:
            layers[name] = LoRALinear.from_linear(old, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
            new_layers[id(old)] = layers[name]
        else:
            raise InputError(
                f"{file}: {name} must be a linear layer of the model, found "
                f"{'no such module' if old is None else type(old)}; the adapter belongs to another model"
            )
    for key, value in tensors.items():
        name, _, attribute = key.removeprefix(_PREFIX).rpartition(".")
        if attribute == "weight" and name.endswith((".lora_A", ".lora_B")):
            layer_name, _, attribute = name.rpartition(".")
            target = getattr(layers[layer_name], attribute)
        else:
            target = _beside(modules, layers, name, attribute)
        copies.append((_fitting(file, key, target, value), value))
    for name in sorted(adapted):
        for part in ("lora_A", "lora_B"):
            if f"{_PREFIX}{name}.{part}.weight" not in tensors:
                raise InputError(f"{file}: {name} has no {part}; the file is incomplete")
    return new_layers, copies


def _beside(modules: dict[str, nn.Module], layers: dict[str, AdaptedLinear], name: str, attribute: str) -> Any:
    """A bias of an adapted layer, or a tensor of a module that was saved whole."""
    owner = name.removesuffix(".base_layer")
    return getattr(layers.get(owner, modules.get(owner)), attribute, None)


def _fitting(file: Path, key: str, target: Any, value: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise InputError(f"{file}: {key} has no counterpart in the model; the adapter belongs to another model")
    if target.shape != value.shape:
        raise InputError(
            f"{file}: {key} must have shape {tuple(target.shape)}, got {tuple(value.shape)}; "
            "the adapter belongs to another model"
        )
    return target


def _plan_own(
    model: nn.Module, file: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[int, AdaptedLinear], list[tuple[Tensor, Tensor]]]:
    """As `_plan`, of adapters of another method."""
    modules = dict(model.named_modules())
    kind = ADAPTERS[config["method"]]
    layers: dict[str, AdaptedLinear] = {}
    new_layers: dict[int, AdaptedLinear] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    seen: set[str] = set()
    sites: list[Site] = []
    for index, name in enumerate(config["options"]):
        old = modules.get(name)
        if not isinstance(old, AdaptedLinear) and type(old) is not nn.Linear:
            raise InputError(
                f"{file}: {name} must be a linear layer of the model, found "
                f"{'no such module' if old is None else type(old)}; the adapter belongs to another model"
            )
        assert isinstance(old, (AdaptedLinear, nn.Linear))
        sites.append(Site(name, index, len(config["options"]), old.in_features, old.out_features))
        shape = [old.out_features, old.in_features]
        if (stored_shape := config.get("shapes", {}).get(name, shape)) != shape:  # files had none before
            raise InputError(
                f"{file}: {name} must be a layer of (out_features, in_features) {tuple(stored_shape)}, the model's is "
                f"of {tuple(shape)}; the adapter belongs to another model"
            )
    options: dict[str, dict[str, Any]] = {}
    for name, given in config["options"].items():
        try:
            options[name] = read_options(config["method"], given)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{file}: {name} has options that {kind.name} does not take ({error})") from error
    try:
        bank = kind.bank(sites, **next(iter(options.values()), {}))
    except ValueError as error:
        raise InputError(f"{file}: is no {kind.name} adapter of this model ({error})") from error
    shared = () if bank is None else (bank,)
    held = [
        (path, layer.adapter.site.index)
        for path, layer in adapted_layers(model)
        if layer.adapter is not None and type(layer.adapter) is kind
    ]
    if bank is not None and held and held != [(site.path, site.index) for site in sites]:
        raise InputError(
            f"{file}: has {kind.name} adapters that share something, of {', '.join(options)}, the model of "
            f"{', '.join(path for path, _ in held)}; load into a model without adapters"
        )
    known = adapter_options(config["method"])
    for site in sites:
        name = site.path
        old = modules.get(name)
        start = f"{_PREFIX}{name}.adapter."
        stored = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        seen |= {start + key for key in stored}
        assert isinstance(old, (AdaptedLinear, nn.Linear))
        try:
            adapter = kind(site, *shared, **options[name])
        except (TypeError, ValueError) as error:
            raise InputError(f"{file}: {name} has options that {kind.name} does not take ({error})") from error
        for key, value in adapter.file_state().items():
            if key not in stored:
                raise InputError(f"{file}: {start}{key} is missing; the file is incomplete")
            if type(adapter).file_state is Adapter.file_state:
                _fitting(file, start + key, value, stored[key])
        try:
            adapter.load_file_state(stored)
        except (IndexError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{file}: {name} is no {kind.name} adapter of this model ({error})") from error
        for key, value in adapter.file_state().items():
            _fitting(file, start + key, value, stored[key])  # assigning may have broadcast what was stored
        assert isinstance(old.weight, Tensor)
        adapter.to(old.weight.device)
        adapter.options = options[name]
        if isinstance(old, QLoRALinear) and not old.rank and old.adapter is None:
            if kind.base is not Adapter.base:
                raise InputError(
                    f"{file}: {kind.name} at {name} is over another weight than the 4-bit one of the model; load into "
                    "a model with dense weights"
                )
            new = old.over_same(rank=0, dropout=config["lora_dropout"])
            layers[name] = new_layers[id(old)] = new.attach(adapter)
        elif isinstance(old, AdaptedLinear):
            mine = old.adapter
            if type(mine) is kind:
                held_options, given_options = ({**known, **one.options} for one in (mine, adapter))
                others = [key for key in known if given_options[key] != held_options[key]]
                if others:
                    raise InputError(
                        f"{file}: {name} has {kind.name} with "
                        f"{', '.join(f'{key} {given_options[key]!r}' for key in others)}, the model with "
                        f"{', '.join(f'{key} {held_options[key]!r}' for key in others)}; apply the adapter with the "
                        "file's options, or load into a model without adapters"
                    )
            if type(mine) is not kind or not mine.same_base(adapter):
                raise InputError(
                    f"{file}: {name} of the model has {'another base' if type(mine) is kind else 'no'} "
                    f"{kind.name} adapter; load into the model that it was saved from, or into one without adapters"
                )
            layers[name] = old
            read = adapter.state_dict()
            copies += [
                (_fitting(file, start + key, target, read[key]), read[key]) for key, target in mine.state_dict().items()
            ]
        else:
            layers[name] = new_layers[id(old)] = adapter_over(
                old, adapter, options[name], dropout=config["lora_dropout"]
            )
    for key, value in tensors.items():
        if key not in seen:
            name, _, attribute = key.removeprefix(_PREFIX).rpartition(".")
            copies.append((_fitting(file, key, _beside(modules, layers, name, attribute), value), value))
    return new_layers, copies
