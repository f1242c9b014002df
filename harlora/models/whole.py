"""Several layers of an encoder in one call of the compiled CPU kernels, or in one launch or recording on a GPU.

At HAR size the modules around the products cost more than the products. For inference on a CPU `encode` hands all
layers of an `Encoder` to one operator; on a GPU `encode_tokens` hands over the blocks and the last norm, in training
too. Elsewhere `attend` takes q, k, v and attention together, `feed_forward` fc1, GELU and fc2; on a GPU `attend` takes
q, k and v in one launch, `feed_forward` its two layers. Where anything about the layers is out of the ordinary they
return None and the modules run one by one.
"""

from itertools import chain, repeat
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.kernels import eager, gpu
from harlora.nn.linear import LoRALinear, QLoRALinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Plan:
    """Where the tensors of an encoder are, and everything else about it that decides what it computes.

    Tensors are looked up anew in each call, since `.to()`, loading and training may replace them; the rest is compared
    with what it was when the plan was made.
    """

    def __init__(self, encoder: nn.Module) -> None:
        from harlora.models import mae  # which imports this module

        config: Any = encoder.config
        blocks: Any = encoder.blocks
        self.slots: list[tuple[dict[str, Any], str]] = []  # of the tensors, in the operator's order
        self.absent: list[tuple[dict[str, Any], str]] = []
        self.attentions: list[Any] = []
        self.facts = [len(blocks), config.width, config.heads, config.ffn]
        self.factors: list[float] = []
        self.adapted: list[Any] = []
        self.quantized: list[QLoRALinear] = []
        self.norms: list[nn.LayerNorm] = []
        self.usable = True
        self.held: eager.HeldEncoder | None = None
        self.refused: list[Any] | None = None  # kinds of tensors that the operator did not take
        self._linear(encoder.patch_embed)
        self.usable &= self._slot(encoder._buffers, "positions") and type(encoder) is mae.Encoder
        for block in blocks:
            if type(block) is not mae.Block or type(block.attention) is not mae.Attention:
                self.usable = False  # it may compute something else from the same layers
                break
            attention = block.attention
            self.attentions.append(attention)
            self.usable &= attention.heads == config.heads
            self._norm(block.norm1)
            for layer in (attention.q, attention.k, attention.v, attention.o):
                self._linear(layer)
            self._norm(block.norm2)
            self._linear(block.fc1)
            self._linear(block.fc2)
        self._norm(encoder.norm)
        self.blocks, self.block_slots = self._on_gpu(encoder)
        modules = list(encoder.modules())
        self.places = [(module._modules, name) for module in modules for name in module._modules]
        self.modules = [places[name] for places, name in self.places]
        self.hooks = [getattr(module, hooks) for module in modules[1:] for hooks in _HOOKS]
        self.attributes = [vars(module) for module in modules[1:]]
        self.settings = self._settings()

    def _slot(self, tensors: dict[str, Any], name: str) -> bool:
        present = tensors.get(name) is not None
        (self.slots if present else self.absent).append((tensors, name))
        return present

    def _linear(self, layer: Any) -> None:
        if type(layer) not in (nn.Linear, LoRALinear, QLoRALinear) or "bias" not in layer._parameters:
            self.usable = False
            return
        self.usable &= not layer._modules  # factors of other adapters are not held, but computed
        nested = False
        if isinstance(layer, QLoRALinear):
            self.usable &= self._slot(layer._buffers, "weight") and self._slot(layer._buffers, "absmax")
            self.slots.append((eager.codes(), layer.quant_type))
            nested = self._slot(layer._buffers, "nested_absmax") and self._slot(layer._buffers, "nested_offset")
            if nested:
                self.slots.append((eager.codes(), "nested"))
            self.quantized.append(layer)
        else:
            self.usable &= self._slot(layer._parameters, "weight")
        bias = self._slot(layer._parameters, "bias")
        rank = 0
        if not isinstance(layer, nn.Linear):
            self.adapted.append(layer)
            rank = layer.rank
            if rank:
                self.usable &= self._slot(layer._parameters, "lora_A") and self._slot(layer._parameters, "lora_B")
                self.factors.append(layer.scaling)
                self.usable &= not (layer.dropout and layer.training)
        self.facts += [layer.blocksize if isinstance(layer, QLoRALinear) else 0, nested, bias, rank]

    def _norm(self, norm: Any) -> None:
        if type(norm) is not nn.LayerNorm:
            self.usable = False
            return
        self.usable &= self._slot(norm._parameters, "weight") and self._slot(norm._parameters, "bias")
        self.factors.append(norm.eps)
        self.norms.append(norm)

    def _on_gpu(self, encoder: Any) -> tuple[gpu.Blocks | None, list[tuple[dict[str, Any], str]]]:
        """The blocks as `gpu` takes them, None where not all layers are in 4 bits, and the slots of their tensors."""
        layers = [
            layer
            for block in encoder.blocks
            for layer in (*(getattr(block.attention, name) for name in "qkvo"), block.fc1, block.fc2)
        ] if self.usable else []  # fmt: skip
        if not layers or any(type(layer) is not QLoRALinear for layer in layers):
            return None, []
        facts = tuple(
            (
                layer.quant_type, layer.blocksize, layer.out_features, layer.scaling, layer.nested_absmax is not None,
                layer.bias is not None, layer.rank > 0,
            )
            for layer in layers
        )  # fmt: skip
        first = next(i for i, (places, _) in enumerate(self.slots) if places is self.norms[0]._parameters)
        slots = [slot for slot in self.slots[first:] if slot[0] is not eager.codes()]
        return gpu.blocks_of(encoder.config.heads, facts, tuple(norm.eps for norm in self.norms)), slots

    def _settings(self) -> list[Any]:
        # Flat: tuples of each layer would set the garbage collector to work every few calls.
        adapted, quantized = self.adapted, self.quantized
        return [
            *[layer.rank for layer in adapted],
            *[layer.alpha for layer in adapted],
            *[layer.rslora for layer in adapted],
            *[layer.dropout for layer in adapted],
            *[layer.training for layer in adapted],
            *[layer.quant_type for layer in quantized],
            *[layer.blocksize for layer in quantized],
            *[norm.eps for norm in self.norms],
            *[attention.heads for attention in self.attentions],
        ]

    def holds(self) -> bool:
        """Whether the encoder is still as it was when the plan was made, up to the values and places of tensors."""
        return (
            [places.get(name) for places, name in self.places] == self.modules
            and self._settings() == self.settings
            and all(tensors.get(name) is None for tensors, name in self.absent)
        )

    def watched(self) -> bool:
        """Whether someone looks at, or changed, what a layer does when it is called."""
        return any(self.hooks) or any("forward" in attributes for attributes in self.attributes)


_plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _plan(encoder: nn.Module) -> _Plan | None:
    """The plan of ``encoder`` as it is now, or None where its modules have to run."""
    plan = _plans.get(encoder)
    if plan is None or not plan.holds():
        plan = _plans[encoder] = _Plan(encoder)
    if not plan.usable or plan.watched() or nn.modules.module._has_any_global_hook():
        return None
    return plan


def encode(encoder: nn.Module, patches: Tensor) -> Tensor | None:
    """What ``encoder`` makes of ``patches``, ``(batch, tokens, width)``, or None where its modules have to run.

    patches: ``(batch, tokens, patch_size · channels)``, float32.
    """
    if torch.compiler.is_compiling() or not eager.serves(patches) or patches.dtype is not torch.float32:
        return None
    plan = _plan(encoder)
    if plan is None:
        return None
    try:
        tensors = [place[name] for place, name in plan.slots]
    except KeyError:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in chain((patches,), tensors)):
        return None
    if plan.refused is not None and plan.refused == _kinds(tensors):
        return None
    if plan.held is None or not all(map(is_, plan.held.tensors, tensors)):
        if any(tensor is None for tensor in tensors):  # a bias was taken away: the plan is another one now
            plan = _plans[encoder] = _Plan(encoder)
            return encode(encoder, patches)
        plan.held = eager.HeldEncoder(tensors, plan.facts, plan.factors)
    encoded = plan.held(patches)
    if encoded is None:
        plan.refused = _kinds(tensors)
    return encoded


def encode_tokens(encoder: nn.Module, tokens: Tensor) -> Tensor | None:
    """What the blocks and the last norm of ``encoder`` make of ``tokens``, or None where the modules have to run.

    tokens: ``(batch, tokens, width)``.
    """
    if not gpu.serves_blocks(tokens):
        return None
    plan = _plan(encoder)
    if plan is None or plan.blocks is None:
        return None
    tensors: list[Any] = [places.get(name) for places, name in plan.block_slots]
    if any(map(is_, tensors, repeat(None))):  # a bias was taken away: the next call makes another plan
        del _plans[encoder]
        return None
    return gpu.encoder_blocks(tokens, tensors, plan.blocks)


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.device.type, tensor.shape) for tensor in tensors]


def _layers(*modules: Any) -> list[eager.Layer] | None:
    """What `eager` takes of 4-bit layers, or None unless calling each does nothing but compute."""
    layers: list[eager.Layer] = []
    for module in modules:
        attributes = vars(module)
        if (
            type(module) is not QLoRALinear
            or "forward" in attributes
            or any(attributes[hooks] for hooks in _HOOKS)
            or (module.dropout and module.training and (module.rank or module._modules))
        ):
            return None
        try:
            layers.append(module.operands())
        except KeyError:  # a parametrised layer keeps its parameters elsewhere
            return None
    return None if nn.modules.module._has_any_global_hook() else layers


def attend(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, heads: int) -> Tensor | None:
    """Attention of ``q(x)``, ``k(x)`` and ``v(x)``, or None where the modules have to run.

    x: ``(windows, tokens, width)``; on a CPU float32.
    """
    # Asked first, so that no product is computed twice.
    on_cpu = not torch.compiler.is_compiling() and eager.attention_serves(x)
    if not on_cpu and not gpu.serves(x):
        return None
    layers = _layers(q, k, v)
    if layers is None:
        return None
    if on_cpu:
        projected = eager.qlora_qkv(x, *layers)
        return None if projected is None else eager.attention(*projected, heads)
    projections = gpu.qlora_qkv(x, layers[0], layers[1], layers[2])
    if projections is None:
        return None
    split = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projections)
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)


def feed_forward(x: Tensor, fc1: nn.Module, fc2: nn.Module) -> Tensor | None:
    """``fc2(gelu(fc1(x)))``, or None where the modules have to run."""
    on_cpu = not torch.compiler.is_compiling() and eager.serves(x)
    if not on_cpu and not gpu.serves(x):
        return None
    layers = _layers(fc1, fc2)
    if layers is None:
        return None
    return (eager if on_cpu else gpu).qlora_mlp(x, *layers)
