"""CUDA C++ kernels without a GPU: whole, on the model of one in tests/host/device/, or their layouts alone."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from needs import needs_extension
from test_cuda import encoder_error

import harlora
from harlora.kernels import cuda, dispatch, eager, gpu, reference, replay
from harlora.kernels.configurations import Configuration
from harlora.kernels.format import code_table
from harlora.models import MAE, MAEConfig, whole

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
    library = compiled(
        "device/kernels.cpp", "-include", device / "device.h", "-I", device, "-fvisibility=hidden",
        "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi", "-Wno-unknown-pragmas",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    )  # fmt: skip
    torch.ops.load_library(library)
    return library


@pytest.fixture
def on_model(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=8))


@pytest.fixture
def recorded(on_model, model, monkeypatch):
    """Calls a function, then the recording of its call on other inputs: what both give."""
    operators, recordings = torch.ops.harlora_cpp, torch.ops.harlora_model

    class Operators:
        def __getattr__(self, name):
            return getattr(recordings if name.startswith("launches_") else operators, name)

    monkeypatch.setattr(torch.ops, "harlora_cpp", Operators())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    code_table("nf4", CPU)  # made once, not while a call is watched

    def call(function, inputs, others):
        result, number = replay.record(inputs, lambda: function(inputs), str(model))
        assert number
        again = torch.ops.harlora_cpp.launches_run(others, number, 0)
        torch.ops.harlora_cpp.launches_release(number)
        return result, again

    return call


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
        (4, 2112, 100, 24, 64, False, "nf4"), (1, 5184, 70, 0, 64, True, "fp4"), (7, 1088, 150, 16, 64, True, "nf4"),
    ],
)  # fmt: skip
def test_few_rows(on_model, rows, in_features, out_features, rank, blocksize, nested, quant_type, dtype):
    arguments = dispatch.problem(
        "qlora_linear", CPU, dtype, rows, in_features, out_features, rank, quant_type, blocksize, nested
    )
    result = cuda.qlora_gemv(*arguments)
    for found, right in zip(result, reference.qlora_linear(*exactly(arguments)), strict=True):
        assert_close(found, right, dtype)
    if rank:
        wide = [each.float() if i in (9, 10) else each for i, each in enumerate(arguments)]
        assert all(map(torch.equal, cuda.qlora_gemv(*wide), result))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tile", "parts", "rows", "in_features", "out_features", "rank", "blocksize", "nested", "quant_type"),
    [
        (16, 1, 1, 64, 1, 0, 64, False, "nf4"), (16, 2, 7, 192, 33, 1, 64, True, "nf4"),
        (16, 1, 16, 1024, 128, 16, 512, False, "fp4"), (16, 3, 33, 640, 136, 5, 64, False, "nf4"),
        (32, 1, 8, 512, 130, 40, 128, True, "fp4"), (32, 2, 33, 768, 40, 128, 256, False, "nf4"),
        (32, 5, 70, 576, 8, 16, 64, True, "nf4"), (64, 1, 70, 320, 136, 16, 64, False, "nf4"),
        (64, 2, 130, 384, 33, 0, 128, False, "fp4"), (64, 3, 16, 1024, 40, 5, 64, True, "nf4"),
        (128, 1, 130, 256, 136, 40, 64, True, "nf4"), (128, 3, 70, 512, 17, 16, 256, False, "fp4"),
        (None, None, 20, 1024, 200, 8, 64, False, "nf4"),
    ],
)  # fmt: skip
def test_some_rows(
    on_model, tile, parts, rows, in_features, out_features, rank, blocksize, nested, quant_type, dtype
):  # fmt: skip
    x, *layer = dispatch.problem(
        "qlora_linear", CPU, dtype, rows, in_features, out_features, rank, quant_type, blocksize, nested
    )
    result = cuda.qlora_mma(x, *layer, tile=tile, parts=parts)
    for found, right in zip(result, reference.qlora_linear(*exactly((x, *layer))), strict=True):
        assert_close(found, right, dtype)
    if rank:
        wide = [each.float() if i in (8, 9) else each for i, each in enumerate(layer)]
        assert all(map(torch.equal, cuda.qlora_mma(x, *wide, tile=tile, parts=parts), result))


@needs_extension
def test_values_that_are_not_finite_stay_in_their_rows(on_model):
    x, *layer = dispatch.problem("qlora_linear", CPU, torch.bfloat16, 20, 256, 40, 0, "nf4", 64, False)
    for tile in (16, 64):
        right = cuda.qlora_mma(x, *layer, tile=tile, parts=2)[0]
        changed = x.clone()
        changed[5, 100], changed[17, 7] = torch.inf, torch.nan
        found = cuda.qlora_mma(changed, *layer, tile=tile, parts=2)[0]
        assert not found[5].isfinite().any()
        assert found[17].isnan().all()
        others = [row for row in range(20) if row not in (5, 17)]
        assert torch.equal(found[others], right[others])


@needs_extension
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 48, "parts": 1}, "tile must be 16, 32, 64 or 128"), ({"parts": 17}, "parts must be 1 to 16"),
        ({"parts": 3}, "each part needs a step of 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_it_does_not_take_is_named(options, message, on_model):
    with pytest.raises(RuntimeError, match=message):
        cuda.qlora_mma(*dispatch.problem("qlora_linear", CPU, torch.float16, 3, 128, 8, 0, "nf4", 64, False), **options)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "blocksize"),
    [(1, 64, 16, 64), (8, 192, 48, 64), (3, 1024, 32, 128), (5, 4096, 16, 64), (8, 512, 16, 256), (2, 4096, 16, 4096)],
)
def test_few_rows_are_rounded_once_and_each_byte_is_read_once(
    on_model, model, rows, in_features, out_features, blocksize, dtype
):
    x, *layer = dispatch.problem(
        "qlora_linear", CPU, dtype, rows, in_features, out_features, 0, "nf4", blocksize, False
    )
    layer[7] = None
    read = ctypes.CDLL(str(model)).bytes_read_once
    read.restype = ctypes.c_int64
    read()
    y, _ = cuda.qlora_gemv(x, *layer)
    assert read() == layer[0].numel()
    codes = torch.cat([layer[0] >> 4, layer[0] & 15], 1).view(out_features, in_features).long()
    values = code_table("nf4", CPU).to(dtype).double()
    scales = layer[1].double().repeat_interleave(blocksize).view(out_features, in_features)
    right = x.double() @ (values[codes] * scales).T
    half = torch.finfo(dtype).eps / 2  # of the last place of a result
    assert ((y - right).abs() <= half * right.abs() + 1e-5 * right.abs().max()).all()


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
        right = weight[:, first : first + 8].T.to(dtype)
        assert torch.equal(cuda.qlora_gemv(x, *layer)[0], right)
        if first % 64 == 0:  # which takes the model longer
            assert torch.equal(cuda.qlora_mma(x, *layer, tile=16, parts=1)[0], right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_each_byte_has_its_pair_by_permutes(model, quant_type, dtype):
    values = code_table(quant_type, CPU).to(dtype)
    byte = torch.arange(256)
    four = torch.stack([byte, byte.roll(77), byte.flip(0), (byte * 5) % 256], 1)  # each at each place of a word
    words, found = four.to(torch.uint8).contiguous(), torch.empty(256, 4, 2, dtype=torch.int16)
    ctypes.CDLL(str(model)).pairs_by_planes(
        pointer(values.view(torch.int16)), pointer(words), ctypes.c_int64(256), pointer(found)
    )
    assert torch.equal(found.view(dtype), torch.stack([values[four >> 4], values[four & 15]], -1))


@needs_extension
@pytest.mark.parametrize("nested", [False, True])
def test_a_recorded_call_of_few_rows_is_that_call(recorded, nested):
    def given(seed):
        arguments = dispatch.problem("qlora_linear", CPU, torch.bfloat16, 5, 256, 40, 8, "nf4", 64, nested, seed=seed)
        return arguments, [each for each in arguments if torch.is_tensor(each)]

    (arguments, inputs), (further, others) = given(1), given(2)

    def call(tensors):
        left = iter(tensors)
        return cuda.qlora_gemv(*(next(left) if torch.is_tensor(each) else each for each in arguments))

    for found, right in zip(recorded(call, inputs, others)[1], cuda.qlora_gemv(*further), strict=True):
        assert torch.equal(found, right)


# A whole encoder ----------------------------------------------------------------------------------------------------


def an_encoder(dtype, *sizes, blocksize=64, nested=False, quant_type="nf4", **options):
    """Arguments of the operator: windows, tokens, heads, width, hidden, blocks and rank."""
    return *dispatch.problem_of_encoder(CPU, dtype, *sizes, quant_type, blocksize, nested, **options), False


def assert_encodes(arguments, **options):
    assert encoder_error(arguments[:4], **options) <= 2


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tile", "parts", "sizes", "options"),
    [
        (16, 1, (1, 16, 4, 64, 128, 1, 0), {}),
        (16, 2, (3, 8, 4, 64, 128, 2, 16), {}),
        (16, 8, (2, 5, 1, 64, 192, 1, 3), {"nested": True}),
        (32, 4, (3, 13, 2, 128, 192, 1, 5), {"blocksize": 128, "nested": True, "quant_type": "fp4"}),
        (32, 1, (5, 16, 4, 256, 64, 1, 70), {"adapter_dtype": torch.float32}),
        (64, 1, (2, 64, 3, 192, 128, 1, 40), {"quant_type": "fp4"}),
        (64, 2, (3, 33, 6, 192, 512, 1, 16), {"blocksize": 512}),
        (16, 4, (2, 16, 6, 192, 512, 3, 16), {}),  # the package's own, by parts
        *((16, parts, (3, 16, 6, 192, 512, 1, 16), {}) for parts in (1, 2, 8)),
        *((32, parts, (3, 16, 6, 192, 512, 2, 16), {}) for parts in (1, 2, 4)),
    ],
)  # fmt: skip
def test_an_encoder_in_one_launch(on_model, tile, parts, sizes, options, dtype):
    assert_encodes(an_encoder(dtype, *sizes, **options), tile=tile, parts=parts)


@needs_extension
def test_more_blocks_than_one_launch_has(on_model):
    assert_encodes(an_encoder(torch.float16, 2, 9, 4, 64, 128, 9, 8), tile=16, parts=2)


@needs_extension
def test_without_bias(on_model):
    x, blocks, norm, *rest = an_encoder(torch.float16, 2, 9, 4, 64, 128, 1, 8)
    blocks = [[(*part[:7], None, *part[8:]) if len(part) > 3 else part for part in block] for block in blocks]
    assert_encodes((x, blocks, norm, *rest), tile=32, parts=1)


@needs_extension
def test_no_window_sees_another(on_model):
    x, *rest = an_encoder(torch.float16, 5, 6, 4, 64, 128, 1, 8)
    (right,) = cuda.encoder_blocks(x, *rest, tile=32, parts=2)
    x = x.clone()
    x[1, 2, 3], x[3, 5, 0] = torch.nan, torch.inf
    (found,) = cuda.encoder_blocks(x, *rest, tile=32, parts=2)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], right[[0, 2, 4]])


@needs_extension
def test_tensors_at_any_address_are_read(on_model):
    """As of a model whose adapters are views into one tensor; what served another model of the same sizes is kept."""
    x, blocks, *rest = an_encoder(torch.float16, 2, 5, 4, 64, 128, 1, 3)
    (right,) = cuda.encoder_blocks(x, blocks, *rest, tile=16, parts=1)
    norm1, q, *others = blocks[0]
    moved = [torch.empty(each.numel() + 1, dtype=each.dtype)[1:].view_as(each).copy_(each) for each in q[8:10]]
    assert any(each.data_ptr() % 16 for each in moved)
    (found,) = cuda.encoder_blocks(x, [(norm1, (*q[:8], *moved, q[10]), *others)], *rest, tile=16, parts=1)
    assert torch.equal(found, right)


def test_one_launch_is_proven_on_a_problem_that_finds_room():
    weight = (None, None, None, None, "nf4", 4096)
    for chosen, hidden in ((Configuration("encoder", 64), 512), ((Configuration("direct"),), 8192)):
        probe = dispatch._probe("encoder_blocks", chosen, CPU, torch.float16, 64, weight, None)
        _, blocks, *_ = dispatch._problem_of_blocks(dispatch.replace(probe, shape=(5, 4, 64)), torch.float16)
        assert blocks[0][6][6] == hidden


@needs_extension
def test_the_tile_and_the_parts_follow_from_the_windows_and_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132))
    for windows, tokens, tile, parts in (
        (1, 16, 16, 8), (64, 16, 16, 2), (64, 8, 16, 4), (132, 16, 16, 1), (133, 16, 32, 1), (512, 16, 32, 1),
        (3, 17, 32, 8), (64, 64, 64, 2), (4, 33, 64, 8),
    ):  # fmt: skip
        x, fc1 = torch.empty(windows, tokens, 64), (None,) * 6 + (128, None, torch.empty(3, 64))
        assert cuda._tile_of_encoder(x) == tile
        cuda._room.cache_clear()
        assert cuda._parts_of_encoder(x, fc1, tile) == parts
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    assert cuda._parts_of_encoder(x[:1], fc1, tile) == 1
    cuda._room.cache_clear()


@needs_extension
def test_a_block_of_threads_finds_room_on_a_multiprocessor(model):
    """Of the package's own encoder with adapters, on GPUs from 8.0 and from 9.0 on, and how many of them at once."""
    for token_tiles, most in ((2, 163), (4, 163), (8, 227)):
        assert torch.ops.harlora_model.encoder_shared_bytes(192, 512, 16, token_tiles) <= most * 1024
    for parts in (1, 2, 4, 8):
        assert torch.ops.harlora_model.encoder_room(192, 512, 16, True, 2, parts) == (8 // parts if parts > 1 else 1)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"width / heads must be a multiple of 16"),
        ({"tile": 24}, "token_tiles must be 2, 4 or 8"),
        ({"parts": 3}, "parts must be 1, 2, 4 or 8"),
        ({"tokens": 17}, "at most 8 tokens for each of token_tiles"),
        ({"dtype": torch.float32}, "x must be bfloat16 or float16"),
        ({"hidden": 96}, "must be multiples of 64"),
        ({"norm": torch.ones(3).half()}, "tensor 34 must have 64 contiguous values"),
    ],
    ids=str,
)  # fmt: skip
def test_what_one_launch_cannot_serve_is_refused(on_model, change, message):
    given = {"dtype": torch.float16, "windows": 1, "tokens": 4, "heads": 4, "width": 64, "hidden": 128}
    options = {"tile": change.get("tile", 16), "parts": change.get("parts", 1)}
    known = {name: value for name, value in change.items() if name in given}
    x, blocks, norm, heads, keep = an_encoder(*(given | known).values(), 1, 2)
    if "norm" in change:
        norm = (change["norm"], *norm[1:])
    with pytest.raises(RuntimeError, match=message):
        cuda.encoder_blocks(x, blocks, norm, heads, keep, **options)


