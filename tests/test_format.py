"""The 4-bit storage format against bitsandbytes, which defines it."""

import json
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import harlora
from harlora.kernels import QuantizedWeight, reference
from harlora.kernels.format import BLOCKSIZES, code_table, nested_code_table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from bitsandbytes import functional as bnb_functional

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nibbles(packed: torch.Tensor, numel: int) -> torch.Tensor:
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:numel]


def dequantized_by_bnb(packed, state):
    """bitsandbytes' own arithmetic. Its CPU kernel is wrong where a row is no multiple of the blocksize, so the
    weight is passed as one row of whole blocks, which it gets right."""
    numel = state.shape.numel()
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    length = len(absmax) * state.blocksize
    whole = torch.zeros((length // 2, 1), dtype=torch.uint8)
    whole[: len(packed)] = packed
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    return op(whole, absmax, state.blocksize, state.quant_type, (1, length), state.dtype)[0, :numel].view(state.shape)


def random_cases(count):
    rng = np.random.default_rng(5)
    sizes = [1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 96, 127, 128, 144, 160, 192, 200]
    for case in range(count):
        yield (
            case,
            (int(rng.choice(sizes)), int(rng.choice(sizes))),
            DTYPES[rng.integers(3)],
            ("nf4", "fp4")[rng.integers(2)],
            int(rng.choice(BLOCKSIZES)),
            bool(rng.integers(2)),
        )


def test_code_tables_are_those_of_bitsandbytes():
    for quant_type in ("nf4", "fp4"):
        assert torch.equal(code_table(quant_type, CPU), bnb_functional.get_4bit_type(quant_type, device="cpu"))
    table = nested_code_table(CPU)
    assert torch.equal(table, bnb_functional.create_dynamic_map())
    assert table[127] == 0
    assert table[255] == 1


@pytest.mark.parametrize(("case", "shape", "dtype", "quant_type", "blocksize", "double_quant"), list(random_cases(200)))
def test_codes_and_scales_equal_bitsandbytes(case, shape, dtype, quant_type, blocksize, double_quant):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(case)).to(dtype)
    ours = harlora.quantize_4bit(weight, quant_type, blocksize, double_quant)
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )
    codes, theirs = (nibbles(tensor, weight.numel()) for tensor in (ours.packed, packed))
    plain = harlora.quantize_4bit(weight, quant_type, blocksize)
    if quant_type == "fp4":
        # Device differences: bitsandbytes on a CPU gives tiny magnitudes the other sign of zero, and its bounds
        # differ from CUDA's by up to 3.2e-7.
        theirs = torch.where((codes ^ theirs == 8) & (codes & 7 == 0), codes, theirs)
        scaled = (weight.flatten().float() / plain.absmax.repeat_interleave(blocksize)[: weight.numel()]).abs()
        to_bound = (scaled[:, None] - torch.tensor(reference._FP4_BOUNDS)).abs().min(dim=1).values
        theirs = torch.where(to_bound < 4e-7, codes, theirs)
    assert torch.equal(codes, theirs)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_offset, state.offset)
        # Device difference: bitsandbytes on a CPU looks 8-bit codes up in a table of 65,536 values, CUDA searches.
        table = nested_code_table(CPU)
        span = ours.nested_absmax.repeat_interleave(256)[: len(plain.absmax)]
        centred = (plain.absmax - ours.nested_offset) / span
        own, other = ((centred - table[code.int()]).abs() for code in (ours.absmax, state.absmax))
        different = ours.absmax != state.absmax
        assert (different.sum() <= max(1, 0.02 * len(different))).item()
        assert ((other - own)[different] < 4 / 65535).all()
        state.absmax = ours.absmax
    else:
        assert torch.equal(ours.absmax, state.absmax)
    # The values, from the same codes and scales.
    assert torch.equal(harlora.dequantize_4bit(ours), dequantized_by_bnb(ours.packed, state))


def test_nested_codes_are_the_nearest():
    weight = torch.randn(512, 256)
    plain, nested = (harlora.quantize_4bit(weight, "nf4", 32, double_quant) for double_quant in (False, True))
    centred = (plain.absmax - nested.nested_offset) / nested.nested_absmax.repeat_interleave(256)[: len(plain.absmax)]
    distance = (centred[:, None] - nested_code_table(CPU)).abs()
    chosen = distance.gather(1, nested.absmax.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.min(dim=1).values, rtol=0, atol=1e-6)


def test_block_of_zeros_takes_code_0_as_on_cuda():
    weight = torch.zeros(2, 64)
    weight[1] = 1.0
    for quant_type in ("nf4", "fp4"):
        packed = harlora.quantize_4bit(weight, quant_type)
        assert nibbles(packed.packed, 64).eq(0).all()
        assert torch.equal(harlora.dequantize_4bit(packed), weight)


def test_tiny_fp4_values_keep_their_sign_as_on_cuda():
    weight = torch.full((1, 64), 1.0)
    weight[0, 1], weight[0, 2] = 1e-4, -1e-4
    codes = nibbles(harlora.quantize_4bit(weight, "fp4").packed, 64)
    assert codes[:3].tolist() == [3, 0, 8]
    assert harlora.dequantize_4bit(harlora.quantize_4bit(weight, "fp4"))[0, 2] == 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_go_down(quant_type):
    code = torch.unique(code_table(quant_type, CPU))  # sorted
    middle = (code[:-1] + code[1:]) / 2
    if quant_type == "fp4":
        middle = torch.tensor(reference._FP4_BOUNDS)
        code = code[code >= 0]
    weight = torch.cat([middle, torch.ones(64 - len(middle))])[None]
    values = harlora.dequantize_4bit(harlora.quantize_4bit(weight, quant_type))[0, : len(middle)]
    assert torch.equal(values, code[:-1])


