"""The choice of a backend: order, override, self-check."""

import os
import subprocess
import sys

import pytest
import torch
from needs import needs_extension

from harlora.kernels import cpp, dispatch, eager, reference, tuning
from harlora.kernels.dispatch import Backend, select

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("HARLORA_BACKEND", raising=False)
    dispatch.agrees.cache_clear()
    eager.reset()
    yield
    dispatch.agrees.cache_clear()
    eager.reset()


def with_table(monkeypatch, *table):
    def backends(operator):
        return (*table, Backend("reference", getattr(reference, operator)))

    monkeypatch.setattr(dispatch, "backends", backends)


@needs_extension
@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_the_extension_serves_the_cpu_by_default(operator):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select(operator, CPU, dtype) is getattr(cpp, operator)
    assert select(operator, CPU, torch.float64) is getattr(reference, operator)


def test_reference_on_request(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "reference")
    assert select("dequantize_4bit", CPU, FLOAT) is reference.dequantize_4bit


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("HARLORA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="must be one of .*, got .fastest."):
        select("dequantize_4bit", CPU, FLOAT)


def test_missing_extension_is_named_when_asked_for(monkeypatch):
    monkeypatch.setattr(cpp, "load_extension", lambda: "it was not built")
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="the extension does not serve: it was not built"):
        select("dequantize_4bit", CPU, FLOAT)


def slightly_wrong(operator):
    def function(*arguments):
        result = getattr(reference, operator)(*arguments)
        *first, last = result if isinstance(result, tuple) else (result,)
        last = last + 1 if last.numel() else last
        return (*[t + 1 if t.numel() else t for t in first], last) if first else last

    return function


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_a_wrong_backend_is_left_out_with_one_warning(operator, monkeypatch):
    with_table(monkeypatch, Backend("cpp", slightly_wrong(operator), "cpu"))
    with pytest.warns(RuntimeWarning, match=f"backend 'cpp' of {operator} disagrees with the reference on cpu"):
        assert select(operator, CPU, FLOAT) is getattr(reference, operator)
    select.cache_clear()
    assert select(operator, CPU, FLOAT) is getattr(reference, operator)  # a second warning would be an error


def test_a_wrong_backend_on_request_raises(monkeypatch):
    with_table(monkeypatch, Backend("cpp", slightly_wrong("dequantize_4bit"), "cpu"))
    monkeypatch.setattr(cpp, "load_extension", lambda: "")
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="disagrees with the reference"):
        select("dequantize_4bit", CPU, FLOAT)


def test_an_unverified_backend_serves_only_on_request(monkeypatch):
    def unverified(*arguments):
        return reference.dequantize_4bit(*arguments)

    with_table(monkeypatch, Backend("cpp", unverified, "cpu", on_request="it has not yet run here"))
    monkeypatch.setattr(cpp, "load_extension", lambda: "")
    assert select("dequantize_4bit", CPU, FLOAT) is reference.dequantize_4bit
    select.cache_clear()
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    assert select("dequantize_4bit", CPU, FLOAT) is unverified


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ("pass", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'ieee'", False),
    ],
)
def test_tf32_is_allowed_by_either_interface(said, allowed):
    code = f"import torch; {said}; from harlora.kernels.configurations import tf32_allowed; print(tf32_allowed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(allowed)


def test_what_never_ran_is_not_checked_while_it_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backend = Backend("triton", reference.qlora_linear, "cuda")
    with pytest.raises(RuntimeError, match="qlora_linear is captured .* run the model once before capturing"):
        dispatch.agrees("qlora_linear", backend, torch.device("cuda"))


def test_a_user_without_a_home_has_no_tables(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HARLORA_TUNING", "HARLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert tuning.path() is None
    assert tuning.table("cpu", None) == {}


@needs_extension
def test_the_environment_chooses_the_instruction_set():
    code = (
        "import torch, harlora; from harlora.kernels import cpp; print(harlora.kernels.cpp.load_extension());"
        "harlora.quantize_4bit(torch.ones(64))"
    )

    def run(name):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                              env={**os.environ, "HARLORA_CPU": name})  # fmt: skip

    assert run("portable").returncode == 0
    refused = run("sse9")
    assert refused.returncode != 0
    assert "HARLORA_CPU must be one of the kernels that this processor runs (" in refused.stderr


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
        (packed, scale, code, 64, out, scale, scale),
    ):
        with pytest.raises(RuntimeError, match="must|wrong|nested"):
            op(*arguments)
    linear = torch.ops.harlora_cpp.qlora_linear
    x, rest = torch.ones(2, 8), (packed, scale, code, 64, 8)
    linear(x, *rest, None, None, None, 1.0)
    A, B = torch.ones(3, 8), torch.ones(8, 3)
    for arguments in (
        (x[:, :4], *rest, None, None, None, 1.0),
        (x.double(), *rest, None, None, None, 1.0),
        (x, *rest, torch.ones(7), None, None, 1.0),
        (x, *rest, None, A, None, 1.0),
        (x, *rest, None, A, B[:, :2], 1.0),
        (x, *rest, None, A, B, 1.0, torch.empty(2, 2)),
    ):
        with pytest.raises(RuntimeError, match="must|wrong|come together"):
            linear(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@needs_extension
def test_cuda_dequantise_agrees_with_the_reference():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = torch.randint(0, 256, (50_001,), dtype=torch.uint8, device="cuda")
        scale = torch.rand(-(-100_001 // 64), device="cuda")
        arguments = (packed, scale, None, None, "nf4", 64, (100_001,), dtype)
        assert torch.equal(reference.dequantize_4bit(*arguments), cpp.dequantize_4bit(*arguments))
