"""Layers that Triton's kernels take together: the numbers and gradients of each, and never where a layer differs."""

from itertools import pairwise

import pytest
import torch
from test_triton import ERROR
from torch import nn
from torch.nn import functional as F

import harlora
from harlora import QLoRALinear
from harlora.kernels import configurations, dispatch, eager, gpu, reference, replay
from harlora.kernels.configurations import Configuration
from harlora.kernels.dropout import draw_seed, dropped
from harlora.models import MAE, MAEConfig, whole
from harlora.models.mae import Attention

if dispatch.load_triton():
    pytest.skip(dispatch.load_triton(), allow_module_level=True)

from harlora.kernels.triton import qlora_linear, qlora_qkv
from harlora.kernels.triton import qlora_mlp as mlp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
SMALL = Configuration("direct", 16, 32, 32)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "triton")
    eager.reset()
    yield
    eager.reset()


def make(in_features, out_features, dtype=torch.float32, **options):
    layer = QLoRALinear(in_features, out_features, **{"rank": 4, **options}).to(DEVICE)
    for parameter in (layer.lora_B, layer.bias):
        if parameter is not None:
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_()
    return layer.to(dtype)


def check(found, exact, dtype):
    assert found.shape == exact.shape
    if exact.numel():
        assert (found.double() - exact).abs().max() <= ERROR[dtype] * exact.abs().max() + 1e-6


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(
    ("shape", "features", "options"),
    [
        ((2, 5), (64, 40), {}),
        ((33,), (65, 33), {"blocksize": 32, "double_quant": True, "quant_type": "fp4"}),
        ((70,), (64, 32), {"rank": 32, "bias": False}),
        ((3,), (192, 192), {"rank": 0}),
        ((0,), (64, 32), {}),
    ],
)
def test_three_layers_equal_each(monkeypatch, shape, features, options, dtype):
    monkeypatch.setattr(dispatch, "configuration", lambda *_: SMALL)
    layers = [make(*features, dtype, **options) for _ in range(3)]
    x = torch.randn(*shape, features[0], device=DEVICE).to(dtype).requires_grad_()
    found = gpu.qlora_qkv(x, *whole._layers(*layers))
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    seeds = [torch.randn_like(y) / features[1] ** 0.5 for y in found]
    grads = torch.autograd.grad(found, leaves, seeds)
    x64 = x.detach().double().requires_grad_()
    others, exact = [x64], []
    for layer in layers:
        own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
        y = F.linear(x64, layer.base_weight().double(), own.get("bias"))
        if layer.rank:
            y = y + layer.scaling * (x64 @ own["lora_A"].T) @ own["lora_B"].T
        exact.append(y)
        others += [own[name] for name, _ in layer.named_parameters()]
    for one, other in zip((*found, *grads), (*exact, *torch.autograd.grad(exact, others, [s.double() for s in seeds])),
                          strict=True):  # fmt: skip
        check(one, other, dtype)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(
    ("shape", "features", "first", "second"),
    [
        ((2, 5), (64, 128, 40), {}, {}),
        ((33,), (96, 64, 33), {"blocksize": 32, "double_quant": True, "quant_type": "fp4"}, {"rank": 17}),
        ((3,), (64, 192, 20), {"rank": 32, "bias": False}, {"rank": 5, "blocksize": 32, "double_quant": True}),
        ((3,), (192, 512, 192), {"rank": 0}, {"rank": 0}),
        ((17,), (64, 64, 16), {"rank": 0}, {"bias": False}),
        ((1,), (320, 64, 1), {"rank": 2}, {"rank": 0}),
        ((600,), (64, 64, 32), {"rank": 3}, {"rank": 20}),
    ],
)
def test_the_feed_forward_layers_equal_each(shape, features, first, second, dtype):
    sizes = zip(pairwise(features), (first, second), strict=True)
    layers = [make(i, o, dtype, **options) for (i, o), options in sizes]
    x = torch.randn(*shape, features[0], device=DEVICE).to(dtype).requires_grad_()
    found = gpu.qlora_mlp(x, *whole._layers(*layers))
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    seed = torch.randn_like(found) / features[-1] ** 0.5
    grads = torch.autograd.grad(found, leaves, seed)
    exact = x64 = x.detach().double().requires_grad_()
    others = [x64]
    for number, layer in enumerate(layers):
        own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
        entering = F.gelu(exact) if number else exact
        exact = F.linear(entering, layer.base_weight().double(), own.get("bias"))
        if layer.rank:
            exact = exact + layer.scaling * (entering @ own["lora_A"].T) @ own["lora_B"].T
        others += own.values()
    for one, other in zip((found, *grads), (exact, *torch.autograd.grad(exact, others, seed.double())), strict=True):
        # Rounded several times on the way, to which the bound of one layer does not apply.
        assert (one.double() - other).abs().max() <= 2 * ERROR[dtype] * other.abs().max() + 1e-6
    with torch.no_grad():
        assert torch.equal(gpu.qlora_mlp(x, *whole._layers(*layers)), found)


def test_feed_forward_layers_that_do_not_fit_run_one_by_one():
    def take(*features, rows=3, **options):
        layers = [make(i, o, **options) for i, o in pairwise(features)]
        return gpu.qlora_mlp(torch.randn(rows, features[0], device=DEVICE), *whole._layers(*layers))

    assert take(64, 64, 32) is not None
    assert take(65, 64, 32) is None  # blocks across rows
    assert take(64, 65, 32) is None
    assert take(64, 64, 257) is None
    assert take(64, 64, 32, rank=33) is None
    assert take(64, 64, 32, rows=0) is None
    assert take(64, 2048, 32) is None


PLACES = ("x", "bias1", "A1", "B1", "bias2", "A2", "B2")


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(
    "trained", [PLACES, *((place,) for place in PLACES), ("A1", "A2"), ("B1", "bias2"), ("x", "A2"), ("B1", "B2"), ()]
)
def test_only_the_gradients_of_the_feed_forward_layers_that_are_needed(trained, dtype):
    wanted = [place in trained for place in PLACES]
    size = (70, 128, 0, 5, "nf4", 64, True)
    exact = dispatch.problem("qlora_mlp_backward", DEVICE, torch.float64, *size, rounded=dtype)
    given = dispatch.problem("qlora_mlp_backward", DEVICE, dtype, *size, adapter_dtype=torch.float32)
    found = mlp.qlora_mlp_backward(*given[:-1], wanted, configuration=SMALL)
    expected = reference.qlora_mlp_backward(*exact[:-1], wanted)
    for place, one, other, want in zip(PLACES, found, expected, wanted, strict=True):
        assert one.shape == other.shape
        if want:
            assert one.dtype == (torch.float32 if place[0] in "AB" else dtype)
            check(one, other, dtype)


@pytest.mark.parametrize("frozen", ["x", "first", "second", "x and first", "lora_A", "lora_B", "adapters and x"])
@pytest.mark.parametrize("ranks", [(4, 4), (0, 4), (4, 0), (0, 0)])
def test_the_feed_forward_layers_train_in_parts(frozen, ranks):
    layers = [make(64, 64, rank=ranks[0]), make(64, 32, rank=ranks[1])]
    x = torch.randn(5, 64, device=DEVICE, requires_grad="x" not in frozen)
    for layer, name in zip(layers, ("first", "second"), strict=True):
        layer.requires_grad_(name not in frozen)
        for part, parameter in layer.named_parameters():
            if part in frozen or ("adapters" in frozen and part != "bias"):
                parameter.requires_grad_(False)
    leaves = [leaf for leaf in (x, *(p for layer in layers for p in layer.parameters())) if leaf.requires_grad]
    y = gpu.qlora_mlp(x, *whole._layers(*layers))
    assert y is not None
    together = torch.autograd.grad(y.square().sum(), leaves)
    apart = torch.autograd.grad(layers[1](F.gelu(layers[0](x))).square().sum(), leaves)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def launches(monkeypatch):
    """The launches of the kernels of `qlora_mlp_backward` by name, with their grid; none takes place."""
    made = []
    for name in ("dx", "grads", "add_grads"):

        class Kernel:
            def __class_getitem__(cls, grid, name=name):
                return lambda *arguments, **constants: made.append((name, grid, arguments))

        monkeypatch.setattr(mlp, f"_qlora_mlp_{name}_kernel", Kernel)
    return made


