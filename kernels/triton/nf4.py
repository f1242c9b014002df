"""Triton: the 4-bit format. What a packed byte means to a kernel, and the operators that quantise and dequantise.

A code is decoded by selects on its four bits, or by byte permutes in PTX (`_permute`), which are fewer instructions.
The interpreter runs no PTX, so it takes the selects; both give the same values, rounded to the dtype of the product.
"""

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from harlora.kernels import reference
from harlora.kernels.format import code_table, nested_code_table

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
_CPU = torch.device("cpu")


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """``value``, of ``DTYPE`` or float32, rounded to the nearest of ``DTYPE``.

    Triton's interpreter truncates to bfloat16.
    """
    if value.dtype == DTYPE:
        rounded = value
    elif INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(DTYPE)
    return rounded


def _permutation(values: Sequence[float], dtype: torch.dtype) -> str:
    """PTX that decodes four packed bytes, the last operand, to four first codes and four second codes.

    Codes of 16 bits are two to an operand ($0 and $1 the first codes, $2 and $3 the second), those of 32 bits one
    ($0 to $3, $4 to $7). The patterns of the 16 values are split into a table for each of their bytes. ``prmt`` looks
    up four codes in eight bytes at once; codes of 8 and more come from a second table and are chosen by a mask made of
    bit 3, unless both tables are the same.
    """
    pattern = torch.tensor(values, dtype=dtype).view(torch.uint8).view(16, dtype.itemsize)  # little-endian
    planes = [struct.unpack("<4I", bytes(plane)) for plane in pattern.T.tolist()]
    names = [f"plane{i}" for i in range(len(planes))]
    packed = f"${2 * len(planes)}"
    lines = [
        f".reg .b32 code, third, mask, below, above, {', '.join(names)}, near0, near1, far0, far1;",
        f"and.b32 code, {packed}, 0x77777777;",
        f"shr.u32 third, {packed}, 3;",
        "and.b32 third, third, 0x11111111;",
    ]
    for half in (0, 1):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 third, third, 16;"]
        lines.append("prmt.b32 mask, 0x0000ff00, 0, third;")
        for plane, name in zip(planes, names, strict=True):
            words = [f"{word:#010x}" for word in plane]
            if plane[:2] == plane[2:]:
                lines.append(f"prmt.b32 {name}, {words[0]}, {words[1]}, code;")
                continue
            lines += [
                f"prmt.b32 below, {words[0]}, {words[1]}, code;",
                f"prmt.b32 above, {words[2]}, {words[3]}, code;",
                f"lop3.b32 {name}, below, above, mask, 0xd8;",  # mask ? above : below
            ]
        # Nibbles lie in the order second, first, second, first; of each, its bytes from low to high.
        if len(planes) == 2:
            lines += [f"prmt.b32 ${half}, plane0, plane1, 0x7351;", f"prmt.b32 ${2 + half}, plane0, plane1, 0x6240;"]
            continue
        for name, low, high in (("near", "plane0", "plane1"), ("far", "plane2", "plane3")):
            lines += [f"prmt.b32 {name}0, {low}, {high}, 0x5140;", f"prmt.b32 {name}1, {low}, {high}, 0x7362;"]
        for i in (0, 1):
            lines += [
                f"prmt.b32 ${4 + 2 * half + i}, near{i}, far{i}, 0x5410;",
                f"prmt.b32 ${2 * half + i}, near{i}, far{i}, 0x7632;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


_VALUES = {name: code_table(name, _CPU).tolist() for name in ("nf4", "fp4")}
_NF4: tl.constexpr = tl.constexpr(tuple(_VALUES["nf4"]))
_FP4: tl.constexpr = tl.constexpr(tuple(_VALUES["fp4"]))
_NF4_FLOAT32: tl.constexpr = tl.constexpr(_permutation(_VALUES["nf4"], torch.float32))
_NF4_BFLOAT16: tl.constexpr = tl.constexpr(_permutation(_VALUES["nf4"], torch.bfloat16))
_NF4_FLOAT16: tl.constexpr = tl.constexpr(_permutation(_VALUES["nf4"], torch.float16))
_FP4_FLOAT32: tl.constexpr = tl.constexpr(_permutation(_VALUES["fp4"], torch.float32))
_FP4_BFLOAT16: tl.constexpr = tl.constexpr(_permutation(_VALUES["fp4"], torch.bfloat16))
_FP4_FLOAT16: tl.constexpr = tl.constexpr(_permutation(_VALUES["fp4"], torch.float16))

_EIGHT: tl.constexpr = tl.constexpr(8 * "=&f," + "r")


@triton.jit
def _select(code, VALUES: tl.constexpr):
    """The value of each 4-bit code, float32: a tree of selects, one level for each bit."""
    bit = (code & 1) != 0
    v0 = tl.where(bit, VALUES[1], VALUES[0])
    v1 = tl.where(bit, VALUES[3], VALUES[2])
    v2 = tl.where(bit, VALUES[5], VALUES[4])
    v3 = tl.where(bit, VALUES[7], VALUES[6])
    v4 = tl.where(bit, VALUES[9], VALUES[8])
    v5 = tl.where(bit, VALUES[11], VALUES[10])
    v6 = tl.where(bit, VALUES[13], VALUES[12])
    v7 = tl.where(bit, VALUES[15], VALUES[14])
    bit = (code & 2) != 0
    v0 = tl.where(bit, v1, v0)
    v1 = tl.where(bit, v3, v2)
    v2 = tl.where(bit, v5, v4)
    v3 = tl.where(bit, v7, v6)
    bit = (code & 4) != 0
    v0 = tl.where(bit, v1, v0)
    v1 = tl.where(bit, v3, v2)
    return tl.where((code & 8) != 0, v1, v0)


@triton.jit
def _value(code, QUANT_TYPE: tl.constexpr):
    if QUANT_TYPE == "nf4":
        value = _select(code, _NF4)
    else:
        value = _select(code, _FP4)
    return value


@triton.jit
def _permute(byte, QUANT_TYPE: tl.constexpr, DTYPE: tl.constexpr):
    """The values of both codes of each byte in ``DTYPE``."""
    if tl.float32 == DTYPE:
        if QUANT_TYPE == "nf4":
            both = tl.inline_asm_elementwise(
                _NF4_FLOAT32, _EIGHT, [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
            )
        else:
            both = tl.inline_asm_elementwise(
                _FP4_FLOAT32, _EIGHT, [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
            )
    elif tl.bfloat16 == DTYPE:
        if QUANT_TYPE == "nf4":
            both = tl.inline_asm_elementwise(
                _NF4_BFLOAT16, "=&r,=&r,=&r,=&r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            both = tl.inline_asm_elementwise(
                _FP4_BFLOAT16, "=&r,=&r,=&r,=&r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
    else:
        if QUANT_TYPE == "nf4":
            both = tl.inline_asm_elementwise(
                _NF4_FLOAT16, "=&r,=&r,=&r,=&r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            both = tl.inline_asm_elementwise(
                _FP4_FLOAT16, "=&r,=&r,=&r,=&r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    return both


@triton.jit
def decode(byte, QUANT_TYPE: tl.constexpr, DTYPE: tl.constexpr, PERMUTE: tl.constexpr):
    """The values of packed bytes ``(rows, columns)``, ``(rows, 2 · columns)`` in ``DTYPE``, before scaling."""
    if PERMUTE:
        first, second = _permute(byte, QUANT_TYPE, DTYPE)
    else:
        first = cast(_value(byte >> 4, QUANT_TYPE), DTYPE)
        second = cast(_value(byte & 15, QUANT_TYPE), DTYPE)
    return tl.reshape(tl.join(first, second), (byte.shape[0], 2 * byte.shape[1]))


@triton.jit
def scales(absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, block, mask, NESTED: tl.constexpr):
    """The scale of each block, float32."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + (block >> 8), mask, other=0.0)
        scale = tl.load(nested_code_ptr + code) * nested + nested_offset
    else:
        scale = tl.load(absmax_ptr + block, mask, other=0.0)
    return scale


@triton.jit
def gather(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset,
    nested_code_ptr,
    index,
    mask,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Code · scale of the values at ``index`` of the flattened weight, float32, 0 where masked: any shape.

    WIDE: whether an index may exceed 31 bits; 64 take twice the registers.
    """
    if not WIDE:
        index = index.to(tl.int32)
    byte = tl.load(packed_ptr + (index >> 1), mask, other=0).to(tl.int32)
    code = tl.where((index & 1) == 0, byte >> 4, byte & 15)
    scale = scales(absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, index // BLOCKSIZE, mask, NESTED)
    return tl.where(mask, _value(code, QUANT_TYPE) * scale, 0.0)


@triton.jit(do_not_specialize=["first", "columns"])
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    out_ptr,
    first,
    columns,
    stride_weight,
    stride_out,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's part of ``BLOCK`` columns; ``first`` is the index of the region's first value in the flat weight."""
    nested_offset = 0.0
    if NESTED:
        nested_offset = tl.load(nested_offset_ptr)
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    index = first + row * stride_weight + start
    column = start + tl.arange(0, BLOCK)
    if PAIRS:  # a byte is read once for both of its values
        pair = tl.arange(0, BLOCK // 2)
        mask = start + 2 * pair < columns
        byte = tl.load(packed_ptr + (index >> 1) + pair, mask, other=0)
        block = (index + 2 * pair) // BLOCKSIZE
        scale = scales(absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, block, mask, NESTED)
        high, low = _value(byte >> 4, QUANT_TYPE) * scale, _value(byte & 15, QUANT_TYPE) * scale
        values = tl.reshape(tl.join(high, low), (BLOCK,))
    else:
        values = gather(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr,
            index + tl.arange(0, BLOCK), column < columns, QUANT_TYPE, BLOCKSIZE, NESTED, True,
        )  # fmt: skip
    tl.store(out_ptr + row * stride_out + column, cast(values, out_ptr.dtype.element_ty), column < columns)


@triton.jit
def _blocks(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, out_ptr, start, first, blocks, columns,
    stride_weight, stride_out,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, FLAT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Packed bytes and scales of ``GROUPS`` blocks of a region from block ``start`` on; where they go, and a mask."""
    group = tl.arange(0, GROUPS)
    mask = group < blocks - start
    if FLAT:
        block = first + start + group
        packed_ptr += (first + start).to(tl.int64) * (BLOCKSIZE // 2)
        byte = group * (BLOCKSIZE // 2)
        out_ptr += start.to(tl.int64) * BLOCKSIZE
        place = group * BLOCKSIZE
    else:
        row = (start + group) // columns
        column = (start + group) - row * columns
        block = first + row * stride_weight + column
        byte = block.to(tl.int64) * (BLOCKSIZE // 2)
        place = row.to(tl.int64) * stride_out + column * BLOCKSIZE
    packed = tl.load(packed_ptr + byte[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :], mask[:, None], other=0)
    scale = scales(absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, block, mask, NESTED)
    return packed, scale, out_ptr + place[:, None] + tl.arange(0, BLOCKSIZE)[None, :], mask


@triton.jit(do_not_specialize=["first", "blocks", "columns", "stride_weight"])
def _dequantize_blocks_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, out_ptr, first, blocks, columns,
    stride_weight, stride_out,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, FLAT: tl.constexpr,
    PERMUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Twice ``GROUPS`` whole blocks of a region of ``blocks``, numbered row by row.

    All but ``stride_out`` is counted in blocks: the compiler then knows how addresses are aligned without specialising.
    FLAT: the region is contiguous, in the weight and where it is written.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    nested_offset = 0.0
    if NESTED:
        nested_offset = tl.load(nested_offset_ptr)
    start = tl.program_id(0) * (2 * GROUPS)
    # Both halves are read before either is written, which might be to the same place for all that the compiler knows.
    byte0, scale0, out0, mask0 = _blocks(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, out_ptr, start, first, blocks,
        columns, stride_weight, stride_out, BLOCKSIZE, NESTED, FLAT, GROUPS,
    )  # fmt: skip
    byte1, scale1, out1, mask1 = _blocks(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset, nested_code_ptr, out_ptr, start + GROUPS, first,
        blocks, columns, stride_weight, stride_out, BLOCKSIZE, NESTED, FLAT, GROUPS,
    )  # fmt: skip
    value = decode(byte0, QUANT_TYPE, tl.float32, PERMUTE) * scale0[:, None]
    tl.store(out0, cast(value, dtype), mask0[:, None])
    value = decode(byte1, QUANT_TYPE, tl.float32, PERMUTE) * scale1[:, None]
    tl.store(out1, cast(value, dtype), mask1[:, None])


@triton.jit(do_not_specialize=["numel"])
def _quantize_4bit_kernel(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    NF4_BOUNDS: tl.constexpr,
    FP4_BOUNDS: tl.constexpr,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Quantises ``BLOCKS`` blocks of the flattened weight."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    value = tl.load(weight_ptr + index, index < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(value), axis=1)
    tl.store(absmax_ptr + block, absmax, block * BLOCKSIZE < numel)
    # Exact division and no fused multiply-add: the codes are those of the reference to the last one.
    value = value * tl.div_rn(1.0, tl.where(absmax > 0, absmax, 1.0))[:, None]
    code = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    if QUANT_TYPE == "nf4":
        for i in tl.static_range(15):
            code += (value > NF4_BOUNDS[i]).to(tl.int32)
        code = tl.where((absmax > 0)[:, None], code, 0)
        code = tl.where(index < numel, code, 7)  # the spare half byte of an odd number of values
    else:
        magnitude = tl.abs(value)
        for i in tl.static_range(7):
            code += (magnitude > FP4_BOUNDS[i]).to(tl.int32)
        code = (0x32547610 >> (4 * code)) & 15  # codes by rising magnitude: 0, 1, 6, 7, 4, 5, 2, 3
        code = tl.where(index < numel, code | ((value < 0).to(tl.int32) << 3), 0)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), 2 * byte < numel)


def cdiv(length: int, step: int) -> int:
    """How many steps cover a length. Triton's own takes microseconds, several of which a launch would pay for."""
    return -(-length // step)


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below a positive number; as with `cdiv`, Triton's own is slow."""
    return 1 << (least - 1).bit_length()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels are launched on the device of ``tensor``, on its current stream."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.quantize_4bit`."""
    weight, numel = weight.contiguous(), weight.numel()
    blocks = cdiv(numel, blocksize)
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    together = max(1, 1024 // blocksize)
    with on_device(weight):
        _quantize_4bit_kernel[(cdiv(blocks, together),)](
            weight, packed, absmax, numel, *_BOUNDS, QUANT_TYPE=quant_type, BLOCKSIZE=blocksize, BLOCKS=together,
            enable_fp_fusion=False,
        )  # fmt: skip
        if not double_quant:
            return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
        return packed, *reference.quantize_scales(absmax)


_TILE = 1024  # values: of each thread's 8, the bytes are loaded as 4 and 16-bit results stored as 16

_BOUNDS = tuple(tuple(reference.bounds(name, _CPU).tolist()) for name in ("nf4", "fp4"))


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.dequantize_4bit`."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel():
        region = out.view(1, -1)
        dequantize_region(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, prod(shape), 0, region)
    return out


def dequantize_region(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
    first: int,
    out: Tensor,
) -> None:
    """Writes a rectangle of a weight of rows of ``in_features`` to ``out``, ``(rows, columns)``, of unit column stride.

    first: the index of the rectangle's first value in the flattened weight.
    """
    rows, columns = out.shape
    stride_out, nested = out.stride(0), nested_absmax is not None
    flat = rows == 1 or columns == in_features == stride_out
    if flat:
        rows, columns = 1, rows * columns
    weight = (packed, absmax, nested_absmax, nested_offset, nested_code_table(packed.device) if nested else None, out)
    with on_device(packed):
        whole = columns % blocksize == 0 and first % blocksize == 0 and (flat or in_features % blocksize == 0)
        if whole and absmax.numel() < 2**30:  # blocks are counted in 32 bits
            groups, blocks = max(1, _TILE // blocksize), rows * columns // blocksize
            _dequantize_blocks_kernel[(cdiv(blocks, 2 * groups),)](
                *weight, first // blocksize, blocks, columns // blocksize, in_features // blocksize, stride_out,
                QUANT_TYPE=quant_type, BLOCKSIZE=blocksize, NESTED=nested, FLAT=flat, PERMUTE=not INTERPRETED,
                GROUPS=groups, num_warps=groups * blocksize // 256, enable_fp_fusion=False,
            )  # fmt: skip
            return
        block = min(4096, max(32, power_of_two(columns)))
        _dequantize_4bit_kernel[(rows * cdiv(columns, block),)](
            *weight, first, columns, in_features, stride_out, QUANT_TYPE=quant_type, BLOCKSIZE=blocksize,
            NESTED=nested, PAIRS=first % 2 == 0 and (in_features % 2 == 0 or rows == 1), BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip
