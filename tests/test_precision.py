"""The opt-in reduced precision of inference: its error is what is promised, and it is off unless asked for."""

import itertools

import pytest
import torch
from needs import needs_extension

import harlora
from harlora.kernels import reference
from harlora.models import MAE, MAEConfig

pytestmark = needs_extension
LAYERS = ["q", "k", "v", "o", "fc1", "fc2"]


@pytest.fixture(params=["bfloat16 avx512bf16", "int8 avx512bf16", "int8 avx512", "int8 avx2"])
def precision(request, use_kernels):
    """Every precision with all kernels that have it."""
    name, kernels = request.param.split()
    use_kernels(kernels, *{"int8": ["avx_vnni" if kernels == "avx2" else "avx512_vnni"]}.get(name, []))
    return name


def layer_of(in_features, out_features, **options):
    layer = harlora.QLoRALinear(in_features, out_features, rank=4, **options)
    torch.nn.init.normal_(layer.lora_B)
    torch.nn.init.normal_(layer.bias)
    return layer


def exact(layer, x):
    weight = layer.base_weight().double()
    branch = layer.scaling * (x.double() @ layer.lora_A.double().T) @ layer.lora_B.double().T
    return x.double() @ weight.T + layer.bias.double() + branch


def promised(precision, layer, x):
    """How far y may be off, by the docstring of inference_precision; sums in float32 add their own rounding."""
    weight, size = layer.base_weight().double().abs(), x.double().abs()
    if precision == "bfloat16":  # each factor is within 2⁻⁹ of its value, so each product within 2⁻⁸
        return 2**-8 * 1.01 * size @ weight.T + 1e-4
    quantized = layer.quantized_weight()
    scales = reference.scales(quantized.absmax, quantized.nested_absmax, quantized.nested_offset).double().abs()
    scales = scales.repeat_interleave(layer.blocksize)[: weight.numel()].view_as(weight)
    largest = size.view(len(x), -1, 64).amax(-1).repeat_interleave(64, -1)
    return (size @ scales.T + largest @ (weight + scales / 254).T) / 254 * 1.01 + 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "options"),
    [
        *itertools.product([3, 15, 64, 300], [192], [192], [{}]),
        *itertools.product([3, 15, 64], [64], [33], [{"quant_type": "fp4"}]),
        *itertools.product([5, 16], [320], [40], [{"blocksize": 128}]),
        *itertools.product([8, 19], [192], [5], [{"blocksize": 4096}]),
        *itertools.product([9, 300], [4096], [64], [{}]),
        # Few long rows; half a line at the end of each.
        *itertools.product([1, 2, 3, 4, 5, 6, 7, 8], [1088], [33], [{}]),
        *itertools.product([1, 8], [4096], [64], [{}, {"blocksize": 256}, {"quant_type": "fp4"}]),
    ],
)
def test_error_is_what_is_promised(precision, rows, in_features, out_features, options):
    layer = layer_of(in_features, out_features, double_quant=rows % 2 == 0, **options)
    x = torch.randn(rows, in_features)
    x[-1, 1] = 1000.0  # widens the steps of its 64 values alone
    expected = exact(layer, x)
    with harlora.inference_precision(precision):
        found = layer(x)
        empty = layer(x[:0])
    error = (found.double() - expected).abs()
    assert (error <= promised(precision, layer, x)).all()
    usual = slice(-1) if rows > 1 else slice(0)
    base = x[usual] @ layer.base_weight().T
    assert error[usual].norm() <= {"bfloat16": 3e-3, "int8": 1e-2}[precision] * base.norm()
    assert error.max() > 10 * (layer(x).double() - expected).abs().max()  # it was on, and off again
    assert empty.shape == (0, out_features)


