"""The layer's ways in CUDA C++: what each serves, and the calls. dispatch.py chooses between them and Triton's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import cpp
from harlora.kernels.configurations import GEMV_ROWS, Configuration
from harlora.kernels.format import code_table

STEP = 64  # values of k that must have one scale


def qlora_gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.qlora_linear`, for what `serves`; lora_A and lora_B may be float32, rounded as they are read."""
    rows, rank = x.numel() // x.shape[-1], 0 if lora_A is None else lora_A.shape[0]
    flat, packed = _aligned(x.reshape(rows, x.shape[-1])), _aligned(packed)
    y, t = x.new_empty(rows, out_features), x.new_empty((rows, rank) if lora_A is not None else 0)
    nested = cpp.nested_scales(nested_absmax, nested_offset)
    bias, lora_A, lora_B = (None if each is None else _aligned(each) for each in (bias, lora_A, lora_B))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    torch.ops.harlora_cpp.qlora_gemv(
        flat, packed, absmax, code_table(quant_type, x.device), blocksize, bias, lora_A, lora_B, scaling, y, t, *nested,
        stream=stream,
    )  # fmt: skip
    leading = x.shape[:-1]
    return y.view(*leading, out_features), t.view(*leading, rank) if lora_A is not None else t


def _serves_gemv(x: Tensor, *arguments: Any) -> bool:
    return _has_whole_steps(x, *arguments) and x.numel() <= GEMV_ROWS * x.shape[-1]


def _has_whole_steps(x: Tensor, *arguments: Any) -> bool:
    """Whether the layer is one that kernels read in steps of 64 values of k with one scale, 16 bytes at a time."""
    packed, *_, blocksize, out_features, _, lora_A, lora_B, _ = arguments[:11]
    seed = arguments[12] if len(arguments) > 12 else None
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() > 0 and out_features > 0
        and blocksize >= STEP and x.shape[-1] % blocksize == 0
        and seed is None
        and all(each is None or each.dtype in (x.dtype, torch.float32) for each in (lora_A, lora_B))
        and all(each is None or each.data_ptr() % 16 == 0 for each in (x, packed, lora_A))
    )  # fmt: skip


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous at a multiple of 16 bytes: what is chosen for one may later be called with another."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def qlora_gemm(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    tile: int | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.qlora_linear`, for what `serves`; lora_A and lora_B may be float32, rounded as they are read.

    tile: rows of x of a tile, 64, 128 or 256; by default the fewest that hold all, or 256.
    parts: how many blocks of threads, a cluster, share the sum over in_features, up to 8; by default up to two, where
        there are fewer tiles than multiprocessors. Larger clusters do not all find room at once.
    """
    in_features = x.shape[-1]
    flat, packed = _aligned(x.reshape(-1, in_features)), _aligned(packed)
    rows, rank = len(flat), 0 if lora_A is None else lora_A.shape[0]
    y, t = x.new_empty(rows, out_features), x.new_empty((rows, rank) if lora_A is not None else 0)
    nested = cpp.nested_scales(nested_absmax, nested_offset)
    bias, lora_A, lora_B = (None if each is None else _aligned(each) for each in (bias, lora_A, lora_B))
    tile = tile or _tile(rows)
    torch.ops.harlora_cpp.qlora_gemm(
        flat, packed, absmax, code_table(quant_type, x.device), blocksize, bias, lora_A, lora_B, scaling, y, t, tile,
        parts or _parts(x.device, rows, in_features, out_features, tile), *nested,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    leading = x.shape[:-1]
    return y.view(*leading, out_features), t.view(*leading, rank) if lora_A is not None else t


def _tile(rows: int) -> int:
    return 64 if rows <= 64 else 128 if rows <= 128 else 256


def _tiles(rows: int, out_features: int, tile: int) -> int:
    return -(-out_features // 128) * -(-rows // tile)


def _parts(device: torch.device, rows: int, in_features: int, out_features: int, tile: int) -> int:
    tiles = _tiles(rows, out_features, tile)
    processors, steps = torch.cuda.get_device_properties(device).multi_processor_count, in_features // STEP

    def can(parts: int) -> bool:  # each with steps of its own, and all at once
        return parts * tiles <= processors and steps >= 4 * parts and (parts - 1) * -(-steps // parts) < steps

    return 2 if can(2) else 1


def _serves_gemm(x: Tensor, *arguments: Any) -> bool:
    out_features, bias = arguments[6:8]
    return (
        _has_whole_steps(x, *arguments)
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.numel() < 2**31
        and out_features % 8 == 0
        and (bias is None or bias.dtype == x.dtype)
    )


# The ways of each operator, fastest first.
WAYS: dict[str, dict[str, Callable[..., Any]]] = {"qlora_linear": {"gemv": qlora_gemv, "gemm": qlora_gemm}}
_SERVES: dict[str, Callable[..., bool]] = {"gemv": _serves_gemv, "gemm": _serves_gemm}
PROVEN_ROWS = {"gemv": GEMV_ROWS - 1}  # of the problem on which a way is proven: of the columns of a product not all
# Blocks of threads for each multiprocessor, from fewer and up to more of which dequantising or Triton was faster on an
# H200 than qlora_gemm_sm90.cu (bench/results/gpu/h200-gemm.json). A multiprocessor has room for one.
LEAST_BLOCKS, MOST_BLOCKS = 0.8, 1.75


def serves(operator: str, way: str, *arguments: Any) -> bool:
    """Whether a way is for such arguments of ``operator``, on a GPU."""
    if way not in WAYS.get(operator, {}) or cpp.load_extension() or not cpp.has_kernel(f"qlora_{way}", "cuda"):
        return False
    return arguments[0].is_cuda and _SERVES[way](*arguments)


def worth(chosen: Configuration, x: Tensor, *arguments: Any) -> bool:
    """Whether a way that serves is fast for such arguments, by what a rule's limits cannot say."""
    if chosen.way != "gemm":
        return True
    out_features, in_features = arguments[6], x.shape[-1]
    rows = x.numel() // in_features
    blocks = _tiles(rows, out_features, chosen.block_rows)
    blocks *= _parts(x.device, rows, in_features, out_features, chosen.block_rows)
    return LEAST_BLOCKS <= blocks / torch.cuda.get_device_properties(x.device).multi_processor_count <= MOST_BLOCKS