@pytest.mark.parametrize(
    ("trained", "kernels"),
    [
        (PLACES, ["dx", "grads", "add_grads"]),
        (("x",), ["dx"]),
        (("bias2", "B2"), ["grads", "add_grads"]),
        (("A2",), ["dx", "grads", "add_grads"]),
        (("B1",), ["dx", "grads", "add_grads"]),
        ((), []),
    ],
)
def test_the_launches_of_the_feed_forward_layers_backward(monkeypatch, launches, trained, kernels):
    monkeypatch.setattr(qlora_linear, "multiprocessors", lambda _: 132)
    given = dispatch.problem("qlora_mlp_backward", DEVICE, torch.float32, 600, 128, 0, 5, "nf4", 64, False)
    with replay._Watch() as watch:
        mlp.qlora_mlp_backward(*given[:-1], [place in trained for place in PLACES], configuration=SMALL)
    assert not watch.computed  # otherwise it could not be repeated
    assert [name for name, *_ in launches] == kernels
    if "dx" in kernels:
        grad_x, grad_h, u1, u2 = launches[0][2][15:19]
        assert (grad_x is None) == ("x" not in trained)
        assert (grad_h is None) == (not {"x", "bias1", "A1", "B1"} & {*trained})
        assert (u1 is None, u2 is None) == ("A1" not in trained, "A2" not in trained)
    if "add_grads" in kernels:
        assert launches[-2][1][1] > 1  # parts of the rows


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_the_feed_forward_layers_rows_are_shared_out(monkeypatch, multiprocessors):
    monkeypatch.setattr(qlora_linear, "multiprocessors", lambda _: multiprocessors)
    made, original = [], mlp.Gradients
    monkeypatch.setattr(mlp, "Gradients", lambda *arguments: made.append(original(*arguments)) or made[-1])
    given = dispatch.problem("qlora_mlp_backward", DEVICE, torch.float32, 600, 64, 0, 5, "nf4", 32, False)
    results = [mlp.qlora_mlp_backward(*given, configuration=SMALL) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert {each.together is None for each in made} == {multiprocessors == 1}
    for one, other in zip(results[0], reference.qlora_mlp_backward(*given), strict=True):
        check(one, other.double(), torch.float32)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("multiprocessors", [1, 4, 9])
def test_programs_share_the_columns_of_dx(monkeypatch, rows, multiprocessors):
    monkeypatch.setattr(mlp, "multiprocessors", lambda _: multiprocessors)
    given = dispatch.problem("qlora_mlp_backward", DEVICE, torch.float32, rows, 320, 0, 5, "nf4", 64, False)
    expected = reference.qlora_mlp_backward(*given)
    for one, other in zip(mlp.qlora_mlp_backward(*given, configuration=SMALL), expected, strict=True):
        check(one, other.double(), torch.float32)


def test_the_feed_forward_layers_take_strided_rows():
    grad, x, *given = dispatch.problem("qlora_mlp_backward", DEVICE, torch.float32, 6, 64, 0, 5, "nf4", 64, False)
    spaced = [torch.empty(6, 200, device=DEVICE)[:, 7 : 7 + each.shape[1]].copy_(each) for each in (grad, x)]
    expected = mlp.qlora_mlp_backward(grad, x, *given, configuration=SMALL)
    for one, other in zip(mlp.qlora_mlp_backward(*spaced, *given, configuration=SMALL), expected, strict=True):
        assert torch.equal(one, other)


def test_no_empty_launch_adds_what_three_layers_do_not_want(monkeypatch):
    """Triton leaves out a grid of no programs; a recording would not."""
    given = dispatch.problem("qlora_qkv_backward", DEVICE, torch.float32, 600, 64, 32, 5, "nf4", 64, False)
    expected = reference.qlora_qkv_backward(*given)[0]
    monkeypatch.setattr(qlora_linear, "_add_grads_kernel", None)
    found = qlora_qkv.qlora_qkv_backward(*given[:-1], (True, False, False, False), configuration=SMALL)
    check(found[0], expected.double(), torch.float32)
    assert not any(grad.numel() for grad in found[1:])


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_A", "lora_B"])
def test_only_the_gradients_that_are_needed(wanted):
    layers = [make(64, 32) for _ in range(3)]
    x = torch.randn(5, 64, device=DEVICE)
    for layer in layers:
        layer.requires_grad_(False)
    leaf = x if wanted == "x" else getattr(layers[1], wanted)
    leaf.requires_grad_()
    together = sum(y.square().sum() for y in gpu.qlora_qkv(x, *whole._layers(*layers)))
    apart = sum(layer(x).square().sum() for layer in layers)
    (one,), (other,) = (torch.autograd.grad(loss, [leaf]) for loss in (together, apart))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_output_that_is_not_used_gives_no_gradient():
    layers = [make(64, 32) for _ in range(3)]
    x = torch.randn(5, 64, device=DEVICE)
    gpu.qlora_qkv(x, *whole._layers(*layers))[1].sum().backward()
    assert layers[0].lora_A.grad.abs().sum() == 0
    assert layers[1].lora_A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "other", [{"rank": 5}, {"bias": False}, {"blocksize": 128}, {"quant_type": "fp4"}, {"double_quant": True}]
)
def test_layers_that_differ_run_one_by_one(other):
    layers = [make(64, 32), make(64, 32, **other), make(64, 32)]
    assert gpu.qlora_qkv(torch.randn(3, 64, device=DEVICE), *whole._layers(*layers)) is None


