"""The CPU kernels in a real program: threads, forks, transforms, memory, and what bitsandbytes gets wrong here."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from needs import needs_extension
from safetensors.torch import save
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import harlora
from harlora import QLoRALinear
from harlora.kernels import eager
from harlora.train.memory import step_peak_bytes

OPERATOR = torch.ops.harlora.qlora_linear.default
COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
WAYS = ["direct", "public"]  # past torch's dispatcher, and through it
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The short way of eager mode where it is open, and the public operator alone."""
    if request.param == "public":
        monkeypatch.setattr(eager, "qlora_linear", lambda *arguments: None)
    return request.param


def make(in_features=96, out_features=40, **options) -> QLoRALinear:
    layer = QLoRALinear(in_features, out_features, **{"rank": 4, **options})
    if layer.lora_B is not None:
        nn.init.normal_(layer.lora_B)
    return layer


def definition(layer: QLoRALinear, x: Tensor) -> Tensor:
    """What the layer means, in plain torch."""
    y = F.linear(x, layer.base_weight(), layer.bias)
    return y + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


def step(layer: QLoRALinear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and the gradients of x, lora_A and lora_B."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, layer.lora_A, layer.lora_B], grad)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Threads and processes ----------------------------------------------------------------------------------------------

# In a process of its own, since conftest leaves one thread to this one.
PROLOGUE = """
import itertools, multiprocessing, sys
import torch, harlora
from harlora.kernels import cpp

def make(rows, in_features, out_features, rank=8, dtype=torch.float32, **options):
    layer = harlora.QLoRALinear(in_features, out_features, rank=rank, **options).to(dtype)
    torch.nn.init.normal_(layer.lora_B)
    layer.bias.requires_grad_()
    return layer, torch.randn(rows, in_features, dtype=dtype), torch.randn(rows, out_features, dtype=dtype)

def step(layer, x, grad):
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, layer.bias, layer.lora_A, layer.lora_B], grad)]

def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

torch.manual_seed(0)
assert torch.get_num_threads() == 2
"""


def in_two_threads(code: str, tmp_path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(code)],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@needs_extension
@needs_fork
@pytest.mark.parametrize("first", ["", "cpp.load_extension(); cpp.select_kernels()"])
def test_a_forked_child_computes_the_same_and_ends(first, tmp_path):
    """The threads of OpenMP do not survive a fork: a child that waits for them never ends."""
    # Small enough that no operator of torch's own, which would wait, goes parallel in the child.
    code = f"""
    {first}
    layer, x, grad = make(16, 512, 512)
    expected = step(layer, x, grad)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(0 if same(step(layer, x, grad), expected) else 3))
    child.start()
    child.join(40)
    child.kill()  # one that hangs must not outlive the test
    assert child.exitcode == 0, child.exitcode
    assert same(step(layer, x, grad), expected)  # and the parent still has its threads
    """
    in_two_threads(code, tmp_path)


@needs_extension
@needs_fork
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_forked_child_may_be_the_first_to_run_a_layer_or_drop(dropout, tmp_path):
    """Torch's own operators wait for its threads too, in what checks kernels before their first use and in dropout."""
    code = f"""
    torch.randn(2_000_000).exp()  # in both threads
    layer, x, grad = make(64, 512, 512, dropout={dropout})
    if {dropout}:
        step(layer, x, grad)
    child = multiprocessing.get_context("fork").Process(target=step, args=(layer, x, grad))
    child.start()
    child.join(40)
    child.kill()
    assert child.exitcode == 0, child.exitcode
    assert torch.get_num_threads() == 2
    """
    in_two_threads(code, tmp_path)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_the_first_use_may_be_under_autocast_or_another_default_dtype(backend, tmp_path):
    code = """
    import harlora.nn
    weight = torch.randn(64, 64)
    torch.set_default_dtype(torch.bfloat16)
    quantized = harlora.quantize_4bit(weight)
    torch.set_default_dtype(torch.float32)
    code = weight.reshape(-1, 64) / weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
    nearest = (code[..., None] - torch.tensor(harlora.kernels.format._NF4)).abs().amin(dim=-1)
    found = harlora.dequantize_4bit(quantized).reshape(-1, 64) / weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
    assert torch.allclose((found - code).abs(), nearest, atol=1e-6)
    layer, x, grad = make(4, 64, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
        dora = harlora.nn.apply_adapter(torch.nn.Sequential(torch.nn.Linear(64, 48)), "dora", ["0"], quantize=True)
        dora(x).sum().backward()
    assert torch.allclose(layer(x).bfloat16().float(), layer(x), atol=0.1)
    """
    in_two_threads(code, tmp_path, HARLORA_BACKEND=backend)


@pytest.mark.parametrize("variant", ["avx512bf16", "avx512", "avx2", "portable"])
@needs_extension
def test_results_depend_neither_on_the_number_of_threads_nor_on_the_run(variant, tmp_path, use_kernels):
    use_kernels(variant)
    code = """
    shapes = [(1, 1024, 1030), (3, 576, 1000), (4, 2048, 65), (33, 160, 999), (64, 192, 512), (300, 321, 100)]
    for shape, rank, dtype in itertools.product(shapes, (5, 66), (torch.float32, torch.bfloat16)):
        layer, x, grad = make(*shape, rank, dtype, double_quant=rank == 5)
        results = []
        for threads in (1, 2, 2, 2, 1):
            torch.set_num_threads(threads)
            results.append(step(layer, x, grad))
        for result in results[1:]:
            assert same(result, results[0]), (shape, rank, dtype)
    """
    in_two_threads(code, tmp_path, HARLORA_CPU=variant)


@pytest.mark.usefixtures("way")
def test_python_threads_do_not_disturb_each_other():
    layers = [make(96, 40), make(192, 70, double_quant=True), make(65, 33, quant_type="fp4"), make(128, 64, rank=9)]
    jobs = [(layer, torch.randn(rows, layer.in_features)) for layer in layers for rows in (1, 5, 40)]
    jobs = [(layer, x, torch.randn(len(x), layer.out_features)) for layer, x in jobs]
    expected = [step(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for one in (0, 4):  # one layer in all threads
            for result in pool.map(lambda job: step(*job), [jobs[one]] * 12):
                assert same(result, expected[one])
        for _ in range(5):  # each another
            for result, one in zip(pool.map(lambda job: step(*job), jobs), expected, strict=True):
                assert same(result, one)


@needs_extension
def test_no_window_of_an_encoder_is_alone_because_of_the_number_of_threads(tmp_path):
    code = """
    from harlora.models.mae import Encoder, MAEConfig
    encoder = Encoder(MAEConfig(window=32, patch_size=8, width=64, depth=1, heads=2, ffn=64)).eval()
    harlora.apply_qlora(encoder, ["q", "k", "v", "o", "fc1", "fc2"], rank=4, alpha=8)
    for windows in (1281, 257, 33, 3):
        x, found = torch.randn(windows, 32, 6), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(encoder(x))
        assert torch.equal(*found), windows
    """
    in_two_threads(code, tmp_path)


@pytest.mark.usefixtures("way")
def test_operands_of_another_shape_are_refused_whatever_their_size():
    weight, x = harlora.quantize_4bit(torch.randn(64, 32)), torch.randn(5, 32)
    A, B, bias = torch.randn(4, 32), torch.randn(64, 4), torch.randn(64)
    for wrong in ((bias.view(8, 8), A, B), (bias, A, B.T), (bias, A, B.T.contiguous()), (bias, A.T.contiguous(), B)):
        for trains in (False, True):
            with pytest.raises(ValueError, match="must have shape|must be"):
                harlora.qlora_linear(x.clone().requires_grad_(trains), weight, *wrong)


def test_rank_0_trains():
    x = torch.randn(5, 64, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        weight = harlora.quantize_4bit(torch.randn(32, 64))
        A, B = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((0, 64), (32, 0)))
        y = harlora.qlora_linear(x.to(dtype), weight, None, A, B)
        grads = torch.autograd.grad(y.sum(), [x, A, B])
        assert [grad.shape for grad in grads] == [x.shape, A.shape, B.shape]


@needs_extension
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_takes_the_public_operator_and_keeps_gradients():
    layer, x = make(), torch.randn(3, 96)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(traced(leaf), layer(leaf))
    traced(leaf).sum().backward()
    assert leaf.grad is not None
    assert layer.lora_A.grad is not None


# Compilation, autocast, transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 20])
def test_a_compiled_layer_equals_the_eager_one(rows):
    """Inductor where a C++ compiler is, else the same trace without it."""
    layer = make(double_quant=True)
    x, grad = torch.randn(rows, 96), torch.randn(rows, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if COMPILER else "aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    found = [y.detach(), *torch.autograd.grad(y, [leaf, layer.lora_A, layer.lora_B], grad)]
    assert same(found, step(layer, x, grad))


@pytest.mark.usefixtures("way")
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients():
    layer = make()
    x, grad = torch.randn(5, 96, requires_grad=True), torch.randn(5, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    weight, half = layer.quantized_weight(), torch.bfloat16
    given = (tensor.detach().to(half) for tensor in (layer.bias, layer.lora_A, layer.lora_B))
    assert torch.equal(y, harlora.qlora_linear(x.detach().to(half), weight, *given, layer.scaling))
    found = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], grad.to(half))
    for value, exact in zip(found, step(layer, x, grad)[1:], strict=True):
        assert value.dtype == torch.float32
        assert (value - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("over", ["x", "lora_A"])
def test_functional_gradients_are_refused_not_dropped(over):
    """torch.func.grad: what torch generates around an operator has no rule for it, and says so."""
    layer, x = make(), torch.randn(5, 96)

    def loss(value: Tensor) -> Tensor:
        return (layer(value) if over == "x" else torch.func.functional_call(layer, {over: value}, (x,))).sum()

    value = x if over == "x" else layer.lora_A.detach()
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.grad(loss)(value)


@pytest.mark.usefixtures("way")
def test_functional_call_has_the_gradients_of_the_given_parameters():
    layer, x = make(), torch.randn(5, 96)
    lora_A = torch.randn(4, 96, requires_grad=True)
    (found,) = torch.autograd.grad(torch.func.functional_call(layer, {"lora_A": lora_A}, (x,)).sum(), lora_A)
    expected = layer.scaling * (torch.ones(5, 40) @ layer.lora_B.detach()).T @ x
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_vmap_equals_a_loop_with_gradients():
    layer, xs = make(), torch.randn(3, 5, 96)
    y = torch.func.vmap(layer)(xs)
    torch.testing.assert_close(y, torch.stack([layer(x) for x in xs]))
    found = torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B])
    expected = torch.autograd.grad(layer(xs).square().sum(), [layer.lora_A, layer.lora_B])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    adapters = torch.stack([layer.lora_A.detach() * factor for factor in (0.0, 1.0)])
    both = torch.func.vmap(lambda lora_A: torch.func.functional_call(layer, {"lora_A": lora_A}, (xs[0],)))(adapters)
    torch.testing.assert_close(both[1], layer(xs[0]))
    torch.testing.assert_close(both[0], F.linear(xs[0], layer.base_weight(), layer.bias))


@pytest.mark.parametrize("dual", ["x", "lora_A", "lora_B", "bias"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, forward mode
def test_forward_mode_is_refused_not_dropped(dual):
    layer, x = make(), torch.randn(5, 96)
    with forward_ad.dual_level():
        value = x if dual == "x" else getattr(layer, dual).detach()
        value = forward_ad.make_dual(value, torch.ones_like(value))
        given, changed = (value, {}) if dual == "x" else (x, {dual: value})
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
            torch.func.functional_call(layer, changed, (given,))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("power", [1, 2])  # power 1: dY is constant, dX depends on lora_A and lora_B alone
def test_a_second_derivative_is_refused_not_dropped(power):
    layer, x = make(), torch.randn(5, 96, requires_grad=True)
    with pytest.raises(NotImplementedError, match="a second derivative is not supported"):
        torch.autograd.grad(layer(x).pow(power).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative is not supported"):
        torch.autograd.functional.hessian(lambda x: layer(x).pow(power).sum(), x)  # takes what is unused for zero


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_public_operators():
    layer, x = make(), torch.randn(5, 96)
    expected = layer(x)
    with Recorder() as recorder:
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert OPERATOR in recorder.seen
    assert torch.ops.harlora.qlora_linear_backward.default in recorder.seen
    assert not [function for function in recorder.seen if function.namespace == "harlora_cpp"]


class Wrapped(Tensor):
    """A subclass that holds its values in another tensor, as those of distributed and quantised tensors do."""

    seen: list = []  # noqa: RUF012  of the one test that uses it

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        out = function(*(arg.inner if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))
        return tuple(map(cls, out)) if isinstance(out, tuple) else cls(out)


def test_a_tensor_subclass_sees_the_public_operator():
    layer, x = make(), torch.randn(5, 96)
    Wrapped.seen.clear()
    with torch.no_grad():
        y = layer(Wrapped(x))
        assert Wrapped.seen == [OPERATOR]
        assert torch.equal(y.inner, layer(x))


def test_fake_tensors_compute_no_values():
    layer, x = make(), torch.randn(5, 96)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(x)
    with mode:
        y = layer(fake)
    assert type(y) is type(fake)
    assert y.shape == (5, 40)
    assert type(layer(fake)) is type(fake)  # outside its mode too


# Memory and messages ------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_the_weight_is_decoded(dtype, monkeypatch):
    layer = make(2048, 2048, rank=8).to(dtype)
    layer.bias.requires_grad_()
    x, grad = torch.randn(64, 2048, dtype=dtype, requires_grad=True), torch.randn(64, 2048, dtype=dtype)
    inputs = [x, layer.bias, layer.lora_A, layer.lora_B]

    def peak() -> int:
        results = []
        found = step_peak_bytes(
            lambda: results.extend(torch.autograd.grad(layer(x), inputs, grad)), torch.device("cpu")
        )
        y_and_t = (64 * 2048 + 64 * 8) * x.element_size()
        return found - y_and_t - sum(tensor.nbytes for tensor in results)

    layer(x)  # the comparison with the reference at the first use allocates too
    assert peak() < 2**21
    monkeypatch.setenv("HARLORA_BACKEND", "reference")
    eager.reset()
    assert peak() > 2048 * 2048 * x.element_size() - 2**20  # what the measure shows where a copy is made
    monkeypatch.undo()
    eager.reset()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(4, 95), ValueError, r"x.shape\[-1\] must equal in_features=96, got x of shape \(4, 95\)"),
        (torch.ones(4, 48), ValueError, r"x.shape\[-1\] must equal in_features=96, got x of shape \(4, 48\)"),
        (torch.ones(96 * 40), ValueError, r"x.shape\[-1\] must equal in_features=96, got x of shape \(3840,\)"),
        (torch.ones(()), ValueError, "x must have at least one dimension"),
        (torch.ones(4, 96, dtype=torch.int64), TypeError, "x must be float32, .* got torch.int64"),
        (torch.ones(4, 96, dtype=torch.complex64), TypeError, "x must be float32, .* got torch.complex64"),
        (torch.ones(4, 96, device="meta"), ValueError, "packed is on cpu, required meta"),
    ],
    ids=["wide", "half", "flat", "scalar", "int64", "complex64", "meta"],
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_the_layer_says_what_is_wrong(x, error, message, grad):
    with torch.set_grad_enabled(grad), pytest.raises(error, match=f"qlora_linear: {message}"):
        make()(x)


def test_weights_without_values_give_what_remains():
    """The bias, and zeros; not what the memory held. No layer has such a weight, the operators take it."""
    packed, absmax = torch.zeros(0, 1, dtype=torch.uint8), torch.zeros(0)
    quantized, bias = (packed, absmax, None, None, "nf4", 64), torch.randn(40)
    for rows, dtype in ((2, torch.float32), (30, torch.float32), (30, torch.bfloat16)):
        torch.full((rows, 96), 7.0)  # memory that a careless kernel would return
        lora_A, lora_B = torch.ones(2, 0, dtype=dtype), torch.ones(40, 2, dtype=dtype)
        y, t = OPERATOR(torch.ones(rows, 0, dtype=dtype), *quantized, 40, bias.to(dtype), lora_A, lora_B, 1.0)
        assert torch.equal(y, bias.to(dtype).expand(rows, 40))
        assert torch.equal(t, torch.zeros(rows, 2, dtype=dtype))
        lora_A, lora_B = torch.ones(2, 96, dtype=dtype), torch.ones(0, 2, dtype=dtype)
        grad_x, _, grad_A, _ = torch.ops.harlora.qlora_linear_backward(
            torch.ones(rows, 0, dtype=dtype), torch.ones(rows, 96, dtype=dtype), None, *quantized, 96, lora_A, lora_B,
            1.0, [True, False, True, False],
        )  # fmt: skip
        assert not grad_x.any()
        assert not grad_A.any()


# What bitsandbytes 0.50.2 gets wrong on a CPU ------------------------------------------------------------------------
# Its wrong values are in test_format.py (test_right_where_bitsandbytes_is_wrong_on_cpu), its lost gradient in
# test_linear.py (test_gradients_are_the_same_however_often_it_was_evaluated).


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(192, 6), (96, 40), (144, 64), (160, 33), (65, 17)])
def test_evaluation_serves_every_shape(in_features, out_features, double_quant, rows):
    """bitsandbytes raises where out_features is no multiple of 32, as of a head, or in_features none of blocksize."""
    layer = make(in_features, out_features, double_quant=double_quant)
    x = torch.randn(rows, in_features)
    trained = layer.train()(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = layer.eval()(x)
            torch.testing.assert_close(y, definition(layer, x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(y, trained)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("double_quant", [False, True])
def test_evaluating_does_not_change_the_file(double_quant):
    """bitsandbytes saves scales in bfloat16, transposed, and double quantised ones quantised anew."""
    layer = make(128, 64, double_quant=double_quant)
    before = save(layer.state_dict())
    for rows in (1, 40):
        with torch.inference_mode():
            layer.eval()(torch.randn(rows, 128))
        layer.train()(torch.randn(rows, 128)).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            layer.eval()(torch.randn(rows, 128))
    assert save(layer.state_dict()) == before
