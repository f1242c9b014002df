import os
import re
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of one test run share the cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HARLORA_TUNING"] = "0"  # no test depends on what the user measured

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on CPUs

from harlora.kernels import cpp

torch.set_num_threads(1)


def pytest_runtest_logreport(report):
    """What fails is in the file HARLORA_FAILURES at once: a machine with a GPU may be taken back before the end."""
    file = os.environ.get("HARLORA_FAILURES")
    if report.failed and file and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(f"{report.nodeid}\n{report.longreprtext}\n\n")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache, or depends on where the user keeps data."""
    monkeypatch.setenv("HARLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def nan_filled_memory():
    """New tensors hold NaN until they are written, so that a value read too early shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# What each set of CPU kernels needs, as Linux names it.
_NEEDS = {
    "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
    "": set(),
}


@pytest.fixture
def use_kernels():
    """Makes a set of CPU kernels serve for one test; skips where the processor lacks it, fails where it is missing."""

    def use(name: str, *needs: str) -> None:
        information = Path("/proc/cpuinfo")
        flags = set(information.read_text().split()) if information.exists() else set()
        if missing := (_NEEDS[name] | set(needs)) - flags:
            pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
        cpp.select_kernels(name)

    yield use
    if not cpp.load_extension():
        cpp.select_kernels()


@pytest.fixture
def real_data():
    """The path of a real archive under HARLORA_DATA; skips, naming the file, where it is not there."""

    def find(relative: str) -> Path:
        root = os.environ.get("HARLORA_DATA")
        path = Path(root or "data") / relative
        if not path.exists():
            pytest.skip(f"{path} is not there; set HARLORA_DATA to the folder that has {relative}")
        return path

    return find


def words(text: str) -> str:
    """A pattern for ``match`` that finds ``text`` as it stands."""
    return re.escape(text)
