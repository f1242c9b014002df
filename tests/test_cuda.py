"""CUDA C++ as a way of the layer: when it is chosen, what it refuses, and on a GPU what it computes."""

import copy
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from needs import needs_extension

import harlora
from harlora.kernels import configurations, cpp, cuda, dispatch, eager, reference, replay
from harlora.kernels.configurations import Configuration, Rule
from harlora.models import MAE, MAEConfig, whole

CPU = torch.device("cpu")
ERROR = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
TABLE = {"qlora_linear 16": (Rule(Configuration("gemv"), 8), Rule(Configuration("direct", 16, 32, 32)))}


def problem(device, dtype, rows, in_features=128, out_features=33, rank=4, blocksize=64, nested=False, kind="nf4"):
    return dispatch.problem(
        "qlora_linear", device, dtype, rows, in_features, out_features, rank, kind, blocksize, nested
    )


@pytest.fixture
def card(monkeypatch):
    """A machine where the kernel runs, computes what the reference does and is in the table; its calls."""
    called = []

    def gemv(*arguments):
        called.append(arguments)
        return reference.qlora_linear(*arguments)

    monkeypatch.setitem(cuda.WAYS["qlora_linear"], "gemv", gemv)
    monkeypatch.setattr(cuda, "serves", lambda _, way, *arguments: cuda._SERVES[way](*arguments))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(dispatch, "_table", lambda _: TABLE)
    monkeypatch.setattr(dispatch, "_wrong", {})
    return called


