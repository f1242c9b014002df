"""The opt-in reduced precision of inference: its error is what is promised, and it is off unless asked for."""

import pytest
import torch

import harlora
from harlora.kernels import cpp
from harlora.models import MAE, MAEConfig

pytestmark = pytest.mark.skipif(bool(cpp.load_extension()), reason=cpp.load_extension())


@pytest.fixture
def _bfloat16(use_kernels):
    use_kernels("avx512bf16")


def layer_of(in_features, out_features, **options):
    layer = harlora.QLoRALinear(in_features, out_features, rank=4, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def exact(layer, x):
    """y in float64, and the sum of the magnitudes that the base product adds up."""
    weight = layer.base_weight().double()
    branch = layer.scaling * (x.double() @ layer.lora_A.double().T) @ layer.lora_B.double().T
    return x.double() @ weight.T + layer.bias.double() + branch, x.abs().double() @ weight.abs().T


@torch.no_grad()
@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("rows", [3, 14, 15, 64, 300])
@pytest.mark.parametrize(("in_features", "out_features"), [(192, 192), (160, 33), (62, 40), (4096, 64)])
def test_error_is_that_of_two_roundings(rows, in_features, out_features):
    layer = layer_of(in_features, out_features, double_quant=rows % 2 == 0)
    x = torch.randn(rows, in_features)
    y, magnitude = exact(layer, x)
    with harlora.inference_precision("bfloat16"):
        found = layer(x)
    error = (found.double() - y).abs()
    # Each factor is within 2⁻⁹ of its value, so each product within 2⁻⁸; float32 sums add their own rounding.
    assert (error <= 2**-8 * 1.01 * magnitude + 1e-4).all()
    assert error.max() > 10 * (layer(x).double() - y).abs().max()  # it was on, and off again


@torch.no_grad()
@pytest.mark.usefixtures("_bfloat16")
def test_encoder():
    encoder = harlora.apply_qlora(MAE(MAEConfig(depth=2)).encoder.eval(), ["q", "k", "v", "o", "fc1", "fc2"])
    x = torch.randn(5, 128, 6)
    before = encoder(x)
    with harlora.inference_precision("bfloat16"):
        reduced = encoder(x)
    assert not torch.equal(before, reduced)
    assert (before - reduced).norm() < 1e-2 * before.norm()
    assert torch.equal(encoder(x), before)


@pytest.mark.usefixtures("_bfloat16")
def test_training_is_not_affected():
    layer, x = layer_of(64, 48), torch.randn(20, 64)
    expected = layer(x)
    with harlora.inference_precision("bfloat16"):
        assert torch.equal(layer(x), expected)
        with torch.no_grad(), harlora.inference_precision("float32"):
            assert torch.equal(layer(x), expected)


@torch.no_grad()
@pytest.mark.usefixtures("_bfloat16")
def test_odd_in_features_stay_float32():
    layer, x = layer_of(65, 48), torch.randn(20, 65)
    with harlora.inference_precision("bfloat16"):
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_what_cannot_be_had_is_refused(use_kernels):
    with pytest.raises(ValueError, match="name must be 'float32' or 'bfloat16', got 'int8'"), \
            harlora.inference_precision("int8"):  # fmt: skip
        pass
    use_kernels("portable")
    with pytest.raises(RuntimeError, match="requires the kernels 'avx512bf16', but those that serve here are"), \
            harlora.inference_precision("bfloat16"):  # fmt: skip
        pass