def test_what_is_out_of_the_ordinary_runs_one_by_one(monkeypatch):
    layers = whole._layers(*(make(64, 32) for _ in range(3)))
    x = torch.randn(3, 64, device=DEVICE)
    assert gpu.qlora_qkv(x, *layers) is not None
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert gpu.qlora_qkv(x, *layers) is None
    assert gpu.qlora_qkv(x.double(), *layers) is None
    wide = whole._layers(*(make(64, 32, rank=33) for _ in range(3)))
    assert gpu.qlora_qkv(x, *wide) is None
    monkeypatch.setattr(dispatch, "configuration", lambda *_: Configuration("dense"))
    eager.reset()
    assert gpu.qlora_qkv(x, *layers) is None
    monkeypatch.undo()
    monkeypatch.setenv("HARLORA_BACKEND", "reference")
    eager.reset()
    assert gpu.qlora_qkv(x, *layers) is None


def test_a_second_derivative_is_refused():
    layers = [make(64, 32) for _ in range(3)]
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    y = gpu.qlora_qkv(x, *whole._layers(*layers))[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = gpu.qlora_mlp(x, *whole._layers(make(64, 64), make(64, 32)))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("operator", ["qlora_qkv", "qlora_qkv_backward", "qlora_mlp", "qlora_mlp_backward"])
def test_a_wrong_group_is_left_out_with_one_warning(monkeypatch, operator):
    module = mlp if "mlp" in operator else qlora_qkv
    true = getattr(module, operator)

    def wrong(*arguments, configuration):
        *first, last = true(*arguments, configuration=configuration)
        return *first, 1.05 * last

    monkeypatch.setattr(module, operator, wrong)
    monkeypatch.setattr(dispatch, "_wrong", {})
    layers = whole._layers(*(make(64, 64) for _ in range(2 if module is mlp else 3)))
    take = gpu.qlora_mlp if module is mlp else gpu.qlora_qkv
    x = torch.randn(3, 64, device=DEVICE)
    with pytest.warns(RuntimeWarning, match=f"of {operator} disagrees with the reference"):
        assert take(x, *layers) is None
    assert take(x, *layers) is None  # a second warning would be an error


def test_each_format_of_a_group_is_checked(monkeypatch):
    monkeypatch.setattr(dispatch, "_wrong", {})
    layers = make(64, 64, rank=4), make(64, 32, rank=20, blocksize=32, quant_type="fp4", double_quant=True)
    assert gpu.qlora_mlp(torch.randn(3, 64, device=DEVICE), *whole._layers(*layers)) is not None
    for operator in ("qlora_mlp", "qlora_mlp_backward"):
        facts = {
            (probe.quant_type, probe.blocksize, probe.nested, probe.rank, probe.aligned)
            for probe in dispatch._wrong if probe.operator == operator
        }  # fmt: skip
        assert facts == {("nf4", 64, False, 16, True), ("fp4", 32, True, 32, True)}


@pytest.mark.parametrize("grad", [False, True])
def test_the_models_attention_takes_them_together(monkeypatch, grad):
    attention = Attention(64, 4).to(DEVICE)
    harlora.apply_qlora(attention, ["q", "k", "v", "o"], rank=4, alpha=8)
    x = torch.randn(2, 5, 64, device=DEVICE)
    calls = []
    take = gpu.qlora_qkv
    monkeypatch.setattr(gpu, "qlora_qkv", lambda *a: calls.append(take(*a)) or calls[-1])
    with torch.set_grad_enabled(grad):
        together = attention(x)
    assert len(calls) == 1
    assert calls[0] is not None
    q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (attention.q, attention.k, attention.v))
    apart = attention.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    seen = []
    handle = attention.k.register_forward_hook(lambda *_: seen.append(1))
    attention(x)
    handle.remove()
    assert seen == [1]


