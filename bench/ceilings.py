"""What this machine can do at most, measured in the same run: multiply-adds, torch's product, copies, launches."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harlora.bench import machine

TOGETHER_S = 5e-3


def measure(device: torch.device, cores: Sequence[int], seconds: float) -> dict[str, Any]:
    """The ceilings of ``device``, of a CPU's ``cores``; the best of what ``seconds`` allow for each.

    copy_gb_s counts bytes read and bytes written, as STREAM does. Beyond any cache: cache_bytes is the last one's size.
    launch_us: an operator on one value, called again and again; what no call of an operator can be faster than.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "mm_float32_gflops": _mm_gflops(device, torch.float32, (4096, 8192), seconds / 2),
            "mm_bfloat16_gflops": _mm_gflops(device, torch.bfloat16, (4096, 8192), seconds / 2),
            "copy_gb_s": _copy_gb_s(device, 2**30, seconds),
            "launch_us": _launch_us(device, seconds / 4),
            "cache_bytes": properties.L2_cache_size,
        }
    fma, note = machine.fma_gflops(cores)
    return {
        "threads": len(cores),
        "fma_float32_gflops": fma,
        "fma_note": note,
        "mm_float32_gflops": _mm_gflops(device, torch.float32, (512, 1024, 2048), seconds),
        "mm_bfloat16_gflops": _mm_gflops(device, torch.bfloat16, (512, 1024, 2048), seconds),
        "copy_gb_s": _copy_gb_s(device, 2**28, seconds),
        "launch_us": _launch_us(device, seconds / 4),
        "cache_bytes": _cache_bytes(),
    }


def guessed(device: torch.device) -> dict[str, Any]:
    """In place of `measure`, where it was not asked for: what is used to foresee how long a case takes."""
    cuda = device.type == "cuda"
    return {
        "mm_float32_gflops": 1e4 if cuda else 100.0,
        "mm_bfloat16_gflops": 1e5 if cuda else 100.0,
        "cache_bytes": torch.cuda.get_device_properties(device).L2_cache_size if cuda else 2**25,
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes() -> int:
    """The size of the largest cache that Linux names, or 32 MiB where it names none."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=2**25)


def _mm_gflops(device: torch.device, dtype: torch.dtype, sizes: Sequence[int], seconds: float) -> float:
    best = 0.0
    for size in sizes:
        # Random values: a GPU multiplies zeros faster.
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        taken = _shortest(partial(torch.mm, a, b, out=out), device, seconds / len(sizes))
        best = max(best, 2 * size**3 / taken / 1e9)
    return best


def _copy_gb_s(device: torch.device, size: int, seconds: float) -> float:
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _shortest(lambda: target.copy_(source), device, seconds) / 1e9


def _launch_us(device: torch.device, seconds: float) -> float:
    one = torch.zeros(1, device=device)

    def thousand() -> None:
        for _ in range(1000):
            one.add_(1)

    return _shortest(thousand, device, seconds) * 1e3


def _shortest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    call()
    synchronize(device)
    end, best, count = time.perf_counter() + seconds, float("inf"), 1
    while True:
        began = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        best = min(best, (time.perf_counter() - began) / count)
        if time.perf_counter() > end:
            return best
        if device.type == "cuda":  # so many that launching and waiting do not count
            count = max(1, math.ceil(TOGETHER_S / best))
