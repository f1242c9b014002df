"""Building: the wheel, the extension, and installation where it cannot be built."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from harlora.kernels import cpp, dispatch

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def source(tmp_path):
    """A copy of the files that a build reads."""
    for name in ("kernels", "harlora", "bench", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def build(source, tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir",
         str(tmp_path / "wheels"), str(source)],
        capture_output=True, text=True, check=False, env={**os.environ, "HARLORA_CUDA": "0", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist(), done.stdout + done.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_the_wheel_has_one_top_level_name_and_serves_every_python(source, tmp_path):
    wheel, names, _ = build(source, tmp_path)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"harlora"}
    for name in ("harlora/kernels/_C.so", "harlora/kernels/ops.py", "harlora/py.typed", "harlora/nn/linear.py"):
        assert name in names
    assert "-py3-none-" in wheel.name
    # Without this checkout in sight, the built extension loads and serves.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import harlora, torch; from harlora.kernels import cpp\n"
        "assert 'installed' in harlora.__file__, harlora.__file__\n"
        "assert cpp.load_extension() == '', cpp.load_extension()\n"
        "harlora.dequantize_4bit(harlora.quantize_4bit(torch.randn(3, 70)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_installs_without_a_compiler_with_one_warning(source, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    _, names, said = build(source, tmp_path, PATH=str(empty), CXX="")
    assert "harlora/kernels/_C.so" not in names
    assert "harlora/kernels/reference.py" in names
    warned = re.findall(r"warning: .*the compiled extension is left out.*no C\+\+ compiler was found.*", said)
    assert len(warned) == 1


def test_installs_where_the_code_does_not_compile(source, tmp_path):
    (source / "csrc" / "cpu" / "operators.cpp").write_text("this is not C++")
    _, names, said = build(source, tmp_path)
    assert "harlora/kernels/_C.so" not in names
    assert len(re.findall("warning: .*the compiled extension is left out", said)) == 1


def test_the_source_distribution_can_be_built_from(source, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    for part in ("csrc", "kernels", "harlora", "bench"):
        kept = [path.relative_to(source).as_posix() for path in (source / part).rglob("*") if path.is_file()]
        assert not set(kept) - names


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_the_extension_of_this_installation_serves():
    assert cpp.load_extension() == ""
    assert all(cpp.has_kernel(operator, "cpu") for operator in dispatch.OPERATORS)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_the_extension_has_its_cuda_part_where_nvcc_is():
    assert cpp.load_extension() == ""
    assert cpp.has_kernel("dequantize_4bit", "cuda")
    assert cpp.has_kernel("qlora_gemv", "cuda")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_its_cuda_part_has_the_machine_code_that_is_wanted(tmp_path):
    """As `make compile` reads it: no spills, tensor cores where matrices are multiplied."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "bench/compile_report.py", "--only", "CUDA C++", "--json", str(tmp_path / "report.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((tmp_path / "report.json").read_text())["kernels"]
    found = {(each["target"], each["kernel"]): each for each in kernels}
    for target in ("sm_80", "sm_90", "sm_100"):
        assert found[target, "dequantize_4bit_kernel<float>"]["registers"] <= 64
        for kernel in ("qlora_gemv_kernel<__half, true, 2>", "qlora_gemv_kernel<__nv_bfloat16, false, 1>"):
            assert found[target, kernel]["spills"] == 0
            assert found[target, kernel]["tensor_cores"] == "HMMA"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ["80,code=sm_80", "80,code=compute_80", "86,code=sm_86", "90a,code=sm_90a"]),
        ("9.0a", ["90a,code=sm_90a"]),
        ("8.9 10.0+PTX", ["89,code=sm_89", "100,code=sm_100", "100,code=compute_100"]),
        ("Hopper", None),
    ],
)
def test_the_gpus_that_are_built_for(given, expected, tmp_path, monkeypatch):
    """Those of the list; by default those that this toolkit knows of the kernels'."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    build_file = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho sm_80 sm_86 sm_90\n")
    nvcc.chmod(0o755)
    if expected is None:
        with pytest.raises(
            build_file["UnavailableError"], match=r"numbers such as 8\.0;9\.0a;10\.0\+PTX, got 'Hopper'"
        ):
            build_file["architectures"](tmp_path)
    else:
        assert build_file["architectures"](tmp_path) == [f"-gencode=arch=compute_{each}" for each in expected]


def test_paths_may_have_blanks(tmp_path, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("CXX", f"env {sys.executable}")
    build_file = runpy.run_path(str(ROOT / "setup.py"))
    assert build_file["cxx_program"]() == f"env {sys.executable}"
    folder = tmp_path / "my $ project"
    text = build_file["ninja_file"](folder, "c++", folder, [], folder / "_C.so")
    lines = {line.partition(" = ")[0].strip(): shlex.split(line.replace("$$", "$")) for line in text.splitlines()
             if line.startswith(("cxxflags", "ldflags", " cuda"))}  # fmt: skip
    assert str(folder / "include") in lines["cxxflags"]
    assert f"-L{folder / 'lib'}" in lines["ldflags"]
    assert f"-L{folder / 'lib64'}" in lines["cuda"]
    (command,) = [line for line in text.splitlines() if "nvcc" in line and "command" in line]
    assert str(folder / "bin" / "nvcc") in shlex.split(command.replace("$$", "$"))


def test_what_is_for_hopper_alone_is_offered_where_its_machine_code_is(tmp_path, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    build_file = runpy.run_path(str(ROOT / "setup.py"))
    for arches, offered in ((["80"], False), (["80", "90"], False), (["80", "90a"], True)):
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
        text = build_file["ninja_file"](tmp_path, "c++", tmp_path, gencode, tmp_path / "_C.so")
        assert ("-DHARLORA_SM90A" in text) == offered
    assert "-DHARLORA_SM90A" not in build_file["ninja_file"](tmp_path, "c++", None, [], tmp_path / "_C.so")
