"""Several layers in one compiled call: the same numbers and gradients, and never where a layer differs."""

import copy

import pytest
import torch
from needs import needs_extension
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import harlora
from harlora import QLoRALinear
from harlora.kernels import eager
from harlora.models import MAE, Classifier, MAEConfig, whole
from harlora.models.mae import Attention, Block
from harlora.train.memory import step_peak_bytes

pytestmark = needs_extension
LAYERS = ["q", "k", "v", "o", "fc1", "fc2"]
OPTIONS = {
    "plain": {},
    "nested": {"double_quant": True},
    "fp4": {"quant_type": "fp4", "blocksize": 32},
    "no bias": {"bias": False},
    "no adapter": {"rank": 0},
    "rank 70": {"rank": 70},
}


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"])
def kernels(request, use_kernels):
    """Every instruction set that this processor has."""
    use_kernels(request.param)


@pytest.fixture
def served(monkeypatch):
    """Which operators the compiled kernels served, by name."""
    names = []
    for name in ("qlora_qkv", "qlora_mlp", "attention"):
        original = getattr(eager, name)

        def counting(*arguments, name=name, original=original):
            result = original(*arguments)
            names.extend([name] if result is not None else [])
            return result

        monkeypatch.setattr(eager, name, counting)
    return names


def make(in_features, out_features, trainable_bias=False, **options):
    layer = QLoRALinear(in_features, out_features, **{"rank": 3, **options})
    if layer.rank:
        nn.init.normal_(layer.lora_B, std=0.1)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
        layer.bias.requires_grad_(trainable_bias)
    return layer


def exact(layer, x):
    """The layer in float64, and its parameters there in the order bias, lora_A, lora_B."""
    parameters = [None if p is None else p.detach().double().requires_grad_(p.requires_grad) for p in own(layer)]
    bias, lora_A, lora_B = parameters
    y = F.linear(x, layer.base_weight().double(), bias)
    return (y if lora_A is None else y + layer.scaling * (x @ lora_A.T) @ lora_B.T), parameters


def own(layer):
    return [layer.bias, layer.lora_A, layer.lora_B]


def compare(outputs, leaves, outputs64, leaves64):
    """Values and gradients against those in float64."""
    for y, y64 in zip(outputs, outputs64, strict=True):
        close(y, y64)
    wanted = [(a, b) for a, b in zip(leaves, leaves64, strict=True) if a is not None and a.requires_grad]
    seeds = [torch.randn_like(y) for y in outputs]
    grads = torch.autograd.grad(outputs, [a for a, _ in wanted], seeds)
    grads64 = torch.autograd.grad(outputs64, [b for _, b in wanted], [seed.double() for seed in seeds])
    for grad, grad64 in zip(grads, grads64, strict=True):
        close(grad, grad64)


def close(value, value64):
    assert value.shape == value64.shape
    assert value.dtype is torch.float32
    if value.numel():
        assert (value - value64).abs().max() <= 2e-5 * value64.abs().max() + 1e-6


@pytest.mark.usefixtures("kernels", "nan_filled_memory")
@pytest.mark.parametrize("rows", [0, 1, 7, 150, 333])
@pytest.mark.parametrize("option", OPTIONS)
def test_qkv_equals_its_layers(option, rows):
    for features, outs in ((64, (64, 64, 64)), (37, (5, 70, 33))):
        layers = [make(features, out, trainable_bias=i == 1, **OPTIONS[option]) for i, out in enumerate(outs)]
        x = torch.randn(rows, features, requires_grad=True)
        x64 = x.detach().double().requires_grad_()
        found = eager.qlora_qkv(x, *whole._layers(*layers))
        results = [exact(layer, x64) for layer in layers]
        leaves = [p for layer in layers for p in own(layer)]
        compare(found, [x, *leaves], [y for y, _ in results], [x64, *(p for _, ps in results for p in ps)])
        with torch.no_grad():
            for y, (y64, _) in zip(eager.qlora_qkv(x, *whole._layers(*layers)), results, strict=True):
                close(y, y64)


