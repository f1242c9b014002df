"""The choice of a backend: order, override, self-check."""

import pytest
import torch

from harlora.kernels import dispatch, reference
from harlora.kernels.dispatch import Backend, select

CPU = torch.device("cpu")
needs_extension = pytest.mark.skipif(bool(dispatch.load_extension()), reason=dispatch.load_extension())


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("HARLORA_BACKEND", raising=False)
    dispatch._agrees.cache_clear()
    yield
    dispatch._agrees.cache_clear()


def with_table(monkeypatch, *table):
    monkeypatch.setattr(dispatch, "backends", lambda operator: (*table, dispatch._REFERENCE[operator]))


@needs_extension
def test_the_extension_serves_the_cpu_by_default():
    assert select("dequantize_4bit", CPU) is dispatch._dequantize_4bit_cpp
    assert select("qlora_linear", CPU) is reference.qlora_linear


def test_reference_on_request(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "reference")
    assert select("dequantize_4bit", CPU) is reference.dequantize_4bit


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="must be 'reference' or 'cpp', got 'fastest'"):
        select("dequantize_4bit", CPU)


def test_missing_extension_is_named_when_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "load_extension", lambda: "it was not built")
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="the extension does not serve: it was not built"):
        select("dequantize_4bit", CPU)


def wrong(packed, scale, quant_type, blocksize, out):
    reference.dequantize_4bit(packed, scale * 1.0001, quant_type, blocksize, out)


def test_a_wrong_backend_is_left_out_with_one_warning(monkeypatch):
    with_table(monkeypatch, Backend("cpp", wrong, "cpu", probe=dispatch._probe_dequantize))
    with pytest.warns(RuntimeWarning, match="backend 'cpp' of dequantize_4bit disagrees with the reference on cpu"):
        assert select("dequantize_4bit", CPU) is reference.dequantize_4bit
    assert select("dequantize_4bit", CPU) is reference.dequantize_4bit  # no second warning: it would be an error


def test_a_wrong_backend_on_request_raises(monkeypatch):
    with_table(monkeypatch, Backend("cpp", wrong, "cpu", probe=dispatch._probe_dequantize))
    monkeypatch.setattr(dispatch, "load_extension", lambda: "")
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="disagrees with the reference"):
        select("dequantize_4bit", CPU)


def test_an_unverified_backend_serves_only_on_request(monkeypatch):
    unverified = Backend("cpp", lambda *a: None, "cpu", verified=False)
    with_table(monkeypatch, unverified)
    monkeypatch.setattr(dispatch, "load_extension", lambda: "")
    assert select("dequantize_4bit", CPU) is reference.dequantize_4bit
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    assert select("dequantize_4bit", CPU) is unverified.function


@needs_extension
def test_the_extension_checks_its_arguments():
    out, scale, code = torch.empty(64), torch.ones(1), torch.zeros(16)
    packed = torch.zeros(32, dtype=torch.uint8)
    op = torch.ops.harlora_cpp.dequantize_4bit
    op(packed, scale, code, 64, out)
    for arguments in (
        (packed[:-1], scale, code, 64, out),
        (packed, scale.double(), code, 64, out),
        (packed, scale, code[:-1], 64, out),
        (packed, scale, code, 48, out),
        (packed, scale, code, 64, torch.empty(128)[::2]),
        (packed, scale, code, 64, torch.empty(64, dtype=torch.int32)),
    ):
        with pytest.raises(RuntimeError, match="dequantize_4bit"):
            op(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@needs_extension
def test_cuda_dequantise_agrees_with_the_reference():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = torch.randint(0, 256, (50_001,), dtype=torch.uint8, device="cuda")
        scale = torch.rand(-(-100_001 // 64), device="cuda")
        expected, found = (torch.empty(100_001, device="cuda", dtype=dtype) for _ in range(2))
        reference.dequantize_4bit(packed, scale, "nf4", 64, expected)
        dispatch._dequantize_4bit_cpp(packed, scale, "nf4", 64, found)
        assert torch.equal(expected, found)
