"""QLoRALinear and LoRALinear as drop-ins for nn.Linear."""

import copy
import shutil
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

import harlora
from harlora import LoRALinear, QLoRALinear
from harlora.kernels.dropout import draw_seed, dropped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb


def adapted(kind, in_features=96, out_features=40, **options):
    linear = nn.Linear(in_features, out_features)
    layer = (QLoRALinear if kind == "qlora" else LoRALinear).from_linear(linear, **options)
    if layer.lora_B is not None:
        nn.init.normal_(layer.lora_B)
    return linear, layer


KINDS = pytest.mark.parametrize("kind", ["lora", "qlora"])


@KINDS
def test_a_new_adapter_changes_nothing(kind):
    linear = nn.Linear(96, 40)
    layer = (QLoRALinear if kind == "qlora" else LoRALinear).from_linear(linear)
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), F.linear(x, layer.base_weight(), linear.bias))
    if kind == "lora":
        torch.testing.assert_close(layer(x), linear(x))
    else:
        assert (layer(x) - linear(x)).abs().max() < 0.5


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["lora", "qlora"]),
    in_features=st.integers(1, 90),
    out_features=st.integers(1, 40),
    rank=st.integers(1, 9),
    bias=st.booleans(),
    rslora=st.booleans(),
    double_quant=st.booleans(),
)
def test_merged_equals_unmerged(kind, in_features, out_features, rank, bias, rslora, double_quant):
    linear = nn.Linear(in_features, out_features, bias=bias)
    extra = {"double_quant": double_quant} if kind == "qlora" else {}
    cls = QLoRALinear if kind == "qlora" else LoRALinear
    layer = cls.from_linear(linear, rank=rank, alpha=5.0, rslora=rslora, **extra)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, in_features)
    merged = layer.merge()
    assert type(merged) is nn.Linear
    assert (merged.bias is None) is not bias
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(rslora, expected):
    assert QLoRALinear(8, 8, rank=4, alpha=16, rslora=rslora).scaling == expected


@KINDS
def test_only_the_adapter_trains(kind):
    _, layer = adapted(kind)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    before = {name: value.clone() for name, value in layer.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        layer(torch.randn(5, 96)).square().sum().backward()
        optimizer.step()
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value), name


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_same_however_often_it_was_evaluated(kind, dropout):
    """bitsandbytes loses the gradient of x once its layer has been evaluated on a CPU."""
    _, layer = adapted(kind, dropout=dropout)
    x = torch.randn(5, 96, requires_grad=True)

    def gradients():
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        layer.train()(x).square().sum().backward()
        return [x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]

    first = gradients()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            layer.eval()(x)
        for one, other in zip(gradients(), first, strict=True):
            assert torch.equal(one, other)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name


@KINDS
def test_dropout_is_on_the_adapter_alone(kind):
    _, layer = adapted(kind, dropout=0.5)
    x = torch.ones(2000, 96)
    base = F.linear(x, layer.base_weight(), layer.bias)
    branch = layer.train()(x) - base
    assert branch.std(dim=0).min() > 0  # differs from row to row
    torch.testing.assert_close(layer.eval()(x) - base, layer(x) - base)
    expected = layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    torch.testing.assert_close(layer(x) - base, expected, rtol=1e-3, atol=1e-3)
    error = (branch.mean(dim=0) - expected[0]).abs() / branch.std(dim=0)
    assert error.max() < 5 / 2000**0.5  # the same in the mean


@KINDS
def test_dropout_gradient_passes_both_branches(kind):
    _, layer = adapted(kind, dropout=0.5)
    x = torch.randn(5, 96, requires_grad=True)
    torch.manual_seed(3)
    layer.train()(x).sum().backward()
    torch.manual_seed(3)
    ones = torch.ones(5, 96)
    kept = F.dropout(ones, 0.5) if kind == "lora" else dropped(ones, 0.5, draw_seed(x.device))
    ones = torch.ones(5, 40)
    expected = ones @ layer.base_weight() + kept * (layer.scaling * (ones @ layer.lora_B) @ layer.lora_A)
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-4, atol=1e-4)


def test_casting_the_model_leaves_the_scales_alone():
    layer = QLoRALinear(96, 40, double_quant=True)
    quantized = {name: value.clone() for name, value in layer.quantized_weight().tensors().items()}
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        for name, value in layer.quantized_weight().tensors().items():
            assert value.dtype == quantized[name].dtype
            assert torch.equal(value, quantized[name]), name
    assert layer.bfloat16()(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16


@KINDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_that_was_cast_merges_to_one_of_that_dtype(kind, bias, dtype):
    cls = QLoRALinear if kind == "qlora" else LoRALinear
    layer = cls.from_linear(nn.Linear(96, 40, bias=bias))
    nn.init.normal_(layer.lora_B, std=0.1)
    state, x = layer.state_dict(), torch.randn(3, 96).to(dtype)
    expected = layer(x.float()).to(dtype)
    for one in (layer.to(dtype), cls.from_linear(nn.Linear(96, 40, bias=bias)).to(dtype)):
        one.load_state_dict(state)
        assert {tensor.dtype for tensor in one.merge().state_dict().values()} == {dtype}
        torch.testing.assert_close(one.merge()(x), expected, atol=0.05, rtol=0.02)
    again = cls.from_linear(nn.Linear(96, 40, bias=bias))
    again.load_state_dict(layer.state_dict())
    assert again.float().merge().weight.dtype == torch.float32


@KINDS
def test_a_layer_can_be_parametrised(kind):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    _, layer = adapted(kind, alpha=1)
    _, other = adapted(kind, alpha=2)
    other.load_state_dict(layer.state_dict())
    register_parametrization(layer, "lora_B", Twice())
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-4)


