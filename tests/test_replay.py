"""Launches that were recorded and are repeated: the same numbers, and never for arguments that do not fit."""

import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from needs import needs_extension
from torch import nn

from harlora import QLoRALinear
from harlora.kernels import cpp, cuda, dispatch, eager, replay
from harlora.kernels.configurations import Configuration
from harlora.kernels.dropout import draw_seed

pytestmark = needs_extension
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


def what_is_missing():
    """How calls of CUDA C++ end here: with the GPU they would go to, or in an extension that has none of them."""
    return "device_guard" if cpp.has_kernel("qlora_gemv", "cuda") else "built without CUDA"


# A driver whose one kernel is out[i] = scale · (a[i + first] + n), and whose device is that of tensors on a CPU.
DRIVER = """
#include <stdint.h>
int device = -1;
int cuCtxGetDevice(int* d) { *d = device; return 0; }
void set_device(int d) { device = d; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** p, void** extra) {
  if ((intptr_t)f != 77 || (intptr_t)stream != 5 || gy != 1 || gz != 1 || tx != 128 || shared != 16) return 1;
  float* a = *(float**)p[0]; float* out = *(float**)p[1]; int n = *(int*)p[2]; float scale = *(float*)p[3];
  for (unsigned i = 0; i < gx; ++i) out[i] = scale * (a[i] + n);
  return *(void**)p[4] || *(void**)p[5] ? 2 : 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "driver.so", folder / "driver.c"], check=True)
    return str(folder / "driver.so")


def kernel(**metadata):
    none = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False, "launch_pdl": False}
    signature = {"a": "*fp32", "out": "*fp32", "n": "i32", "scale": "fp32", "BLOCK": "constexpr"}
    return SimpleNamespace(
        function=77, metadata=SimpleNamespace(**none | {"num_warps": 4, "shared": 16} | metadata),
        src=SimpleNamespace(signature=signature, fn=SimpleNamespace(arg_names=list(signature))),
    )  # fmt: skip


def held(driver, inputs, allocated, result, launched):
    facts, _ = replay._facts(inputs, allocated, result, launched)
    return torch.ops.harlora_cpp.launches_hold(facts, driver)


def test_launches_are_repeated_on_other_tensors(driver):
    x, out, between = torch.randn(3, 8), torch.empty(20), torch.empty(24)
    # Two launches, the second of which reads what the first wrote from its fifth value on.
    launched = [
        (kernel(), (24,), (x, between, -3, 0.5), {"BLOCK": 8}),
        (kernel(), (20,), (between[4:], out, 2, 4.0), {}),
    ]
    number = held(driver, [x], [between, out], [out.view(4, 5)], launched)
    run = torch.ops.harlora_cpp.launches_run
    for _ in range(2):
        x = torch.randn(3, 8)
        (found,) = run([x], number, 5)
        torch.testing.assert_close(found, 4 * (0.5 * (x.flatten()[4:].view(4, 5) - 3) + 2))
    for other in (torch.randn(4, 8), torch.randn(3, 8).double(), torch.randn(8, 3).T, torch.randn(25)[1:].view(3, 8)):
        assert run([other], number, 5) == []
    assert run([x, x], number, 5) == []
    with pytest.raises(RuntimeError, match="CUDA driver error 1"):
        run([x], number, 6)
    import ctypes

    ctypes.CDLL(driver).set_device(0)
    assert run([x], number, 5) == []
    ctypes.CDLL(driver).set_device(-1)
    torch.ops.harlora_cpp.launches_release(number)
    with pytest.raises(RuntimeError, match="nothing is held"):
        run([x], number, 5)


def test_what_cannot_be_repeated_is_not_recorded():
    x, out = torch.randn(3, 8), torch.empty(24)
    launch = (kernel(), (24,), (x, out, 1, 1.0), {})
    assert replay._facts([x], [out], [out], [launch])
    unaligned = torch.randn(25)[1:]
    for inputs, allocated, result, launched in (
        ([x, x], [out], [out], [launch]),  # one tensor twice
        ([x, x[1:]], [out], [out], [launch]),
        ([unaligned], [out], [out], [(kernel(), (24,), (unaligned, out, 1, 1.0), {})]),
        ([x], [out], [out, out], [launch]),
        ([x], [out], [out[1:]], [launch]),
        ([x], [out], [x], [launch]),
        ([x], [out], [out.view(4, 6).T], [launch]),
        ([x], [out], [out], [(kernel(launch_pdl=True), (24,), (x, out, 1, 1.0), {})]),
        ([x], [out], [out], [(kernel(global_scratch_size=8), (24,), (x, out, 1, 1.0), {})]),
    ):
        with pytest.raises(replay._UnrepeatableError):
            replay._facts(inputs, allocated, result, launched)


def test_damaged_facts_are_refused(driver):
    x, out = torch.randn(3, 8), torch.empty(24)
    facts, _ = replay._facts([x], [out], [out], [(kernel(), (24,), (x, out, 1, 1.0), {})])
    for damaged in (facts[:-1], [*facts, 0], [*facts[:2], -1, *facts[3:]]):
        with pytest.raises(RuntimeError, match="launches_hold: facts"):
            torch.ops.harlora_cpp.launches_hold(damaged, driver)
    with pytest.raises(RuntimeError, match="does not load"):
        torch.ops.harlora_cpp.launches_hold(facts, "/nowhere/libcuda.so.1")


def test_computing_functions_are_seen():
    x = torch.randn(3, 8)
    with replay._Watch() as watch:
        y = x.new_empty((2, 3)).view(3, 2)
        torch.empty_like(x)
    assert not watch.computed
    assert len(watch.allocated) == 2
    for compute in (lambda: x @ x.T, lambda: x.T.contiguous(), lambda: y.mul_(2), lambda: x.to(torch.float64)):
        with replay._Watch() as watch:
            compute()
        assert watch.computed


def test_products_are_repeated_between_launches(driver):
    def computed(x, w, bias, A):
        """Each kind of product, on parts and transposed, over memory that holds NaN."""
        with replay.launches() as steps, replay._Watch(steps) as watch:
            y, t, wide = x.new_empty(5, 12), x.new_empty(5, 3), w.new_empty(12, 8)
            for tensor in (y, t, wide):
                tensor.numpy()[:] = np.nan
            half = torch.empty_like(w, dtype=torch.bfloat16).copy_(w)
            wide.copy_(half)
            t.addmm_(x, A.T, beta=0, alpha=2.0)
            torch.addmm(bias, x, wide.T, alpha=0.5, out=y)
            y[:, 4:9].addmm_(x, w[4:9].T)
            torch.mm(t, A[:, 2:5], out=y[:, 1:4])
            torch.mm(x[:, :5], table[:, :2], out=y[:, 10:])
        assert not watch.computed
        return [y, t], watch.allocated, steps

    inputs, table = [torch.randn(5, 8), torch.randn(12, 8), torch.randn(12), torch.randn(3, 8)], torch.randn(5, 3)
    result, allocated, steps = computed(*inputs)
    number = held(driver, inputs, allocated, result, steps)
    moved = torch.randn(16 + 5 * 8)[16:].view(5, 8)
    for x in (torch.randn(5, 8), moved):
        inputs[0] = x
        found = torch.ops.harlora_cpp.launches_run(inputs, number, 5)
        for one, other in zip(found, computed(*inputs)[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.ops.harlora_cpp.launches_release(number)


def test_products_that_cannot_be_repeated():
    x, w, out = torch.randn(5, 8), torch.randn(12, 8), torch.empty(5, 12)
    for product in (
        replay._Product(2, (out, x, w.view(torch.int32).T)),
        replay._Product(3, (out[:0], x[:0])),
    ):
        with pytest.raises(replay._UnrepeatableError):
            replay._facts([x, w], [out], [out], [product])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "numbers", "workspace"),
    [
        ("qlora_gemv", (), ()), ("qlora_gemm", (64, 2), ()), ("qlora_mma", (16, 1), (None,)),
        ("qlora_mma", (16, 2), (torch.empty(2, 3, 16),)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}",
)  # fmt: skip
def test_calls_of_cuda_are_held_with_their_arguments_in_order(name, numbers, workspace, nested, driver):
    def half(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    x, y, t, A, B = half(3, 128), half(3, 16), half(3, 4), half(4, 128), half(16, 4)
    packed, table = torch.zeros(1024, 1, dtype=torch.uint8), torch.randn(16)
    absmax = torch.ones(32, dtype=torch.uint8 if nested else torch.float32)
    scales = (torch.ones(1), torch.zeros(1), torch.ones(256)) if nested else ()
    arguments = (x, packed, absmax, table, 64, None, A, B, 0.5, y, t, *numbers, *workspace, *scales)
    product = replay._product(getattr(torch.ops.harlora_cpp, name).default, arguments, {"stream": 3})
    assert product.numbers == (64, *numbers)
    assert product.alpha == 0.5
    wanted = (x, packed, absmax, table, None, A, B, y, t, *workspace, *(scales or (None, None, None)))
    assert all(one is other for one, other in zip(product.tensors, wanted, strict=True))
    inputs = [x, packed, absmax, A, B, *scales[:2]]
    number = held(driver, inputs, [y, t, *(each for each in workspace if each is not None)], [y, t], [product])
    # All that is checked of the arguments is right; what is missing is the GPU to go to.
    with pytest.raises(RuntimeError, match=what_is_missing()):
        torch.ops.harlora_cpp.launches_run(inputs, number, 5)
    torch.ops.harlora_cpp.launches_release(number)


@pytest.mark.parametrize("nested", [False, True])
def test_calls_of_the_backward_of_cuda_are_held_with_their_arguments_in_order(nested, driver):
    def half(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    grad, x, t, u, A, B = half(3, 16), half(3, 128), half(3, 4), half(3, 16), half(4, 128), half(16, 4)
    grad_x, sums, grad_bias, grad_A, grad_B = half(3, 128), torch.empty(1, 3, 128), half(16), half(4, 128), half(16, 4)
    packed, table = torch.zeros(1024, 1, dtype=torch.uint8), torch.randn(16)
    absmax = torch.ones(32, dtype=torch.uint8 if nested else torch.float32)
    scales = (torch.ones(1), torch.zeros(1), torch.ones(256)) if nested else ()
    calls = [
        ("qlora_dx", (grad, packed, absmax, table, 64, A, B, 0.5, grad_x, u, sums, 16, 1, *scales), (64, 16, 1),
         (grad, packed, absmax, table, A, B, grad_x, u, sums, *(scales or (None, None, None)))),
        ("lora_grads", (grad, x, t, u, 0.5, grad_bias, grad_A, grad_B), (),
         (grad, x, t, u, grad_bias, grad_A, grad_B)),
    ]  # fmt: skip
    for name, arguments, numbers, wanted in calls:
        product = replay._product(getattr(torch.ops.harlora_cpp, name).default, arguments, {"stream": 3})
        assert product.numbers == numbers
        assert product.alpha == 0.5
        assert all(one is other for one, other in zip(product.tensors, wanted, strict=True))
        made = [grad_x, u, sums, grad_bias, grad_A, grad_B]
        number = held(driver, [grad, x, t, packed, absmax, A, B, *scales[:2]], made, made[:1], [product])
        with pytest.raises(RuntimeError, match=what_is_missing()):
            torch.ops.harlora_cpp.launches_run([grad, x, t, packed, absmax, A, B, *scales[:2]], number, 5)
        torch.ops.harlora_cpp.launches_release(number)


@pytest.mark.parametrize("way", ["direct", "split", "dense"])
@pytest.mark.parametrize("rank", [0, 4, 40])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_but_launches_and_products_is_done_by(way, rank, adapter, dropout, monkeypatch):
    """All ways of the layer, so that each is one compiled call; no kernel runs."""
    if dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    from harlora.kernels.triton import dropout as dropping
    from harlora.kernels.triton import nf4, qlora_linear

    class Kernel:
        def __class_getitem__(cls, grid):
            return lambda *arguments, **constants: None

    for module in (qlora_linear, nf4, dropping):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel)
    monkeypatch.setattr(qlora_linear, "CHUNK_BYTES", 2**14)  # several chunks
    cpu, dtype, given = torch.device("cpu"), torch.bfloat16, Configuration(way, 32, 32, 32)
    for operator in ("qlora_linear", "qlora_linear_backward"):
        arguments = dispatch.problem(operator, cpu, dtype, 70, 256, 192, rank, "nf4", 64, False, adapter_dtype=adapter)
        if dropout and rank:
            arguments = dispatch.with_dropout(arguments, cpu)
        with replay._Watch() as watch:
            getattr(qlora_linear, operator)(*arguments, configuration=given)
        # Without an adapter dbias is a sum, and so is all of backward.
        assert bool(watch.computed) == (operator == "qlora_linear_backward" and not rank)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_but_its_calls_is_done_by_the_backward_of_cuda(rank, adapter, monkeypatch):
    arguments = dispatch.problem(
        "qlora_linear_backward", torch.device("cpu"), torch.bfloat16, 70, 256, 192, rank, "nf4", 64, False,
        adapter_dtype=adapter,
    )  # fmt: skip
    calls = []
    for name in ("qlora_dx", "lora_grads"):
        monkeypatch.setattr(torch.ops.harlora_cpp, name, lambda *given, name=name, **_: calls.append((name, given)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    with replay._Watch() as watch:
        cuda.qlora_backward(*arguments, tile=64, parts=2)
    assert [name for name, _ in calls] == ["qlora_dx", "lora_grads"]
    assert not watch.computed


def test_it_is_kept_why_a_call_is_not_recorded(driver):
    reason = []
    assert replay.record([torch.ones(2)], lambda: [torch.ones(2) * 3], driver, reason)[1] == 0
    assert reason == ["it computes aten::ones"]


def test_what_only_asks_for_room_computes_nothing():
    if not torch._C._dispatch_has_kernel("harlora_cpp::encoder_shared_bytes"):
        pytest.skip("the extension has no CUDA part")
    with replay._Watch() as watch:
        assert torch.ops.harlora_cpp.encoder_shared_bytes(192, 512, 16, 2) > 0
    assert not watch.computed


@pytest.mark.parametrize("message", ["it gives other bits in result 1", "it fails .*nothing is held under -1"])
def test_a_recording_that_differs_is_told_of(message, monkeypatch):
    run = torch.ops.harlora_cpp.launches_run
    again = {"launches_run": lambda *_: run([], -1, 0) if "fails" in message else [torch.ones(2), torch.zeros(3)]}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.ops, "harlora_cpp", SimpleNamespace(**again))
    with pytest.warns(RuntimeWarning, match=message):
        why = replay._difference([torch.ones(2)], 1, [torch.ones(2), torch.ones(3)])
    assert why


# On a GPU -----------------------------------------------------------------------------------------------------------


def layer_of(dtype, **options):
    layer = QLoRALinear(128, 192, **options).to("cuda", dtype)
    for parameter in (layer.lora_A, layer.lora_B, layer.bias):
        if parameter is not None:
            parameter.data = torch.randn_like(parameter, dtype=dtype) / 8
            parameter.requires_grad_()
    return layer


def public(layer, x, *dropout):
    """By the operator itself, which is never a repetition."""
    return torch.ops.harlora.qlora_linear(x, *layer.operands(), *dropout)[0]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 70, "dense"])
@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 0}, {"rank": 40}, {"bias": False}, {"double_quant": True}, {"dropout": 0.3}],
    ids=str,
)
def test_layers_repeat_on_a_gpu(dtype, rows, options, monkeypatch):
    if dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    if rows == "dense":
        rows = 70
        monkeypatch.setattr(dispatch, "configuration", lambda *_: Configuration("dense"))
    eager.reset()
    layers = [layer_of(dtype, **options) for _ in range(2)]
    for turn in range(6):
        layer = layers[turn % 2]
        x = torch.randn(rows, 128, device="cuda", dtype=dtype, requires_grad=turn != 3)
        leaves = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
        if not leaves:
            continue
        seed = torch.randn(rows, 192, device="cuda", dtype=dtype)
        torch.manual_seed(turn)
        found = layer(x)
        torch.manual_seed(turn)
        wanted = public(layer, x, *((layer.dropout, draw_seed(x.device)) if layer.dropout else ()))
        assert torch.equal(found, wanted)
        pairs = zip(torch.autograd.grad(found, leaves, seed), torch.autograd.grad(wanted, leaves, seed), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        torch.manual_seed(turn)
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)
    # Without an adapter dbias is a sum of torch's, and so is all of backward.
    assert sum(number > 0 for number in replay._held.values()) >= (2 if layers[0].rank else 1)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("way", ["gemv", "gemm", "mma"])
@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"rank": 40}, {"bias": False}, {"double_quant": True}], ids=str)
def test_the_ways_of_cuda_repeat_on_a_gpu(way, options, monkeypatch):
    layers = [layer_of(torch.bfloat16, **options) for _ in range(2)]
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    if not cuda.serves("qlora_linear", way, x, *layers[0].operands()):
        pytest.skip(f"{way} does not serve here")
    dispatch.served_by_triton(x.device, x.dtype)  # which compares configurations of its own, once
    monkeypatch.setattr(dispatch, "configuration", lambda *_: Configuration(way))
    eager.reset()
    with torch.no_grad():
        for turn in range(6):
            x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(layers[turn % 2](x), cuda.WAYS["qlora_linear"][way](x, *layers[turn % 2].operands())[0])
    assert sum(number > 0 for number in replay._held.values()) == 1


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"rank": 40}, {"bias": False}, {"double_quant": True}], ids=str)
def test_the_backward_of_cuda_repeats_on_a_gpu(options, monkeypatch):
    layers = [layer_of(torch.bfloat16, **options) for _ in range(2)]
    way, original = cuda.WAYS["qlora_linear_backward"]["dx"], dispatch.configuration
    size = (torch.device("cuda"), torch.bfloat16, 70, 128, 192, 8, "nf4", 64, False)
    if not cuda.serves("qlora_linear_backward", "dx", *dispatch.problem("qlora_linear_backward", *size)):
        pytest.skip("dx does not serve here")
    dispatch.served_by_triton(torch.device("cuda"), torch.bfloat16)  # which compares configurations of its own, once
    monkeypatch.setattr(
        dispatch,
        "configuration",
        lambda operator, *given: Configuration("dx") if "backward" in operator else original(operator, *given),
    )
    eager.reset()
    called = []
    monkeypatch.setitem(cuda.WAYS["qlora_linear_backward"], "dx", lambda *given: called.append(given) or way(*given))
    for turn in range(6):
        layer = layers[turn % 2]
        x = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        seed = torch.randn(70, 192, device="cuda", dtype=torch.bfloat16)
        leaves = [x, *(each for each in layer.parameters() if each.requires_grad)]
        found = torch.autograd.grad(layer(x), leaves, seed)
        wanted = torch.autograd.grad(public(layer, x), leaves, seed)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert called
    assert sum(number > 0 for key, number in replay._held.items() if key[0] == "qlora_linear_backward") == 1


@pytest.mark.gpu
@NEEDS_GPU
def test_what_does_not_fit_a_recording_is_computed_all_the_same_on_a_gpu():
    eager.reset()
    layer = layer_of(torch.bfloat16)
    x = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        layer(x)
    assert any(number > 0 for number in replay._held.values())
    base = torch.randn(70 * 128 + 1, device="cuda", dtype=torch.bfloat16)
    for other in (base[1:].view(70, 128), x.T.contiguous().T, torch.randn(70, 256, device="cuda").bfloat16()[:, ::2]):
        torch.testing.assert_close(layer(other), public(layer, other.contiguous()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="in_features"):
        layer(x[:, :64].contiguous())
    layer.lora_A = nn.Parameter(layer.lora_A.detach()[:4].clone())
    with pytest.raises(ValueError, match="lora_B must have shape"):
        layer(x)


@pytest.mark.gpu
@NEEDS_GPU
def test_repetitions_are_captured_and_follow_the_stream_on_a_gpu():
    eager.reset()
    layer = layer_of(torch.bfloat16)
    x = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, public(layer, x))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)
            x.normal_()
            found = layer(x)
        stream.synchronize()
        assert torch.equal(found, public(layer, x))


def test_there_are_never_more_recordings_than_twice_the_most(monkeypatch, driver):
    eager.reset()
    monkeypatch.setattr(replay, "MOST", 2)
    x, out = torch.randn(3, 8), torch.empty(24)
    for key in range(7):
        facts, needed = replay._facts([x], [out], [out], [(kernel(), (24,), (x, out, 1, 1.0), {})])
        replay._make_room()
        number = torch.ops.harlora_cpp.launches_hold(facts, driver)
        replay._needed[number] = needed
        replay._held[key] = number
        assert len(replay._needed) <= 4
        assert len(torch.ops.harlora_cpp.launches_run([x], number, 5)) == 1
    eager.reset()
    assert not replay._needed
    with pytest.raises(RuntimeError, match="nothing is held"):
        torch.ops.harlora_cpp.launches_run([x], number, 5)
