"""DoRA: the norms without B·A, the layer in each way of Triton's kernels, and the public function against PEFT."""

import pytest
import torch
from torch import nn

import harlora
from harlora.kernels import cpp, dispatch, dora_linear, dora_norm, eager, reference
from harlora.kernels.configurations import Configuration

OPS = torch.ops.harlora
# As in test_triton.py, of the largest value.
ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [  # rows, in_features, out_features, rank, quant_type, blocksize, nested
    (1, 64, 32, 1, "nf4", 64, False),
    (17, 192, 65, 16, "fp4", 64, True),
    (33, 96, 40, 3, "nf4", 32, True),
    (5, 65, 33, 7, "nf4", 32, False),  # odd rows of the weight
    (9, 160, 34, 33, "fp4", 64, True),  # blocks across rows
    (2, 130, 70, 130, "nf4", 256, False),  # more than two steps of the rank
    (0, 128, 3, 64, "nf4", 128, True),
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


def problem(rows, in_features, out_features, rank, quant_type="nf4", blocksize=64, nested=False, dtype=torch.float32):
    dense = torch.randn(out_features, in_features, device=DEVICE) / in_features**0.5
    weight = harlora.quantize_4bit(dense, quant_type, blocksize, nested)

    def draw(*shape, variance=1):
        return (torch.randn(*shape, device=DEVICE) / variance**0.5).to(dtype)

    arrays = {
        "x": draw(rows, in_features),
        "bias": draw(out_features),
        "lora_A": draw(rank, in_features, variance=in_features),
        "lora_B": draw(out_features, rank, variance=rank),
        "magnitude": draw(out_features),
    }
    return weight, arrays


def close(found, exact, dtype, name):
    assert found.shape == exact.shape, name
    if exact.numel():
        error = (found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
        assert error <= ERROR[dtype], f"{name} is off by {error:.1e} of its largest value"


def norm_of(dense, lora_A, lora_B, scaling):
    """The definition, which forms lora_B·lora_A."""
    return (dense + scaling * (lora_B @ lora_A)).norm(dim=1)


def plain(dense, x, bias, lora_A, lora_B, magnitude, scaling):
    """The definition; its gradients come from autograd, not from the formulas under test."""
    direction = dense + scaling * (lora_B @ lora_A)
    return x @ ((magnitude / direction.norm(dim=1).detach())[:, None] * direction).T + bias


def run(function, arrays, dtype, grad):
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in arrays.items()}
    y = function(**leaves)
    y.backward(grad.to(dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


# The norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled_memory", "backend")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape, dtype):
    weight, arrays = problem(*shape, dtype)
    found = dora_norm(weight, arrays["lora_A"], arrays["lora_B"], 1.5)
    assert found.dtype == torch.float32
    exact = norm_of(
        harlora.dequantize_4bit(weight, torch.float64), arrays["lora_A"].double(), arrays["lora_B"].double(), 1.5
    )
    close(found, exact, dtype, "norm")


@pytest.mark.usefixtures("backend")
def test_norms_of_the_weight_alone_do_not_take_its_rounding():
    """With lora_B = 0 the norm is that of float32 values, though the adapters have 16 bits."""
    weight, arrays = problem(1, 256, 40, 8, dtype=torch.bfloat16)
    found = dora_norm(weight, arrays["lora_A"], torch.zeros_like(arrays["lora_B"]))
    torch.testing.assert_close(found, harlora.dequantize_4bit(weight).norm(dim=1))


@pytest.mark.usefixtures("backend")
def test_norms_where_the_adapter_cancels_the_weight():
    """What is lost is relative to the parts, not to the sum, and never gives NaN."""
    weight, _ = problem(1, 64, 48, 1)
    dense = harlora.dequantize_4bit(weight)
    identity = torch.eye(64, device=DEVICE)
    assert dora_norm(weight, identity, -dense).max() <= 1e-3 * dense.norm(dim=1).max()
    exact = norm_of(dense.double(), identity.double(), -0.9 * dense.double(), 1.0)
    torch.testing.assert_close(dora_norm(weight, identity, -0.9 * dense).double(), exact, rtol=1e-3, atol=0)


@needs_triton
def test_norms_of_a_nan_are_nan():
    from harlora.kernels.triton import dora

    weight, arrays = problem(1, 64, 20, 3)
    arrays["lora_B"][7, 1] = torch.nan
    found = dora.dora_norm(*weight.arguments(), arrays["lora_A"], arrays["lora_B"], 1.0)
    assert found.isnan().nonzero().flatten().tolist() == [7]


# The layer in each way -----------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda c: c.way)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_way(way, shape, dtype):
    from harlora.kernels.triton import dora

    weight, arrays = problem(*shape, dtype)
    quantized, out_features = weight.arguments(), shape[2]
    x, bias, A, B = (arrays[name] for name in ("x", "bias", "lora_A", "lora_B"))
    bias = bias if shape[0] % 2 else None
    gain = torch.randn(out_features, device=DEVICE)
    gain[0] = 0.0
    found = dora.dora_linear(x, *quantized, out_features, bias, A, B, 0.5, gain, configuration=way)
    wide = [None if each is None else each.double() for each in (bias, A, B)]
    exact = reference.dora_linear(x.double(), *quantized, out_features, *wide, 0.5, gain.double())
    for name, one, other in zip(("y", "t"), found, exact, strict=True):
        assert one.dtype == dtype
        close(one, other, dtype, name)


@needs_triton
def test_a_weight_of_several_chunks(monkeypatch):
    from harlora.kernels.triton import qlora_linear

    monkeypatch.setattr(qlora_linear, "CHUNK_BYTES", 64 * 4 * 150)
    test_each_way(WAYS[2], (7, 128, 190, 4, "nf4", 64, False), torch.float32)


# The public function -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, backend):
    if backend == "triton" and shape not in SHAPES[2:4]:
        return  # each costs a probe of several tiles; the kernels' shapes are tested above
    weight, arrays = problem(*shape, dtype)
    grad = torch.randn(shape[0], shape[2], device=DEVICE).to(dtype)
    found = run(lambda **a: dora_linear(weight=weight, **a, scaling=1.5), arrays, dtype, grad)
    dense = harlora.dequantize_4bit(weight, torch.float64)
    exact = run(lambda **a: plain(dense, **a, scaling=1.5), arrays, torch.float64, grad)
    for name, other in exact.items():
        assert found[name].dtype == dtype
        # The gain's rounding comes to that of the layer.
        close(found[name], other, dtype, name)


def test_gradcheck():
    weight, arrays = problem(3, 34, 5, 2, dtype=torch.float64)
    norm = dora_norm(weight, arrays["lora_A"], arrays["lora_B"], 0.7)
    assert norm.dtype == torch.float64
    dense, quantized = harlora.dequantize_4bit(weight, torch.float64), weight.arguments()
    inputs = [arrays[name].requires_grad_() for name in ("x", "bias", "lora_A", "lora_B", "magnitude")]

    def layer(x, bias, lora_A, lora_B, magnitude):  # the norm is held, since its gradient is left out
        return OPS.dora_linear(x, *quantized, 5, bias, lora_A, lora_B, 0.7, magnitude / norm)[0]

    assert torch.autograd.gradcheck(layer, inputs)
    grad = torch.randn(3, 5, dtype=torch.float64, device=DEVICE)
    found = run(lambda **a: dora_linear(weight=weight, **a, scaling=0.7), arrays, torch.float64, grad)
    exact = run(lambda **a: plain(dense, **a, scaling=0.7), arrays, torch.float64, grad)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name])


@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_peft(with_bias):
    weight, arrays = problem(6, 40, 18, 3)
    model = nn.Sequential(nn.Linear(40, 18, bias=with_bias, device=DEVICE))
    with torch.no_grad():
        model[0].weight.copy_(harlora.dequantize_4bit(weight))
        if with_bias:
            model[0].bias.copy_(arrays["bias"])
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"], bias="all")
    model = peft.get_peft_model(model, config)
    theirs = dict(model.named_parameters())
    names = {
        "lora_A": next(name for name in theirs if "lora_A" in name),
        "lora_B": next(name for name in theirs if "lora_B" in name),
        "magnitude": next(name for name in theirs if "magnitude" in name),
    } | ({"bias": next(name for name in theirs if name.endswith("bias"))} if with_bias else {})
    with torch.no_grad():
        for ours in ("lora_A", "lora_B"):
            theirs[names[ours]].copy_(arrays[ours])
        start = theirs[names["magnitude"]].clone()
        theirs[names["magnitude"]].mul_(torch.rand(18, device=DEVICE) + 0.5)
    zero = torch.zeros_like(arrays["lora_B"])
    torch.testing.assert_close(dora_norm(weight, arrays["lora_A"], zero, 2.0), start)  # as PEFT starts
    arrays["magnitude"] = theirs[names["magnitude"]].detach().clone()
    if not with_bias:
        del arrays["bias"]
    grad = torch.randn(6, 18, device=DEVICE)
    x = arrays["x"].clone().requires_grad_()
    expected = model(x)
    expected.backward(grad)
    found = run(
        lambda bias=None, **a: dora_linear(bias=bias, weight=weight, **a, scaling=2.0), arrays, torch.float32, grad
    )
    torch.testing.assert_close(found["y"], expected.detach())
    torch.testing.assert_close(found["x"], x.grad)
    for ours, name in names.items():
        torch.testing.assert_close(found[ours], theirs[name].grad)


@pytest.mark.usefixtures("backend")
def test_starts_as_the_layer_without_an_adapter():
    weight, arrays = problem(6, 64, 18, 3)
    arrays["lora_B"].zero_()
    arrays["magnitude"] = dora_norm(weight, arrays["lora_A"], arrays["lora_B"])
    expected = harlora.qlora_linear(arrays["x"], weight, arrays["bias"])
    torch.testing.assert_close(dora_linear(weight=weight, **arrays), expected)


@pytest.mark.usefixtures("backend")
def test_a_magnitude_of_zero_has_a_gradient():
    weight, arrays = problem(4, 64, 18, 3)
    arrays["magnitude"][5] = 0.0
    grad = torch.randn(4, 18, device=DEVICE)
    found = run(lambda **a: dora_linear(weight=weight, **a), arrays, torch.float32, grad)
    exact = run(
        lambda **a: plain(harlora.dequantize_4bit(weight, torch.float64), **a, scaling=1.0),
        arrays, torch.float64, grad,
    )  # fmt: skip
    assert found["magnitude"][5] != 0
    torch.testing.assert_close(found["magnitude"].double(), exact["magnitude"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["y"][:, 5], arrays["bias"][5].expand(4))


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_A", "lora_B", "magnitude"])
def test_only_the_gradients_that_are_needed(wanted):
    weight, arrays = problem(5, 40, 18, 3)
    arrays[wanted].requires_grad_()
    dense = harlora.dequantize_4bit(weight)
    dora_linear(weight=weight, **arrays, scaling=0.5).square().sum().backward()
    found, arrays[wanted].grad = arrays[wanted].grad.clone(), None
    plain(dense, **arrays, scaling=0.5).square().sum().backward()
    torch.testing.assert_close(found, arrays[wanted].grad, rtol=1e-4, atol=1e-4)


def test_leading_dimensions_and_dtypes():
    weight, arrays = problem(24, 40, 18, 3)
    rest = {name: value for name, value in arrays.items() if name != "x"}
    expected = dora_linear(weight=weight, **arrays)
    cube = dora_linear(arrays["x"].view(2, 3, 4, 40), weight, **rest)
    torch.testing.assert_close(cube, expected.view(2, 3, 4, 18))
    half = dora_linear(arrays["x"].bfloat16(), weight, **rest)
    assert half.dtype == torch.bfloat16
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(dora_linear(weight=weight, **arrays), half)


def test_opcheck():
    weight, arrays = problem(6, 40, 18, 3)
    quantized = weight.arguments()
    x, bias, A, B, gain = (value.requires_grad_() for value in arrays.values())
    torch.library.opcheck(OPS.dora_norm.default, (*quantized, A.detach(), B.detach(), 2.0))
    torch.library.opcheck(OPS.dora_linear.default, (x, *quantized, 18, bias, A, B, 2.0, gain))
    torch.library.opcheck(OPS.dora_linear.default, (x, *quantized, 18, None, A, B, 2.0, gain.detach()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    weight, arrays = problem(6, 40, 18, 3)

    def layer(x, **rest):
        return dora_linear(x.sin(), weight, **rest, scaling=2.0).cos()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9):
        arrays["x"], grad = torch.randn(rows, 40, device=DEVICE), torch.randn(rows, 18, device=DEVICE)
        expected = run(layer, arrays, torch.float32, grad)
        for name, found in run(compiled, arrays, torch.float32, grad).items():
            torch.testing.assert_close(found, expected[name])


def test_a_second_derivative_is_refused():
    weight, arrays = problem(6, 40, 18, 3)
    y = dora_linear(arrays.pop("x").requires_grad_(), weight, **arrays)
    with pytest.raises(NotImplementedError, match="dora_linear: a second derivative is not supported"):
        y.sum().backward(create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 63)}, ValueError, r"dora_linear: x.shape\[-1\] must equal in_features=64, got x of shape"),
        ({"x": torch.ones(4, 64, dtype=torch.int64)}, TypeError, "dora_linear: x must be float32"),
        ({"magnitude": torch.ones(47)}, ValueError, r"magnitude must have shape \(48,\), got \(47,\)"),
        ({"magnitude": torch.ones(48, dtype=torch.int64)}, TypeError, "magnitude must be of a floating-point dtype"),
        ({"bias": torch.ones(47)}, ValueError, r"dora_linear: bias must have shape \(48,\), got \(47,\)"),
        ({"lora_A": torch.ones(3, 60)}, ValueError, r"dora_linear: lora_A must have shape \(3, 64\)"),
        ({"lora_A": torch.ones(64)}, ValueError, r"dora_linear: lora_A must have shape \(64, 64\), got \(64,\)"),
        ({"x": torch.ones(())}, ValueError, "dora_linear: x must have at least one dimension"),
        ({"lora_B": torch.ones(48, 4)}, ValueError, r"lora_B must have shape \(48, 3\), got \(48, 4\)"),
        ({"lora_B": torch.ones(47, 3)}, ValueError, r"lora_B must have shape \(48, 3\), got \(47, 3\)"),
        ({"magnitude": torch.ones(48, device="meta")}, ValueError, "dora_linear: magnitude is on meta, required cpu"),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are on the CPU")
def test_bad_arguments_are_refused(change, error, message):
    weight, arrays = problem(4, 64, 48, 3)
    with pytest.raises(error, match=message):
        dora_linear(**{**arrays, "weight": weight, **change})


def test_the_operators_themselves_check_too():
    weight, arrays = problem(4, 64, 48, 3)
    arguments = (arrays["x"], *weight.arguments(), 48, None, arrays["lora_A"], arrays["lora_B"], 1.0)
    with pytest.raises(ValueError, match=r"gain must be torch.float32 of shape \(48,\), got torch.float64 of shape"):
        OPS.dora_linear(*arguments, torch.ones(48, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match=r"dora_norm: lora_A and lora_B must have shapes \(rank, in_features\)"):
        dora_norm(weight, arrays["lora_A"][0], arrays["lora_B"])
    with pytest.raises(ValueError, match=r"dora_norm: lora_B must have shape \(48, rank\), got \(47, 3\)"):
        dora_norm(weight, arrays["lora_A"], arrays["lora_B"][1:])
    with pytest.raises(ValueError, match="weight must have shape"):
        dora_norm(harlora.quantize_4bit(torch.ones(2, 4, 8)), arrays["lora_A"], arrays["lora_B"])