def test_half_precision_weights_keep_their_dtype_and_train_float32_adapters():
    layer = QLoRALinear.from_linear(nn.Linear(96, 40).bfloat16())
    assert layer.lora_A.dtype == torch.float32
    assert layer.merge().weight.dtype == torch.bfloat16
    assert layer(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16
    assert LoRALinear.from_linear(nn.Linear(96, 40).bfloat16())(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_autocast(kind, dropout):
    _, layer = adapted(kind, dropout=dropout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, 96))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_whole(dropout):
    _, layer = adapted("qlora", dropout=dropout)
    x = torch.randn(5, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(x), layer.eval()(x))
    compiled.train()(x).sum().backward()
    assert layer.lora_A.grad is not None


def test_state_dict_round_trip_and_deepcopy():
    _, layer = adapted("qlora", double_quant=True, quant_type="fp4", blocksize=128)
    x = torch.randn(5, 96)
    for other in (QLoRALinear(96, 40), copy.deepcopy(layer)):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        assert other.quant_type == "fp4"
        assert other.blocksize == 128
    other.lora_A.data.zero_()
    other.weight.zero_()
    assert layer.lora_A.abs().sum() > 0
    assert layer.weight.any()


def test_loading_copies():
    _, layer = adapted("qlora")
    state = layer.state_dict()
    other = QLoRALinear(96, 40)
    other.load_state_dict(state)
    other.weight.zero_()
    assert state["weight"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "Missing key"),
        (lambda s: s.pop("weight.absmax"), "required the keys"),
        (lambda s: s.pop("lora_A"), "Missing key"),
    ],
)
def test_incomplete_state_dict_is_refused(change, message):
    state = QLoRALinear(96, 40).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        QLoRALinear(96, 40).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"shape must be \(40, 64\)"):
        QLoRALinear(64, 40, rank=0).load_state_dict(QLoRALinear(96, 40, rank=0).state_dict())


@pytest.mark.parametrize("double_quant", [False, True])
def test_takes_over_a_bitsandbytes_layer_bit_for_bit(double_quant):
    theirs = bnb.nn.Linear4bit(
        128, 40, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")
    layer = QLoRALinear.from_linear(theirs)
    assert torch.equal(layer.weight, theirs.weight.data)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), theirs.train()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be an integer of at least 0, got -1"),
        ({"rank": 2.5}, "rank must be an integer"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"quant_type": "nf3"}, "quant_type must be one of"),
        ({"blocksize": 100}, "blocksize must be one of"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QLoRALinear(8, 8, **options)
    with pytest.raises(ValueError, match=message):
        QLoRALinear.from_linear(nn.Linear(8, 8), **options)


def test_other_layers_are_refused():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    for layer in (Special(4, 4), nn.Conv1d(4, 4, 1)):
        with pytest.raises(TypeError, match="must be an nn.Linear"):
            QLoRALinear.from_linear(layer)


def test_rank_zero_is_the_quantised_layer_alone():
    layer = QLoRALinear(96, 40, rank=0)
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 96)
    torch.testing.assert_close(layer(x), layer.merge()(x))
    assert "lora_A" not in layer.state_dict()


def test_of_one_output_no_wider_x_is_taken():
    """Whose packed weight of 5 values has room for 6."""
    layer = QLoRALinear(5, 1, rank=0)
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x[:, :5]), layer.merge()(x[:, :5]))
    with pytest.raises(ValueError, match="x.shape"):
        layer(x)


def test_bytes_are_those_of_the_format():
    layer = QLoRALinear(192, 512, rank=0, bias=False, double_quant=True)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == layer.quantized_weight().nbytes < 0.15 * 4 * 192 * 512
    assert harlora.quantize_4bit(torch.randn(512, 192)).nbytes < 0.15 * 4 * 192 * 512


def test_repr_names_the_settings():
    text = repr(QLoRALinear(96, 40, rank=4, quant_type="fp4"))
    assert "rank=4" in text
    assert "quant_type=fp4" in text


@pytest.mark.skipif(not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler here")
def test_compiles_with_the_default_backend():
    model = nn.Sequential(QLoRALinear(32, 48, rank=4), nn.GELU(), QLoRALinear(48, 8, rank=4, dropout=0.1))
    x = torch.randn(6, 32)
    compiled = torch.compile(model, fullgraph=True)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    expected = torch.autograd.grad(model(x).square().sum(), model[0].lora_A)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), model[0].lora_A)[0], expected)
