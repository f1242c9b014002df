"""A pool of adapters over one 4-bit weight: each row as if it were alone with its adapter."""

import pytest
import torch

import harlora
from harlora.kernels import cpp, dispatch, eager, lora_pool_linear, reference
from harlora.kernels.configurations import Configuration

OPS = torch.ops.harlora
# As in test_triton.py, of the largest value.
ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
RANKS = [[3], [4, 0, 9], [16, 1, 40, 8, 0], [0, 0], [], [33, 64, 31, 2]]
SHAPES = [  # rows, in_features, out_features, quant_type, blocksize, nested
    (1, 64, 32, "nf4", 64, False),
    (37, 192, 65, "fp4", 64, True),
    (19, 65, 33, "nf4", 32, False),  # odd rows of the weight
    (6, 160, 34, "fp4", 64, True),  # blocks across rows
    (0, 128, 3, "nf4", 128, True),
]
WAYS = [
    Configuration("direct", 32, 32, 64),
    Configuration("split", 16, 32, 32, programs=16),
    Configuration("dense"),
]
needs_triton = pytest.mark.skipif(bool(dispatch.load_triton()), reason=dispatch.load_triton())
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, monkeypatch):
    """Each backend in turn."""
    reason = {"cpp": cpp.load_extension, "triton": dispatch.load_triton}.get(request.param, str)()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("HARLORA_BACKEND", request.param)
    eager.reset()
    yield request.param
    eager.reset()


def problem(shape, ranks, dtype=torch.float32, index="mixed"):
    rows, in_features, out_features, quant_type, blocksize, nested = shape
    dense = torch.randn(out_features, in_features, device=DEVICE) / in_features**0.5
    weight = harlora.quantize_4bit(dense, quant_type, blocksize, nested)

    def draw(*size, variance=1):
        return (torch.randn(*size, device=DEVICE) / variance**0.5).to(dtype)

    total, adapters = sum(ranks), len(ranks)
    arrays = {
        "x": draw(rows, in_features),
        "bias": draw(out_features),
        "lora_A": draw(total, in_features, variance=in_features),
        "lora_B": draw(out_features, total, variance=max(1, total)),
    }
    which = torch.randint(-1, adapters, (rows,), device=DEVICE)
    if index == "sorted":
        which = which.sort().values
    elif index == "none":
        which.fill_(-1)
    elif index == "last":  # all others are unused
        which.fill_(adapters - 1)
    pool = {
        "offsets": torch.tensor([0, *ranks], device=DEVICE).cumsum(0),
        "index": which,
        "scaling": torch.rand(adapters, device=DEVICE) + 0.5,
    }
    return weight, arrays, pool


def looped(dense, x, bias, lora_A, lora_B, offsets, index, scaling):
    """Row by row, each with the adapter it names: the definition."""
    y = []
    bounds = offsets.tolist()
    for row, j in zip(x, index.tolist(), strict=True):
        out = dense @ row + bias
        if j >= 0:
            A, B = lora_A[bounds[j] : bounds[j + 1]], lora_B[:, bounds[j] : bounds[j + 1]]
            out = out + scaling[j].to(x.dtype) * (B @ (A @ row))
        y.append(out)
    return torch.stack(y) if y else x @ dense.T + bias + 0 * (x @ lora_A.T @ lora_B.T)


def run(function, arrays, dtype, grad):
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in arrays.items()}
    y = function(**leaves)
    y.backward(grad.to(dtype))
    return {"y": y.detach()} | {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }


def close(found, exact, dtype, name):
    assert found.shape == exact.shape, name
    assert found.dtype == dtype, name
    if exact.numel():
        error = (found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
        assert error <= ERROR[dtype], f"{name} is off by {error:.1e} of its largest value"


# The kernels ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda c: c.way)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_way(way, shape, dtype):
    from harlora.kernels.triton import lora_pool

    for ranks, index in zip(RANKS, ("mixed", "sorted", "mixed", "mixed", "none", "last"), strict=True):
        weight, arrays, pool = problem(shape, ranks, dtype, index)
        quantized, out_features = weight.arguments(), shape[2]
        x, bias, A, B = arrays.values()
        bias = bias if shape[0] % 2 else None
        found = lora_pool.lora_pool_linear(x, *quantized, out_features, bias, A, B, *pool.values(), configuration=way)
        wide = [None if each is None else each.double() for each in (bias, A, B)]
        exact = reference.lora_pool_linear(x.double(), *quantized, out_features, *wide, *pool.values())
        for name, one, other in zip(("y", "t"), found, exact, strict=True):
            close(one, other, dtype, name)


@needs_triton
@pytest.mark.parametrize("index", ["mixed", "sorted", "none", "last"])
def test_what_other_rows_use_is_zero(index):
    """Also where it is NaN: an adapter that no row of a tile uses is not even read there."""
    from harlora.kernels.triton import lora_pool

    weight, arrays, pool = problem((70, 64, 20, "nf4", 64, False), [5, 40, 0, 33], index=index)
    arrays["lora_A"][5:45] = torch.nan
    for low in (lora_pool.lora_pool_low, reference.lora_pool_low):
        t = low(arrays["x"], arrays["lora_A"], **pool)
        uses = (pool["index"] == 1)[:, None] & ((torch.arange(78) >= 5) & (torch.arange(78) < 45)).to(DEVICE)
        assert torch.equal(t.isnan(), uses)
    if index in ("none", "last"):  # no step of the rank has a value but that of the last adapter
        arrays["lora_A"].nan_to_num_()
        arrays["lora_B"][:, :32] = torch.nan
        for way in WAYS[:2]:
            y, _ = lora_pool.lora_pool_linear(
                arrays["x"], *weight.arguments(), 20, None, arrays["lora_A"], arrays["lora_B"], *pool.values(),
                configuration=way,
            )  # fmt: skip
            assert y.isfinite().all()


@needs_triton
def test_an_index_out_of_range_reads_nothing():
    from harlora.kernels.triton import lora_pool

    _, arrays, pool = problem((20, 64, 20, "nf4", 64, False), [5, 7])
    expected = reference.lora_pool_low(arrays["x"], arrays["lora_A"], **pool)
    away = pool["index"] < 0
    pool["index"] = torch.where(away, torch.where(torch.arange(20, device=DEVICE) % 2 == 0, 2, -(2**40)), pool["index"])
    pool["index"][0], expected[0] = 2**40, 0
    for low in (lora_pool.lora_pool_low, reference.lora_pool_low):
        torch.testing.assert_close(low(arrays["x"], arrays["lora_A"], **pool), expected)


# The public function -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, backend):
    ranks = RANKS[1:3] if backend != "triton" else RANKS[2:3]
    for each, index in zip(ranks, ("mixed", "sorted"), strict=False):
        if backend == "triton" and shape not in SHAPES[1:3]:
            return  # each costs a probe of several tiles; the kernels' shapes are tested above
        weight, arrays, pool = problem(shape, each, dtype, index)
        dense = harlora.dequantize_4bit(weight, torch.float64)
        grad = torch.randn(shape[0], shape[2], device=DEVICE).to(dtype)
        found = run(lambda **a: lora_pool_linear(weight=weight, **a, **pool), arrays, dtype, grad)  # noqa: B023
        exact = run(lambda **a: looped(dense, **a, **pool), arrays, torch.float64, grad)  # noqa: B023
        for name, other in exact.items():
            close(found[name], other, dtype, name)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_ragged_ranks(ranks):
    for index in ("mixed", "none"):
        weight, arrays, pool = problem((9, 64, 20, "nf4", 64, False), ranks, index=index)
        found = lora_pool_linear(weight=weight, **arrays, **pool)
        close(found, looped(harlora.dequantize_4bit(weight).double(), *(a.double() for a in arrays.values()), **pool),
              torch.float32, "y")  # fmt: skip


def test_one_adapter_is_the_layer_with_it():
    weight, arrays, pool = problem((9, 64, 20, "nf4", 64, False), [6], index="last")
    expected = harlora.qlora_linear(weight=weight, **arrays, scaling=pool["scaling"].item())
    torch.testing.assert_close(lora_pool_linear(weight=weight, **arrays, **pool), expected)


def test_gradcheck():
    weight, arrays, pool = problem((5, 34, 6, "nf4", 64, False), [2, 0, 3], torch.float64)
    pool["index"] = torch.tensor([2, -1, 0, 2, 1], device=DEVICE)
    inputs = [value.requires_grad_() for value in arrays.values()]
    assert torch.autograd.gradcheck(
        lambda x, bias, lora_A, lora_B: lora_pool_linear(x, weight, bias, lora_A, lora_B, **pool), inputs
    )


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_A", "lora_B"])
def test_only_the_gradients_that_are_needed(wanted):
    weight, arrays, pool = problem((9, 40, 18, "nf4", 64, False), [3, 4])
    arrays[wanted].requires_grad_()
    dense = harlora.dequantize_4bit(weight)
    lora_pool_linear(weight=weight, **arrays, **pool).square().sum().backward()
    found, arrays[wanted].grad = arrays[wanted].grad.clone(), None
    looped(dense, **arrays, **pool).square().sum().backward()
    torch.testing.assert_close(found, arrays[wanted].grad, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_change_from_call_to_call():
    weight, arrays, pool = problem((50, 64, 20, "nf4", 64, False), [16, 1, 40])
    grad = torch.randn(50, 20, device=DEVICE)
    first, second = (
        run(lambda **a: lora_pool_linear(weight=weight, **a, **pool), arrays, torch.float32, grad) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_leading_dimensions_strides_and_autocast():
    weight, arrays, pool = problem((24, 40, 18, "nf4", 64, False), [3, 5])
    rest = {name: value for name, value in arrays.items() if name != "x"}
    expected = lora_pool_linear(weight=weight, **arrays, **pool)
    cube = {**pool, "index": pool["index"].view(2, 3, 4)}
    found = lora_pool_linear(arrays["x"].view(2, 3, 4, 40), weight, **rest, **cube)
    torch.testing.assert_close(found, expected.view(2, 3, 4, 18))
    spaced = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in (rest | pool).items()}
    torch.testing.assert_close(lora_pool_linear(arrays["x"].T.contiguous().T, weight, **spaced), expected)
    one = {**pool, "index": pool["index"][0]}
    torch.testing.assert_close(lora_pool_linear(arrays["x"][0], weight, **rest, **one), expected[0])
    half = lora_pool_linear(arrays["x"].bfloat16(), weight, **rest, **pool)
    assert half.dtype == torch.bfloat16
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(lora_pool_linear(weight=weight, **arrays, **pool), half)


@needs_triton
def test_strides_reach_the_kernel():
    from harlora.kernels.triton import lora_pool

    _, arrays, pool = problem((24, 40, 18, "nf4", 64, False), [3, 5])
    expected = reference.lora_pool_low(arrays["x"], arrays["lora_A"], **pool)
    spaced = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in pool.items()}
    x = torch.empty(24, 99, device=DEVICE)[:, 7:47].copy_(arrays["x"])
    found = lora_pool.lora_pool_low(x, arrays["lora_A"].T.contiguous().T, **spaced)
    torch.testing.assert_close(found, expected)


# The compiled part for CPUs looks at the index, which lies there.
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("backend", ["reference" if DEVICE.type == "cpu" else "triton"], indirect=True)
def test_no_value_is_read_on_the_host(monkeypatch):
    """What would wait for a device, and what a CUDA graph could not capture: a tensor's value in Python."""
    weight, arrays, pool = problem((9, 64, 20, "nf4", 64, False), [3, 5])
    leaves = {name: value.requires_grad_() for name, value in arrays.items()}
    # The comparison with the reference reads values, once.
    lora_pool_linear(weight=weight, **leaves, **pool).sum().backward()

    def refuse(*_):
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    lora_pool_linear(weight=weight, **leaves, **pool).sum().backward()


def test_opcheck():
    weight, arrays, pool = problem((6, 40, 18, "nf4", 64, False), [3, 5])
    x, bias, A, B = (value.requires_grad_() for value in arrays.values())
    quantized = weight.arguments()
    torch.library.opcheck(OPS.lora_pool_linear.default, (x, *quantized, 18, bias, A, B, *pool.values()))
    torch.library.opcheck(OPS.lora_pool_linear.default, (x, *quantized, 18, None, A, B, *pool.values()))


def test_compiles_whole():
    weight, arrays, pool = problem((6, 40, 18, "nf4", 64, False), [3, 5])

    def layer(x, **rest):
        return lora_pool_linear(x.sin(), weight, **rest, **pool).cos()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grad = torch.randn(6, 18, device=DEVICE)
    expected = run(layer, arrays, torch.float32, grad)
    for name, found in run(compiled, arrays, torch.float32, grad).items():
        torch.testing.assert_close(found, expected[name])


def test_a_second_derivative_is_refused():
    weight, arrays, pool = problem((6, 40, 18, "nf4", 64, False), [3, 5])
    y = lora_pool_linear(arrays.pop("x").requires_grad_(), weight, **arrays, **pool)
    with pytest.raises(NotImplementedError, match="lora_pool_linear: a second derivative is not supported"):
        y.sum().backward(create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 63)}, ValueError, r"x.shape\[-1\] must equal in_features=64, got x of shape \(4, 63\)"),
        ({"x": torch.ones(())}, ValueError, "x must have at least one dimension"),
        ({"x": torch.ones(4, 64, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"bias": torch.ones(47)}, ValueError, r"bias must have shape \(48,\), got \(47,\)"),
        ({"lora_A": torch.ones(3, 60)}, ValueError, r"lora_A must have shape \(3, 64\), got \(3, 60\)"),
        ({"lora_B": torch.ones(48, 4)}, ValueError, r"lora_B must have shape \(48, 8\), got \(48, 4\)"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"offsets must have shape \(3,\), got \(2,\)"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, TypeError, r"offsets must be torch.int64, got torch.int32"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, r"index must have shape \(4,\), got \(5,\)"),
        ({"index": torch.zeros(4)}, TypeError, r"index must be torch.int64, got torch.float32"),
        ({"scaling": torch.ones(())}, ValueError, r"scaling must have shape \(adapters,\), got \(\)"),
        ({"scaling": torch.ones(2).double()}, TypeError, r"scaling must be torch.float32, got torch.float64"),
        ({"scaling": torch.ones(2, requires_grad=True)}, ValueError, "scaling must not require a gradient"),
        ({"index": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "index is on meta, required cpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are on the CPU")
def test_bad_arguments_are_refused(change, error, message):
    weight, arrays, pool = problem((4, 64, 48, "nf4", 64, False), [3, 5])
    with pytest.raises(error, match=f"lora_pool_linear: {message}"):
        lora_pool_linear(**{**arrays, **pool, "weight": weight, **change})