@needs_extension
@pytest.mark.parametrize("nested", [False, True])
def test_a_recorded_call_of_an_encoder_is_that_call(recorded, nested):
    given = (torch.bfloat16, 3, 8, 4, 64, 128, 2, 4)
    (x, blocks, norm, heads, _), further = (an_encoder(*given, nested=nested, seed=seed) for seed in (3, 4))
    facts = tuple(
        (*layer[4:7], layer[10], nested, True, True) for block in blocks for layer in cuda._layers(block)
    )  # fmt: skip
    held = gpu.Blocks(heads, facts, (*[1e-5] * 4, norm[2]))

    def tensors(x, blocks, norm):
        parts = [part for block in blocks for part in block]
        return [x, *(each for part in (*parts, norm) for each in part if torch.is_tensor(each))]

    def call(inputs):
        made, last = held.assembled(inputs[1:])
        return cuda.encoder_blocks(inputs[0], made, last, heads, False, tile=16, parts=2)

    first, (again,) = recorded(call, tensors(x, blocks, norm), tensors(*further[:3]))
    assert torch.equal(again, cuda.encoder_blocks(*further, tile=16, parts=2)[0])
    assert not torch.equal(again, first[0])


@pytest.fixture
def asked_for(on_model, monkeypatch):
    """A machine whose CPU is the model's GPU, and encodes in one launch; the sizes of what it encoded."""
    shapes, original = [], cuda.encoder_blocks

    def encoder_blocks(x, *arguments, **options):
        shapes.append(tuple(x.shape))
        return original(x, *arguments, **options)

    monkeypatch.setitem(cuda.WAYS["encoder_blocks"], "encoder", encoder_blocks)
    monkeypatch.setattr(dispatch, "encoder_way", cache(lambda *_: Configuration("encoder")))
    monkeypatch.setattr(dispatch, "served_by_triton", cache(lambda *_: False))
    monkeypatch.setattr(dispatch, "_wrong", {})
    monkeypatch.setattr(cuda, "serves_encoder", lambda *given: cuda._fits_encoder(*given[:4]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=2))
    eager.reset()
    yield shapes
    eager.reset()