@pytest.mark.usefixtures("kernels", "nan_filled_memory")
@pytest.mark.parametrize("rows", [0, 1, 7, 150, 333])
@pytest.mark.parametrize("option", OPTIONS)
def test_mlp_equals_its_layers(option, rows):
    for features, hidden, out, size in ((64, 96, 64, 1.0), (37, 71, 5, 1.0), (32, 64, 32, 100.0)):
        fc1, fc2 = make(features, hidden, True, **OPTIONS[option]), make(hidden, out, True, **OPTIONS[option])
        x = (size * torch.randn(2, rows, features)).requires_grad_()
        x64 = x.detach().double().requires_grad_()
        inner, first = exact(fc1, x64)
        y64, second = exact(fc2, F.gelu(inner))
        y = eager.qlora_mlp(x, *whole._layers(fc1, fc2))
        compare([y], [x, *own(fc1), *own(fc2)], [y64], [x64, *first, *second])
        with torch.no_grad():
            close(eager.qlora_mlp(x, *whole._layers(fc1, fc2)), y64)


@pytest.mark.usefixtures("kernels", "nan_filled_memory")
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16, 33, 100])
@pytest.mark.parametrize(("heads", "size"), [(1, 32), (3, 64), (2, 8), (3, 5), (2, 70)])
def test_attention_equals_torch(tokens, heads, size):
    q, k, v = (torch.randn(3, tokens, heads * size, requires_grad=True) for _ in range(3))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    split = [x.unflatten(-1, (heads, size)).transpose(1, 2) for x in doubles]
    y64 = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)
    compare([eager.attention(q, k, v, heads)], [q, k, v], [y64], doubles)


def test_attention_of_nothing_and_of_too_much():
    empty = torch.randn(0, 4, 6, requires_grad=True)
    eager.attention(empty, empty, empty, 2).sum().backward()
    assert empty.grad.shape == (0, 4, 6)
    many = torch.randn(1, 257, 4)
    assert eager.attention(many, many, many, 2) is None
    assert not eager.attention_serves(many)
    x = torch.randn(2, 3, 8)
    assert eager.attention(x, x.transpose(0, 1), x, 2) is None
    assert eager.attention(x, x, x, 3) is None


def test_non_contiguous_input_and_gradient():
    fc1, fc2 = make(16, 24), make(24, 16)
    x = torch.randn(16, 9, 4).permute(1, 2, 0).requires_grad_()
    y = whole.feed_forward(x, fc1, fc2)
    seed = torch.randn(16, 4, 9).permute(2, 1, 0)
    found = torch.autograd.grad(y, [x, fc1.lora_A], seed)
    expected = torch.autograd.grad(fc2(F.gelu(fc1(x))), [x, fc1.lora_A], seed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    torch.manual_seed(3)
    q, k, v, fc1, fc2 = make(192, 192), make(192, 192), make(192, 192), make(192, 512), make(512, 192)
    try:
        for rows in (3, 16, 61, 64):
            x = torch.randn(rows, 8, 192)
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                given = x.clone().requires_grad_()
                y = whole.feed_forward(whole.attend(given, q, k, v, 6), fc1, fc2)
                leaves = [given, *(p for layer in (q, k, v, fc1, fc2) for p in (layer.lora_A, layer.lora_B))]
                results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0])), rows
    finally:
        torch.set_num_threads(before)


def small_model():
    config = MAEConfig(width=24, depth=2, heads=2, ffn=48, decoder_width=16, decoder_depth=1, decoder_heads=2)
    model = Classifier(MAE(config).encoder, 4, dropout=0.0)
    harlora.apply_qlora(model, LAYERS, rank=3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model, x):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(x).square().sum(), parameters)


def test_training_takes_the_groups_and_gives_the_modules_gradients(served, monkeypatch):
    model, x = small_model(), torch.randn(5, 128, 6)
    found = gradients(model, x)
    assert served == ["qlora_qkv", "attention", "qlora_mlp"] * 2
    monkeypatch.setattr("harlora.models.mae.attend", lambda *_: None)
    monkeypatch.setattr("harlora.models.mae.feed_forward", lambda *_: None)
    expected = gradients(model, x)
    assert len(served) == 6
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def hook(layer):
    layer.register_forward_hook(lambda *_: None)


