"""What CUDA C++ kernels decide by arithmetic alone, run on the CPU from their own headers: layouts, decoding."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from harlora.kernels import reference
from harlora.kernels.format import code_table

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


def compiled(name, folder):
    library = folder / f"{name}.so"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", ROOT / "csrc",
         ROOT / "tests" / "host" / f"{name}.cpp", "-o", library],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compiled("gemv", tmp_path_factory.mktemp("host"))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def patterns(tensor, dtype):
    return tensor.to(dtype).view(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_each_byte_has_its_pair_in_the_bank_of_each_lane(host, quant_type, dtype):
    values = code_table(quant_type, torch.device("cpu")).to(dtype)
    places, found = torch.empty(256, 4, dtype=torch.int32), torch.empty(256, 2, dtype=torch.int16)
    host.pairs(pointer(values.view(torch.int16)), pointer(places), pointer(found))
    byte = torch.arange(256)
    assert torch.equal(places, (4 * 32 * byte[:, None]).expand(256, 4).int())  # a multiple of the banks
    assert torch.equal(found.view(dtype), torch.stack([values[byte >> 4], values[byte & 15]], dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "blocksize"),
    [(1, 64, 16, 64), (8, 192, 33, 64), (3, 1024, 17, 128), (5, 4096, 40, 64), (8, 512, 1, 256), (2, 4096, 16, 4096)],
)
def test_lanes_together_multiply(host, tokens, in_features, out_features, blocksize, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    packed, absmax, _, _ = reference.quantize_4bit(weight, "nf4", blocksize, False)
    values = code_table("nf4", torch.device("cpu")).to(dtype)
    y, reads = torch.full((tokens, out_features), torch.nan), torch.zeros(packed.numel(), dtype=torch.int32)
    host.gemv(
        pointer(x), pointer(packed), pointer(absmax), pointer(values), int(dtype == torch.bfloat16), tokens,
        *(ctypes.c_int64(each) for each in (in_features, out_features, blocksize)), pointer(y), pointer(reads),
    )  # fmt: skip
    codes = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(out_features, in_features)
    dense = values.double()[torch.from_numpy(codes).long()] * absmax.double().repeat_interleave(blocksize).view(
        out_features, in_features
    )
    right = x.double() @ dense.T
    assert (y - right).abs().max() <= 1e-5 * right.abs().max()
    assert torch.equal(reads, torch.ones_like(reads))  # no byte is read twice, none is left out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("out_features", [128, 200])
def test_threads_of_warpgroups_together_multiply(tmp_path, out_features, tile, dtype):
    host, in_features, tokens = compiled("gemm_sm90", tmp_path), 192, tile - 3
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    packed, absmax, _, _ = reference.quantize_4bit(weight, "nf4", 64, False)
    values = code_table("nf4", torch.device("cpu")).to(dtype)
    y, writes = torch.full((tokens, out_features), torch.nan), torch.zeros(128 * 32, dtype=torch.int32)
    host.gemm(
        pointer(x), pointer(packed), pointer(absmax), pointer(values), int(dtype == torch.bfloat16), tokens, tile,
        *(ctypes.c_int64(each) for each in (in_features, out_features)), pointer(y), pointer(writes),
    )  # fmt: skip
    codes = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(out_features, in_features)
    dense = values.double()[torch.from_numpy(codes).long()] * absmax.double().repeat_interleave(64).view(
        out_features, in_features
    )
    right = x.double() @ dense.T
    assert (y - right).abs().max() <= 1e-5 * right.abs().max()
    assert torch.equal(writes, torch.ones_like(writes))  # no place of the tile of codes is taken twice
