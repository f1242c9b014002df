"""Triton's kernels under its interpreter, each way and tile of the dispatch table, and the code they are compiled to.

The operators' own suite runs on them too (test_ops.py); here they are called past the dispatcher.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harlora
from harlora.kernels import configurations, dispatch, eager, reference
from harlora.kernels.configurations import Configuration
from harlora.kernels.dropout import draw_seed
from harlora.kernels.format import code_table

if dispatch.load_triton():
    pytest.skip(dispatch.load_triton(), allow_module_level=True)

from harlora.kernels.triton import nf4, qlora_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
ROOT = Path(__file__).parent.parent
DIRECT, SPLIT, DENSE = (
    Configuration("direct", 32, 32, 64),
    Configuration("split", 16, 32, 32, programs=16),
    Configuration("dense"),
)
ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tables():
    return {
        rule.use
        for table in configurations.tables().values()
        for rules in table.values()
        for rule in rules
        if rule.use.way in ("direct", "split")
    }


def quantized(in_features, out_features, quant_type, blocksize, nested):
    weight = torch.randn(out_features, in_features, device=DEVICE) / in_features**0.5
    packed, absmax, nested_absmax, offset = reference.quantize_4bit(weight, quant_type, blocksize, nested)
    return packed, absmax, *((nested_absmax, offset) if nested else (None, None)), quant_type, blocksize


def double(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check(
    configuration, rows, in_features, out_features, rank, dtype, quant_type="nf4", blocksize=64, nested=False, dropout=0
):
    """Forward and backward against the reference in float64, with the weight as the kernels round it or finer."""
    q = quantized(in_features, out_features, quant_type, blocksize, nested)

    def draw(*shape, variance=1):
        return (torch.randn(*shape, device=DEVICE) / variance**0.5).to(dtype)

    x, grad, bias = draw(rows, in_features), draw(rows, out_features, variance=out_features), draw(out_features)
    A = draw(rank, in_features, variance=in_features) if rank else None
    B = draw(out_features, rank, variance=rank) if rank else None
    t = draw(rows, rank) if rank else None
    forward = (out_features, bias, A, B, 0.5)
    mask = [True, True, bool(rank), bool(rank)]
    drop = (dropout, draw_seed(DEVICE)) if dropout else ()
    backward = (grad, x, t, *q, in_features, A, B, 0.5, mask, *drop)
    found = [
        *qlora_linear.qlora_linear(x, *q, *forward, *drop, configuration=configuration),
        *qlora_linear.qlora_linear_backward(*backward, configuration=configuration),
    ]
    exact = [
        *reference.qlora_linear(x.double(), *q, *double(forward), *drop),
        *reference.qlora_linear_backward(*double(backward[:3]), *q, in_features, *double((A, B)), 0.5, mask, *drop),
    ]
    for name, one, other in zip(("y", "t", "dX", "dbias", "dA", "dB"), found, exact, strict=True):
        assert one.shape == other.shape, name
        assert one.dtype == dtype, name
        if other.numel():
            error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-30)
            assert error <= ERROR[dtype], f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("way", [DIRECT, SPLIT, DENSE], ids=lambda c: c.way)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "rank", "quant_type", "blocksize", "nested"),
    [
        (1, 64, 32, 1, "nf4", 64, False),
        (17, 192, 65, 16, "fp4", 64, True),
        (33, 96, 40, 3, "nf4", 32, True),
        (5, 65, 33, 7, "nf4", 32, False),  # odd rows of the weight
        (9, 160, 34, 33, "fp4", 64, True),  # blocks across rows; an adapter's product of its own
        (3, 1024, 18, 128, "nf4", 1024, False),
        (2, 130, 70, 130, "nf4", 256, False),
        (35, 128, 130, 0, "nf4", 128, True),
    ],
)
def test_each_way(way, rows, in_features, out_features, rank, quant_type, blocksize, nested, dtype):
    check(way, rows, in_features, out_features, rank, dtype, quant_type, blocksize, nested)
    if rank and dtype != torch.float16:
        check(way, rows, in_features, out_features, rank, dtype, quant_type, blocksize, nested, dropout=0.3)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("rank", [4, 40])
def test_dropout_where_t_is_computed_ahead(rank, monkeypatch):
    """For many tiles of y, each of which would have to compute anew what is dropped; and in several parts of rows."""
    monkeypatch.setattr(qlora_linear, "MOST_TILES_WITH_DROPOUT", 1)
    check(DIRECT, 300, 96, 70, rank, torch.float32, blocksize=32, dropout=0.9)


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 15, 16, 17, 32, 64, 127, 128])
def test_ranks(rank):
    check(DIRECT, 20, 64, 48, rank, torch.float32)
    check(SPLIT, 20, 128, 48, rank, torch.float16)


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 31, 64, 65, 300])
def test_rows(rows):
    for way in (DIRECT, SPLIT, DENSE):
        check(way, rows, 128, 34, 4, torch.float32)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocksizes(quant_type, blocksize):
    for in_features in (64, 33):  # one of them in one block with others
        check(DIRECT, 4, in_features, 20, 4, torch.float32, quant_type, blocksize, blocksize > 256)


@pytest.mark.parametrize("configuration", sorted(tables(), key=str), ids=str)
def test_each_configuration_of_the_tables(configuration):
    check(configuration, configuration.block_rows + 1, 192, configuration.block_out + 2, 8, torch.float16)


def test_the_parts_of_a_sum_do_not_depend_on_who_is_first():
    q = quantized(256, 40, "nf4", 64, True)
    x, A, B = (torch.randn(*shape, device=DEVICE) for shape in ((5, 256), (8, 256), (40, 8)))
    first, second = (qlora_linear.qlora_linear(x, *q, 40, None, A, B, 0.5, configuration=SPLIT) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_strides_and_offsets(monkeypatch):
    """Rows with room between them, and tensors that begin anywhere in one storage, as FSDP keeps them."""
    q = quantized(128, 40, "nf4", 64, False)
    x, A, B = (torch.randn(*shape, device=DEVICE) for shape in ((6, 128), (4, 128), (40, 4)))
    storage = torch.empty(4 * (x.numel() + A.numel() + B.numel()) + 8, device=DEVICE)
    flat, place = [], 3
    for tensor in (x, A, B):
        flat.append(storage[place : place + tensor.numel()].view(tensor.shape).copy_(tensor))
        place += tensor.numel() + 1
    packed = torch.empty(q[0].numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(-1, 1).copy_(q[0])
    spaced = torch.empty(6, 200, device=DEVICE)[:, 7:135].copy_(x)
    for way in (DIRECT, SPLIT, DENSE):
        expected = qlora_linear.qlora_linear(x, *q, 40, None, A, B, 0.5, configuration=way)[0]
        for rows in (flat[0], spaced, x.T.contiguous().T):
            found = qlora_linear.qlora_linear(rows, packed, *q[1:], 40, None, *flat[1:], 0.5, configuration=way)[0]
            torch.testing.assert_close(found, expected)
    # A weight larger than a chunk, whose last chunk is shorter.
    monkeypatch.setattr(qlora_linear, "CHUNK_BYTES", 64 * 4 * 150)
    check(DENSE, 7, 128, 190, 4, torch.float32)
    check(DENSE, 7, 320, 66, 4, torch.float32)
    check(DENSE, 7, 320, 190, 0, torch.float32)
    check(DENSE, 7, 512, 30, 4, torch.float32, blocksize=256)  # chunks of dX's columns are of whole blocks
    check(DENSE, 7, 512, 66, 4, torch.float32, blocksize=256)  # and here too small for that


@pytest.mark.usefixtures("nan_filled_memory")
def test_dense_with_and_without_each_addend():
    q = quantized(64, 48, "nf4", 64, False)
    x, bias, A, B = (torch.randn(*shape, device=DEVICE) for shape in ((9, 64), (48,), (4, 64), (48, 4)))
    gain = torch.randn(48, device=DEVICE)
    for bias_ in (None, bias):
        for adapter in ((None, None), (A[:0], B[:, :0]), (A, B)):
            expected = reference.qlora_linear(x, *q, 48, bias_, *adapter, 0.5)
            found = qlora_linear.qlora_linear(x, *q, 48, bias_, *adapter, 0.5, configuration=DENSE)
            torch.testing.assert_close(found, expected)
            z, _ = reference.qlora_linear(x, *q, 48, None, *adapter, 0.5)
            y, _ = qlora_linear.qlora_linear(x, *q, 48, bias_, *adapter, 0.5, configuration=DENSE, gain=gain)
            torch.testing.assert_close(y, reference.with_gain(z, gain, bias_))


# The bytes that PTX permutes -----------------------------------------------------------------------------------------


def execute(ptx, byte):
    """Run the few PTX instructions of `nf4._permutation` on four packed bytes; the words of the results."""
    results = ptx.count("prmt.b32 $")
    registers = {f"${results}": byte}

    def value(text):
        return int(text, 0) if text[0].isdigit() else registers[text]

    for line in ptx.strip("{}\n ").split(";"):
        words = re.split(r"[\s,]+", line.strip())
        if words[0] in ("", ".reg"):
            continue
        operation, target, *arguments = words
        given = [value(argument) for argument in arguments]
        if operation == "and.b32":
            result = given[0] & given[1]
        elif operation == "shr.u32":
            result = given[0] >> given[1]
        elif operation == "prmt.b32":  # PTX ISA, prmt: bit 3 of a selector would copy the byte's sign
            pool = given[0] | given[1] << 32
            selectors = [given[2] >> 4 * i & 15 for i in range(4)]
            assert max(selectors) < 8
            result = sum((pool >> 8 * selector & 255) << 8 * i for i, selector in enumerate(selectors))
        elif operation == "lop3.b32":
            result = 0
            for bit in range(32):
                row = sum((given[i] >> bit & 1) << (2 - i) for i in range(3))
                result |= (given[3] >> row & 1) << bit
        else:
            raise AssertionError(operation)
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(results)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
def test_permutes_decode_every_byte_in_every_place(quant_type, dtype):
    ptx = nf4._permutation(code_table(quant_type, torch.device("cpu")).tolist(), dtype)
    size = dtype.itemsize
    pattern = code_table(quant_type, torch.device("cpu")).to(dtype).view(torch.uint8).view(16, size).tolist()
    pattern = [int.from_bytes(bytes(each), "little") for each in pattern]
    for byte in range(256):
        for place in range(4):
            four = [(byte if i == place else 37 * byte + 11 * i & 255) for i in range(4)]
            words = execute(ptx, sum(b << 8 * i for i, b in enumerate(four)))
            assert len(words) == 2 * size
            stream = b"".join(word.to_bytes(4, "little") for word in words)
            codes = [int.from_bytes(stream[i : i + size], "little") for i in range(0, 8 * size, size)]
            assert codes[:4] == [pattern[b >> 4] for b in four]
            assert codes[4:] == [pattern[b & 15] for b in four]


# Regions of a weight -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(
    ("shape", "blocksize", "rows", "columns"),
    [
        ((96, 192), 64, (0, 96), (0, 192)),  # all, more than one program
        ((33, 96), 32, (5, 32), (0, 96)),  # whole rows
        ((6, 40), 32, (0, 4), (0, 40)),  # whole blocks, which cross rows
        ((41, 256), 64, (0, 41), (64, 192)),  # whole blocks of each row
        ((3, 8192), 4096, (1, 3), (4096, 8192)),
        ((7, 128), 32, (1, 7), (16, 80)),  # blocks that begin outside
        ((9, 65), 32, (1, 8), (3, 40)),
        ((1, 4096), 1024, (0, 1), (1024, 1056)),
    ],
)
def test_regions_are_dequantised_bit_for_bit(shape, blocksize, rows, columns, dtype):
    for quant_type, nested in (("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)):
        q = quantized(shape[1], shape[0], quant_type, blocksize, nested)
        part = reference.dequantize_4bit(*q, shape, dtype)[slice(*rows), slice(*columns)]
        for room in (0, 1, 16):  # between the rows of what is written
            wide = torch.empty(len(part), part.shape[1] + room, dtype=dtype, device=DEVICE)
            found = wide[:, : part.shape[1]]
            nf4.dequantize_region(*q, shape[1], rows[0] * shape[1] + columns[0], found)
            assert torch.equal(found, part)
            assert wide[:, part.shape[1] :].isnan().all()


# The choice of a configuration ---------------------------------------------------------------------------------------


def test_the_tables_are_complete():
    found = configurations.tables()
    assert set(found) == {"sm_80", "sm_90", "sm_100"}
    layers = {f"{operator} {bits}" for operator in configurations.OPERATORS for bits in (16, 32)}
    for target, table in found.items():
        # Of an encoder's blocks a table has rules where one launch has been faster somewhere.
        assert set(table) == layers | ({"encoder_blocks 16"} if target == "sm_90" else set())
    assert [configurations.target(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))] == [
        "sm_80", "sm_80", "sm_90", "sm_100", "sm_100", "sm_80",
    ]  # fmt: skip


def test_the_first_rule_that_fits_counts():
    small, large = {"way": "direct", "block_rows": 16}, {"way": "dense"}
    table = configurations.read({"qlora_linear 16": [{"rows": 8, "weights": 100, "use": small}, {"use": large}]})

    def way(rows, weights):
        return configurations.choose(table, "qlora_linear", torch.bfloat16, rows, weights).way

    assert [way(8, 100), way(9, 100), way(8, 101)] == ["direct", "dense", "dense"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"use": {"way": "direct", "tile": 3}}], "damaged"),
        ([{"rows": 8, "use": {"way": "direct"}}], "must have no limit"),
        ([{"use": {"way": "fast"}}], "must be one of"),
        ([], "must have no limit"),
    ],
)
def test_a_damaged_table_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        configurations.read({"qlora_linear 16": rules})


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_wrong", {})
    monkeypatch.setattr(dispatch, "configuration", lambda *_: DIRECT)


def call(operator, dtype=torch.float32, rank=4):
    return dispatch.problem(operator, DEVICE, dtype, 3, 64, 20, rank, "nf4", 64, False)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("operator", configurations.OPERATORS)
@pytest.mark.parametrize("result", [0, 1, 2, 3])
def test_a_wrong_configuration_is_left_out_with_one_warning(monkeypatch, operator, result):
    true = getattr(qlora_linear, operator)

    def wrong(*arguments, configuration):
        results = list(true(*arguments, configuration=configuration))
        results[result % len(results)] = results[result % len(results)] * 1.05
        return tuple(results)

    monkeypatch.setattr(qlora_linear, operator, wrong)
    expected = getattr(reference, operator)(*call(operator))
    with pytest.warns(RuntimeWarning, match=rf"Configuration\(way='direct'.* of {operator} disagrees"):
        found = dispatch._triton(operator, *call(operator))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    dispatch._triton(operator, *call(operator))  # a second warning would be an error
    assert len(dispatch.wrong_configurations()) == 1


@pytest.mark.usefixtures("fresh")
def test_a_configuration_that_does_not_compile_is_left_out(monkeypatch):
    def fails(*arguments, configuration):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(qlora_linear, "qlora_linear", fails)
    with pytest.warns(RuntimeWarning, match="fails .*out of resource: shared memory"):
        dispatch._triton("qlora_linear", *call("qlora_linear"))


@pytest.mark.usefixtures("fresh")
def test_a_right_configuration_serves_and_is_checked_once(monkeypatch):
    checks = []
    check = dispatch._disagreement
    monkeypatch.setattr(dispatch, "_disagreement", lambda probe: checks.append(probe) or check(probe))
    for dtype in (torch.float32, torch.float16, torch.float32):
        y, _ = dispatch._triton("qlora_linear", *call("qlora_linear", dtype))
        assert y.shape == (3, 20)
    assert [probe.dtype for probe in checks] == [torch.float32, torch.float16]


@pytest.mark.usefixtures("fresh")
def test_the_first_use_may_be_under_autocast():
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y, _ = dispatch._triton("qlora_linear", *call("qlora_linear", torch.float32))
    assert y.dtype == torch.float32
    assert not dispatch.wrong_configurations()


def test_a_compiled_graph_runs_them(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "triton")
    eager.reset()
    try:
        layer = harlora.QLoRALinear(64, 40, rank=4).to(DEVICE)
        torch.nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
        results = []
        for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            layer.zero_grad()
            # Twice forward: a compiled backward that torch takes from its cache does not run again (retain_graph).
            (grad,) = torch.autograd.grad(call(x).square().sum(), x)
            y = call(x)
            y.sum().backward()
            results.append([y, grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
        assert dispatch.served_by_triton(DEVICE, torch.float32)
    finally:
        eager.reset()


@pytest.mark.usefixtures("fresh")
def test_what_was_not_checked_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    probe = dispatch._Probe(
        "qlora_linear",
        DIRECT,
        torch.device("cuda", 0),
        torch.float32,
        True,
        True,
        "nf4",
        64,
        False,
        16,
        torch.float32,
    )
    with pytest.warns(RuntimeWarning, match="Run the model once before capturing"):
        assert not dispatch._proven(probe)
    assert not dispatch.wrong_configurations()


# The machine code ----------------------------------------------------------------------------------------------------


def test_the_report_compiles_for_gpus_that_are_not_here(tmp_path):
    """A few kernels; `make compile` compiles all."""
    done = subprocess.run(
        [sys.executable, "bench/compile_report.py", "--targets", "sm_90", "--only", "qlora_linear split 128", "--json",
         str(tmp_path / "report.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_qlora_linear_fwd_split_kernel" in done.stdout
    assert "HGMMA" in done.stdout