def test_it_is_taken_where_the_table_has_it_and_it_serves(card):
    for rows in (1, 8):
        x, *layer = problem(CPU, torch.float16, rows)
        assert dispatch.proven_function("qlora_linear", x, *layer) is cuda.WAYS["qlora_linear"]["gemv"]
    assert len(card) == 1  # the problem on which it is proven, once
    assert card[0][0].shape[0] == 7


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 9}, {"rows": 0}, {"dtype": torch.float32}, {"blocksize": 32}, {"in_features": 96}, {"dropout": True},
        {"in_features": 65}, {"misplaced": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_serve_takes_another_way(changed, card, monkeypatch):
    given = {"dtype": torch.float16, "rows": 3} | changed
    drop, misplaced = given.pop("dropout", False), given.pop("misplaced", False)
    arguments = problem(CPU, **given)
    if drop:
        arguments = dispatch.with_dropout(arguments, CPU)
    if misplaced:
        x, packed, *rest = arguments
        moved = torch.empty(packed.numel() + 8, dtype=torch.uint8)[8:].view_as(packed).copy_(packed)
        arguments = (x, moved, *rest)
    assert not cuda.serves("qlora_linear", "gemv", *arguments)
    monkeypatch.setattr(dispatch, "_table", lambda _: {**TABLE, "qlora_linear 32": TABLE["qlora_linear 16"]})
    monkeypatch.setattr(dispatch, "serves", lambda *_: True)
    assert dispatch.proven_function("qlora_linear", *arguments).keywords["configuration"].way == "direct"
    assert not card


def test_more_rows_than_a_grid_has_room_for_are_left_to_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    _, *layer = problem(CPU, torch.float16, 1, in_features=64, out_features=32)
    for serves, tile in ((cuda._serves_gemm, 64), (cuda._serves_mma, 16)):
        for rows in (65535 * tile - 1, 65535 * tile):
            assert serves(torch.empty(1, dtype=torch.float16).expand(rows, 64), *layer) == (rows % tile > 0)


def test_a_wrong_one_is_left_out_with_one_warning_that_names_it(card, monkeypatch):
    monkeypatch.setitem(cuda.WAYS["qlora_linear"], "gemv", lambda x, *layer: (x.new_zeros(7, layer[6]), x[:, :16]))
    arguments = problem(CPU, torch.float16, 3)
    with pytest.warns(RuntimeWarning, match="way='gemv'.* of qlora_linear disagrees with the reference"):
        assert dispatch.proven_function("qlora_linear", *arguments) is None
    assert dispatch.proven_function("qlora_linear", *arguments) is None
    assert not card


# Those of which bench/results/gpu/h200-many-rows.json, h200-few-rows.json and others of h200 have the times.
@pytest.mark.parametrize(
    ("rows", "shape", "way", "tile"),
    [
        (1, (4096, 4096), "gemv", 0), (8, (8192, 8192), "gemv", 0), (8, (768, 3072), "split", 16),
        (8, (4096, 4096), "gemv", 0), (16, (4096, 4096), "split", 16), (32, (4096, 4096), "mma", 32),
        (16, (8192, 8192), "split", 16), (64, (8192, 8192), "split", 64),
        (128, (4096, 4096), "split", 128), (128, (8192, 8192), "gemm", 128), (128, (4096, 14336), "gemm", 128),
        (128, (14336, 4096), "split", 128), (256, (4096, 4096), "gemm", 128), (256, (8192, 8192), "gemm", 256),
        (256, (14336, 4096), "gemm", 128), (512, (4096, 4096), "gemm", 256), (512, (4096, 14336), "gemm", 256),
        (256, (4096, 14336), "gemm", 256), (1024, (8192, 8192), "gemm", 256), (1024, (14336, 4096), "gemm", 256),
        (2048, (4096, 4096), "gemm", 256), (4096, (14336, 4096), "gemm", 256), (8192, (8192, 8192), "dense", 0),
    ],
)  # fmt: skip
def test_the_table_of_hopper_names_the_fastest(rows, shape, way, tile, card, monkeypatch):
    x = torch.zeros(1, dtype=torch.bfloat16).expand(rows, shape[0])
    packed = torch.zeros(1, dtype=torch.uint8).expand(shape[0] * shape[1] // 2, 1)
    layer = (packed, packed, None, None, "nf4", 64, shape[1], None, None, None, 1.0)
    monkeypatch.setattr(dispatch, "_table", lambda _: configurations.tables()["sm_90"])
    chosen = dispatch.configuration(
        "qlora_linear", CPU, x.dtype, rows, shape[0] * shape[1],
        lambda use: cuda.serves("qlora_linear", use.way, x, *layer) and cuda.worth(use, x, *layer),
    )  # fmt: skip
    assert (chosen.way, chosen.block_rows) == (way, tile)


@pytest.mark.parametrize(
    ("rows", "shape", "way"),
    [
        (8, (4096, 4096), "dx"), (128, (8192, 8192), "split"), (256, (4096, 4096), "split"),
        (256, (8192, 8192), "dx_gemm"), (256, (4096, 14336), "dx_gemm"), (512, (4096, 4096), "dx_gemm"),
        (1024, (14336, 4096), "dx_gemm"), (2048, (8192, 8192), "dense"), (512, (768, 3072), "split"),
    ],
)  # fmt: skip
def test_the_table_of_hopper_names_the_fastest_backward(rows, shape, way, card, monkeypatch):
    in_features, out_features = shape
    grad = torch.zeros(1, dtype=torch.bfloat16).expand(rows, out_features)
    packed = torch.zeros(1, dtype=torch.uint8).expand(in_features * out_features // 2, 1)
    rest = (None, None, packed, packed, None, None, "nf4", 64, in_features, None, None, 1.0, [True] * 4)
    monkeypatch.setattr(dispatch, "_table", lambda _: configurations.tables()["sm_90"])
    chosen = dispatch.configuration(
        "qlora_linear_backward", CPU, grad.dtype, rows, in_features * out_features,
        lambda use: cuda.serves("qlora_linear_backward", use.way, grad, *rest) and cuda.worth(use, grad, *rest),
    )  # fmt: skip
    assert chosen.way == way


@pytest.mark.parametrize(
    ("changed", "capability", "serves"),
    [
        ({}, (8, 0), True), ({"out_features": 40, "rows": 300, "nested": True}, (12, 0), True), ({}, (7, 5), False),
        ({"rows": 0}, (8, 0), False), ({"dtype": torch.float32}, (8, 0), False), ({"blocksize": 32}, (8, 0), False),
        ({"in_features": 96}, (8, 0), False), ({"dropout": True}, (8, 0), False), ({"bias": True}, (8, 0), False),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_way_for_some_rows_serves(changed, capability, serves, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    given = {"dtype": torch.float16, "rows": 3} | changed
    drop, wide_bias = given.pop("dropout", False), given.pop("bias", False)
    arguments = problem(CPU, **given)
    if drop:
        arguments = dispatch.with_dropout(arguments, CPU)
    if wide_bias:
        arguments = (*arguments[:8], arguments[8].float(), *arguments[9:])
    assert cuda.serves("qlora_linear", "mma", *arguments) == serves


@pytest.mark.parametrize(
    ("tiles", "steps", "parts"),
    [(1, 64, 8), (32, 64, 4), (40, 64, 3), (70, 64, 1), (200, 64, 1), (1, 8, 2), (1, 7, 1), (1, 33, 7)],
)
def test_parts_that_share_a_sum_all_have_some_of_it(tiles, steps, parts, card):
    assert cuda._mma_parts(CPU, tiles, steps) == parts


def test_the_way_for_some_rows_is_measured_up_to_many():
    def tiles(operator, dtype, rows):
        found = configurations.candidates(operator, dtype, rows)
        return [candidate.block_rows for candidate in found if candidate.way == "mma"]

    assert tiles("qlora_linear", torch.float16, 1) == [16]
    assert tiles("qlora_linear", torch.bfloat16, 64) == [16, 32, 64]
    assert tiles("qlora_linear", torch.bfloat16, 1024) == [128]
    assert not tiles("qlora_linear", torch.bfloat16, 8192)
    assert not tiles("qlora_linear", torch.float32, 64)
    assert not tiles("qlora_linear_backward", torch.bfloat16, 64)


def test_the_backward_is_measured_up_to_the_rows_it_is_for():
    for dtype, rows, tiles in (
        (torch.bfloat16, 1, [16]), (torch.bfloat16, 33, [16, 32, 64]), (torch.float16, 128, [32, 64, 128]),
        (torch.bfloat16, 1024, [128]), (torch.bfloat16, 1025, []), (torch.float32, 64, []),
    ):  # fmt: skip
        found = configurations.candidates("qlora_linear_backward", dtype, rows)
        assert [each.block_rows for each in found if each.way == "dx"] == tiles
        assert "dx" not in {each.way for each in configurations.candidates("qlora_linear", dtype, rows)}


def backward_problem(device, dtype, rows, in_features=128, out_features=33, rank=4, blocksize=64, nested=False,
                     kind="nf4", **options):  # fmt: skip
    size = (rows, in_features, out_features, rank, kind, blocksize, nested)
    return dispatch.problem("qlora_linear_backward", device, dtype, *size, **options)


@pytest.mark.parametrize(
    ("changed", "serves"),
    [
        ({}, True), ({"rows": 2000, "out_features": 1}, True), ({"rank": 0}, True), ({"rows": 0}, False),
        ({"dtype": torch.float32}, False), ({"blocksize": 32}, False), ({"in_features": 96}, False),
        ({"adapter_dtype": torch.float32}, True), ({"adapter_dtype": torch.float16}, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_backward_serves(changed, serves, card, monkeypatch):
    arguments = backward_problem(CPU, **{"dtype": torch.bfloat16, "rows": 3} | changed)
    assert cuda.serves("qlora_linear_backward", "dx", *arguments) == serves
    assert cuda.serves("qlora_linear_backward", "dx", *arguments, 0.0, None) == serves
    assert not cuda.serves("qlora_linear_backward", "dx", *dispatch.with_dropout(arguments, CPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not cuda.serves("qlora_linear_backward", "dx", *arguments)


@pytest.mark.parametrize(
    ("changed", "capability", "serves"),
    [
        ({}, (9, 0), True), ({"rows": 1, "out_features": 8}, (9, 0), True), ({"rank": 0}, (9, 0), True),
        ({}, (8, 0), False), ({}, (10, 0), False), ({"out_features": 33}, (9, 0), False),
        ({"blocksize": 32}, (9, 0), False), ({"dtype": torch.float32}, (9, 0), False),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_backward_for_many_rows_serves(changed, capability, serves, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    arguments = backward_problem(CPU, **{"dtype": torch.bfloat16, "rows": 3, "out_features": 40} | changed)
    assert cuda.serves("qlora_linear_backward", "dx_gemm", *arguments) == serves


def test_the_backward_for_many_rows_is_measured_from_half_a_tile_on():
    for rows, found in ((127, False), (128, True), (8192, True)):
        candidates = configurations.candidates("qlora_linear_backward", torch.bfloat16, rows)
        assert (Configuration("dx_gemm", 256) in candidates) == found
    assert Configuration("dx_gemm", 256) not in configurations.candidates("qlora_linear_backward", torch.float32, 512)


def test_the_backward_is_taken_where_a_table_has_it_and_proven_once(card, monkeypatch):
    tiles = []

    def backward(*arguments, tile, parts=None):
        tiles.append((len(arguments[0]), tile, parts))
        return reference.qlora_linear_backward(*arguments)

    table = {"qlora_linear_backward 16": (Rule(Configuration("dx", 32), 64), Rule(Configuration("direct", 16, 32, 32)))}
    monkeypatch.setattr(dispatch, "_table", lambda _: table)
    monkeypatch.setitem(cuda.WAYS["qlora_linear_backward"], "dx", backward)
    function = dispatch.proven_function("qlora_linear_backward", *backward_problem(CPU, torch.bfloat16, 40))
    assert function.func is backward
    assert (
        dispatch.proven_function("qlora_linear_backward", *backward_problem(CPU, torch.bfloat16, 64)).func is backward
    )
    assert tiles == [(65, 32, None), (65, 32, 2)]  # as one sum, and in parts


def test_a_way_that_is_wrong_in_other_parts_alone_is_left_out(card, monkeypatch):
    def backward(*arguments, tile, parts=None):
        found = reference.qlora_linear_backward(*arguments)
        return tuple(2 * each for each in found) if parts else found

    monkeypatch.setitem(cuda.WAYS["qlora_linear_backward"], "dx", backward)
    with pytest.warns(RuntimeWarning, match="way='dx'.* disagrees with the reference"):
        assert not dispatch.serves(
            "qlora_linear_backward", Configuration("dx", 32), *backward_problem(CPU, torch.bfloat16, 40)
        )


@pytest.mark.parametrize("processors", [1, 56, 108, 132, 170])
def test_parts_of_the_backward_have_steps_each(processors, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=processors)
    )
    for rows, out_features, in_features in product((1, 70, 1000), (1, 33, 192, 1025, 4096, 14336), (64, 768, 4096)):
        for tile in configurations.DX_TILES:
            parts = cuda._parts_of_dx(CPU, rows, in_features, out_features, tile)
            steps = -(-out_features // (32 if tile == 128 else 64))
            assert 1 <= parts <= 32
            assert (parts - 1) * -(-steps // parts) < steps


def test_a_table_must_end_with_a_way_that_serves_everything():
    with pytest.raises(ValueError, match="must have no limit, of sizes or of what its way serves"):
        configurations.read({"qlora_linear 16": [{"use": {"way": "gemv"}}]})


def test_it_does_not_serve_where_there_is_no_gpu():
    assert not cuda.serves("qlora_linear", "gemv", *problem(CPU, torch.float16, 3))
    assert not cuda.serves("qlora_linear_backward", "gemv", *problem(CPU, torch.float16, 3))


def test_an_encoder_is_one_launch_on_request_or_by_the_table(monkeypatch):
    gpu, sizes = torch.device("cuda"), (torch.bfloat16, 1024)
    rules = (Rule(Configuration("encoder", 32), 512), Rule(Configuration("launches")))
    tables = {"with": {"encoder_blocks 16": rules}, "without": {}}
    for forced, table, device, asked, expected in (
        ("", "without", gpu, sizes, "launches"), ("cpp", "without", gpu, sizes, "encoder"),
        ("triton", "with", gpu, (torch.bfloat16, 64), "launches"), ("", "with", gpu, (torch.bfloat16, 64), "encoder"),
        ("", "with", gpu, sizes, "launches"), ("cpp", "with", CPU, sizes, "launches"),
        ("cpp", "with", gpu, (torch.float32, 64), "launches"),
    ):  # fmt: skip
        monkeypatch.setenv("HARLORA_BACKEND", forced)
        monkeypatch.setattr(dispatch, "_table", lambda _, table=table: tables[table])
        dispatch.encoder_way.cache_clear()
        assert dispatch.encodes_at_once(device, *asked) == (expected == "encoder")
    dispatch.encoder_way.cache_clear()


def test_the_repositorys_tables_name_cuda_for_the_card_it_has_run_on_alone():
    found = {
        (target, title, rule.use.way)
        for target, table in configurations.tables().items()
        for title, rules in table.items()
        for rule in rules
        if rule.use.way in configurations.CUDA_WAYS
    }
    assert found == {
        *(("sm_90", "qlora_linear 16", way) for way in ("gemv", "gemm", "mma")),
        *(("sm_90", "qlora_linear_backward 16", way) for way in ("dx", "dx_gemm")),
        ("sm_90", "encoder_blocks 16", "encoder"),
    }


@pytest.mark.parametrize(
    ("rows", "way", "tile"),
    [(16, "encoder", 16), (512, "encoder", 16), (2048, "encoder", 16), (4096, "encoder", 32), (4112, "launches", 0)],
)  # fmt: skip
def test_hoppers_table_has_the_fastest_way_of_an_encoder(rows, way, tile, monkeypatch):
    """As bench/results/gpu/h200-encoder.json has them."""
    monkeypatch.delenv("HARLORA_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_table", lambda _: configurations.tables()["sm_90"])
    dispatch.encoder_way.cache_clear()
    chosen = dispatch.encoder_way(torch.device("cuda"), torch.bfloat16, rows)
    dispatch.encoder_way.cache_clear()
    assert (chosen.way, chosen.block_rows) == (way, tile)


@needs_extension
def test_on_request_the_reference_serves_what_it_does_not(monkeypatch):
    arguments = problem(CPU, torch.float16, 3)
    for found, right in zip(
        dispatch._cuda("qlora_linear", *arguments), reference.qlora_linear(*arguments), strict=True
    ):
        assert torch.equal(found, right)
    arguments = backward_problem(CPU, torch.float16, 3)
    for found, right in zip(
        dispatch._cuda("qlora_linear_backward", *arguments), reference.qlora_linear_backward(*arguments), strict=True
    ):
        assert torch.equal(found, right)
    if cpp.has_kernel("qlora_gemv", "cuda"):
        for operator in ("qlora_linear", "qlora_linear_backward"):
            (backend,) = [b for b in dispatch.backends(operator) if b.name == "cpp" and b.device_type == "cuda"]
            assert backend.on_request == dispatch.IN_THE_TABLE


# On a GPU ------------------------------------------------------------------------------------------------------------

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture
def gpu():
    if cpp.load_extension() or not cpp.has_kernel("qlora_gemv", "cuda"):
        pytest.skip("the extension was built without CUDA")
    return torch.device("cuda")


def check(arguments, way="gemv", **options):
    assert cuda.serves("qlora_linear", way, *arguments)
    x = arguments[0]
    exact = reference.qlora_linear(
        *(each.double() if isinstance(each, torch.Tensor) and each.dtype == x.dtype else each for each in arguments)
    )
    for found, right in zip(cuda.WAYS["qlora_linear"][way](*arguments, **options), exact, strict=True):
        assert found.shape == right.shape
        assert found.dtype == x.dtype
        if right.numel():
            assert (found.double() - right).abs().max() <= ERROR[x.dtype] * right.abs().max()


def check_in_a_graph(function, calls):
    """Many calls, kernels of which start beside the one before, give what each gives by itself."""
    right = [function(*call) for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [function(*call) for call in calls for _ in range(8)]
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(map(torch.equal, results, right[i // 8]))


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    def test_it_agrees_with_the_reference(self, gpu, dtype):
        for size in (
            (64, 1, 1, 64, False, "nf4"), (192, 192, 16, 64, False, "nf4"), (4096, 4096, 16, 64, True, "nf4"),
            (2048, 33, 5, 128, False, "fp4"), (4096, 17, 128, 4096, True, "fp4"), (640, 1024, 0, 64, True, "nf4"),
            (14336, 4096, 64, 64, False, "nf4"),
        ):  # fmt: skip
            for rows in (1, 2, 5, 7, 8):
                check(problem(gpu, dtype, rows, *size))

    def test_without_bias_and_with_strides(self, gpu):
        x, *layer = problem(gpu, torch.bfloat16, 6)
        layer[7] = None
        check((x.T.contiguous().T, *layer))
        check((x[::2], *layer))
        check((x.view(2, 3, -1), *layer))

    def test_float32_adapters_are_rounded_as_they_are_read(self, gpu):
        x, *layer = problem(gpu, torch.bfloat16, 3, 256, 70, 8)
        wide = [each.float() if i in (8, 9) else each for i, each in enumerate(layer)]
        for one, other in zip(cuda.qlora_gemv(x, *layer), cuda.qlora_gemv(x, *wide), strict=True):
            assert torch.equal(one, other)

    def test_many_launches_in_a_graph_give_what_each_gives(self, gpu):
        """Each reads t of its own first kernel, though it starts beside it."""
        calls = [problem(gpu, torch.bfloat16, 4, 4096, 1024, 16) for _ in range(4)]
        check_in_a_graph(cuda.qlora_gemv, calls)


@pytest.fixture
def hopper(gpu):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is of compute capability 9.0")
    return gpu


def check_backward(arguments, way="dx", **options):
    assert cuda.serves("qlora_linear_backward", way, *arguments)
    grad, x, t, *quantized, A, B, scaling, mask = arguments
    wide = (None if each is None else each.double() for each in (grad, x, t, A, B))
    exact_grad, exact_x, exact_t, exact_A, exact_B = wide
    exact = reference.qlora_linear_backward(exact_grad, exact_x, exact_t, *quantized, exact_A, exact_B, scaling, mask)
    function = cuda.WAYS["qlora_linear_backward"][way]
    for found, right in zip(function(*arguments, **options), exact, strict=True):
        assert found.shape == right.shape
        if right.numel():
            assert (found.double() - right).abs().max() <= ERROR[grad.dtype] * right.abs().max()


class TestBackwardOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    @pytest.mark.parametrize("tile", [16, 32, 64, 128, None])
    @pytest.mark.parametrize("parts", [1, 3, None])
    def test_it_agrees_with_the_reference(self, gpu, dtype, tile, parts):
        for rows, *size in (
            (1, 512, 192, 1, 64, False, "nf4"), (7, 192, 333, 16, 64, True, "fp4"),
            (70, 1536, 768, 16, 64, False, "nf4"), (300, 2048, 1025, 5, 128, False, "fp4"),
            (130, 1024, 4096, 128, 1024, True, "fp4"),
            (257, 640, 1024, 0, 64, False, "nf4"), (33, 4096, 14336, 40, 512, True, "nf4"),
        ):  # fmt: skip
            for adapter in (None, torch.float32):
                arguments = backward_problem(gpu, dtype, rows, *size, adapter_dtype=adapter)
                check_backward(arguments, tile=tile, parts=parts)

    def test_strides_and_what_lies_elsewhere(self, gpu):
        grad, x, *layer = backward_problem(gpu, torch.bfloat16, 60, 128, 200)
        check_backward((grad.T.contiguous().T, x, *layer))
        check_backward((grad.view(2, 30, -1), x.view(2, 30, -1), *layer))
        right = cuda.qlora_backward(grad, x, *layer)
        moved = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view_as(each) for each in (grad, x, layer[1])]
        assert all(each.data_ptr() % 16 for each in moved)
        layer[1] = moved[2]
        assert all(map(torch.equal, cuda.qlora_backward(moved[0], moved[1], *layer), right))

    def test_the_same_bits_each_time_and_in_a_graph(self, gpu):
        """Each reads u of its own first kernel, though it starts beside it, and its own parts of sums."""
        calls = [backward_problem(gpu, torch.bfloat16, 100, 4096, 1024, 16) for _ in range(4)]
        check_in_a_graph(cuda.qlora_backward, calls)


class TestManyRowsOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    @pytest.mark.parametrize("tile", [64, 128, 256])
    @pytest.mark.parametrize("parts", [1, 2, 8, None])
    def test_it_agrees_with_the_reference(self, hopper, dtype, tile, parts):
        for rows, *size in (
            (1, 512, 8, 1, 64, False, "nf4"), (70, 1536, 192, 16, 64, False, "nf4"),
            (300, 2048, 136, 5, 128, False, "fp4"), (65, 1024, 264, 128, 1024, True, "fp4"),
            (257, 640, 1024, 0, 64, False, "nf4"), (33, 4096, 512, 70, 64, True, "nf4"),
        ):  # fmt: skip
            steps = size[0] // 64
            if parts is None or (parts - 1) * -(-steps // parts) < steps:
                check(problem(hopper, dtype, rows, *size), "gemm", tile=tile, parts=parts)

    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    @pytest.mark.parametrize("parts", [1, 2, 8, None])
    def test_the_backward_agrees_with_the_reference(self, hopper, dtype, parts):
        for rows, *size in (
            (1, 64, 512, 1, 64, False, "nf4"), (70, 192, 1536, 16, 64, True, "fp4"),
            (300, 192, 1992, 5, 64, False, "fp4"), (513, 1024, 1032, 128, 1024, True, "nf4"),
            (257, 640, 1024, 0, 64, False, "nf4"), (33, 512, 4096, 70, 256, True, "nf4"),
        ):  # fmt: skip
            steps = -(-size[1] // 64)
            if parts is not None and (parts - 1) * -(-steps // parts) >= steps:
                continue
            for adapter in (None, torch.float32):
                arguments = backward_problem(hopper, dtype, rows, *size, adapter_dtype=adapter)
                check_backward(arguments, "dx_gemm", parts=parts)

    def test_the_backward_of_infinite_and_nan_values_stays_in_their_rows(self, hopper):
        arguments = backward_problem(hopper, torch.bfloat16, 300, 128, 512, 0)
        function = cuda.WAYS["qlora_linear_backward"]["dx_gemm"]
        right = function(*arguments)[0]
        arguments[0][5, 100], arguments[0][290, 7] = torch.inf, torch.nan
        found = function(*arguments)[0]
        assert not found[5].isfinite().any()
        assert found[290].isnan().all()
        others = [row for row in range(300) if row not in (5, 290)]
        assert torch.equal(found[others], right[others])

    def test_the_backward_gives_the_same_bits_each_time_and_in_a_graph(self, hopper):
        calls = [backward_problem(hopper, torch.bfloat16, 300, 1024, 2048, 16) for _ in range(4)]
        check_in_a_graph(cuda.WAYS["qlora_linear_backward"]["dx_gemm"], calls)

    def test_without_bias_and_with_strides(self, hopper):
        x, *layer = problem(hopper, torch.bfloat16, 60, 128, 200)
        layer[7] = None
        check((x.T.contiguous().T, *layer), "gemm")
        check((x[::2], *layer), "gemm")
        check((x.view(2, 30, -1), *layer), "gemm")

    def test_what_lies_elsewhere_is_moved(self, hopper):
        for way in ("gemv", "gemm"):
            x, packed, *layer = problem(hopper, torch.bfloat16, 5, 128, 200)
            right = cuda.WAYS["qlora_linear"][way](x, packed, *layer)
            moved = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view_as(each) for each in (x, packed, layer[7])]
            assert all(each.data_ptr() % 16 for each in moved)
            layer[7] = moved[2]
            found = cuda.WAYS["qlora_linear"][way](moved[0], moved[1], *layer)
            assert all(map(torch.equal, found, right))

    def test_float32_adapters_are_rounded_as_they_are_read(self, hopper):
        x, *layer = problem(hopper, torch.bfloat16, 30, 256, 72, 8)
        wide = [each.float() if i in (8, 9) else each for i, each in enumerate(layer)]
        for one, other in zip(cuda.qlora_gemm(x, *layer), cuda.qlora_gemm(x, *wide), strict=True):
            assert torch.equal(one, other)

    def test_infinite_and_nan_values_stay_in_their_rows(self, hopper):
        x, *layer = problem(hopper, torch.bfloat16, 130, 512, 128, 0)
        right = cuda.qlora_gemm(x, *layer)[0]
        x[5, 100], x[100, 7] = torch.inf, torch.nan
        found = cuda.qlora_gemm(x, *layer)[0]
        assert not found[5].isfinite().any()
        assert found[100].isnan().all()
        others = [row for row in range(130) if row not in (5, 100)]
        assert torch.equal(found[others], right[others])

    def test_many_launches_in_a_graph_give_what_each_gives(self, hopper):
        calls = [problem(hopper, torch.bfloat16, 100, 4096, 1024, 16) for _ in range(4)]
        check_in_a_graph(cuda.qlora_gemm, calls)

    def test_what_it_does_not_serve(self, hopper):
        for changed in (
            {"dtype": torch.float32}, {"rows": 0}, {"blocksize": 32}, {"in_features": 96}, {"out_features": 33},
        ):  # fmt: skip
            arguments = problem(hopper, **{"dtype": torch.float16, "rows": 3, "out_features": 40} | changed)
            assert not cuda.serves("qlora_linear", "gemm", *arguments)
        arguments = problem(hopper, torch.float16, 3, out_features=40)
        assert cuda.serves("qlora_linear", "gemm", *arguments)
        assert not cuda.serves("qlora_linear", "gemm", *dispatch.with_dropout(arguments, hopper))


def encoder_error(arguments, **options):
    """How far one launch is from float64, over how far the reference is in the dtype of x."""
    x, blocks, norm, heads = arguments

    def converted(part, dtype):
        scales = part[1:5] if len(part) > 3 else ()
        part = [each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each for each in part]
        return (part[0], *scales, *part[len(scales) + 1 :])

    (found,), (right, same) = (
        cuda.encoder_blocks(x, blocks, norm, heads, False, **options),
        (
            reference.encoder_blocks(
                x.to(dtype), [[converted(part, dtype) for part in block] for block in blocks], converted(norm, dtype),
                heads, False,
            )[0]
            for dtype in (torch.float64, x.dtype)
        ),
    )  # fmt: skip
    assert found.shape == right.shape
    return float((found - right).abs().max() / (same - right).abs().max())


class TestAnEncoderOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    def test_it_agrees_with_the_reference(self, gpu, dtype):
        most = 8 if torch.cuda.get_device_capability() >= (9, 0) else 1
        plain = ("nf4", 64, False)
        for tile, parts, size, facts in (
            (16, 1, (1, 16, 4, 64, 128, 1, 0), plain), (16, 8, (3, 8, 4, 64, 128, 2, 16), ("nf4", 64, True)),
            (32, 4, (3, 13, 2, 128, 192, 1, 5), ("fp4", 128, True)), (64, 1, (2, 64, 3, 192, 512, 1, 40), plain),
            (64, 2, (3, 33, 6, 192, 512, 1, 16), ("nf4", 512, False)), (0, 0, (64, 16, 6, 192, 512, 6, 16), plain),
            (0, 0, (512, 16, 6, 192, 512, 6, 16), plain), (0, 0, (1, 16, 6, 192, 512, 9, 16), plain),
        ):  # fmt: skip
            arguments = dispatch.problem_of_encoder(gpu, dtype, *size, *facts)
            assert cuda.serves_encoder(*arguments, tile)
            assert encoder_error(arguments, tile=tile, parts=min(parts, most)) <= 2

    def test_few_windows_and_float32_adapters(self, gpu):
        arguments = dispatch.problem_of_encoder(
            gpu, torch.bfloat16, 3, 5, 2, 64, 64, 1, 3, "nf4", 64, False, adapter_dtype=torch.float32
        )
        assert encoder_error(arguments) <= 2

    def test_no_window_sees_another(self, gpu):
        x, *rest = dispatch.problem_of_encoder(gpu, torch.float16, 5, 6, 4, 64, 128, 1, 8, "nf4", 64, False)
        right = cuda.encoder_blocks(x, *rest, False, tile=32)[0]
        x[1, 2, 3], x[3, 5, 0] = torch.nan, torch.inf
        found = cuda.encoder_blocks(x, *rest, False, tile=32)[0]
        assert found[[1, 3]].isnan().all()
        assert torch.equal(found[[0, 2, 4]], right[[0, 2, 4]])

    def test_a_model_repeats_it_on_request_also_in_a_graph(self, gpu, monkeypatch):
        monkeypatch.setenv("HARLORA_BACKEND", "cpp")
        eager.reset()
        encoders = [MAE(MAEConfig(depth=2)).encoder for _ in range(2)]
        for encoder in encoders:
            harlora.apply_qlora(encoder, ["q", "k", "v", "o", "fc1", "fc2"], rank=8)
            for name, parameter in encoder.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            encoder.to(gpu, torch.bfloat16)
        with torch.no_grad():
            for turn in range(6):
                encoder, x = encoders[turn % 2], torch.randn(9, 16, 192, device=gpu, dtype=torch.bfloat16)
                found, right = whole.encode_tokens(encoder, x), x.float()
                for block in copy.deepcopy(encoder).float().blocks:
                    right = block(right)
                right = copy.deepcopy(encoder).float().norm(right)
                assert (found - right).abs().max() <= 0.05 * right.abs().max()
            assert any(number > 0 for number in replay._held.values()), replay.refused
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = whole.encode_tokens(encoder, x)
            x.normal_()
            graph.replay()
            assert torch.equal(captured, whole.encode_tokens(encoder, x))
        eager.reset()


@pytest.fixture
def ampere(gpu):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cp.async is of compute capability 8.0 and up")
    return gpu


class TestSomeRowsOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    @pytest.mark.parametrize("tile", [16, 32, 64, 128])
    @pytest.mark.parametrize("parts", [1, 2, 5, 16, None])
    def test_it_agrees_with_the_reference(self, ampere, dtype, tile, parts):
        for rows, *size in (
            (1, 512, 8, 1, 64, False, "nf4"), (70, 1536, 192, 16, 64, False, "nf4"),
            (300, 2048, 133, 5, 128, False, "fp4"), (65, 1024, 264, 128, 1024, True, "fp4"),
            (16, 640, 1024, 0, 64, False, "nf4"), (33, 4096, 4096, 70, 64, True, "nf4"),
        ):  # fmt: skip
            steps = size[0] // 64
            if parts is None or (parts - 1) * -(-steps // parts) < steps:
                check(problem(ampere, dtype, rows, *size), "mma", tile=tile, parts=parts)

    def test_without_bias_and_with_strides(self, ampere):
        x, *layer = problem(ampere, torch.bfloat16, 60, 128, 200)
        layer[7] = None
        check((x.T.contiguous().T, *layer), "mma")
        check((x[::2], *layer), "mma", parts=2)
        check((x.view(2, 30, -1), *layer), "mma")

    def test_float32_adapters_are_rounded_as_they_are_read(self, ampere):
        x, *layer = problem(ampere, torch.bfloat16, 30, 256, 72, 8)
        wide = [each.float() if i in (8, 9) else each for i, each in enumerate(layer)]
        for one, other in zip(cuda.qlora_mma(x, *layer), cuda.qlora_mma(x, *wide), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("parts", [1, 4])
    def test_many_launches_in_a_graph_give_what_each_gives(self, ampere, parts):
        """Kernels that start beside the one before wait for what it writes."""
        calls = [problem(ampere, torch.bfloat16, 50, 4096, 1024, 16) for _ in range(4)]
        check_in_a_graph(partial(cuda.qlora_mma, parts=parts), calls)
