"""The 4-bit storage format: `QuantizedWeight`, its code tables and its state_dict, as bitsandbytes writes them.

A weight is flattened row by row and cut into blocks of ``blocksize`` values; a block crosses rows where the row is
not a multiple of it. Each value becomes the nearest of 16 codes times the block's largest magnitude (``absmax``).
Two codes share a byte, the first in the high half. With double quantisation absmax itself is stored in 8 bits: its
mean is subtracted, and blocks of 256 are coded by a table of 256 values.

Source: bitsandbytes 0.50.2, `functional.py` and `csrc/`; where its devices differ, its CUDA behaviour is kept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NESTED_BLOCKSIZE = 256

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # magnitude of codes 0 to 7; bit 3 is the sign


@cache
def code_table(quant_type: str, device: torch.device) -> Tensor:
    """The value of each 4-bit code, ``(16,)``, float32. Not to be written to."""
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device=device)
    magnitude = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device=device) / 12.0
    negative = -magnitude
    negative[0] = 0.0  # code 8 is +0 as well
    return torch.cat([magnitude, negative])


@cache
def nested_code_table(device: torch.device) -> Tensor:
    """The value of each 8-bit code of a block's scale, ``(256,)``, float32, sorted. Not to be written to.

    A signed dynamic map (Dettmers et al. 2022, arXiv 2110.02861): seven decades, each with twice the values of the
    one below, half way between evenly spaced bounds from 0.1 to 1; and 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (bounds[:-1] + bounds[1:]) / 2.0
        decade = 10 ** (exponent - 6)
        values += (decade * middles).tolist() + (-decade * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def check_format(function: str, quant_type: str, blocksize: int) -> None:
    """Raise ValueError unless the format has such a quant_type and blocksize."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{function}: quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{function}: blocksize must be one of {BLOCKSIZES}, got {blocksize!r}")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of ``shape`` in 4 bits.

    packed: ``((numel + 1) // 2, 1)``, uint8; two codes a byte, the first in the high half.
    absmax: ``(ceil(numel / blocksize),)``; float32, or uint8 codes when double quantised.
    nested_absmax: ``(ceil(blocks / 256),)``, float32, or None.
    nested_offset: scalar tensor, float32, the mean that was subtracted from absmax, or None.
    dtype: what the weight had before; `dequantize_4bit` returns it unless told otherwise.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def double_quant(self) -> bool:
        """Whether absmax is stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and of all scales."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]:
        """What operators over a quantised weight take of it, in their order."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset, self.quant_type, self.blocksize

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it holds, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on ``device``."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Tensors under the keys that bitsandbytes' ``Linear4bit`` saves and loads."""
        device = self.packed.device
        facts = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {prefix: self.packed, f"{prefix}.absmax": self.absmax}
        state[f"{prefix}.quant_map"] = code_table(self.quant_type, device).clone()
        if self.nested_absmax is not None and self.nested_offset is not None:
            state[f"{prefix}.nested_absmax"] = self.nested_absmax
            state[f"{prefix}.nested_quant_map"] = nested_code_table(device).clone()
            facts |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset.item(),
            }
        text = json.dumps(facts).encode()
        state[f"{prefix}.quant_state.bitsandbytes__{self.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "QuantizedWeight":
        """The weight under ``prefix`` in a state_dict of harlora or bitsandbytes.

        Raises: ValueError if a key is missing, the code table is not the standard one, or sizes disagree.
        """
        where = f"QuantizedWeight.from_state_dict: {prefix}"
        found = [t for t in QUANT_TYPES if f"{prefix}.quant_state.bitsandbytes__{t}" in state]
        if prefix not in state or f"{prefix}.absmax" not in state or not found:
            raise ValueError(
                f"{where}: required the keys {prefix}, {prefix}.absmax and {prefix}.quant_state.bitsandbytes__nf4 or "
                f"__fp4, found {sorted(key for key in state if key.startswith(prefix))}; save a quantised layer"
            )
        text = bytes(state[f"{prefix}.quant_state.bitsandbytes__{found[0]}"].tolist())
        try:
            facts = json.loads(text)
            quant_type, blocksize, shape = facts["quant_type"], facts["blocksize"], tuple(facts["shape"])
            dtype = getattr(torch, facts["dtype"])
            nested = "nested_offset" in facts
            if nested and facts["nested_blocksize"] != NESTED_BLOCKSIZE:
                raise ValueError(f"nested_blocksize must be {NESTED_BLOCKSIZE}, got {facts['nested_blocksize']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: cannot read the quantisation state {text[:200]!r} ({error})") from error
        check_format(where, quant_type, blocksize)
        packed = state[prefix].contiguous().view(torch.uint8).reshape(-1, 1)
        device = packed.device
        weight = cls(
            packed=packed,
            absmax=state[f"{prefix}.absmax"],
            nested_absmax=state[f"{prefix}.nested_absmax"] if nested else None,
            nested_offset=torch.tensor(facts["nested_offset"], dtype=torch.float32, device=device) if nested else None,
            quant_type=quant_type,
            blocksize=blocksize,
            dtype=dtype,
            shape=shape,
        )
        tables = [("quant_map", code_table(quant_type, device))]
        tables += [("nested_quant_map", nested_code_table(device))] if nested else []
        for name, table in tables:
            stored = state.get(f"{prefix}.{name}")
            if stored is not None and not torch.equal(stored.to(table), table):
                raise ValueError(f"{where}: {name} must be the standard table of {quant_type}, got another one")
        if weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{where}: dtype must be one of {WEIGHT_DTYPES}, got {weight.dtype}")
        check_packed(where, prod(shape), packed, weight.absmax, weight.nested_absmax, weight.nested_offset, blocksize)
        return weight


def check_packed(
    function: str,
    numel: int,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
) -> None:
    """Raise ValueError unless the tensors of a quantised weight fit ``numel`` values and each other."""
    if packed.dtype != torch.uint8 or packed.numel() != (numel + 1) // 2:
        raise ValueError(
            f"{function}: packed must be uint8 with {(numel + 1) // 2} bytes for {numel} values, "
            f"got {packed.dtype} with {packed.numel()}"
        )
    blocks = -(-numel // blocksize)
    if (nested_absmax is None) != (nested_offset is None):
        raise ValueError(f"{function}: nested_absmax and nested_offset must be given together or not at all")
    required = torch.float32 if nested_absmax is None else torch.uint8
    if absmax.dtype != required or absmax.shape != (blocks,):
        raise ValueError(
            f"{function}: absmax must be {required} of shape ({blocks},) for {numel} values in blocks of {blocksize}, "
            f"got {absmax.dtype} of shape {tuple(absmax.shape)}; a file that bitsandbytes saved after evaluating on a "
            "CPU has damaged scales: save it before"
        )
    if nested_absmax is not None and nested_offset is not None:
        nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
        if nested_absmax.dtype != torch.float32 or nested_absmax.shape != (nested_blocks,):
            raise ValueError(
                f"{function}: nested_absmax must be float32 of shape ({nested_blocks},), "
                f"got {nested_absmax.dtype} of shape {tuple(nested_absmax.shape)}"
            )
        if nested_offset.dtype != torch.float32 or nested_offset.numel() != 1:
            raise ValueError(f"{function}: nested_offset must be one float32 number, got {nested_offset}")
