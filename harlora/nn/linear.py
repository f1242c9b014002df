"""Linear layers with a low-rank adapter: over a dense weight, and over one in 4 bits."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.kernels import QuantizedWeight, dequantize_4bit, eager, gpu, qlora_linear, quantize_4bit
from harlora.kernels.dropout import draw_seed
from harlora.kernels.format import WEIGHT_DTYPES, check_format
from harlora.nn.adapters.adapter import Adapter, LowRank


class AdaptedLinear(nn.Module):
    """What every linear layer with a low-rank adapter shares; the base weight is the subclass's.

    y = x·Wᵀ + bias + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ

    scaling is alpha / rank, or alpha / √rank with ``rslora`` (Kalajdzievski 2023, arXiv 2312.03732). lora_B starts at
    zero, so that a new layer computes what its base does (Hu et al. 2021, arXiv 2106.09685). lora_A and lora_B train;
    weight and bias do not.

    lora_A: ``(rank, in_features)``; lora_B: ``(out_features, rank)``; float32 over a half-precision weight, as in
    PEFT, otherwise of the dtype of the weight.
    adapter: one of another method in place of lora_A and lora_B, set by `attach`, or None.
    """

    in_features: int
    out_features: int
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, linear: "nn.Linear | QLoRALinear", *, rank: int, alpha: float, dropout: float, rslora: bool
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"{type(self).__name__}: rank must be an integer of at least 0, got {rank!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{type(self).__name__}: dropout must be at least 0 and below 1, got {dropout!r}")
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora
        bias: nn.Parameter | None = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        )
        self.register_parameter("bias", bias)
        lora_A = lora_B = None
        if rank:
            half = linear.weight.dtype in (torch.bfloat16, torch.float16)
            dtype = linear.weight.dtype if linear.weight.is_floating_point() and not half else torch.float32
            lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=linear.weight.device, dtype=dtype))
            lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=linear.weight.device, dtype=dtype))
        self.register_parameter("lora_A", lora_A)
        self.register_parameter("lora_B", lora_B)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw lora_A anew and set lora_B to zero."""
        if self.lora_A is not None and self.lora_B is not None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that is no plain LoRA, or None."""
        return self._modules.get("adapter")  # type: ignore[return-value]

    def attach(self, adapter: Adapter) -> Self:
        """Give this layer, which must have rank 0, ``adapter``, and return it."""
        if self.rank or self._modules:
            raise ValueError(f"{type(self).__name__}: carries an adapter already; make the layer with rank=0")
        self._modules["adapter"] = adapter.train(self.training)  # add_module would mind the property
        return self

    @property
    def scaling(self) -> float:
        """The factor of the low-rank branch."""
        if not self.rank:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def base_weight(self) -> Tensor:
        """The weight without the adapter, ``(out_features, in_features)``, dense."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None, delta: LowRank | None) -> Tensor:
        """x·Wᵀ + bias + scale·(dropout(x)·Aᵀ)·Bᵀ, ``(..., out_features)``, with A, B and scale of ``delta``."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain layer with the weight W + scaling·lora_B·lora_A, computed in float32; this layer is unchanged."""
        weight = self.base_weight()
        bias: Tensor | None = self.bias
        dtype = weight.dtype
        if self.adapter is not None:
            weight, bias = self.adapter.merged(self)
        elif self.lora_A is not None and self.lora_B is not None:
            wide = torch.promote_types(dtype, torch.float32)
            delta = self.lora_B.to(wide) @ self.lora_A.to(wide)
            weight = weight.to(wide).add(delta, alpha=self.scaling)
        merged = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(weight.to(dtype).clone())
        if bias is not None:
            merged.bias = nn.Parameter(bias.detach().clone())
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """The layer's settings, for ``repr``."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rank={self.rank}, "
            f"alpha={self.alpha:g}, dropout={self.dropout:g}, rslora={self.rslora}"
        )


class LoRALinear(AdaptedLinear):
    """A linear layer with a low-rank adapter over a dense frozen weight; made by `from_linear`."""

    def __init__(
        self, linear: nn.Linear, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__(linear, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        self.weight: nn.Parameter = nn.Parameter(linear.weight.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False
    ) -> Self:
        """The layer with a new adapter over the weight and bias of ``linear``, which it shares."""
        _require_plain(linear)
        return cls(linear, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora).train(linear.training)

    def base_weight(self) -> Tensor:
        """The frozen weight, ``(out_features, in_features)``."""
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)``.

        x: ``(..., in_features)``.
        """
        if self.adapter is not None:
            return self.adapter(self, x)
        adapted = self.lora_A is not None and self.lora_B is not None
        return self.product(x, self.bias, LowRank(self.lora_A, self.lora_B, self.scaling) if adapted else None)  # type: ignore[arg-type]

    def product(self, x: Tensor, bias: Tensor | None, delta: LowRank | None) -> Tensor:
        """As in `AdaptedLinear`."""
        y = F.linear(x, self.weight, bias)
        if delta is None:
            return y
        dtype = x.dtype  # autocast, when it is on, decides inside F.linear
        t = F.linear(F.dropout(x, self.dropout, self.training), delta.A.to(dtype))
        return y + delta.scale * F.linear(t, delta.B.to(dtype))


