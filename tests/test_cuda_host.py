"""CUDA C++ kernels without a GPU: whole, on the model of one in tests/host/device/, or their layouts alone."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from needs import needs_extension

from harlora.kernels import cuda, dispatch, reference
from harlora.kernels.format import code_table

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
COMPILER = shutil.which("g++") or shutil.which("c++")
ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here"),
    pytest.mark.skipif(sys.platform != "linux", reason="the model of a GPU is written for Linux"),
]


def compiled(name, *options):
    """The library of a file in tests/host/, made once for what is in the folders it includes."""
    host, torch_folder = ROOT / "tests" / "host", Path(torch.__file__).parent
    digest = hashlib.sha256(f"{torch.__version__} {options}".encode())
    for path in sorted([*host.rglob("*.*"), *(ROOT / "csrc" / "cuda").iterdir()]):
        digest.update(path.read_bytes())
    library = ROOT / "build" / "host" / f"{Path(name).stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", ROOT / "csrc",
             *options, "-isystem", torch_folder / "include", host / name, "-o", temporary,
             "-L", torch_folder / "lib", "-ltorch_cpu"],
            check=True,
        )  # fmt: skip
        temporary.rename(library)
    return library


@pytest.fixture(scope="module")
def model():
    """The model of a GPU, whose kernels are then those of the CPU."""
    device = ROOT / "tests" / "host" / "device"
    torch.ops.load_library(
        compiled(
            "device/kernels.cpp", "-include", device / "device.h", "-I", device, "-fvisibility=hidden",
            "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi", "-Wno-unknown-pragmas",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        )
    )  # fmt: skip


@pytest.fixture
def on_model(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


def exactly(arguments):
    """The arguments with all in float64 that is in the dtype of x or a float32 adapter."""
    wide = [each.double() if torch.is_tensor(each) and each.is_floating_point() else each for each in arguments]
    return (*wide[:1], *arguments[1:5], *wide[5:])


def assert_close(found, right, dtype):
    assert found.shape == right.shape
    assert not right.numel() or (found - right).abs().max() <= ERROR[dtype] * right.abs().max()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "rank", "blocksize", "nested", "quant_type"),
    [
        (1, 64, 16, 0, 64, False, "nf4"), (8, 192, 33, 16, 64, False, "nf4"), (3, 1024, 17, 5, 128, True, "fp4"),
        (5, 4096, 40, 128, 64, True, "nf4"), (8, 512, 1, 1, 256, False, "fp4"), (2, 4096, 16, 8, 4096, False, "nf4"),
    ],
)  # fmt: skip
def test_few_rows(on_model, rows, in_features, out_features, rank, blocksize, nested, quant_type, dtype):
    arguments = dispatch.problem(
        "qlora_linear", CPU, dtype, rows, in_features, out_features, rank, quant_type, blocksize, nested
    )
    for found, right in zip(cuda.qlora_gemv(*arguments), reference.qlora_linear(*exactly(arguments)), strict=True):
        assert_close(found, right, dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_each_byte_is_decoded_exactly(on_model, quant_type, dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(16)  # 16 rows of 512, byte by byte
    absmax = torch.logspace(-3, 3, 16 * 8, dtype=torch.float32)
    weight = code_table(quant_type, CPU).to(dtype).float()[torch.stack([packed >> 4, packed & 15], 1).long()]
    weight = weight.view(16, 512) * absmax.repeat_interleave(64).view(16, 512)
    layer = (packed.view(-1, 1), absmax, None, None, quant_type, 64, 16, None, None, None, 1.0)
    for first in range(0, 512, 8):
        x = torch.zeros(8, 512, dtype=dtype)
        x[range(8), range(first, first + 8)] = 1
        assert torch.equal(cuda.qlora_gemv(x, *layer)[0], weight[:, first : first + 8].T.to(dtype))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("out_features", [128, 200])
def test_threads_of_warpgroups_together_multiply(out_features, tile, dtype):
    host, in_features, tokens = ctypes.CDLL(str(compiled("gemm_sm90.cpp"))), 192, tile - 3
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
