"""The operators against plain float64 arithmetic, on every backend: values, gradients, checks, tracing, memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import harlora
from harlora.kernels import cpp, dispatch, eager, reference
from harlora.kernels.dropout import draw_seed, kept, rescale
from harlora.train.memory import step_peak_bytes

OPS = torch.ops.harlora
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The defaults of torch.testing for each dtype; the one table of bounds.
ATOL = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
RTOL = {torch.float64: 1e-7, torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
SHAPES = [  # rows, in_features, out_features, rank
    (0, 64, 32, 4),
    (5, 1, 1, 1),
    (1, 192, 192, 16),
    (3, 65, 17, 2),
    (7, 96, 33, 5),
    (64, 192, 512, 8),
    (5, 63, 129, 3),
    (4, 64, 70, 1),
    (9, 256, 6, 66),
    (300, 160, 100, 9),
    (15, 1088, 600, 4),
    (2, 576, 34, 17),
]


BLOCK = (64, 32, 256)
BACKENDS = ["reference", "cpp", "cpp-avx512bf16", "cpp-avx512", "cpp-avx2", "cpp-portable", "triton"]


@pytest.fixture(params=[name for name in BACKENDS if "-" not in name] if torch.cuda.is_available() else BACKENDS)
def backend(request, monkeypatch, use_kernels):
    """Each backend in turn, and of the compiled one every instruction set that this processor has."""
    name, _, variant = request.param.partition("-")
    if name == "cpp":
        if cpp.load_extension():
            pytest.skip(f"the extension does not serve: {cpp.load_extension()}")
        use_kernels(variant)
    if name == "triton" and dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    monkeypatch.setenv("HARLORA_BACKEND", name)
    eager.reset()
    yield request.param
    eager.reset()


@pytest.fixture(params=["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])])
def device(request):
    """Where new tensors of the test are made."""
    with torch.device(request.param):
        yield torch.device(request.param)


def close(actual: Tensor, exact: Tensor, same_dtype: Tensor) -> None:
    """At most twice the error of the reference in the same dtype, plus the default bound of the dtype."""
    assert actual.shape == exact.shape
    assert actual.dtype == same_dtype.dtype
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (same_dtype.double() - exact).abs().max()
    assert error <= allowed + ATOL[actual.dtype] + RTOL[actual.dtype] * exact.abs().max()


def problem(rows, in_features, out_features, rank, dtype=torch.float32, **quantisation):
    weight = harlora.quantize_4bit(torch.randn(out_features, in_features) / in_features**0.5, **quantisation)
    arrays = {
        "x": torch.randn(rows, in_features),
        "bias": torch.randn(out_features),
        "lora_A": torch.randn(rank, in_features) / in_features**0.5,
        "lora_B": torch.randn(out_features, rank),
    }
    return weight, {name: value.to(dtype) for name, value in arrays.items()}


def plain(dense: Tensor, x: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The definition; its gradients come from autograd, not from the formulas under test."""
    return x @ dense.T + bias + scaling * ((x @ lora_A.T) @ lora_B.T)


