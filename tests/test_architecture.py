"""The layers point one way, names live in one place, and the core needs nothing of HAR."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"kernels": "harlora.kernels", "harlora": "harlora", "bench": "harlora.bench"}
MODULES = {
    ".".join([PACKAGES[top], *path.relative_to(ROOT / top).with_suffix("").parts]).removesuffix(".__init__"): path
    for top in PACKAGES
    for path in (ROOT / top).rglob("*.py")
}
# What a layer may import of the project, itself aside. Everything else is forbidden.
ALLOWED = {
    "harlora.errors": set(),
    "harlora.files": {"harlora.errors"},
    "harlora.kernels": set(),
    "harlora.nn": {"harlora.kernels", "harlora.errors", "harlora.files"},
    "harlora.models": {"harlora.nn", "harlora.kernels"},
    "harlora.data": {"harlora.errors", "harlora.files"},
    "harlora.train": {
        "harlora.nn", "harlora.kernels", "harlora.models", "harlora.data", "harlora.errors", "harlora.files",
    },
    "harlora.export": {
        "harlora", "harlora.nn", "harlora.kernels", "harlora.models", "harlora.train", "harlora.data",
        "harlora.errors", "harlora.files",
    },
    "harlora.report": {"harlora.train", "harlora.data", "harlora.errors", "harlora.files"},
    "harlora.progress": {"harlora.train"},
    "harlora.bench": {
        "harlora", "harlora.configure", "harlora.kernels", "harlora.nn", "harlora.models", "harlora.train",
        "harlora.errors", "harlora.files",
    },
    **{
        f"harlora.bench.{name}": {
            "harlora", "harlora.bench", "harlora.nn", "harlora.models", "harlora.train", "harlora.data",
            "harlora.errors", "harlora.files",
        }
        for name in ("placements", "forgetting")  # on recordings
    },
    "harlora.configure": {"harlora.kernels"},
    "harlora.doctor": {"harlora", "harlora.configure", "harlora.kernels", "harlora.models", "harlora.files"},
    "harlora.cli": {
        "harlora", "harlora.bench", "harlora.doctor", "harlora.export", "harlora.train", "harlora.report",
        "harlora.data", "harlora.errors", "harlora.progress",
    },
    "harlora.__main__": {"harlora.cli"},
    "harlora": {"harlora.kernels", "harlora.nn", "harlora.models"},
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module):
    return next(name for name in sorted(ALLOWED, key=len, reverse=True) if f"{module}.".startswith(f"{name}."))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layers_point_one_way(module):
    for name in imports(MODULES[module]):
        target = max((m for m in MODULES if f"{name}.".startswith(f"{m}.")), key=len, default=None)
        assert not name.startswith("kernels"), f"{module} imports {name}: the package is harlora.kernels"
        assert name.split(".")[0] not in ("bench", "tests"), f"{module} imports {name}"
        if target is not None and layer(target) != layer(module):
            assert layer(target) in ALLOWED[layer(module)], f"{module} may not import {target}"


def test_one_file_names_operators():
    named = [name for name, path in MODULES.items() if re.search(r'"harlora::', path.read_text())]
    assert named == ["harlora.kernels.ops"]


def test_one_file_chooses_backends():
    named = {name for name, path in MODULES.items() if '"HARLORA_BACKEND"' in path.read_text()}
    assert named == {"harlora.kernels.dispatch"}
    named = {name for name, path in MODULES.items() if "ops.harlora_cpp" in path.read_text()}
    assert named == {f"harlora.kernels.{name}" for name in ("cpp", "cuda", "eager", "replay")}


def test_no_file_is_unpickled():
    for name, path in MODULES.items():
        assert not re.search(r"torch\.load\(|import pickle|allow_pickle", path.read_text()), name


def test_the_core_needs_nothing_of_har():
    forbidden = ("scipy", "sklearn", "matplotlib", "rich", "tyro", "polars", "peft", "bitsandbytes")
    code = (
        "import sys\n"
        f"for name in {forbidden!r}: sys.modules[name] = None\n"
        "import harlora, torch\n"
        "layer = harlora.QLoRALinear(8, 8)\n"
        "layer(torch.ones(1, 8)).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_those_promised():
    import harlora

    for name in ("quantize_4bit", "dequantize_4bit", "qlora_linear", "QLoRALinear", "apply_qlora", "save_adapter",
                 "load_adapter", "models"):  # fmt: skip
        assert name in harlora.__all__
    assert harlora.models.MAE().encoder is not None


def test_versions_agree():
    import harlora

    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{harlora.__version__}"' in text
    assert f"version: {harlora.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {harlora.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert found == set(listed)


def test_documents_name_no_machine():
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    pattern = re.compile(r"/(?:work|root|home|tmp)/[a-z]")
    for name in files:
        path = ROOT / name
        if (
            path.suffix in (".md", ".py", ".json", ".toml", ".yml", ".cff", "")
            and path.is_file()
            and "tests" not in name
        ):
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found}"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
