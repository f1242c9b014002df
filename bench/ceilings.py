"""What this machine can do at most, measured in the same run: multiply-adds, torch's product, copies, launches."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Independent multiply-adds in registers. As many accumulators as registers allow: four cycles of latency times two
# units need eight, and the more the less the loop costs.
_FMA = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__AVX512F__)
enum { BYTES = 64, COUNT = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, COUNT = 12 };
#else
enum { BYTES = 16, COUNT = 12 };
#endif
typedef float vector __attribute__((vector_size(BYTES)));

static const long STEPS = 20000000;
static pthread_barrier_t ready;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *work(void *sum) {
  vector a[COUNT], b, c;
  for (int i = 0; i < COUNT; ++i) a[i] = (vector){0} + (float)i;
  b = (vector){0} + 1.000001f;
  c = (vector){0} + 1e-9f;
  pthread_barrier_wait(&ready);
  for (long k = 0; k < STEPS; ++k) {
    _Pragma("GCC unroll 24") for (int i = 0; i < COUNT; ++i) a[i] = a[i] * b + c;
    __asm__ volatile("");
  }
  for (int i = 0; i < COUNT; ++i) *(float *)sum += a[i][0];
  return NULL;
}

int main(int argc, char **argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 1;
  pthread_t id[threads];
  float sum[threads];
  pthread_barrier_init(&ready, NULL, threads + 1);
  for (int i = 0; i < threads; ++i) sum[i] = 0, pthread_create(&id[i], NULL, work, &sum[i]);
  double began = now();  // before the barrier: whoever passes it first may start before this thread runs again
  pthread_barrier_wait(&ready);
  for (int i = 0; i < threads; ++i) pthread_join(id[i], NULL);
  double seconds = now() - began;
  fprintf(stderr, "%g\n", sum[0]);  // so that nothing is optimised away
  printf("%.6g\n", threads * (double)STEPS * COUNT * 2 * (BYTES / 4) / seconds / 1e9);
}
"""


def measure(device: torch.device, threads: int, seconds: float) -> dict[str, Any]:
    """The ceilings of ``device``, for ``threads`` threads of a CPU; the best of what ``seconds`` allow for each.

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
    fma, note = _fma_gflops(threads)
    return {
        "threads": threads,
        "fma_float32_gflops": fma,
        "fma_note": note,
        "mm_float32_gflops": _mm_gflops(device, torch.float32, (512, 1024, 2048), seconds),
        "mm_bfloat16_gflops": _mm_gflops(device, torch.bfloat16, (512, 1024, 2048), seconds),
        "copy_gb_s": _copy_gb_s(device, 2**28, seconds),
        "launch_us": _launch_us(device, seconds / 4),
        "cache_bytes": _cache_bytes(),
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


def _fma_gflops(threads: int) -> tuple[float | None, str]:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "skipped: no C compiler here"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "fma.c", Path(folder) / "fma"
        source.write_text(_FMA)
        built = subprocess.run(
            [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-pthread", str(source), "-o", str(program)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if built.returncode:
            said = [line for line in built.stderr.splitlines() if "error:" in line]
            return None, "skipped: the C compiler failed: " + (said[0].partition("error: ")[2] if said else "no reason")
        rates = [
            float(subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)
        ]
    return max(rates), f"a C program, {Path(compiler).name} -O3 -march=native"


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
    end, best = time.perf_counter() + seconds, float("inf")
    while True:
        began = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() > end:
            return best
