"""What this machine can do at most, measured in the same run: multiply-adds, torch's product, copying memory."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
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


def measure(threads: int, seconds: float) -> dict[str, Any]:
    """The ceilings for ``threads`` threads; the best of what ``seconds`` allow for each, since they are ceilings.

    copy_gb_s counts bytes read and bytes written, as STREAM does.
    """
    fma, note = _fma_gflops(threads)
    return {
        "threads": threads,
        "fma_float32_gflops": fma,
        "fma_note": note,
        "mm_float32_gflops": max(_mm_gflops(size, seconds / 3) for size in (512, 1024, 2048)),
        "copy_gb_s": _copy_gb_s(seconds),
    }


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


def _mm_gflops(size: int, seconds: float) -> float:
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return 2 * size**3 / _shortest(lambda: torch.mm(a, b, out=out), seconds) / 1e9


def _copy_gb_s(seconds: float) -> float:
    source, target = torch.ones(2**26), torch.ones(2**26)  # 256 MiB each, beyond any cache
    return 2 * source.nbytes / _shortest(lambda: target.copy_(source), seconds) / 1e9


def _shortest(call: Callable[[], object], seconds: float) -> float:
    call()
    end, best = time.perf_counter() + seconds, float("inf")
    while True:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() > end:
            return best
