"""Many adapters over one model: each sample of a batch uses its own, or none (S-LoRA, arXiv 2311.03285)."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.kernels import lora_pool_linear
from harlora.nn.adapter_files import load_adapter, lora_change, stored_names
from harlora.nn.apply import _run_every_layer, adapted_layers
from harlora.nn.linear import AdaptedLinear, QLoRALinear


class AdapterPool(nn.Module):
    """A model that computes each sample of a batch with the adapter named for it.

    model: without adapters, its 4-bit layers `QLoRALinear` of rank 0, or dense; it becomes part of the pool. One set of
        frozen weights serves all adapters. It should be on its device already.
    adapters: folders that `save_adapter` or PEFT wrote, by name. What else they hold, such as a head, norms or biases,
        is kept once for each and runs on its samples alone; so does a module that trains tensors of its own with all
        that is in it.
    mixed: all samples go through a layer together, whatever their adapters, which are of low rank and through one
        operator; or else the samples of each adapter go through the model by themselves, which then gives a tensor. By
        default the former on GPUs, for fewer launches (not timed on one yet), the latter on CPUs, where it is faster.
    names: the adapters, in the order that an index counts them.

    For inference: modules such as BatchNorm see the samples of one adapter as their batch.
    Raises: InputError as `load_adapter`; ValueError if there are no adapters, the model carries one, or one that is to
    be mixed changes a layer in more than by a low-rank matrix.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Path | str], *, mixed: bool | None = None) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("AdapterPool: adapters must name one folder or more, got none")
        if found := [path for path, _ in adapted_layers(model)]:
            raise ValueError(
                f"AdapterPool: model must be without adapters, got one at {found[0] or 'the model itself'}; give the "
                "model as it was before"
            )
        self.names = tuple(adapters)
        self.rows = _Rows()
        model.requires_grad_(False).eval()
        loaded = [load_adapter(_copied(model, Path(folder)), folder).eval() for folder in adapters.values()]
        if mixed is None:
            mixed = any(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
        self.model = _mixed(model, loaded, self.rows) if mixed else _PooledModule(model, loaded, self.rows)

    def index(self, names: list[str | None]) -> Tensor:
        """The index, ``(len(names),)``, of samples that are to use these adapters; None for none.

        Raises: ValueError if the pool has no adapter of such a name.
        """
        unknown = sorted({name for name in names if name is not None} - {*self.names})
        if unknown:
            raise ValueError(f"AdapterPool: names must be None or of {', '.join(self.names)}, got {', '.join(unknown)}")
        return torch.tensor([-1 if name is None else self.names.index(name) for name in names])

    @torch.no_grad()
    def forward(self, x: Tensor, index: Tensor) -> Any:
        """What the model computes of ``x``, ``(batch, ...)``, its first dimension that of the samples throughout.

        index: ``(batch,)``, int64, from 0 to the number of adapters - 1, or -1 for none.
        Raises: ValueError if it is not.
        """
        if index.shape != x.shape[:1] or index.dtype != torch.int64:
            raise ValueError(
                f"AdapterPool: index must be int64 of shape {tuple(x.shape[:1])}, got {index.dtype} of shape "
                f"{tuple(index.shape)}"
            )
        if len(index) and not -1 <= int(index.min()) <= int(index.max()) < len(self.names):
            raise ValueError(f"AdapterPool: index must be from -1 to {len(self.names) - 1}")
        self.rows.index = index.to(x.device)
        try:
            return self.model(x)
        finally:
            self.rows.index = None


def _copied(model: nn.Module, folder: Path) -> nn.Module:
    """The model once more, all tensors shared but those that the adapter in ``folder`` has its own values of."""
    stored = stored_names(folder)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {id(tensor) for name, tensor in tensors if name in stored}  # it may have another name too
    shared = {id(tensor): tensor for _, tensor in tensors if id(tensor) not in own}
    return copy.deepcopy(model, shared)


def _mixed(model: nn.Module, loaded: list[nn.Module], rows: "_Rows") -> nn.Module:
    """``model`` with every module that the adapters change replaced by one that serves them all."""
    own = dict(model.named_modules(remove_duplicate=False))
    pooled: dict[int, nn.Module] = {}  # by identity, since a module may be in several places
    whole: tuple[str, ...] = ()  # beginnings of the paths within modules that each adapter has its own version of
    for path, module in own.items():
        if path.startswith(whole):
            continue
        versions = [one.get_submodule(path) for one in loaded]
        if id(module) not in pooled:
            if any(isinstance(version, AdaptedLinear) for version in versions):
                pooled[id(module)] = _PooledLinear(path, module, versions, rows)
            elif any(_differs(module, version) for version in versions):
                pooled[id(module)] = _PooledModule(module, versions, rows)
            else:
                continue
        whole += (f"{path}.",)
        if not path:
            return pooled[id(module)]
        parent, _, name = path.rpartition(".")
        setattr(own[parent], name, pooled[id(module)])
    _run_every_layer(model)
    return model


class _Rows:
    """Which adapter each sample of the batch uses, while it runs."""

    index: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The index for every row of ``x``, ``(batch, ..., features)``: ``(batch, ...)``."""
        assert self.index is not None
        return self.index.view(-1, *[1] * (x.ndim - 2)).expand(x.shape[:-1])


def _differs(module: nn.Module, version: nn.Module) -> bool:
    """Whether the tensors that a module itself holds are not all the same."""
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            other = getattr(version, kind)[name]
            if tensor is not None and tensor.numel() and not torch.equal(tensor, other):
                return True
    return False


class _PooledLinear(nn.Module):
    """A linear layer with the low-rank change, and the bias, of each row's adapter."""

    input_dependent = True

    def __init__(self, path: str, own: nn.Module, versions: list[Any], rows: _Rows) -> None:
        super().__init__()
        self.rows = rows
        self.base = own
        changes = [lora_change(path, version) if _adapted(version) else None for version in versions]
        ranks = [0 if change is None else len(change.A) for change in changes]
        weight = own.base_weight() if isinstance(own, AdaptedLinear) else own.weight
        assert isinstance(weight, Tensor)
        empty = weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)
        pairs = [empty if change is None else (change.A.detach(), change.B.detach()) for change in changes]
        scales = [0.0 if change is None else float(change.scale) for change in changes]
        self.register_buffer("A", torch.cat([A for A, _ in pairs]))
        self.register_buffer("B", torch.cat([B for _, B in pairs], dim=1))
        self.register_buffer("offsets", torch.tensor([0, *ranks]).cumsum(0).to(weight.device))
        self.register_buffer("scaling", torch.tensor(scales, device=weight.device))
        biases = [None if version.bias is None else version.bias.detach() for version in versions]
        bias: Any = own.bias
        same = all(b is bias or (b is not None and bias is not None and torch.equal(b, bias)) for b in biases)
        # One row more, the layer's own, which index -1 finds at the end.
        self.register_buffer("biases", None if same else torch.stack([*biases, bias.detach()]))  # type: ignore[list-item]

    A: Tensor
    B: Tensor
    offsets: Tensor
    scaling: Tensor
    biases: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ..., out_features)``."""
        index = self.rows.of(x)
        base: Any = self.base
        bias = base.bias if self.biases is None else None
        if isinstance(base, QLoRALinear):
            y = lora_pool_linear(
                x, base.quantized_weight(), bias, self.A, self.B, self.offsets, index.contiguous(), self.scaling
            )
        else:
            owner = torch.bucketize(torch.arange(len(self.A), device=x.device), self.offsets[1:], right=True)
            t = F.linear(x, self.A.to(x.dtype)) * (owner == index[..., None]) * self.scaling[owner].to(x.dtype)
            y = F.linear(x, base.weight, bias) + F.linear(t, self.B.to(x.dtype))
        return y if self.biases is None else y + self.biases[index].to(y.dtype)


def _adapted(layer: Any) -> bool:
    return isinstance(layer, AdaptedLinear) and bool(layer.rank or layer.adapter is not None)


class _PooledModule(nn.Module):
    """A module of which each adapter has its own version."""

    input_dependent = True

    def __init__(self, own: nn.Module, versions: list[nn.Module], rows: _Rows) -> None:
        super().__init__()
        self.rows = rows
        self.versions = nn.ModuleList([*(version.requires_grad_(False) for version in versions), own])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with each sample through its own version."""
        assert self.rows.index is not None
        result: Tensor | None = None
        for which in self.rows.index.unique().tolist():
            chosen = self.rows.index == which
            y = self.versions[which](x[chosen])
            if result is None:
                result = y.new_empty(len(x), *y.shape[1:])
            result[chosen] = y
        return self.versions[-1](x) if result is None else result


class Router(nn.Module):
    """Chooses an adapter by features of the model without any: for example, where on the body a device is worn.

    A linear classifier in closed form (ridge regression on the classes' unit vectors), so that an adapter more needs
    no training. Source: a set of adapters for each kind of noise with a classifier that picks one (AVSR on Whisper).

    features: ``(samples, features)`` of samples whose adapter is known; index: ``(samples,)``, int64.
    """

    weight: Tensor
    mean: Tensor

    def __init__(self, features: Tensor, index: Tensor, *, ridge: float = 1e-2) -> None:
        super().__init__()
        x = features.double()
        mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
        x = (x - mean) / std
        one_hot = F.one_hot(index, int(index.max()) + 1).double()
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        solved = torch.linalg.solve(gram, x.T @ (one_hot - one_hot.mean(dim=0)))
        weight = solved / std[:, None]
        self.register_buffer("weight", weight.to(features.dtype))
        self.register_buffer("mean", (one_hot.mean(dim=0) - mean @ weight).to(features.dtype))

    def forward(self, features: Tensor) -> Tensor:
        """The index of the adapter for each sample, ``(samples,)``."""
        return (features @ self.weight + self.mean).argmax(dim=1)
