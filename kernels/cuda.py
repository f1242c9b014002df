"""The layer's ways in CUDA C++: what each serves, and the calls. dispatch.py chooses between them and Triton's."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from harlora.kernels import cpp
from harlora.kernels.configurations import DX_GEMM_TILE, DX_TILES, GEMV_ROWS, Configuration
from harlora.kernels.format import code_table
from harlora.kernels.reference import Block, Layer, Norm

STEP = 64  # values of k that must have one scale
MOST_TILES = 65535  # of rows, which a grid has room for
ENCODER_TILES = (16, 32, 64)


def _forward(operator: str, x: Tensor, layer: Sequence[Any], *sizes: Any) -> tuple[Tensor, Tensor]:
    """Y and t by the extension's ``operator``.

    layer: the arguments of `reference.qlora_linear` after x; sizes: what the operator has besides.
    """
    packed, absmax, *nested, quant_type, blocksize, out_features, bias, lora_A, lora_B, scaling = layer[:11]
    leading, rank = x.shape[:-1], 0 if lora_A is None else lora_A.shape[0]
    flat, packed = _aligned(x.reshape(-1, x.shape[-1])), _aligned(packed)
    y, t = x.new_empty(len(flat), out_features), x.new_empty((len(flat), rank) if lora_A is not None else 0)
    bias, lora_A, lora_B = (None if each is None else _aligned(each) for each in (bias, lora_A, lora_B))
    getattr(torch.ops.harlora_cpp, operator)(
        flat, packed, absmax, code_table(quant_type, x.device), blocksize, bias, lora_A, lora_B, scaling, y, t, *sizes,
        *cpp.nested_scales(*nested), stream=torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return y.view(*leading, out_features), t.view(*leading, rank) if lora_A is not None else t


def _sizes(x: Tensor, layer: Sequence[Any]) -> tuple[int, int, int]:
    """Rows, in_features and out_features."""
    return x.numel() // x.shape[-1], x.shape[-1], layer[6]


def qlora_gemv(x: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
    """As `reference.qlora_linear`, for what `serves`; lora_A and lora_B may be float32, rounded as they are read."""
    return _forward("qlora_gemv", x, layer)


def _serves_gemv(x: Tensor, *arguments: Any) -> bool:
    return _has_whole_steps(x, *arguments) and x.numel() <= GEMV_ROWS * x.shape[-1]


def _has_whole_steps(x: Tensor, *arguments: Any) -> bool:
    """Whether the layer is one that kernels read in steps of 64 values of k with one scale, 16 bytes at a time."""
    packed, *_, blocksize, out_features, _, lora_A, lora_B, _ = arguments[:11]
    seed = arguments[12] if len(arguments) > 12 else None
    return out_features > 0 and _has_whole_blocks(x, x.shape[-1], packed, blocksize, lora_A, lora_B, seed)


def _has_whole_blocks(
    wide: Tensor,
    in_features: int,
    packed: Tensor,
    blocksize: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    seed: Tensor | None,
) -> bool:
    """Whether 64 columns of each row of the weight have one scale; ``wide`` is x or dY."""
    return (
        wide.dtype in (torch.bfloat16, torch.float16)
        and wide.numel() > 0
        and blocksize >= STEP and in_features > 0 and in_features % blocksize == 0
        and seed is None
        and all(each is None or each.dtype in (wide.dtype, torch.float32) for each in (lora_A, lora_B))
        and (lora_A is None or lora_B is None or lora_A.dtype == lora_B.dtype)
        and all(each is None or each.data_ptr() % 16 == 0 for each in (wide, packed, lora_A))
    )  # fmt: skip


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous at a multiple of 16 bytes: what is chosen for one may later be called with another."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def qlora_gemm(
    x: Tensor, *layer: Any, tile: int | None = None, parts: int | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.qlora_linear`, for what `serves`; lora_A and lora_B may be float32, rounded as they are read.

    tile: rows of x of a tile, 64, 128 or 256; by default the fewest that hold all, or 256.
    parts: how many blocks of threads, a cluster, share the sum over in_features, up to 8; by default up to two, where
        there are fewer tiles than multiprocessors. Larger clusters do not all find room at once.
    """
    rows, in_features, out_features = _sizes(x, layer)
    tile = tile or tile_of("gemm", rows)
    parts = parts or _parts(x.device, rows, in_features, out_features, tile)
    return _forward("qlora_gemm", x, layer, tile, parts)