@pytest.mark.parametrize("in_features", [96, 144, 160])
def test_right_where_bitsandbytes_is_wrong_on_cpu(in_features):
    """Its CPU dequantisation mixes up blocks when in_features is a multiple of 16 but not of the blocksize."""
    weight = torch.randn(64, in_features)
    packed = harlora.quantize_4bit(weight)
    error = (harlora.dequantize_4bit(packed) - weight).norm() / weight.norm()
    theirs = bnb_functional.dequantize_4bit(*bnb_functional.quantize_4bit(weight, quant_type="nf4"))
    assert error < 0.1
    assert (theirs - weight).norm() / weight.norm() > 0.15


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(BLOCKSIZES[:3]),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 10_000),
)
def test_requantising_returns_the_same_codes_and_error_is_bounded(rows, columns, quant_type, blocksize, scale, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    packed = harlora.quantize_4bit(weight, quant_type, blocksize)
    values = harlora.dequantize_4bit(packed)
    again = harlora.quantize_4bit(values, quant_type, blocksize)
    assert torch.equal(again.absmax, packed.absmax)
    assert torch.equal(harlora.dequantize_4bit(again), values)
    widest = torch.unique(code_table(quant_type, CPU)).diff().max()
    absmax = packed.absmax.repeat_interleave(blocksize)[: weight.numel()].view_as(weight)
    assert ((values - weight).abs() <= 0.5001 * widest * absmax).all()


def test_state_dict_loads_in_bitsandbytes():
    for quant_type, double_quant in (("nf4", False), ("nf4", True), ("fp4", True)):
        layer = harlora.QLoRALinear(128, 96, rank=0, quant_type=quant_type, double_quant=double_quant)
        state = layer.state_dict()
        stats = {key.removeprefix("weight."): state[key] for key in state if key.startswith("weight.")}
        loaded = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
        theirs = bnb.nn.Linear4bit(128, 96, quant_type=quant_type, compute_dtype=torch.float32)
        theirs.weight, theirs.bias = loaded, nn.Parameter(state["bias"], requires_grad=False)
        theirs.quant_state = loaded.quant_state
        theirs.train()  # in evaluation its CPU path rounds to bfloat16
        x = torch.randn(4, 128)
        torch.testing.assert_close(layer(x), theirs(x))
        assert loaded.quant_state.nested is double_quant


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_of_bitsandbytes_loads_here_and_back(quant_type, double_quant):
    theirs = bnb.nn.Linear4bit(
        96, 40, compute_dtype=torch.float32, compress_statistics=double_quant, quant_type=quant_type
    ).to("cpu")
    state = theirs.state_dict()
    layer = harlora.QLoRALinear(96, 40, rank=0)
    layer.load_state_dict(state)
    back = layer.state_dict()
    assert back.keys() == state.keys()
    for key, value in state.items():
        if "quant_state" in key:
            ours, other = (json.loads(bytes(t.tolist())) for t in (back[key], value))
            assert ours == other
        else:
            assert torch.equal(back[key], value), key


def test_quantised_weight_of_another_storage_dtype_is_read():
    weight = torch.randn(64, 64)
    packed = harlora.quantize_4bit(weight)
    state = packed.state_dict()
    state["weight"] = state["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    again = QuantizedWeight.from_state_dict(state)
    assert torch.equal(again.packed, packed.packed)


def broken(change):
    state = dict(harlora.quantize_4bit(torch.randn(64, 64), double_quant=True).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight.absmax"), "required the keys weight, weight.absmax"),
        (lambda s: s.update({"weight": s["weight"][:-1]}), "packed must be uint8 with 2048 bytes"),
        (lambda s: s.update({"weight.absmax": s["weight.absmax"].bfloat16()}), "damaged scales"),
        (lambda s: s.update({"weight.quant_map": s["weight.quant_map"] * 2}), "quant_map must be the standard table"),
        (lambda s: s.update({"weight.nested_absmax": torch.ones(3)}), "nested_absmax must be float32 of shape"),
        (
            lambda s: s.update({"weight.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)}),
            "cannot read the quantisation state",
        ),
    ],
)
def test_damaged_state_dict_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.from_state_dict(broken(change))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quant_type": "int4"}, ValueError, "quant_type must be one of"),
        ({"blocksize": 48}, ValueError, "blocksize must be one of"),
        ({"weight": torch.ones(2, 2, dtype=torch.float64)}, TypeError, "weight must be float32, bfloat16 or float16"),
        ({"weight": torch.ones(0, 4)}, ValueError, "at least one value"),
        ({"weight": torch.tensor([[1.0, float("nan")]])}, ValueError, "must be finite"),
        ({"weight": torch.tensor([[1.0, float("inf")]])}, ValueError, "must be finite"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        harlora.quantize_4bit(**{"weight": torch.ones(2, 2), **arguments})


def test_sizes_in_bytes():
    weight = torch.randn(192, 512)
    assert harlora.quantize_4bit(weight).nbytes / (4 * weight.numel()) == (0.5 + 4 / 64) / 4
    nested = harlora.quantize_4bit(weight, double_quant=True)
    assert nested.nbytes == weight.numel() // 2 + 1536 + 6 * 4 + 4
