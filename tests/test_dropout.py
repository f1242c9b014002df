"""What dropout drops: the published random numbers, the share asked for, anew in each call and again with the seed."""

import pytest
import torch

import harlora
from harlora import QLoRALinear
from harlora.kernels import cpp, dispatch, dropout

SEED = torch.tensor(0x299F31D0A4093822, dtype=torch.int64)


def test_the_words_are_those_of_philox():
    """The first known answer of philox4x32 with 7 rounds in the tests of Random123: counter and key are zero."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for share in (0.1, 0.3, 0.5, 0.7):
        expected = [half >= round(share * 65536) for half in halves]
        assert dropout.kept(1, 8, share, torch.tensor(0)).tolist() == [expected]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_the_share_is_kept_everywhere(share):
    kept = dropout.kept(2048, 264, share, SEED).double()
    deviation = (share * (1 - share)) ** 0.5
    assert abs(kept.mean() - (1 - share)) < 5 * deviation / kept.numel() ** 0.5
    assert ((kept.mean(dim=0) - (1 - share)).abs() < 5 * deviation / 2048**0.5).all()
    assert ((kept.mean(dim=1) - (1 - share)).abs() < 6 * deviation / 264**0.5 + 1 / 264).all()
    centred = (kept - (1 - share)) / deviation
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert (centred * shifted).mean().abs() < 5 / kept.numel() ** 0.5
    other = (dropout.kept(2048, 264, share, SEED + 1).double() - (1 - share)) / deviation
    assert (centred * other).mean().abs() < 5 / kept.numel() ** 0.5


def test_a_value_is_dropped_by_its_place_alone():
    large = dropout.kept(40, 96, 0.4, SEED)
    assert torch.equal(dropout.kept(7, 33, 0.4, SEED), large[:7, :33])
    high = torch.tensor(-(2**63) + 5)  # all 64 bits of the seed count
    assert not torch.equal(dropout.kept(40, 96, 0.4, high), dropout.kept(40, 96, 0.4, torch.tensor(5)))


def test_the_mean_of_what_is_dropped_is_the_value():
    for share in (0.1, 1 / 3, 0.99999):
        assert dropout.rescale(share) * (1 - dropout.limit(share) / 65536) == pytest.approx(1.0)
    assert abs(dropout.limit(1 / 3) / 65536 - 1 / 3) < 2**-17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 65), (70, 300)])
def test_the_kernels_drop_the_same(shape, dtype):
    x = torch.randn(shape).to(dtype)
    x[:, ::9] = float("inf")  # a product with zero would not drop it
    exact = dropout.dropped(x, 0.3, SEED)
    if not cpp.load_extension():
        assert torch.equal(cpp.dropped(x, 0.3, SEED), exact)
        out = x.clone()
        assert torch.equal(cpp.dropped(out, 0.3, SEED, out), exact)
    if not dispatch.load_triton():
        from harlora.kernels.triton.dropout import dropped

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spaced = torch.empty(shape[0], shape[1] + 9, device=device, dtype=dtype)[:, 4 : 4 + shape[1]].copy_(x)
        assert torch.equal(dropped(spaced, 0.3, SEED.to(device)).cpu(), exact)


def test_each_call_draws_and_the_seed_of_torch_repeats():
    layer = QLoRALinear(96, 40, rank=4, dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 96)
    torch.manual_seed(7)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), layer(x))


def test_a_share_out_of_range_is_refused_without_an_adapter_too():
    layer = QLoRALinear(96, 40, rank=0)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1.5"):
        harlora.qlora_linear(torch.randn(9, 96), layer.quantized_weight(), dropout=1.5)


def test_a_given_seed_decides():
    layer = QLoRALinear(96, 40, rank=4)
    torch.nn.init.normal_(layer.lora_B)
    given = (layer.quantized_weight(), None, layer.lora_A, layer.lora_B, 1.0, 0.5)
    x = torch.randn(9, 96)
    assert torch.equal(harlora.qlora_linear(x, *given, SEED), harlora.qlora_linear(x, *given, SEED))
    assert not torch.equal(harlora.qlora_linear(x, *given, SEED), harlora.qlora_linear(x, *given))


def test_activation_checkpointing_repeats_what_was_dropped():
    from torch.utils.checkpoint import checkpoint

    layer = QLoRALinear(96, 40, rank=4, dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 96, requires_grad=True)
    torch.manual_seed(1)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)