def a_model(**options):
    config = MAEConfig(
        width=64, heads=4, ffn=128, depth=2, window=40, decoder_width=32, decoder_depth=1, decoder_ffn=32
    )
    encoder = harlora.apply_qlora(MAE(config).encoder, ["q", "k", "v", "o", "fc1", "fc2"], rank=3, **options)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.bfloat16()


@needs_extension
@pytest.mark.parametrize("options", [{}, {"double_quant": True, "quant_type": "fp4"}], ids=str)
def test_a_model_is_encoded_in_one_launch_where_that_is_asked_for(asked_for, options):
    encoder, x = a_model(**options), torch.randn(9, 5, 64).bfloat16()
    with torch.no_grad():
        found, again = (whole.encode_tokens(encoder, x) for _ in range(2))
        assert asked_for == [(3, 5, 64)] * 2 + [(9, 5, 64)] * 2  # it is proven once, in parts and not
        right = x
        for block in encoder.blocks:
            right = block(right)
        right = encoder.norm(right)
    assert torch.equal(found, again)
    assert (found - right).abs().max() <= 0.05 * right.abs().max()
    assert whole.encode_tokens(encoder, x) is None  # to train, its modules run


@needs_extension
def test_what_one_launch_is_not_for_is_left_to_the_modules(asked_for):
    with torch.no_grad():
        for encoder, x in (
            (a_model(), torch.randn(2, 65, 64).bfloat16()),
            (a_model(blocksize=32), torch.randn(2, 5, 64).bfloat16()),
            (a_model().float(), torch.randn(2, 5, 64)),
        ):
            assert whole.encode_tokens(encoder, x) is None
        mixed = a_model()
        mixed.blocks[1].fc2.lora_A.data = mixed.blocks[1].fc2.lora_A.data[:2].clone()
        mixed.blocks[1].fc2.lora_B.data = mixed.blocks[1].fc2.lora_B.data[:, :2].clone()
        assert whole.encode_tokens(mixed, torch.randn(2, 5, 64).bfloat16()) is None
    assert not asked_for