def run(function, arrays, dtype, grad):
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in arrays.items()}
    y = function(**leaves)
    y.backward(grad.to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.usefixtures("nan_filled_memory", "backend", "device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype):
    weight, arrays = problem(
        *shape,
        dtype,
        double_quant=shape[0] % 2 == 0,
        blocksize=BLOCK[shape[0] % 3],
        quant_type="nf4" if shape[0] % 2 else "fp4",
    )
    dense = harlora.dequantize_4bit(weight, dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    actual = run(lambda x, bias, lora_A, lora_B: harlora.qlora_linear(x, weight, bias, lora_A, lora_B, 1.5),
                 arrays, dtype, grad)  # fmt: skip
    exact = run(lambda **a: plain(dense.double(), **a, scaling=1.5), arrays, torch.float64, grad)
    same = run(lambda **a: plain(dense, **a, scaling=1.5), arrays, dtype, grad)
    for values in zip(actual, exact, same, strict=True):
        close(*values)


@pytest.mark.usefixtures("nan_filled_memory", "backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_output_and_gradients_with_dropout(shape, dtype, device):
    weight, arrays = problem(*shape, dtype, double_quant=shape[0] % 2 == 1, blocksize=BLOCK[(shape[0] + 1) % 3])
    seed = draw_seed(device)
    seen = kept(*shape[:2], 0.25, seed) * rescale(0.25)
    dense = harlora.dequantize_4bit(weight, dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)

    def defined(dense, x, bias, lora_A, lora_B):
        return x @ dense.T + bias + 1.5 * (((seen * x).to(x.dtype) @ lora_A.T) @ lora_B.T)

    actual = run(lambda x, bias, lora_A, lora_B: harlora.qlora_linear(x, weight, bias, lora_A, lora_B, 1.5, 0.25, seed),
                 arrays, dtype, grad)  # fmt: skip
    exact = run(lambda **a: defined(dense.double(), **a), arrays, torch.float64, grad)
    same = run(lambda **a: defined(dense, **a), arrays, dtype, grad)
    for values in zip(actual, exact, same, strict=True):
        close(*values)


@pytest.mark.usefixtures("nan_filled_memory", "backend", "device")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1, 2, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 100_001])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantise_is_exact(numel, blocksize, dtype):
    source = torch.randn(numel)
    for quant_type, double_quant in (("nf4", False), ("fp4", True)):
        packed = harlora.quantize_4bit(source, quant_type, blocksize, double_quant)
        byte = packed.packed.flatten()
        code = torch.stack([byte >> 4, byte & 15], dim=1).flatten()[:numel].long()
        scale = reference.scales(packed.absmax, packed.nested_absmax, packed.nested_offset)
        table = reference.code_table(quant_type, code.device)
        expected = (table[code] * scale[torch.arange(numel) // blocksize]).to(dtype)
        assert torch.equal(harlora.dequantize_4bit(packed, dtype), expected)


@pytest.mark.usefixtures("backend")
def test_leading_dimensions_and_strides():
    weight, arrays = problem(24, 40, 18, 3)
    expected = harlora.qlora_linear(arrays["x"], weight, arrays["bias"], arrays["lora_A"], arrays["lora_B"])
    rest = {"bias": arrays["bias"], "lora_A": arrays["lora_A"], "lora_B": arrays["lora_B"]}
    cube = arrays["x"].view(2, 3, 4, 40)
    torch.testing.assert_close(harlora.qlora_linear(cube, weight, **rest), expected.view(2, 3, 4, 18))
    strided = torch.randn(40, 24).T.copy_(arrays["x"])
    assert not strided.is_contiguous()
    torch.testing.assert_close(harlora.qlora_linear(strided, weight, **rest), expected)
    torch.testing.assert_close(harlora.qlora_linear(arrays["x"][0], weight, **rest), expected[0])
    transposed = {
        "bias": torch.stack([arrays["bias"]] * 2, dim=1)[:, 0],
        "lora_A": arrays["lora_A"].T.contiguous().T,
        "lora_B": arrays["lora_B"].T.contiguous().T,
    }
    torch.testing.assert_close(harlora.qlora_linear(arrays["x"], weight, **transposed), expected)
    assert harlora.qlora_linear(arrays["x"][:0].view(0, 3, 40), weight, **rest).shape == (0, 3, 18)


def test_gradients_of_a_strided_output_gradient():
    weight, arrays = problem(6, 40, 18, 3)
    leaves = {name: value.requires_grad_() for name, value in arrays.items()}
    y = harlora.qlora_linear(leaves["x"], weight, leaves["bias"], leaves["lora_A"], leaves["lora_B"])
    y.sum().backward()  # its gradient is one number, expanded
    dense = harlora.dequantize_4bit(weight)
    expected = dense.sum(dim=0) + (leaves["lora_B"].sum(dim=0) @ leaves["lora_A"])
    torch.testing.assert_close(leaves["x"].grad, expected.expand(6, 40))


@pytest.mark.parametrize("given", ["nothing", "bias", "adapter"])
def test_parts_may_be_left_out(given):
    weight, arrays = problem(5, 40, 18, 3)
    chosen = {"nothing": (), "bias": ("bias",), "adapter": ("lora_A", "lora_B")}[given]
    kept = {name: arrays[name].requires_grad_() for name in ("x", *chosen)}
    y = harlora.qlora_linear(weight=weight, **kept, scaling=2.0)
    full = {name: value if name in kept else torch.zeros_like(value) for name, value in arrays.items()}
    torch.testing.assert_close(y, plain(harlora.dequantize_4bit(weight), **full, scaling=2.0))
    y.sum().backward()
    assert all(value.grad is not None for value in kept.values())


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_A", "lora_B"])
def test_only_the_gradients_that_are_needed(wanted):
    weight, arrays = problem(5, 40, 18, 3)
    arrays[wanted].requires_grad_()
    dense = harlora.dequantize_4bit(weight)
    harlora.qlora_linear(weight=weight, **arrays, scaling=0.5).square().sum().backward()
    found = arrays[wanted].grad.clone()
    arrays[wanted].grad = None
    plain(dense, **arrays, scaling=0.5).square().sum().backward()
    torch.testing.assert_close(found, arrays[wanted].grad)


def test_gradcheck():
    weight, arrays = problem(3, 34, 5, 2, torch.float64)
    inputs = [value.requires_grad_() for value in arrays.values()]
    assert torch.autograd.gradcheck(
        lambda x, bias, lora_A, lora_B: harlora.qlora_linear(x, weight, bias, lora_A, lora_B, 0.7), inputs
    )
    seed = draw_seed(torch.device("cpu"))
    assert torch.autograd.gradcheck(
        lambda x, bias, lora_A, lora_B: harlora.qlora_linear(x, weight, bias, lora_A, lora_B, 0.7, 0.4, seed), inputs
    )


def test_opcheck():
    source = torch.randn(24, 40)
    for double_quant in (False, True):
        weight = harlora.quantize_4bit(source, double_quant=double_quant)
        quantized = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, "nf4", 64)
        torch.library.opcheck(OPS.quantize_4bit.default, (source, "nf4", 64, double_quant))
        torch.library.opcheck(OPS.dequantize_4bit.default, (*quantized, [24, 40], torch.bfloat16))
        x, bias, lora_A, lora_B = (
            torch.randn(shape, requires_grad=True) for shape in ((2, 3, 40), (24,), (4, 40), (24, 4))
        )
        torch.library.opcheck(OPS.qlora_linear.default, (x, *quantized, 24, bias, lora_A, lora_B, 2.0))
        torch.library.opcheck(OPS.qlora_linear.default, (x, *quantized, 24, None, None, None, 2.0))
        drop = (0.5, draw_seed(x.device))
        torch.library.opcheck(OPS.qlora_linear.default, (x, *quantized, 24, bias, lora_A, lora_B, 2.0, *drop))
        grad, t = torch.randn(2, 3, 24), torch.randn(2, 3, 4)
        arguments = (grad, x.detach(), t, *quantized, 40, lora_A.detach(), lora_B.detach(), 2.0)
        for mask in ([True] * 4, [False, True, False, False], [True, False, True, False]):
            torch.library.opcheck(OPS.qlora_linear_backward.default, (*arguments, mask))
            torch.library.opcheck(OPS.qlora_linear_backward.default, (*arguments, mask, *drop))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    weight, arrays = problem(6, 40, 18, 3)
    compiled = torch.compile(
        lambda x, bias, lora_A, lora_B: harlora.qlora_linear(x.sin(), weight, bias, lora_A, lora_B, 2.0).cos(),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for rows in (6, 9):
        arrays["x"] = torch.randn(rows, 40)
        grad = torch.randn(rows, 18)
        expected = run(
            lambda x, bias, lora_A, lora_B: harlora.qlora_linear(x.sin(), weight, bias, lora_A, lora_B, 2.0).cos(),
            arrays, torch.float32, grad,
        )  # fmt: skip
        for one, other in zip(run(compiled, arrays, torch.float32, grad), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_backward_keeps_x_and_t_and_no_dequantised_weight():
    weight, arrays = problem(5, 64, 48, 3)
    leaves = {name: value.requires_grad_() for name, value in arrays.items()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = harlora.qlora_linear(leaves["x"], weight, leaves["bias"], leaves["lora_A"], leaves["lora_B"])
    owned = {id(tensor) for tensor in (*leaves.values(), *weight.tensors().values())}
    extra = [tensor for tensor in saved if id(tensor) not in owned and tensor.data_ptr() not in
             {t.data_ptr() for t in (*leaves.values(), *weight.tensors().values())}]  # fmt: skip
    assert [tuple(tensor.shape) for tensor in extra] == [(5, 3)]  # t = x·lora_Aᵀ
    torch.testing.assert_close(extra[0], (leaves["x"] @ leaves["lora_A"].T).detach())
    y.sum().backward()


def test_dropout_keeps_neither_a_mask_nor_the_dropped_x():
    weight, arrays = problem(50, 64, 48, 3)
    leaves = {name: value.requires_grad_() for name, value in arrays.items()}
    owned = {tensor.data_ptr() for tensor in (*leaves.values(), *weight.tensors().values())}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        harlora.qlora_linear(weight=weight, **leaves, dropout=0.5)
    assert sorted(t.numel() for t in saved if t.data_ptr() not in owned) == [1, 50 * 3]  # the seed and t


def test_x_is_not_kept_when_lora_A_is_frozen():
    weight, arrays = problem(5, 64, 48, 3)
    x, lora_B = arrays["x"].requires_grad_(), arrays["lora_B"].requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        harlora.qlora_linear(x, weight, None, arrays["lora_A"], lora_B)
    assert x.data_ptr() not in saved


def test_the_saved_product_is_no_way_round_the_gradient():
    weight, arrays = problem(5, 64, 48, 3)
    quantized = (weight.packed, weight.absmax, None, None, "nf4", 64)
    arguments = (arrays["x"].requires_grad_(), *quantized, 48, None, arrays["lora_A"], arrays["lora_B"], 1.0)
    y, t = OPS.qlora_linear(*arguments)
    assert y.requires_grad
    assert not t.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    weight, arrays = problem(5, 64, 48, 3)
    leaves = {name: value.requires_grad_() for name, value in arrays.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = harlora.qlora_linear(weight=weight, **leaves)
    assert y.dtype == dtype
    y.float().sum().backward()
    for leaf in leaves.values():
        assert leaf.grad.dtype == torch.float32
    half = {name: value.detach().to(dtype) for name, value in arrays.items()}
    assert torch.equal(y, harlora.qlora_linear(weight=weight, **half))


def test_half_precision_input_uses_float32_adapters():
    weight, arrays = problem(5, 64, 48, 3)
    leaves = {name: value.requires_grad_() for name, value in arrays.items() if name != "x"}
    y = harlora.qlora_linear(arrays["x"].bfloat16(), weight, **leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert leaves["lora_A"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 63)}, ValueError, r"x.shape\[-1\] must equal in_features=64, got x of shape \(4, 63\)"),
        ({"x": torch.ones(())}, ValueError, "x must have at least one dimension"),
        ({"x": torch.ones(4, 64, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"bias": torch.ones(47)}, ValueError, r"bias must have shape \(48,\), got \(47,\)"),
        ({"lora_A": torch.ones(3, 60)}, ValueError, r"lora_A must have shape \(3, 64\)"),
        ({"lora_B": torch.ones(48, 4)}, ValueError, r"lora_B must have shape \(48, 3\)"),
        ({"lora_B": None}, ValueError, "must be given together"),
        ({"x": torch.ones(4, 64, device="meta")}, ValueError, "is on cpu, required meta"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0 and below 1, got -0.1"),
        ({"dropout": 0.5, "seed": torch.zeros(())}, ValueError, "seed must be a scalar tensor of int64, got torch.fl"),
        ({"dropout": 0.5, "seed": torch.zeros((), dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
    ],
)
def test_bad_arguments_are_refused_in_eager_mode(change, error, message):
    weight, arrays = problem(4, 64, 48, 3)
    with pytest.raises(error, match=message):
        harlora.qlora_linear(**{**arrays, "weight": weight, **change})


def test_the_operator_itself_checks_too():
    weight, arrays = problem(4, 64, 48, 3)
    quantized = [weight.packed, weight.absmax, None, None, "nf4", 64]

    def call(x=arrays["x"], bias=arrays["bias"], quantized=quantized, out_features=48):
        return OPS.qlora_linear(x, *quantized, out_features, bias, None, None, 1.0)

    with pytest.raises(ValueError, match="in_features of the packed weight"):
        call(x=torch.ones(4, 60))
    with pytest.raises(TypeError, match="bias must have the dtype of x"):
        call(bias=arrays["bias"].double())
    with pytest.raises(ValueError, match="absmax must be"):
        call(quantized=[weight.packed, weight.absmax[:-1], None, None, "nf4", 64])
    with pytest.raises(ValueError, match="given together"):
        call(quantized=[weight.packed, weight.absmax, torch.ones(1), None, "nf4", 64])
    mask = [False, False, True, False]
    with pytest.raises(ValueError, match="requires x of shape"):
        OPS.qlora_linear_backward(torch.ones(4, 48), None, None, *quantized, 64, None, None, 1.0, mask)
    with pytest.raises(TypeError, match="dtype must be one of"):
        OPS.dequantize_4bit(*quantized, [48, 64], torch.int32)


def test_weight_of_three_dimensions_is_refused():
    weight = harlora.quantize_4bit(torch.randn(2, 4, 8))
    assert harlora.dequantize_4bit(weight).shape == (2, 4, 8)
    with pytest.raises(ValueError, match="weight must have shape"):
        harlora.qlora_linear(torch.ones(1, 8), weight)


def test_no_gradient_flows_through_quantisation():
    weight = torch.randn(8, 64, requires_grad=True)
    assert not harlora.dequantize_4bit(harlora.quantize_4bit(weight)).requires_grad


def test_works_on_meta_tensors():
    layer = harlora.QLoRALinear(64, 48, device="meta", double_quant=True)
    assert layer(torch.ones(3, 64, device="meta")).shape == (3, 48)


def test_scaling_enters_once():
    weight, arrays = problem(4, 64, 48, 3)
    base = F.linear(arrays["x"], harlora.dequantize_4bit(weight), arrays["bias"])
    one, three = (harlora.qlora_linear(weight=weight, **arrays, scaling=s) - base for s in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [(3, 5), (0, 4), (4, 0)])
def test_the_reference_of_the_feed_forward_layers_has_the_gradients_of_autograd(ranks):
    layers = [harlora.QLoRALinear(i, o, rank=rank) for (i, o), rank in zip(((20, 24), (24, 7)), ranks, strict=True)]
    leaves, full = [torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)], []
    y = leaves[0]
    for number, layer in enumerate(layers):
        *quantized, bias, A, B, scaling = layer.operands()
        bias, A, B = (None if p is None else torch.randn_like(p, dtype=torch.float64) for p in (bias, A, B))
        full.append((*quantized, bias, A, B, scaling))
        own = [None if p is None else p.requires_grad_() for p in (bias, A, B)]
        leaves += own
        y = F.gelu(y) if number else y
        y = F.linear(y, layer.base_weight().double(), bias) + (0 if A is None else scaling * (y @ A.T) @ B.T)
    grad = torch.randn_like(y)
    present = [leaf is not None for leaf in leaves]
    expected = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad))
    expected = [next(expected) if there else None for there in present]
    with torch.no_grad():
        found_y, h, t1, t2 = reference.qlora_mlp(leaves[0], *full, True)
        torch.testing.assert_close(found_y, y)
        for missing in (None, *range(7)):
            wanted = [there and place != missing for place, there in enumerate(present)]
            found = reference.qlora_mlp_backward(grad, leaves[0], h, t1, t2, *full, wanted)
            for one, other, want in zip(found, expected, wanted, strict=True):
                torch.testing.assert_close(one, other if want else grad.new_empty(0))
        nothing_of_fc1 = [False] * 4 + present[4:]
        for one, other in zip(reference.qlora_mlp_backward(grad, leaves[0], h, t1, t2, *full, nothing_of_fc1)[4:],
                              expected[4:], strict=True):  # fmt: skip
            torch.testing.assert_close(one, grad.new_empty(0) if other is None else other)


def test_the_references_backward_makes_no_third_tensor_of_the_size_of_dx():
    rows, in_features, out_features = 2048, 256, 32
    packed = harlora.quantize_4bit(torch.randn(out_features, in_features))
    A, B = torch.randn(4, in_features), torch.randn(out_features, 4)
    grad = torch.randn(rows, out_features)
    arguments = (*packed.tensors().values(), None, None, "nf4", 64, in_features, A, B, 0.5, (True, False, False, False))
    peak = step_peak_bytes(lambda: reference.qlora_linear_backward(grad, None, None, *arguments), torch.device("cpu"))
    dx = 4 * rows * in_features
    assert 2 * dx <= peak < 2.2 * dx