def test_a_whole_model_computes_and_trains():
    torch.manual_seed(0)
    config = MAEConfig(width=64, depth=1, heads=4, ffn=64, decoder_width=32, decoder_depth=1, decoder_ffn=32)
    encoder = MAE(config).encoder.to(DEVICE)
    harlora.apply_qlora(encoder, ["q", "k", "v", "o", "fc1", "fc2"], rank=4, alpha=8)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 128, 6, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HARLORA_BACKEND", backend)
            eager.reset()
            encoder.zero_grad()
            y = encoder(x)
            y.square().mean().backward()
            results.append([y.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


def test_the_tables_of_small_models_are_direct():
    for table in configurations.tables().values():
        for operator in configurations.OPERATORS:
            for rows in (16, 1024, 8192):
                assert configurations.choose(table, operator, torch.bfloat16, rows, 3 * 192 * 192).way == "direct"


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("rank", [4, 40, 130])
@pytest.mark.parametrize("way", ["direct", "split", "dense"])
def test_dropout(monkeypatch, way, rank, dtype):
    chosen = Configuration("dense") if way == "dense" else Configuration(way, 16, 32, 32)
    monkeypatch.setattr(dispatch, "configuration", lambda *_: chosen)
    layer = make(64, 48, dtype, rank=rank, dropout=0.3)
    x = torch.randn(21, 64, device=DEVICE).to(dtype).requires_grad_()
    drop = (0.3, draw_seed(DEVICE))
    found = gpu.qlora_linear(x, *layer.operands(), *drop)
    leaves = [x, layer.lora_A, layer.lora_B, layer.bias]
    x64, A, B, bias = (leaf.detach().double().requires_grad_() for leaf in leaves)
    exact = F.linear(x64, layer.base_weight().double(), bias)
    exact = exact + layer.scaling * (dropped(x64, *drop) @ A.T) @ B.T
    seed = torch.randn_like(found) / 7
    pairs = zip(
        (found, *torch.autograd.grad(found, leaves, seed)),
        (exact, *torch.autograd.grad(exact, [x64, A, B, bias], seed.double())),
        strict=True,
    )
    for one, other in pairs:
        check(one, other, dtype)
    with torch.no_grad():
        assert torch.equal(gpu.qlora_linear(x, *layer.operands(), *drop), found)
        other = gpu.qlora_linear(x, *layer.operands(), 0.3, drop[1] + 1)
    assert not torch.equal(other, found)
    with pytest.raises(ValueError, match="seed must be a scalar"):
        gpu.qlora_linear(x, *layer.operands(), 0.3, drop[1][None])


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [4, 40, 130])
@pytest.mark.parametrize("way", ["direct", "split", "dense"])
def test_float32_adapters_are_read_as_they_are(monkeypatch, way, rank, dtype):
    chosen = Configuration("dense") if way == "dense" else Configuration(way, 16, 32, 32)
    monkeypatch.setattr(dispatch, "configuration", lambda *_: chosen)
    layer = make(64, 48, dtype, rank=rank)
    A, B = (nn.Parameter(torch.randn_like(p, dtype=torch.float32) / 4) for p in (layer.lora_A, layer.lora_B))
    x = torch.randn(21, 64, device=DEVICE).to(dtype).requires_grad_()
    seed = torch.randn(21, 48, device=DEVICE).to(dtype)
    *base, scaling = (*layer.operands()[:7], layer.bias, layer.scaling)
    wide = gpu.qlora_linear(x, *base, A, B, scaling)
    narrow = gpu.qlora_linear(x, *base, A.to(dtype), B.to(dtype), scaling)
    assert torch.equal(wide, narrow)
    leaves = [x, layer.bias, A, B]
    found, rounded = (torch.autograd.grad(y, leaves, seed) for y in (wide, narrow))
    for one, other in zip(found, rounded, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(found[0], rounded[0])
    if rank <= 128:  # sums that leave the kernel in float32
        assert not torch.equal(found[2], found[2].to(dtype).float())


def test_float32_adapters_of_several_layers_are_read_as_they_are():
    layers = [make(64, 32, torch.bfloat16) for _ in range(3)]
    mlp = [make(64, 128, torch.bfloat16), make(128, 64, torch.bfloat16)]
    x = torch.randn(9, 64, device=DEVICE).bfloat16()
    for function, group in ((gpu.qlora_qkv, layers), (gpu.qlora_mlp, mlp)):
        narrow = function(x, *whole._layers(*group))
        for layer in group:
            layer.lora_A, layer.lora_B = (nn.Parameter(p.detach().float()) for p in (layer.lora_A, layer.lora_B))
        wide = function(x, *whole._layers(*group))
        assert all(torch.equal(one, other) for one, other in zip(wide, narrow, strict=True))
        sum(y.float().square().sum() for y in wide).backward()
        assert all(layer.lora_A.grad.dtype == torch.float32 for layer in group)
