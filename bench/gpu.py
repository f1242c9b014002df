"""`make gpu`, where a GPU is: the extension built, the GPU tests, a few under compute-sanitizer, the ways of CUDA C++
against the table's, then the GPU bench.

Needs torch 2.10 or later with CUDA, ninja, setuptools, pytest and rich; no internet, no installation. bitsandbytes,
PEFT and others take part where they can be imported. Runs from the sources:

    python bench/gpu.py [--minutes 8] [--out FOLDER] [--quick]

Leaves FOLDER/result.json with the outcome of the tests in it, failures.txt and ways.json as they come, and a page where
matplotlib is there. The exit status is that of the first part that failed; the bench runs all the same, since a machine
with a GPU may be lent for minutes.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "gpu" / "lib"
SANITIZER_S, WAYS_S = 60, 120  # at most; the first for each tool
BENCH_S = 150  # at least
LEAST_S = 20  # for what comes before it
SANITIZED = (
    "--error-exitcode", "3", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py",
    "-k", "strides or few_windows",
)  # fmt: skip
_SERVES = """
import sys
from harlora.kernels import cpp
if reason := cpp.load_extension():
    sys.exit(f"make gpu: {reason}")
if not cpp.has_kernel("dequantize_4bit", "cuda"):
    sys.exit("make gpu: the extension has no CUDA part; the warning of setup.py says why")
"""


def main() -> int:
    """Builds, tests, measures; the exit status."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="for all of it; the bench gets what is left, two and a half at least; default 8",
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the result; default runs/bench/gpu-TIME")
    parser.add_argument(
        "--tests", type=float, default=240, metavar="SECONDS", help="for each half of the tests, at most; default 240"
    )
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument(
        "--built",
        action="store_true",
        help=f"do not build: {BUILT.relative_to(ROOT)} has harlora with its extension already",
    )
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to try this script without a GPU
    options = parser.parse_args()
    folder = options.out or ROOT / "runs" / "bench" / time.strftime("gpu-%Y%m%dT%H%M%SZ", time.gmtime())
    for package in ("torch", "ninja", "setuptools", "pytest", "rich", "safetensors", "numpy"):
        if importlib.util.find_spec(package) is None:
            return _fail(f"the package {package} is missing in {Path(sys.executable).name}; install it, or set PYTHON")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        return _fail("torch sees no NVIDIA GPU here; `harlora bench --device cpu` measures the CPU")
    began = time.monotonic()

    def within(most: float) -> float:
        """So many seconds, or what is left of the minutes beside the bench."""
        return max(LEAST_S, min(most, 60 * options.minutes - BENCH_S - (time.monotonic() - began)))

    # The working folder, whose harlora/ is not the one that is built, must not come first on the path.
    paths = os.pathsep.join([str(BUILT), os.environ.get("PYTHONPATH", "")])
    os.environ["HARLORA_TUNING"] = "0"  # the repository's table, not one measured on this machine
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    if options.device == "cuda":  # for this GPU alone, in a fraction of the time
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}" + "a" * (major in (9, 10)))
    build = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-lib",
        str(BUILT),
        "--build-temp",
        "build/gpu/temp",
    ]
    statuses = {
        "build": 0 if options.built else subprocess.run(build, cwd=ROOT, env=environment, check=False).returncode
    }
    if not statuses["build"] and options.device == "cuda":
        # setup.py goes on without the CUDA part where that fails, and its tests would skip.
        statuses["build"] = subprocess.run(
            [sys.executable, "-c", _SERVES], cwd=ROOT, env=environment, check=False
        ).returncode
    print(f"[{time.monotonic() - began:5.0f} s] built", flush=True)
    if statuses["build"]:
        return statuses["build"]  # nothing to test or measure: the warning of setup.py says why
    # Their files alone: others import what the machine may lack.
    marked = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    # Most of the time of the tests is compilation, on one core each.
    workers = min(14, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 0
    many = ["-p", "xdist.plugin", "-n", str(workers)] if workers > 1 else []
    # Others' plugins have warnings of their own, which the tests' settings make errors.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    folder.mkdir(parents=True, exist_ok=True)
    failures = folder / "failures.txt"
    failures.unlink(missing_ok=True)
    environment["HARLORA_FAILURES"] = str(failures.resolve())
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *many]
    # Of CUDA C++ apart: what has not run on such a GPU may leave a process with none.
    of_cuda = [file for file in marked if Path(file).stem == "test_cuda"]
    rest = [file for file in marked if file not in of_cuda]
    statuses["tests of CUDA C++"] = _run([*tests, *of_cuda], environment, within(options.tests))
    statuses["tests"] = _run([*tests, *rest], environment, within(options.tests))
    print(f"[{time.monotonic() - began:5.0f} s] tests done", flush=True)
    program = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if program else ():
        statuses[tool] = _run([str(program), "--tool", tool, *SANITIZED], environment, within(SANITIZER_S))
    if not program:
        print("compute-sanitizer is not installed: nothing ran under it", flush=True)
    print(f"[{time.monotonic() - began:5.0f} s] sanitized", flush=True)
    ways: list[dict[str, Any]] = []
    if options.device == "cuda" and not options.quick:
        statuses["ways"], ways = _ways(folder / "ways.json", environment, within(WAYS_S))
        print(f"[{time.monotonic() - began:5.0f} s] ways measured", flush=True)
    sys.path.insert(0, str(BUILT))
    status = _bench(
        options, folder, statuses, ways, max(BENCH_S / 60, options.minutes - (time.monotonic() - began) / 60)
    )
    return next((each for each in statuses.values() if each), status)


def _ways(file: Path, environment: dict[str, str], seconds: float) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of bench/ways.py and what it measured, also before it failed."""
    file.unlink(missing_ok=True)
    status = _run([sys.executable, "-m", "harlora.bench.ways", str(file)], environment, seconds)
    return status, json.loads(file.read_text(encoding="utf-8"))["ways"] if file.exists() else []


def _run(command: list[str], environment: dict[str, str], seconds: float) -> int:
    """The exit status, 124 if it was over time: then all that it had started is killed, and leaves the GPU alone."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return 124
        raise


def _bench(
    options: argparse.Namespace, folder: Path, statuses: dict[str, int], ways: list[dict[str, Any]], minutes: float
) -> int:  # fmt: skip
    import torch
    from rich.console import Console

    from harlora.bench import report
    from harlora.bench.cases import plan
    from harlora.bench.run import RESULT, Options, Preset, measure
    from harlora.errors import InputError

    preset: Preset = "quick" if options.quick else "standard"
    cases = plan(preset, torch.device(options.device)).count()
    seconds = max(0.3, min(2.4, 0.6 * 60 * minutes / cases))  # the rest is for making and checking the competitors
    chosen = Options(preset, options.device, minutes=minutes, seconds=seconds, command="make gpu")
    try:
        result = measure(chosen, folder / RESULT, Console(stderr=True), {"statuses": statuses, "ways": ways})
    except InputError as error:
        return _fail(str(error))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for text in (report.setting(result), *report.summary(result)):
        console.print(text, highlight=False, markup=False)
    if importlib.util.find_spec("matplotlib") is not None:
        console.print(f"page: {report.write_page(result, folder)}", soft_wrap=True, highlight=False)
    console.print(f"result: {folder / RESULT}", soft_wrap=True, highlight=False)
    return 130 if result["stopped"] else 0


def _fail(message: str) -> int:
    sys.stderr.write(f"make gpu: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