# Layouts of wgmma ---------------------------------------------------------------------------------------------------


def backward_in_float64(arguments):
    """The reference's gradients; x, t, lora_A, lora_B and dY in float64."""
    grad, x, t, *quantized, A, B, scaling, mask = arguments
    grad, x, t, A, B = (None if each is None else each.double() for each in (grad, x, t, A, B))
    return reference.qlora_linear_backward(grad, x, t, *quantized, A, B, scaling, mask)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "rank", "blocksize", "nested", "quant_type", "wide", "tile", "parts"),
    [
        (1, 64, 16, 0, 64, False, "nf4", False, 16, 1), (7, 192, 33, 16, 64, False, "fp4", False, 16, 1),
        (16, 128, 200, 1, 128, True, "nf4", True, 16, 2), (33, 256, 392, 40, 256, False, "nf4", False, 32, 3),
        (70, 192, 640, 5, 64, True, "fp4", True, 32, 1), (70, 192, 448, 16, 64, False, "nf4", False, 64, 2),
        (40, 512, 130, 128, 512, True, "nf4", False, 64, 1), (130, 192, 296, 5, 64, False, "nf4", True, 128, 4),
        (90, 128, 24, 40, 64, True, "nf4", False, 128, 1), (130, 64, 1, 0, 64, False, "nf4", False, 16, 1),
    ],
)  # fmt: skip
def test_backward(
    on_model, rows, in_features, out_features, rank, blocksize, nested, quant_type, wide, tile, parts, dtype
):
    arguments = dispatch.problem(
        "qlora_linear_backward", CPU, dtype, rows, in_features, out_features, rank, quant_type, blocksize, nested,
        adapter_dtype=torch.float32 if wide else None,
    )  # fmt: skip
    found = cuda.qlora_backward(*arguments, tile=tile, parts=parts)
    for one, right, of in zip(found, backward_in_float64(arguments), "xbAB", strict=True):
        assert one.dtype == (torch.float32 if wide and rank and of in "AB" else dtype)
        assert_close(one, right, dtype)


