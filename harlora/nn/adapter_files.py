"""Adapters on disk, in PEFT's file format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harlora.errors import InputError
from harlora.files import read_json, replacing, write_text
from harlora.nn.apply import _swap, adapted_layers, matched
from harlora.nn.linear import AdaptedLinear, LoRALinear

Model = TypeVar("Model", bound=nn.Module)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
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
}


def save_adapter(model: nn.Module, path: Path | str) -> None:
    """Write everything trained in ``model`` to the folder ``path``, so that PEFT and `load_adapter` can read it.

    That is lora_A and lora_B of every adapted layer, the biases of those layers if one of them trains, and, as PEFT's
    ``modules_to_save``, every other module that holds a trainable parameter.

    Raises: ValueError if no layer carries an adapter.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("save_adapter: no layer of the model carries an adapter; apply_qlora or apply_lora first")
    tensors: dict[str, Tensor] = {}
    with_bias = any(layer.bias is not None and layer.bias.requires_grad for layer in layers.values())
    for name, layer in layers.items():
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if with_bias and layer.bias is not None:
            tensors[f"{_PREFIX}{name}.base_layer.bias"] = layer.bias
    whole = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, AdaptedLinear) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    for name in whole:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = value
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    first = next(iter(layers.values()))
    if len({layer.rslora for layer in layers.values()}) > 1:
        raise ValueError("save_adapter: PEFT's format has one use_rslora for all layers, the model has both")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "lora_only" if with_bias else "none",
        # A list would match any path that ends in one of them, for example the decoder's blocks.
        "target_modules": "|".join(re.escape(name) for name in layers),
        "modules_to_save": whole or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != first.alpha},
    }
    folder = Path(path)
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load_adapter(model: Model, path: Path | str) -> Model:
    """``model`` itself with the adapter in the folder ``path``, as `save_adapter` or PEFT wrote it.

    A layer that carries an adapter already takes the stored one, whatever its base; a plain ``nn.Linear`` becomes a
    `LoRALinear`. Biases and whole modules in the file replace those of the model.

    Raises: InputError, with the model unchanged, if a file is missing or damaged, a stored layer is not in the model
    or has another shape, or the adapter is of a kind that is not understood.
    """
    folder = Path(path)
    remedy = "give the folder that save_adapter or PEFT's save_pretrained wrote"
    config = read_json(folder / CONFIG_FILE, remedy)
    for key in ("r", "lora_alpha"):
        if not isinstance(config, dict) or not isinstance(config.get(key), (int, float)):
            raise InputError(f"{folder / CONFIG_FILE}: has no {key}; {remedy}")
    for key, values in _MUST_BE.items():
        if config.get(key, values[0]) not in values:
            raise InputError(f"{folder / CONFIG_FILE}: {key} must be {values[0]!r}, got {config[key]!r}")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise InputError(f"{folder / WEIGHTS_FILE}: no such file; {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE}: not a complete safetensors file ({error}); {remedy}") from error

    new_layers, copies = _plan(model, folder / WEIGHTS_FILE, config, tensors)
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
        if isinstance(old, AdaptedLinear):
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
            owner = name.removesuffix(".base_layer")
            module = layers.get(owner, modules.get(owner))
            target = getattr(module, attribute, None)
        if not isinstance(target, Tensor):
            raise InputError(f"{file}: {key} has no counterpart in the model; the adapter belongs to another model")
        if target.shape != value.shape:
            raise InputError(
                f"{file}: {key} must have shape {tuple(target.shape)}, got {tuple(value.shape)}; "
                "the adapter belongs to another model"
            )
        copies.append((target, value))
    for name in sorted(adapted):
        for part in ("lora_A", "lora_B"):
            if f"{_PREFIX}{name}.{part}.weight" not in tensors:
                raise InputError(f"{file}: {name} has no {part}; the file is incomplete")
    return new_layers, copies