def backward_hook(layer):
    layer.register_full_backward_hook(lambda *_: None)


def drop(layer):
    layer.dropout = 0.5


def freeze_A(layer):
    layer.lora_A.requires_grad_(False)


def replace_forward(layer):
    layer.forward = layer.forward


def to_double(layer):
    layer.double()


@pytest.mark.parametrize("change", [hook, backward_hook, drop, freeze_A, replace_forward, to_double])
def test_falls_back_where_a_layer_is_out_of_the_ordinary(change, served):
    attention, block = Attention(8, 2), Block(8, 2, 12)
    for name, layer in {"q": make(8, 8), "k": make(8, 8), "v": make(8, 8)}.items():
        setattr(attention, name, layer)
    block.fc1, block.fc2 = make(8, 12), make(12, 8)
    x = torch.randn(2, 3, 8, requires_grad=True)
    attention(x)
    block(x)
    assert served == ["qlora_qkv", "attention", "qlora_mlp"]
    change(attention.k)
    change(block.fc2)
    if change is to_double:
        x, attention, block = x.detach().double(), attention.double(), block.double()
    attention(x).sum().backward()
    block(x).sum().backward()
    assert len(served) == 3


def test_long_sequences_are_projected_once(served):
    attention, x = Attention(8, 2), torch.randn(1, 257, 8)
    attention.q, attention.k, attention.v = make(8, 8), make(8, 8), make(8, 8)
    attention(x)
    assert not served