@needs_extension
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("mask", list(product([False, True], repeat=4)))
def test_backward_of_what_is_wanted(on_model, mask, rank):
    grad, x, t, *layer, _ = dispatch.problem(
        "qlora_linear_backward", CPU, torch.bfloat16, 20, 64, 40, rank, "nf4", 64, False
    )
    mask = [want and (rank > 0 or place < 2) for place, want in enumerate(mask)]
    grad = grad.view(4, 5, 40)
    arguments = (grad, x.view(4, 5, 64) if mask[2] else None, t.view(4, 5, rank) if mask[3] else None, *layer, mask)
    found = cuda.qlora_backward(*arguments, tile=16, parts=1)
    for one, right in zip(found, backward_in_float64(arguments), strict=True):
        assert_close(one, right, torch.bfloat16)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_backward_decodes_each_byte_as_dequantising_does(on_model, quant_type, tile, dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(16)  # 64 rows of 128
    absmax = torch.logspace(-3, 3, 128, dtype=torch.float32)
    layer = (packed.view(-1, 1), absmax, None, None, quant_type, 64)
    grad = torch.eye(64, dtype=dtype)
    code = code_table(quant_type, CPU).to(dtype).float()[torch.stack([packed >> 4, packed & 15], 1).long()]
    weight = code.view(64, 128) * absmax.repeat_interleave(64).view(64, 128)
    found, *_ = cuda.qlora_backward(
        grad, None, None, *layer, 128, None, None, 1.0, [True, False, False, False], tile=tile, parts=1
    )
    # The scale is two 16-bit numbers and its lesser product is rounded, too: seldom the next number of the dtype.
    assert (found != weight.to(dtype)).float().mean() < 0.02
    assert ((found.float() - weight).abs() <= 0.51 * torch.finfo(dtype).eps * weight.abs() + 2**-24).all()


@needs_extension
def test_backward_keeps_infinite_and_nan_values_in_their_rows(on_model):
    arguments = dispatch.problem("qlora_linear_backward", CPU, torch.bfloat16, 40, 64, 100, 0, "nf4", 64, False)
    right = cuda.qlora_backward(*arguments, tile=32, parts=1)[0]
    arguments[0][3, 99], arguments[0][39, 7] = torch.inf, torch.nan
    found = cuda.qlora_backward(*arguments, tile=32, parts=1)[0]
    assert not found[3].isfinite().any()
    assert found[39].isnan().all()
    others = [row for row in range(40) if row not in (3, 39)]
    assert torch.equal(found[others], right[others])


@needs_extension
def test_backward_refuses_what_does_not_fit(on_model):
    arguments = dispatch.problem("qlora_linear_backward", CPU, torch.bfloat16, 20, 64, 140, 5, "nf4", 64, False)
    for options, message in (
        ({"tile": 48, "parts": 1}, "tile must be"), ({"tile": 16, "parts": 33}, "parts must be 1 to 32"),
        ({"tile": 16, "parts": 4}, "each part needs a step of 64 rows"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            cuda.qlora_backward(*arguments, **options)
    grad, x, t, *layer = arguments
    with pytest.raises(RuntimeError, match="lora_grads: grad_B and t must be"):
        cuda.qlora_backward(grad, x, t.float(), *layer, tile=16, parts=1)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("in_features", "out_features"), [(128, 64), (192, 200), (64, 8)])
def test_threads_of_warpgroups_together_multiply_backward(in_features, out_features, dtype):
    host, tile, tokens = ctypes.CDLL(str(compiled("gemm_sm90.cpp"))), 64, 61
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    grad = torch.randn(tokens, out_features, generator=generator).to(dtype)
    packed, absmax, _, _ = reference.quantize_4bit(weight, "fp4", 64, False)
    values = code_table("fp4", torch.device("cpu")).to(dtype)
    y, writes = torch.full((tokens, in_features), torch.nan), torch.zeros(256, dtype=torch.int32)
    host.dx(
        pointer(grad), pointer(packed), pointer(absmax), pointer(values), int(dtype == torch.bfloat16), tokens, tile,
        *(ctypes.c_int64(each) for each in (in_features, out_features)), pointer(y), pointer(writes),
    )  # fmt: skip
    codes = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(out_features, in_features)
    dense = values.double()[torch.from_numpy(codes).long()] * absmax.double().repeat_interleave(64).view(
        out_features, in_features
    )
    right = grad.double() @ dense
    assert (y - right).abs().max() <= 1e-5 * right.abs().max()
    assert torch.equal(writes, torch.ones_like(writes))  # no place of a scale is taken twice, none is left