class QLoRALinear(AdaptedLinear):
    """A linear layer with a low-rank adapter over a frozen weight in 4 bits; a drop-in for ``nn.Linear``.

    Its weight is random, as that of a new ``nn.Linear``, and quantised at once; `from_linear` takes an existing
    layer. The state_dict has the keys of bitsandbytes' ``Linear4bit``, and lora_A and lora_B beside them.

    quant_type, blocksize, double_quant: as in `quantize_4bit`.
    device, dtype: as in ``nn.Linear``.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_format("QLoRALinear", quant_type, blocksize)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__(linear, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        self._hold(quantize_4bit(linear.weight.detach(), quant_type, blocksize, double_quant))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
    ) -> Self:
        """The layer with a new adapter over the weight of ``linear``, quantised, and its bias.

        A ``Linear4bit`` of bitsandbytes is taken over bit for bit, with the format it has.
        """
        if _is_quantized(linear):
            quantized = QuantizedWeight.from_state_dict(linear.state_dict())
        else:
            _require_plain(linear)
            check_format("QLoRALinear.from_linear", quant_type, blocksize)
            quantized = quantize_4bit(linear.weight.detach(), quant_type, blocksize, double_quant)
        layer = cls.__new__(cls)
        AdaptedLinear.__init__(layer, linear, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        layer._hold(quantized)
        return layer.train(linear.training)

    def over_same(self, *, rank: int, alpha: float = 16, dropout: float = 0.0, rslora: bool = False) -> Self:
        """A layer with a new adapter over the weight and bias of this one, which it shares."""
        layer = type(self).__new__(type(self))
        AdaptedLinear.__init__(layer, self, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        layer._hold(self.quantized_weight())
        return layer.train(self.training)

    def _hold(self, quantized: QuantizedWeight) -> None:
        # None of the buffers is persistent: _save_to_state_dict writes them under bitsandbytes' keys.
        self.register_buffer("weight", quantized.packed, persistent=False)
        self.register_buffer("absmax", quantized.absmax, persistent=False)
        self.register_buffer("nested_absmax", quantized.nested_absmax, persistent=False)
        self.register_buffer("nested_offset", quantized.nested_offset, persistent=False)
        self.quant_type = quantized.quant_type
        self.blocksize = quantized.blocksize
        self.weight_dtype = quantized.dtype

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in 4 bits; shares memory with the layer."""
        return QuantizedWeight(
            packed=self.weight,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            dtype=self.weight_dtype,
            shape=(self.out_features, self.in_features),
        )

    def base_weight(self) -> Tensor:
        """The dequantised weight, ``(out_features, in_features)``, a new tensor."""
        return dequantize_4bit(self.quantized_weight())

    def operands(self) -> eager.Layer:
        """What the operator qlora_linear takes after x. Raises: KeyError if the layer is parametrised, or its adapter
        does more than a low-rank branch.
        """
        # nn.Module's attribute lookup takes half a microsecond a tensor; a whole call at HAR size takes six.
        tensors: dict[str, Any] = self._buffers
        parameters = self._parameters
        if "adapter" in self._modules:  # a parametrised layer has another
            delta = self.adapter.low_rank(self)  # type: ignore[union-attr]
            factors = (delta.A, delta.B, delta.scale)
        else:
            factors = (parameters["lora_A"], parameters["lora_B"], self.scaling)
        return (
            tensors["weight"], tensors["absmax"], tensors["nested_absmax"], tensors["nested_offset"], self.quant_type,
            self.blocksize, self.out_features, parameters["bias"], *factors,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)``.

        x: ``(..., in_features)``, float32, bfloat16, float16 or float64.
        """
        if "adapter" in self._modules:
            return self.adapter(self, x)  # type: ignore[misc]
        dropout: Any = (self.dropout, draw_seed(x.device)) if self.training and self.dropout and self.rank else ()
        if self.out_features == 1 and x.shape[-1:] != (self.in_features,):
            direct = None  # the packed weight may have room for one more value; the public operator knows better
        else:
            try:
                direct = (eager if x.is_cpu else gpu).qlora_linear(x, *self.operands(), *dropout)
            except KeyError:  # a parametrised layer keeps its parameters elsewhere
                direct = None
        if direct is not None:
            return direct
        return qlora_linear(x, self.quantized_weight(), self.bias, self.lora_A, self.lora_B, self.scaling, *dropout)

    def product(self, x: Tensor, bias: Tensor | None, delta: LowRank | None) -> Tensor:
        """As in `AdaptedLinear`, in one operator."""
        if delta is None:
            return qlora_linear(x, self.quantized_weight(), bias)
        dropout: Any = (self.dropout, draw_seed(x.device)) if self.training and self.dropout else ()
        return qlora_linear(x, self.quantized_weight(), bias, delta.A, delta.B, delta.scale, *dropout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting a model to half precision must not touch the scales: they are float32 by the format's definition.
        before = {name: getattr(self, name) for name in ("absmax", "nested_absmax", "nested_offset")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = getattr(self, name)
            if value is not None and after.dtype != value.dtype:
                setattr(self, name, value.to(after.device))
        # What the weight is decoded to is cast with the rest, of which bias and adapter are in that type then.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight.device)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        quantized = self.quantized_weight()
        if quantized.dtype not in WEIGHT_DTYPES:  # after double(), which the format does not know
            quantized = replace(quantized, dtype=torch.float32)
        destination.update(quantized.state_dict(prefix + "weight"))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        rest = {name: value for name, value in state_dict.items() if name != key and not name.startswith(key + ".")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key not in state_dict:
            missing_keys.append(key)
            return
        try:
            quantized = QuantizedWeight.from_state_dict(state_dict, key)
            if quantized.shape != (self.out_features, self.in_features):
                raise ValueError(f"{key}: shape must be {(self.out_features, self.in_features)}, got {quantized.shape}")
        except ValueError as error:
            error_msgs.append(str(error))
        else:
            copied = {name: tensor.clone() for name, tensor in quantized.to(self.weight.device).tensors().items()}
            # As a parameter keeps its dtype, whatever that of the stored one, unless it is replaced.
            dtype = quantized.dtype if local_metadata.get("assign_to_params_buffers") else self.weight_dtype
            self._hold(QuantizedWeight(**{**vars(quantized), **copied, "dtype": dtype}))

    def extra_repr(self) -> str:
        """The layer's settings, for ``repr``."""
        return (
            f"{super().extra_repr()}, quant_type={self.quant_type}, blocksize={self.blocksize}, "
            f"double_quant={self.nested_absmax is not None}"
        )


def _is_quantized(linear: nn.Module) -> bool:
    return getattr(getattr(linear, "weight", None), "quant_state", None) is not None


def _require_plain(linear: nn.Module) -> None:
    # A subclass may compute something else than x·Wᵀ + bias, or keep its weight in another form.
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"from_linear: linear must be an nn.Linear or a quantised bitsandbytes Linear4bit, got {type(linear)}"
        )