@torch.no_grad()
@pytest.mark.parametrize("in_features", [128, 1088])
def test_numbers_at_the_ends_of_their_range(precision, in_features):
    layer = layer_of(in_features, 48)
    layer.lora_A.zero_()
    x = torch.randn(8, in_features)
    usual = x.clone()
    x[1], x[3, 70], x[5, 7], x[6] = 0.0, torch.nan, torch.inf, 1e-39
    x[7, :64] *= 1e30
    with harlora.inference_precision(precision):
        found, before = layer(x), layer(usual)
    assert torch.equal(found[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.equal(found[1], layer.bias)
    assert found[3].isnan().all()
    assert not found[5].isfinite().any()
    torch.testing.assert_close(found[6], layer.bias)
    torch.testing.assert_close(found[7], layer(x)[7], rtol=0, atol=2e-2 * found[7].abs().max().item())


@torch.no_grad()
def test_encoder(precision):
    encoder = harlora.apply_qlora(MAE(MAEConfig(depth=2)).encoder.eval(), LAYERS)
    x = torch.randn(5, 128, 6)
    before = encoder(x)
    with harlora.inference_precision(precision):
        reduced = encoder(x)
        hook = encoder.blocks[0].register_forward_hook(lambda *_: None)  # now the modules run
        one_by_one = encoder(x)
        hook.remove()
    assert not torch.equal(before, reduced)
    assert (before - reduced).norm() < {"bfloat16": 1e-2, "int8": 3e-2}[precision] * before.norm()
    assert (one_by_one - reduced).norm() < {"bfloat16": 1e-2, "int8": 3e-2}[precision] * before.norm()
    assert torch.equal(encoder(x), before)


@torch.no_grad()
def test_threads_do_not_change_what_an_encoder_computes(precision):
    """A window is two rows here, and 65 of them are one more than are encoded at a time: it must not be left alone."""
    config = MAEConfig(width=64, depth=1, heads=2, ffn=64, patch_size=64, mask_ratio=0.5)
    encoder = harlora.apply_qlora(MAE(config).encoder.eval(), LAYERS)
    x = torch.randn(65, 128, 6)
    try:
        with harlora.inference_precision(precision):
            one = encoder(x)
            torch.set_num_threads(2)
            two = encoder(x)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("layers", [["q", "v"], ["k", "fc2"], ["o"]])
def test_dense_layers_among_those_in_4_bits(precision, layers):
    encoder = harlora.apply_qlora(MAE(MAEConfig(depth=1)).encoder.eval(), layers)
    x = torch.randn(5, 128, 6)
    before = encoder(x)
    with harlora.inference_precision(precision):
        reduced = encoder(x)
    assert not torch.equal(before, reduced)
    assert (before - reduced).norm() < 3e-2 * before.norm()


def test_training_is_not_affected(precision):
    layer, x = layer_of(64, 48), torch.randn(20, 64)
    expected = layer(x)
    with harlora.inference_precision(precision):
        assert torch.equal(layer(x), expected)
        with torch.no_grad(), harlora.inference_precision("float32"):
            assert torch.equal(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(("in_features", "blocksize"), [(65, 64), (96, 64), (128, 32)])
def test_layers_that_do_not_fit_stay_float32(precision, in_features, blocksize):
    layer, x = layer_of(in_features, 48, blocksize=blocksize), torch.randn(20, in_features)
    with harlora.inference_precision(precision):
        found = layer(x)
    assert torch.equal(found, layer(x))


@torch.no_grad()
def test_half_precision_inputs_stay_as_they_are(precision):
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = layer_of(128, 48).to(dtype), torch.randn(20, 128, dtype=dtype)
        with harlora.inference_precision(precision):
            found = layer(x)
        assert torch.equal(found, layer(x))


@torch.no_grad()
@pytest.mark.parametrize(("rows", "in_features"), [(5, 192), (700, 1024), (6, 1088)])  # 512 of 700 at a time
def test_threads_do_not_change_the_result(precision, rows, in_features):
    layer, x = layer_of(in_features, 200), torch.randn(rows, in_features)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with harlora.inference_precision(precision):
                found.append(layer(x))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_cannot_be_had_is_refused(use_kernels):
    with pytest.raises(ValueError, match="name must be one of float32, bfloat16, int8, got 'int4'"), \
            harlora.inference_precision("int4"):  # fmt: skip
        pass
    use_kernels("portable")
    for name in ("bfloat16", "int8"):
        refused = f"products of {name}, but the kernels 'portable' .* have those of float32; use"
        with pytest.raises(RuntimeError, match=refused), harlora.inference_precision(name):
            pass
