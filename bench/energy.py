"""Energy counters of the machine: RAPL's of a processor's packages, NVML's of a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")


def counter(device: torch.device, rapl: Path = RAPL) -> tuple[Callable[[], float] | None, str]:
    """A function that returns joules since some moment, and where they come from; None and why where there is none."""
    return _nvml(device) if device.type == "cuda" else _rapl(rapl)


def _rapl(folder: Path) -> tuple[Callable[[], float] | None, str]:
    # intel-rapl:0 is a package (AMD's have that name, too); intel-rapl:0:1 are parts of it, already counted.
    packages = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not packages:
        return None, "not reported: no RAPL counters here, as in most virtual machines"
    files = [zone / "energy_uj" for zone in packages]
    try:
        last = [int(file.read_text()) for file in files]
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in packages]
    except (OSError, ValueError) as error:
        return None, f"not reported: RAPL's counters cannot be read ({type(error).__name__}); Linux shows them to root"
    total = 0

    def joules() -> float:
        nonlocal total, last
        now = [int(file.read_text()) for file in files]
        # They start again at zero: every minute or so under load, so twice between two readings does not happen here.
        total += sum((new - old) % most for new, old, most in zip(now, last, ranges, strict=True))
        last = now
        return total / 1e6

    return joules, f"RAPL, {len(packages)} package{'s' * (len(packages) > 1)}, whatever else runs on them included"


def _nvml(device: torch.device) -> tuple[Callable[[], float] | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "not reported: the package nvidia-ml-py is not installed"
    library: Any = pynvml
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError as error:
        return None, f"not reported: NVML says {error}"
    return lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "NVML, the whole GPU"
