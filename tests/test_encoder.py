"""The blocks of an encoder as Triton's kernels take them: the numbers and gradients of the modules, or the modules."""

import copy
import ctypes
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from needs import needs_extension
from test_triton import ERROR
from torch import nn
from torch.nn import functional as F

import harlora
from harlora.kernels import configurations, dispatch, eager, gpu, replay
from harlora.kernels.configurations import Configuration
from harlora.models import MAE, Classifier, MAEConfig, mae, whole

if dispatch.load_triton():
    pytest.skip(dispatch.load_triton(), allow_module_level=True)

from harlora.kernels.triton import encoder as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
LAYERS = ["q", "k", "v", "o", "fc1", "fc2"]
SMALL = Configuration("direct", 16, 32, 32)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "triton")
    monkeypatch.setattr(dispatch, "configuration", lambda *_: SMALL)
    eager.reset()
    yield
    eager.reset()


@pytest.fixture
def _believed(monkeypatch):
    """Configurations count as proven: the test compares the numbers itself, and a proof takes seconds."""
    monkeypatch.setattr(dispatch, "_proven", lambda _: True)


@pytest.fixture
def taken(monkeypatch):
    """For each call of an encoder whether its blocks were taken together."""
    results = []
    take = whole.encode_tokens

    def noting(*arguments):
        result = take(*arguments)
        results.append(result is not None)
        return result

    monkeypatch.setattr(mae, "encode_tokens", noting)
    return results


def make(width=32, heads=2, ffn=64, dtype=torch.float32, depth=2, **options):
    config = MAEConfig(
        width=width, heads=heads, ffn=ffn, depth=depth, window=40, decoder_width=32, decoder_depth=1, decoder_ffn=32
    )
    encoder = MAE(config).encoder
    for name, parameter in encoder.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    harlora.apply_qlora(encoder, LAYERS, **{"rank": 3, "blocksize": 32, **options})
    for name, parameter in encoder.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return encoder.to(DEVICE, dtype)


def layers_of(encoder):
    return [getattr(owner, name) for block in encoder.blocks for name, owner in
            zip(LAYERS, (*[block.attention] * 4, block, block), strict=True)]  # fmt: skip


def by_modules(encoder, tokens):
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


def check(encoder, shape, dtype, x_trains=True):
    """Output and gradients against the modules in float64."""
    # The bounds hold for the values that the CPU draws, so on every device.
    x = torch.randn(*shape, device="cpu").to(DEVICE, dtype).requires_grad_(x_trains)
    exact, x64 = copy.deepcopy(encoder).double(), x.detach().double().requires_grad_(x_trains)
    expected = by_modules(exact, x64)
    with torch.no_grad():
        inferred = whole.encode_tokens(encoder, x)
    found = whole.encode_tokens(encoder, x)
    assert found.dtype == dtype
    # What is kept for backward is compiled in, so that float32 products may be fused with other sums on a GPU.
    exactly = {"rtol": 0, "atol": 0} if dtype != torch.float32 or DEVICE.type == "cpu" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, inferred, **exactly)
    leaves, exact_leaves = ({"x": at, **dict(of.named_parameters())} for at, of in ((x, encoder), (x64, exact)))
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    seed = torch.randn(found.shape, device="cpu").to(found)
    grads = torch.autograd.grad(found, [leaves[name] for name in names], seed)
    exact_grads = torch.autograd.grad(expected, [exact_leaves[name] for name in names], seed.double())
    assert [grad.dtype for grad in grads] == [leaves[name].dtype for name in names]
    pairs = dict(zip(["y", *names], zip((found, *grads), (expected, *exact_grads), strict=True), strict=True))
    for name, (one, other) in pairs.items():
        assert one.shape == other.shape
        # A shift of all keys changes no probability: the gradient is what rounding leaves of that of q.
        size = pairs[name.replace(".k.bias", ".q.bias")][1].abs().max()
        # Rounded many times on the way, to which the bound of one layer does not apply.
        assert (one.double() - other).abs().max() <= 2 * ERROR[dtype] * size + 1e-6, name