# Of which the fewest rows that hold all are a tile, where it is not said.
_TILES = {"gemm": (64, 128, 256), "mma": (16, 32, 64, 128), "dx": DX_TILES, "dx_gemm": (DX_GEMM_TILE,)}


def tile_of(way: str, rows: int) -> int:
    """The rows of a tile of a way where nobody says; 0 where it has none, or decides by more than rows."""
    tiles = _TILES.get(way, (0,))
    return next((tile for tile in tiles if rows <= tile), tiles[-1])


def _tiles(rows: int, out_features: int, tile: int) -> int:
    return -(-out_features // 128) * -(-rows // tile)


def _parts(device: torch.device, rows: int, in_features: int, out_features: int, tile: int) -> int:
    tiles = _tiles(rows, out_features, tile)
    processors, steps = torch.cuda.get_device_properties(device).multi_processor_count, -(-in_features // STEP)

    def can(parts: int) -> bool:  # each with steps of its own, and all at once
        return parts * tiles <= processors and steps >= 4 * parts and _shares(parts, steps)

    return 2 if can(2) else 1


def _serves_gemm(x: Tensor, *arguments: Any) -> bool:
    out_features, bias = arguments[6:8]
    return (
        _has_whole_steps(x, *arguments)
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.numel() < min(2**31, MOST_TILES * 64 * x.shape[-1])
        and out_features % 8 == 0
        and (bias is None or bias.dtype == x.dtype)
    )


def qlora_mma(
    x: Tensor, *layer: Any, tile: int | None = None, parts: int | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.qlora_linear`, for what `serves`; lora_A and lora_B may be float32, rounded as they are read.

    tile: rows of x of a tile, 16, 32, 64 or 128; by default the fewest that hold all, or 128.
    parts: how many blocks of threads share the sum over in_features, up to 16; by default as many as leave each a
        multiprocessor, up to 8.
    """
    rows, in_features, out_features = _sizes(x, layer)
    tile = tile or tile_of("mma", rows)
    parts = parts or _mma_parts(x.device, _tiles(rows, out_features, tile), in_features // STEP)
    workspace = x.new_empty((parts, rows, out_features), dtype=torch.float32) if parts > 1 else None
    return _forward("qlora_mma", x, layer, tile, parts, workspace)


def _mma_parts(device: torch.device, tiles: int, steps: int) -> int:
    """The most parts of at least four steps with which each tile of each still has a multiprocessor; not measured."""
    most = torch.cuda.get_device_properties(device).multi_processor_count // tiles
    return next((parts for parts in range(min(most, 8, steps // 4), 1, -1) if _shares(parts, steps)), 1)


def _shares(parts: int, steps: int) -> bool:
    """Whether so many parts of the same number of steps, but for the last, all have some."""
    return (parts - 1) * -(-steps // parts) < steps


def _serves_mma(x: Tensor, *arguments: Any) -> bool:
    bias = arguments[7]
    return (
        _has_whole_steps(x, *arguments)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and x.numel() < min(2**31, MOST_TILES * 16 * x.shape[-1])
        and (bias is None or bias.dtype == x.dtype)
    )


def qlora_backward(
    grad: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    output_mask: Sequence[bool],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    tile: int | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.qlora_linear_backward`, for what `serves`; lora_A and lora_B may be float32, rounded as they are
    read, and dA and dB are of their dtype.

    tile: rows of dY of a tile, 16, 32, 64 or 128, by default the fewest that hold all, or 128; or 256, for which
        `serves` speaks of the way ``"dx_gemm"``.
    parts: how many blocks of threads share the sum over out_features, up to 32; by default as many as there is room
        for at once. With 256 rows up to 8, by default up to 2. Their sums are added in order, so the result does not
        depend on which was first.
    """
    want_x, want_bias, want_A, want_B = output_mask
    leading, out_features = grad.shape[:-1], grad.shape[-1]
    flat = _aligned(grad.reshape(-1, out_features))
    rows, rank = len(flat), 0 if lora_A is None else lora_A.shape[0]
    grad_x, grad_bias, grad_A, grad_B = (grad.new_empty(0) for _ in range(4))
    stream = torch.cuda.current_stream(grad.device).cuda_stream
    A = B = u = None
    if lora_A is not None and lora_B is not None and rank and (want_x or want_A):
        A, B = _aligned(lora_A), _aligned(lora_B)
        u = grad.new_empty(rows, -(-rank // 16) * 16)  # zeros past the rank
    if want_x:
        grad_x = grad.new_empty(rows, in_features)
    if want_x or u is not None:
        tile = tile or tile_of("dx", rows)
        many = tile == DX_GEMM_TILE  # whose parts are added up within a cluster
        if not parts and many:
            parts = _parts(grad.device, rows, out_features, in_features, tile)
        parts = parts or _parts_of_dx(grad.device, rows, in_features, out_features, tile)
        apart = want_x and parts > 1 and not many
        sums = grad.new_empty((parts, rows, in_features), dtype=torch.float32) if apart else None
        torch.ops.harlora_cpp.qlora_dx(
            flat, _aligned(packed), absmax, code_table(quant_type, grad.device), blocksize, A, B, scaling,
            grad_x if want_x else None, u, sums, tile, parts, *cpp.nested_scales(nested_absmax, nested_offset),
            stream=stream,
        )  # fmt: skip
        grad_x = grad_x.view(*leading, in_features) if want_x else grad_x
    if want_bias:
        grad_bias = grad.new_empty(out_features)
    if want_A and lora_A is not None:
        grad_A = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
    if want_B and lora_B is not None:
        grad_B = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
    if want_bias or (rank and (want_A or want_B)):
        torch.ops.harlora_cpp.lora_grads(
            flat,
            _aligned(x.reshape(-1, in_features)) if u is not None and want_A and x is not None else None,
            _aligned(t.reshape(-1, rank)) if rank and want_B and t is not None else None,
            u if want_A else None, scaling, grad_bias if want_bias else None, grad_A if rank and want_A else None,
            grad_B if rank and want_B else None, stream=stream,
        )  # fmt: skip
    return grad_x, grad_bias, grad_A, grad_B


def _parts_of_dx(device: torch.device, rows: int, in_features: int, out_features: int, tile: int) -> int:
    """As many as find room at once, each with four steps of the sum or more, up to 32."""
    tiles = -(-in_features // 128) * -(-rows // tile)
    room = torch.cuda.get_device_properties(device).multi_processor_count * (2 if tile <= 32 else 1)
    steps = -(-out_features // (32 if tile == 128 else 64))
    parts = max(1, min(room // tiles, steps // 4, 32))
    return -(-steps // -(-steps // parts))  # as few as have steps of that length


def _serves_dx(grad: Tensor, *arguments: Any) -> bool:
    x, t, packed, *_, blocksize, in_features, lora_A, lora_B, _, _ = arguments[:13]
    seed = arguments[14] if len(arguments) > 14 else None
    return (
        _has_whole_blocks(grad, in_features, packed, blocksize, lora_A, lora_B, seed)
        and torch.cuda.get_device_capability(grad.device) >= (8, 0)
        and grad.numel() < min(2**30, MOST_TILES * 16 * grad.shape[-1])
        and all(each is None or each.dtype == grad.dtype for each in (x, t))
        and (x is None or x.data_ptr() % 16 == 0)
    )


def _serves_dx_gemm(grad: Tensor, *arguments: Any) -> bool:
    return (
        _serves_dx(grad, *arguments)
        and torch.cuda.get_device_capability(grad.device) == (9, 0)
        and grad.shape[-1] % 8 == 0
    )


# The blocks of an encoder -------------------------------------------------------------------------------------------


def encoder_blocks(
    x: Tensor, blocks: Sequence[Block], norm: Norm, heads: int, keep: bool, *, tile: int = 0, parts: int = 0
) -> list[Tensor]:
    """As `reference.encoder_blocks` without ``keep``, for what `serves_encoder`: all blocks in one launch.

    tile: rows of x of a block of threads, 16, 32 or 64, of whole windows; by default the fewest that hold one, or twice
        as many where there are more blocks of threads than find room at once.
    parts: blocks of threads, a cluster, that share the rows of each weight, 1, 2, 4 or 8; by default as many as find
        room at once.
    """
    assert not keep
    tensors = [  # aligned, since what is chosen for one model may later be called with another of the same sizes
        _aligned(each)
        for norm1, *attention, norm2, fc1, fc2 in blocks
        for part in (norm1[:2], *map(_tensors, attention), norm2[:2], _tensors(fc1), _tensors(fc2))
        for each in part
    ]
    layers = [layer for block in blocks for layer in _layers(block)]
    eps = [each[2] for block in blocks for each in (block[0], block[5])]
    _, _, *nested, quant_type, blocksize, hidden, bias, A, _, _ = blocks[0][6]
    x, y = _aligned(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = tile or _tile_of_encoder(x)
    torch.ops.harlora_cpp.encoder_blocks(
        x, [*tensors, *map(_aligned, norm[:2])], heads, hidden, blocksize, bias is not None, A is not None,
        [*eps, norm[2]], [layer[10] for layer in layers], code_table(quant_type, x.device), y, tile // 8,
        parts or _parts_of_encoder(x, blocks[0][6], tile), *cpp.nested_scales(*nested)[2:],
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return [y]


def _layers(block: Block) -> tuple[Layer, ...]:
    _, q, k, v, o, _, fc1, fc2 = block
    return q, k, v, o, fc1, fc2


def _tensors(layer: Layer) -> list[Tensor]:
    """What a launch reads of a layer."""
    packed, absmax, nested_absmax, nested_offset, _, _, _, bias, A, B, _ = layer
    given = (packed, absmax, nested_absmax, nested_offset, bias, A, B)
    return [tensor for tensor in given if tensor is not None]


def has_clusters(device: torch.device) -> bool:
    """Whether blocks of threads may share their memory there."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _room(device: torch.device, width: int, hidden: int, rank: int, nested: bool, tile: int, parts: int) -> int:
    """How many blocks of threads of an encoder, or clusters of ``parts``, find room at once: one a multiprocessor."""
    if device.type != "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count // parts
    with torch.cuda.device(device):
        room: int = torch.ops.harlora_cpp.encoder_room(width, hidden, rank, nested, tile // 8, parts)
    return room


def _tile_of_encoder(x: Tensor) -> int:
    windows, tokens, _ = x.shape
    least = next(tile for tile in ENCODER_TILES if tokens <= tile)
    room = torch.cuda.get_device_properties(x.device).multi_processor_count
    return 32 if least == 16 and -(-windows // (16 // tokens)) > room else least


def _parts_of_encoder(x: Tensor, fc1: Layer, tile: int) -> int:
    if not has_clusters(x.device):
        return 1
    windows, tokens, width = x.shape
    sizes = width, fc1[6], 0 if fc1[8] is None else fc1[8].shape[0], fc1[2] is not None, tile
    groups = -(-windows // (tile // tokens))
    return next((parts for parts in (8, 4, 2) if groups <= _room(x.device, *sizes, parts)), 1)


def serves_encoder(x: Tensor, blocks: Sequence[Block], norm: Norm, heads: int, tile: int = 0) -> bool:
    """Whether one launch is for such an encoder, on a GPU; of every layer the sizes are right in themselves."""
    if cpp.load_extension() or not cpp.has_kernel("encoder_blocks", "cuda") or not x.is_cuda:
        return False
    if not _fits_encoder(x, blocks, norm, heads):
        return False
    properties: Any = torch.cuda.get_device_properties(x.device)
    A = blocks[0][6][8]
    rank, tile = 0 if A is None else A.shape[0], tile or _tile_of_encoder(x)
    if x.shape[1] > tile:
        return False
    wanted = torch.ops.harlora_cpp.encoder_shared_bytes(x.shape[-1], blocks[0][6][6], rank, tile // 8)
    return (properties.major, properties.minor) >= (8, 0) and wanted <= properties.shared_memory_per_block_optin


def _fits_encoder(x: Tensor, blocks: Sequence[Block], norm: Norm, heads: int) -> bool:
    if x.dim() != 3 or not x.numel() or not blocks or heads < 1 or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    _, tokens, width = x.shape
    size = width // heads
    if tokens > ENCODER_TILES[-1] or width % 64 or width > 256 or width % heads or size % 16 or size > 64:
        return False

    def kind(layer: Layer) -> tuple[Any, ...]:
        _, _, nested_absmax, _, quant_type, blocksize, _, bias, A, B, _ = layer
        adapter = None if A is None or B is None else (A.shape[0], A.dtype, B.dtype)
        return quant_type, blocksize, nested_absmax is None, None if bias is None else bias.dtype, adapter

    hidden, kinds = blocks[0][6][6], {kind(layer) for block in blocks for layer in _layers(block)}
    (_, blocksize, _, bias, adapter), *others = kinds
    outs = {tuple(layer[6] for layer in _layers(block)) for block in blocks}
    norms = [each for block in blocks for each in (block[0], block[5])] + [norm]
    vectors = [vector for each in norms for vector in each[:2]]
    tensors = [tensor for block in blocks for layer in _layers(block) for tensor in _tensors(layer)]
    return (
        not others
        and outs == {(width,) * 4 + (hidden, width)}
        and hidden % 64 == 0
        and blocksize >= STEP
        and bias in (None, x.dtype)
        and (
            adapter is None or (adapter[0] > 0 and adapter[1:] in {(dtype,) * 2 for dtype in (x.dtype, torch.float32)})
        )
        and all(each.dtype == x.dtype and each.is_contiguous() for each in vectors)
        and all(each.data_ptr() % 16 == 0 and each.is_contiguous() for each in (*vectors, *tensors))
    )


# The ways of each operator, in the order in which they are tried where only CUDA C++ is asked for.
WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "qlora_linear": {"gemv": qlora_gemv, "gemm": qlora_gemm, "mma": qlora_mma},
    "qlora_linear_backward": {"dx": qlora_backward, "dx_gemm": partial(qlora_backward, tile=DX_GEMM_TILE)},
    "encoder_blocks": {"encoder": encoder_blocks},
}
_SERVES: dict[str, Callable[..., bool]] = {
    "gemv": _serves_gemv, "gemm": _serves_gemm, "mma": _serves_mma, "dx": _serves_dx, "dx_gemm": _serves_dx_gemm,
}  # fmt: skip
_KERNELS = {"dx_gemm": "qlora_gemm"}  # whose operator tells that a way is built, where that is not its own
# On the small problem on which a way is proven its launcher takes several parts, but one for dX; on large ones the
# opposite, which is proven as well.
OTHER_PARTS = {"gemm": 1, "mma": 1, "dx": 2, "dx_gemm": 2, "encoder": 1}
PROVEN_ROWS = {"gemv": GEMV_ROWS - 1}  # of the problem on which a way is proven: of the columns of a product not all
# Blocks of threads for each multiprocessor, each of which has room for one, from fewer of which dequantising or Triton
# was faster on an H200 (bench/results/gpu/h200-many-rows.json).
LEAST_BLOCKS = {"gemm": 0.8, "dx_gemm": 0.45}


def serves(operator: str, way: str, *arguments: Any) -> bool:
    """Whether a way is for such arguments of ``operator``, on a GPU."""
    if way not in WAYS.get(operator, {}) or cpp.load_extension():
        return False
    if not cpp.has_kernel(_KERNELS.get(way, f"qlora_{way}"), "cuda"):
        return False
    return arguments[0].is_cuda and _SERVES[way](*arguments)


def worth(chosen: Configuration, x: Tensor, *arguments: Any) -> bool:
    """Whether a way that serves is fast for such arguments, by what a rule's limits cannot say."""
    if chosen.way not in LEAST_BLOCKS:
        return True
    rows, sums = x.numel() // x.shape[-1], x.shape[-1]
    columns = arguments[6 if chosen.way == "gemm" else 8]  # of the result: out_features, or in_features of dX
    tile = chosen.block_rows or tile_of(chosen.way, rows)
    blocks = _tiles(rows, columns, tile) * _parts(x.device, rows, sums, columns, tile)
    return blocks >= LEAST_BLOCKS[chosen.way] * torch.cuda.get_device_properties(x.device).multi_processor_count