def test_falls_back_for_other_layers_autocast_and_global_hooks(served):
    block, x = Block(8, 2, 12), torch.randn(2, 3, 8)
    block.fc1 = harlora.LoRALinear.from_linear(block.fc1)
    block(x)
    block.fc1, block.fc2 = make(8, 12), make(12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    block(x)
    handle.remove()
    assert not served
    block(x)
    assert served == ["qlora_mlp"]


def test_compiles_without_a_break(served):
    model, x = small_model().encoder, torch.randn(2, 128, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert served == ["qlora_qkv", "attention", "qlora_mlp"] * 2  # of the model, none of the compiled one


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 3, 8, requires_grad=True)
    layers = [make(8, 8) for _ in range(3)]
    for y in (whole.attend(x, *layers, 2), whole.feed_forward(x, *layers[:2])):
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_is_not_finite_does_not_become_finite():
    fc1, fc2 = make(8, 12), make(12, 8)
    x = torch.randn(5, 8)
    x[2, 3] = float("nan")
    x.requires_grad_()
    y = whole.feed_forward(x, fc1, fc2)
    assert torch.equal(y.isfinite(), fc2(F.gelu(fc1(x))).isfinite())
    grads = torch.autograd.grad(y.sum(), [x, fc1.lora_A])
    assert grads[0][2].isnan().all()
    assert grads[0][:2].isfinite().all()
    assert grads[1].isnan().any()


def test_a_mistake_is_reported_by_the_layer():
    attention, block = Attention(8, 2), Block(8, 2, 12)
    attention.q, attention.k, attention.v = make(8, 8), make(8, 8), make(8, 8)
    with pytest.raises(ValueError, match="in_features=8"):
        attention(torch.randn(2, 3, 9))
    block.fc1, block.fc2 = make(8, 12), make(13, 8)
    with pytest.raises(ValueError, match="in_features=13"):
        block(torch.randn(2, 3, 8))


def test_a_parameter_changed_between_forward_and_backward_is_noticed():
    fc1, fc2 = make(8, 12), make(12, 8)
    y = whole.feed_forward(torch.randn(5, 8), fc1, fc2)
    with torch.no_grad():
        fc2.lora_A.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_operators_check_what_they_are_given():
    operators = torch.ops.harlora_cpp
    x = torch.randn(4, 8)
    description = eager._describe(8, tuple(whole._layers(make(8, 8), make(8, 8), make(8, 8))))
    tensors, facts, factors = description
    good = operators.qlora_qkv(x, *description)
    assert len(good) == 4
    for wrong in (
        (x[:, :7], *description),
        (x.double(), *description),
        (x, tensors[:-1], facts, factors),
        (x, [*tensors, x], facts, factors),
        (x, tensors, facts[:-1], factors),
        (x, tensors, [0, *facts[1:]], factors),
        (x, tensors, [8, -8, *facts[2:]], factors),
        (x, tensors, facts, factors[:-1]),
        (x, [torch.randn(8, 8), *tensors[3:]], [8, 8, 0, *facts[3:]], factors),  # dense
        (torch.tensor(1.0), *description),
    ):
        with pytest.raises(RuntimeError):
            operators.qlora_qkv(*wrong)
    grads = (torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8))
    wanted = [1, 7, 7, 7]
    assert len(operators.qlora_qkv_backward(*grads, x, good[3], *description, wanted)) == 10
    for wrong in (
        (*grads, x, good[3][:-1], *description, wanted),
        (*grads, x[:3], good[3], *description, wanted),
        (*grads[:2], grads[2][:3], x, good[3], *description, wanted),
        (*grads, x, good[3], *description, wanted[:3]),
    ):
        with pytest.raises(RuntimeError):
            operators.qlora_qkv_backward(*wrong)
    pair = eager._describe(8, tuple(whole._layers(make(8, 12), make(12, 8))))
    y, inner, t = operators.qlora_mlp(x, *pair, True)
    assert len(operators.qlora_mlp_backward(y, x, inner, t, *pair, [1, 7, 7])) == 7
    for wrong in (
        (y[:3], x, inner, t, *pair, [1, 7, 7]),
        (y, x, inner[:3], t, *pair, [1, 7, 7]),
        (y, x, inner, t[1:], *pair, [1, 7, 7]),
        (y, x, inner, t, *pair, [1, 7]),
    ):
        with pytest.raises(RuntimeError):
            operators.qlora_mlp_backward(*wrong)
    three = torch.randn(2, 3, 8)
    for wrong in (
        (three, three[:1], three, 2),
        (three, three, three, 0),
        (x, x, x, 2),
        (three, three, three, 5),
        (three, three.view(3, 2, 8), three, 2),
    ):
        with pytest.raises(RuntimeError):
            operators.attention(*wrong)
        with pytest.raises(RuntimeError):
            operators.attention_backward(three, *wrong)


def test_under_activation_checkpointing(served):
    model, x = small_model().encoder, torch.randn(2, 9, 24, requires_grad=True)
    block = model.blocks[0]
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    y = checkpoint(block, x, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), leaves)
    assert len(served) >= 6
    assert all(map(torch.equal, found, expected))


def test_a_copied_model_has_its_own_groups():
    model = small_model()
    twin, x = copy.deepcopy(model), torch.randn(2, 128, 6)
    with torch.no_grad():
        twin.encoder.blocks[0].fc1.lora_A.zero_()
    assert not torch.equal(model(x), twin(x))


def test_the_working_memory_of_a_backward_is_traced_and_is_one_buffer():
    rows, ffn = 512, 256
    fc1, fc2 = make(64, ffn, trainable_bias=True), make(ffn, 64, trainable_bias=True)
    x = torch.randn(rows, 64, requires_grad=True)
    inputs = [x, *(p for layer in (fc1, fc2) for p in (layer.bias, layer.lora_A, layer.lora_B))]
    y = eager.qlora_mlp(x, fc1.operands(), fc2.operands())
    grad, found = torch.randn_like(y), []

    def backward():
        found.extend(torch.autograd.grad(y, inputs, grad))

    peak = step_peak_bytes(backward, torch.device("cpu")) - sum(each.nbytes for each in found)
    t_and_u = 2 * 4 * rows * (fc1.rank + fc2.rank)
    assert 4 * rows * ffn <= peak <= 4 * rows * ffn + t_and_u