@pytest.mark.usefixtures("nan_filled_memory", "_believed")
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(
    ("windows", "tokens", "options"),
    [
        (5, 1, {"heads": 1}),
        (3, 16, {"width": 64, "ffn": 96, "rank": 32}),
        (1, 33, {"double_quant": True, "quant_type": "fp4"}),
        (3, 64, {"depth": 1, "ffn": 32}),
        (3, 5, {"width": 96, "heads": 4, "rank": 0, "bias": True, "depth": 1}),  # heads of 24
    ],
)
def test_blocks_equal_the_modules(windows, tokens, options, dtype):
    options = dict(options)
    bias = options.pop("bias", False)
    encoder = make(dtype=dtype, **options)
    for layer in layers_of(encoder):
        layer.bias.requires_grad_(bias)
    check(encoder, (windows, tokens, encoder.config.width), dtype)


@pytest.mark.usefixtures("nan_filled_memory", "_believed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [33, 64])
def test_long_windows_with_large_heads_in_half_precision(tokens, dtype):
    check(make(width=64, heads=1, dtype=dtype, depth=1), (2, tokens, 64), dtype)


@pytest.mark.usefixtures("nan_filled_memory", "_believed")
@pytest.mark.parametrize("windows", [4, 5, 6])
def test_more_windows_than_the_launchers_take_are_encoded_in_parts(windows, monkeypatch, taken):
    encoder, x = make(depth=1), torch.randn(windows, 5, 32, device=DEVICE)
    with torch.no_grad():
        together = whole.encode_tokens(encoder, x)
        monkeypatch.setattr("harlora.kernels.triton.qlora_mlp.MOST_ROWS", 11)
        # A part that is repeated from a recording is no call of Python's.
        monkeypatch.setattr(replay, "run", lambda key, inputs, function: function())
        shapes, original = [], kernels.encoder_blocks
        monkeypatch.setattr(kernels, "encoder_blocks", lambda x, *a, **b: shapes.append(len(x)) or original(x, *a, **b))
        eager.reset()
        parts = whole.encode_tokens(encoder, x)
    assert shapes == {4: [2, 2], 5: [2, 2, 1], 6: [2, 2, 2]}[windows]
    torch.testing.assert_close(parts, together, rtol=1e-5, atol=1e-6)
    assert whole.encode_tokens(encoder, x) is None  # to train, they are not


@pytest.mark.usefixtures("nan_filled_memory", "_believed")
@pytest.mark.parametrize(
    "trains", ["biases", "lora_A", "lora_B", "second block", "v and fc1", "o bias", "one fc2", "x", "mixed ranks"]
)
def test_only_the_gradients_that_are_needed(trains):
    encoder = make(**({"depth": 3} if trains == "second block" else {}))
    first, second = encoder.blocks[:2]
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        wanted = {
            "biases": "norm" not in name and "patch" not in name and name.endswith("bias"),
            "lora_A": name.endswith("lora_A"),
            "lora_B": name.endswith("lora_B"),
            "second block": name.startswith("blocks.1") and "lora" in name,
            "v and fc1": ".v.lora" in name or ".fc1.lora" in name,
            "o bias": name.endswith("o.bias"),
            "one fc2": name.startswith("blocks.1.fc2.lora"),
            "x": False,
            "mixed ranks": "lora" in name,
        }[trains]
        parameter.requires_grad_(wanted)
    if trains == "mixed ranks":  # which have to be the same for q, k and v alone
        for layer in (first.attention.o, second.fc1):
            layer.rank, layer.lora_A, layer.lora_B = 0, None, None
        second.fc2.rank = 5
        second.fc2.lora_A, second.fc2.lora_B = (
            nn.Parameter(torch.randn(*size, device=DEVICE) / 8) for size in ((5, 64), (32, 5))
        )
    check(encoder, (3, 5, 32), torch.float32, x_trains=trains in ("x", "biases"))


@pytest.mark.usefixtures("nan_filled_memory", "_believed")
def test_float32_adapters_of_half_precision_layers():
    encoder = make(dtype=torch.bfloat16)
    for layer in layers_of(encoder):
        layer.lora_A, layer.lora_B = (nn.Parameter(p.detach().float()) for p in (layer.lora_A, layer.lora_B))
    check(encoder, (3, 5, 32), torch.bfloat16)


@pytest.mark.usefixtures("_believed")
@pytest.mark.parametrize("grad", [False, True])
def test_a_classifier_computes_and_trains_as_its_modules_do(taken, monkeypatch, grad):
    model = Classifier(make(), 4, dropout=0.0).to(DEVICE)
    model.head.eval()  # statistics of three windows would magnify what rounding differs by
    x = torch.randn(3, 40, 6, device=DEVICE)
    results = []
    for _ in range(2):
        with nullcontext() if grad else torch.no_grad():
            y = model(x)
        parameters = [p for p in model.parameters() if p.requires_grad] if grad else []
        results.append([y, *(torch.autograd.grad(y.square().sum(), parameters) if grad else ())])
        monkeypatch.setattr(mae, "encode_tokens", lambda *_: None)
    assert taken == [True]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_believed")
def test_some_patches_alone(taken):
    encoder = make()
    x, visible = torch.randn(3, 40, 6, device=DEVICE), torch.tensor([[4, 1], [0, 2], [3, 1]], device=DEVICE)
    together = encoder(x, visible)
    assert taken == [True]
    tokens = encoder.patch_embed(mae.patchify(x, 8)) + encoder.positions
    chosen = tokens.gather(1, visible[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(together, by_modules(encoder, chosen), rtol=1e-4, atol=1e-5)


def hook(block):
    block.attention.k.register_forward_hook(lambda *_: None)


def backward_hook(block):
    block.norm2.register_full_backward_hook(lambda *_: None)


def drop(block):
    block.fc1.dropout = 0.5


def replace_forward(block):
    block.forward = block.forward


def train_a_norm(block):
    block.norm1.weight.requires_grad_()


def another_layer(block):
    block.fc2 = nn.Linear(64, 32, device=DEVICE)


def another_rank(block):
    for name, size in (("lora_A", (4, 32)), ("lora_B", (32, 4))):
        setattr(block.attention.k, name, nn.Parameter(torch.randn(*size, device=DEVICE)))


def large_rank(block):
    for name, size in (("lora_A", (33, 32)), ("lora_B", (64, 33))):
        setattr(block.fc1, name, nn.Parameter(torch.randn(*size, device=DEVICE)))


def no_bias_of_a_norm(block):
    block.norm1 = nn.LayerNorm(32, bias=False, device=DEVICE)


def bias_taken_away(block):
    block.fc1.bias = None


class Other(mae.Attention):
    def forward(self, x):
        return 2 * super().forward(x)


def another_attention(block):
    other = Other(32, 2).to(DEVICE)
    other._modules.update(block.attention._modules)
    block.attention = other


CHANGES = [
    hook, backward_hook, drop, replace_forward, train_a_norm, another_layer, another_rank, large_rank,
    no_bias_of_a_norm, bias_taken_away, another_attention,
]  # fmt: skip


@pytest.mark.usefixtures("_believed")
@pytest.mark.parametrize("change", CHANGES)
def test_the_modules_run_where_a_layer_is_out_of_the_ordinary(change, taken):
    encoder, x = make(), torch.randn(2, 40, 6, device=DEVICE)
    encoder(x).sum().backward()
    assert taken == [True]
    change(encoder.blocks[1])
    torch.manual_seed(1)
    found = encoder(x)
    assert taken == [True, False]
    torch.manual_seed(1)
    tokens = encoder.patch_embed(mae.patchify(x, 8)) + encoder.positions
    torch.testing.assert_close(found, by_modules(encoder, tokens))
    found.sum().backward()
    if change is bias_taken_away:  # noticed, and ordinary from then on
        encoder(x)
        assert taken == [True, False, True]


@pytest.mark.usefixtures("_believed")
def test_values_and_places_of_tensors_count_at_once(taken):
    encoder, x = make(), torch.randn(2, 40, 6, device=DEVICE)

    def same():
        tokens = encoder.patch_embed(mae.patchify(x, 8)) + encoder.positions
        torch.testing.assert_close(encoder(x), by_modules(encoder, tokens), rtol=1e-4, atol=1e-5)

    same()
    layer = encoder.blocks[1].fc1
    with torch.no_grad():
        layer.lora_A.mul_(2.0)
    same()
    layer.lora_B = nn.Parameter(torch.randn_like(layer.lora_B))
    same()
    layer.alpha = 1.0
    same()
    encoder.norm.eps = 0.5
    same()
    encoder.load_state_dict(make().state_dict())
    same()
    assert all(taken)


@pytest.mark.usefixtures("_believed")
def test_what_the_kernels_are_not_for_is_left_to_the_modules(monkeypatch):
    def take(windows, tokens, dtype=torch.float32, **options):
        encoder = make(dtype=dtype, **options)
        return whole.encode_tokens(encoder, torch.randn(windows, tokens, encoder.config.width, device=DEVICE).to(dtype))

    assert take(2, 5) is not None
    assert take(0, 5) is None
    assert take(1, 65) is None  # tokens
    assert take(1, 2, width=160, heads=2, dtype=torch.bfloat16) is None  # heads of 80
    assert take(1, 33, heads=1) is None  # in float32
    assert take(1, 5, ffn=40) is None  # blocks across rows
    assert take(820, 5) is None  # rows
    assert take(1, 5, rank=33) is None
    encoder, x = make(), torch.randn(2, 5, 32, device=DEVICE)
    assert whole.encode_tokens(encoder, x) is not None
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert whole.encode_tokens(encoder, x) is None
    assert whole.encode_tokens(encoder.double(), x.double()) is None
    encoder.float()
    assert whole.encode_tokens(encoder, x) is not None
    encoder.norm.double()
    assert whole.encode_tokens(encoder, x) is None  # another dtype than x
    encoder.norm.float()
    with monkeypatch.context() as changed:
        eager.reset()
        changed.setattr(dispatch, "configuration", lambda *_: Configuration("dense"))
        assert whole.encode_tokens(encoder, x) is None
    eager.reset()
    monkeypatch.setenv("HARLORA_BACKEND", "reference")
    assert whole.encode_tokens(encoder, x) is None


@pytest.mark.usefixtures("_believed")
@pytest.mark.parametrize("way", ["direct", "split"])
def test_the_ways_of_the_layer_after_attention(monkeypatch, way):
    def chosen(operator, device, dtype, rows, weights, *_):
        return Configuration(way, 16, 32, 32) if weights == 32 * 32 else SMALL

    encoder = make()
    dispatch.served_by_triton(DEVICE, torch.float32)  # which compares configurations of its own, once
    monkeypatch.setattr(dispatch, "configuration", chosen)
    check(encoder, (3, 5, 32), torch.float32)


@pytest.mark.usefixtures("_believed")
def test_a_mistake_is_reported():
    encoder = make()
    x = torch.randn(2, 5, 32, device=DEVICE)
    encoder.blocks[0].fc1.lora_B = nn.Parameter(torch.randn(63, 3, device=DEVICE))
    with pytest.raises(ValueError, match="lora_B must have shape"):
        whole.encode_tokens(encoder, x)


@pytest.mark.usefixtures("_believed")
def test_a_second_derivative_is_refused():
    encoder, x = make(), torch.randn(2, 5, 32, device=DEVICE, requires_grad=True)
    y = whole.encode_tokens(encoder, x)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.usefixtures("_believed")
def test_a_parameter_changed_between_forward_and_backward_is_noticed():
    encoder = make()
    y = whole.encode_tokens(encoder, torch.randn(2, 5, 32, device=DEVICE))
    with torch.no_grad():
        encoder.blocks[0].fc2.lora_A.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_right_encoder_is_proven_and_a_wrong_one_left_out_with_one_warning(monkeypatch):
    monkeypatch.setattr(dispatch, "_wrong", {})
    encoder, x = make(), torch.randn(2, 5, 32, device=DEVICE)
    assert whole.encode_tokens(encoder, x) is not None
    assert not dispatch.wrong_configurations()
    proven = [probe.operator for probe in dispatch._wrong if probe.shape == (5, 2, 32)]
    assert proven == ["encoder_blocks", "encoder_blocks_backward"]
    true = kernels.attention_backward
    monkeypatch.setattr(kernels, "attention_backward", lambda *arguments: 1.05 * true(*arguments))
    x = torch.randn(2, 6, 32, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="of encoder_blocks_backward disagrees with the reference"):
        assert whole.encode_tokens(encoder, x) is None
    assert whole.encode_tokens(encoder, x) is None  # a second warning would be an error
    with torch.no_grad():
        assert whole.encode_tokens(encoder, x) is not None


def test_the_tables_take_the_layers_of_a_small_encoder_one_way_or_the_other(monkeypatch):
    """Each table's own configurations of a HAR encoder's layers are direct, or split for o."""
    monkeypatch.undo()
    for table in configurations.tables().values():
        for operator in configurations.OPERATORS:
            for rows in (16, 1024, 4096):
                for dtype in ERROR:
                    for weights, ways in ((192 * 192, {"direct", "split"}), (3 * 192 * 192, {"direct"}),
                                          (2 * 192 * 512, {"direct"})):  # fmt: skip
                        assert configurations.choose(table, operator, dtype, rows, weights).way in ways


# Recordings ----------------------------------------------------------------------------------------------------------

# A driver that counts launches and whose device is that of tensors on a CPU.
DRIVER = """
int launched = 0;
int cuCtxGetDevice(int* d) { *d = -1; return 0; }
int count(void) { return launched; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** p, void** extra) { ++launched; return 0; }
"""


@pytest.fixture
def driver(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "driver.so", tmp_path / "driver.c"], check=True)
    return str(tmp_path / "driver.so")


@contextmanager
def launches():
    """The names of kernels that were launched meanwhile, none of which runs; what replay.py watches."""
    import triton.runtime.jit

    names = []

    def run(self, *arguments, grid, warmup, **options):
        names.append(self.fn.__name__)
        kinds = {int: "i32", float: "fp32", type(None): "constexpr"}
        signature = {
            name: "*fp32" if isinstance(value, torch.Tensor) else kinds[type(value)]
            for name, value in zip(self.arg_names, arguments, strict=False)
        }
        none = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": 0, "launch_pdl": 0}
        return SimpleNamespace(
            function=77, metadata=SimpleNamespace(**none, num_warps=4, shared=16),
            src=SimpleNamespace(signature=signature, fn=SimpleNamespace(arg_names=self.arg_names)),
        )  # fmt: skip

    kind = type(kernels._attention_fwd_kernel)  # the interpreter's, or the compiler's
    with patch.object(kind, "run", run), patch.object(triton.runtime.jit, "JITFunction", kind):
        yield names


@needs_extension
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("x_trains", [False, True])
def test_forward_and_backward_are_one_recording_each(driver, nested, x_trains):
    encoder, x = make(double_quant=nested).cpu(), torch.randn(3, 5, 32)
    plan = whole._Plan(encoder)
    tensors = [places[name] for places, name in plan.block_slots]
    blocks, norm = plan.blocks.assembled(tensors)
    chosen = (SMALL,) * 3
    route = gpu._route(plan.blocks, tuple(tensor.requires_grad for tensor in tensors))
    run, count = torch.ops.harlora_cpp.launches_run, ctypes.CDLL(driver).count
    arguments = (blocks, norm, 2)

    def recorded(inputs, function):
        with launches() as names:
            results, number = replay.record(inputs, function, driver)
        assert number
        before, repeated = count(), run(inputs, number, 0)
        assert count() - before == len(names)
        assert [each.shape for each in repeated] == [each.shape for each in results]
        torch.ops.harlora_cpp.launches_release(number)
        return results, Counter(names)

    with torch.no_grad():
        for keep in (False, True):
            kept, names = recorded(
                [x, *tensors], lambda keep=keep: kernels.encoder_blocks(x, *arguments, keep, configuration=chosen)
            )
            assert names == {
                "_residual_norm_fwd_kernel": 5, "_qlora_qkv_fwd_kernel": 2, "_attention_fwd_kernel": 2,
                "_qlora_linear_fwd_kernel": 2, "_qlora_mlp_fwd_kernel": 2,
            }  # fmt: skip
        grad = torch.randn_like(kept[0])
        grads, names = recorded(
            [grad, x, *kept[1:], *tensors],
            lambda: kernels.encoder_blocks_backward(
                grad, x, kept[1:], *arguments, (x_trains, route.wanted), configuration=chosen
            ),
        )
    assert names["_residual_norm_dx_kernel"] == 4 + x_trains
    assert names["_attention_bwd_kernel"] == 2
    assert len(grads) == 2 * 8 + x_trains


@pytest.mark.gpu
@NEEDS_GPU
@needs_extension
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_repeat_on_a_gpu(dtype):
    eager.reset()
    encoders = [make(dtype=dtype) for _ in range(2)]
    for turn in range(8):
        encoder = encoders[turn % 2]
        x = torch.randn(3, 16, 32, device="cuda", dtype=dtype, requires_grad=turn % 3 == 0)
        leaves = [leaf for leaf in (x, *encoder.parameters()) if leaf.requires_grad]
        seed = torch.randn_like(x)
        results = []
        for replayed in (True, False):
            with pytest.MonkeyPatch.context() as changed:
                if not replayed:
                    changed.setattr(replay, "run", lambda key, inputs, function: function())
                y = whole.encode_tokens(encoder, x)
                results.append([y, *torch.autograd.grad(y, leaves, seed)])
                with torch.no_grad():
                    assert torch.equal(whole.encode_tokens(encoder, x), y)
        assert all(map(torch.equal, *results))
    assert sum(number > 0 for number in replay._held.values()) == 4  # forward, kept or not; backward, with dx or not
    with torch.no_grad():
        assert torch.equal(whole.encode_tokens(encoders[0], x), whole.encode_tokens(encoders[0], x.clone()))
        encoders[0].blocks[0].fc1.lora_A.data = encoders[0].blocks[0].fc1.lora_A.data.repeat(11, 1)[:33].clone()
        encoders[0].blocks[0].fc1.lora_B.data = encoders[0].blocks[0].fc1.lora_B.data.repeat(1, 11)[:, :33].clone()
        assert whole.encode_tokens(encoders[0], x) is None  # found out though a recording is known
        assert whole.encode_tokens(encoders[1], x) is not None


@pytest.mark.gpu
@NEEDS_GPU
@needs_extension
def test_a_captured_step_of_the_blocks_on_a_gpu():
    eager.reset()
    encoder = make(dtype=torch.bfloat16)
    x = torch.randn(3, 16, 32, device="cuda", dtype=torch.bfloat16)
    parameters = [p for p in encoder.parameters() if p.requires_grad]

    def step():
        y = whole.encode_tokens(encoder, x)
        grads = torch.autograd.grad(F.mse_loss(y.float(), torch.ones_like(y, dtype=torch.float32)), parameters)
        return [y.detach(), *grads]  # the graph of a step in capture must not live on into one outside

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    graph.replay()
    assert all(map(torch.equal, captured, step()))
