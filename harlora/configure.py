"""Which configuration of Triton's kernels is fastest on a GPU, by size: what ``harlora doctor --tune`` measures."""

import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from harlora.kernels import configurations, cuda, dispatch, replay
from harlora.kernels.configurations import Configuration, Rule

Report = Callable[[int, int, str], None]

# (in_features, out_features) and up to how many values of a weight what is measured with it counts.
WEIGHTS: tuple[tuple[tuple[int, int], int | None], ...] = (
    ((192, 512), 2**17), ((768, 768), 2**20), ((768, 3072), 2**22), ((4096, 4096), 2**25), ((8192, 8192), None),
)  # fmt: skip
ROWS: tuple[int | None, ...] = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, None)
MANY_ROWS = 8192  # measured for what has no limit
WINDOWS: tuple[int | None, ...] = (1, 8, 32, 64, 128, None)  # of an encoder
MANY_WINDOWS = 256  # of which Triton's launches take more in parts
RANK = 16
CALLS = 8  # in one sample, at least
DTYPES = (torch.bfloat16, torch.float32)
MOST_COMPILERS = 16  # processes; each takes several hundred MiB for torch


def measure(
    device: torch.device,
    report: Report | None = None,
    *,
    weights: Sequence[tuple[tuple[int, int], int | None]] = WEIGHTS,
    rows: Sequence[int | None] = ROWS,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The rules for ``device`` by title, as a table has them, and every measurement they come from.

    Candidates are compared with the reference before they are timed, and left out if they spill registers on this GPU.
    They take turns, and are timed as a captured graph of several calls over several copies of the weight, so that
    neither Python nor the last cache is what is measured.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    measured: list[dict[str, Any]] = []
    jobs = [(operator, dtype) for operator in configurations.OPERATORS for dtype in dtypes]
    total = len(jobs) * len(weights) * len(rows)
    for operator, dtype in jobs:
        title = f"{operator} {8 * dtype.itemsize}"
        rules: list[Rule] = []
        taken: dict[str, float] = {}
        for shape, most_weights in weights:
            for most_rows in rows:
                if report is not None:
                    report(len(measured), total, f"{title}, {shape[0]}→{shape[1]}")
                count = most_rows or MANY_ROWS
                candidates = configurations.candidates(operator, dtype, count)
                taken = times(operator, device, dtype, count, shape, candidates, worth=True)
                measured.append({"title": title, "shape": list(shape), "rows": count, "times_us": taken})
                if taken:
                    best = min(taken, key=taken.__getitem__)
                    rules.append(Rule(_candidate(operator, dtype, count, best), most_rows, most_weights))
        if rules and rules[-1].use.way in configurations.CUDA_WAYS:  # which do not serve all that comes to the last
            others = [each for each in candidates if each.way in configurations.WAYS and str(each) in taken]
            rules += [Rule(min(others, key=lambda each: taken[str(each)]))] if others else []
        if rules and rules[-1].rows is rules[-1].weights is None and rules[-1].use.way in configurations.WAYS:
            table[title] = [rule.to_json() for rule in rules]
    return table, measured


def measure_encoders(
    device: torch.device, sizes: tuple[int, int, int, int, int], report: Report | None = None, *,
    windows: Sequence[int | None] = WINDOWS,
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:  # fmt: skip
    """As `measure`: whether, and how, all blocks of an encoder are one launch, by rows of x in all.

    sizes: tokens of a window, heads, width, out_features of fc1, and blocks.
    """
    title = "encoder_blocks 16"
    rules, measured = [], []
    for done, most in enumerate(windows):
        if report is not None:
            report(done, len(windows), title)
        x, *blocks = dispatch.problem_of_encoder(
            device, torch.bfloat16, most or MANY_WINDOWS, *sizes, RANK, "nf4", 64, False
        )
        taken = _in_turn(_encoder_samples(x, blocks, device))
        rows = x.shape[0] * x.shape[1]
        measured.append({"title": title, "shape": list(x.shape[1:]), "rows": rows, "times_us": taken})
        if taken:
            best = min(taken, key=lambda name: taken[name])
            chosen = next(each for each in configurations.ENCODER_CANDIDATES if str(each) == best)
            rules.append(Rule(chosen, None if most is None else rows))
    if not any(rule.use.way == "encoder" for rule in rules):
        return {}, measured
    if rules[-1].rows is not None or rules[-1].use.way == "encoder":
        rules.append(Rule(Configuration("launches")))
    return {title: [rule.to_json() for rule in rules]}, measured


def _encoder_samples(x: torch.Tensor, blocks: list[Any], device: torch.device) -> dict[str, Callable[[], float]]:
    layers, norm, heads = blocks
    samples = {}
    clusters = device.type == "cuda" and cuda.has_clusters(device)
    for candidate in (each for each in configurations.ENCODER_CANDIDATES if each.parts <= 1 or clusters):
        if candidate.way == "launches":
            functions = dispatch.encoder_launches(x, layers, heads, False)
            encode = functions[0] if functions else None
        else:
            right = dispatch.encodes(candidate, x, layers, norm, heads)
            encode = dispatch.launcher("encoder_blocks", candidate) if right else None
        if encode is not None:
            samples[str(candidate)] = _sampler([partial(encode, x, layers, norm, heads, False)], device)
    return samples


def _candidate(operator: str, dtype: torch.dtype, rows: int, name: str) -> Configuration:
    return next(each for each in configurations.candidates(operator, dtype, rows) if str(each) == name)


def times(
    operator: str, device: torch.device, dtype: torch.dtype, rows: int, shape: tuple[int, int],
    candidates: Sequence[Configuration], *, worth: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Microseconds a call of each candidate that is right and runs, the median over rounds in which they take turns.

    worth: leave out those that a rule would not be followed for, `cuda.worth`.
    """
    in_features, out_features = shape
    copies = _copies(device, in_features * out_features)
    calls = [
        dispatch.problem(operator, device, dtype, rows, in_features, out_features, RANK, "nf4", 64, False, seed=seed)
        for seed in range(copies)
    ]
    samples: dict[str, Callable[[], float]] = {}
    for candidate in candidates:
        if candidate.way in configurations.CUDA_WAYS and not cuda.serves(operator, candidate.way, *calls[0]):
            continue
        if worth and not cuda.worth(candidate, *calls[0]):
            continue
        launch = dispatch.launcher(operator, candidate)
        first = partial(launch, *calls[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what does not fit this GPU; it is left out
            if dispatch.serves(operator, candidate, *calls[0]) and not _spills(first):
                samples[str(candidate)] = _sampler([partial(launch, *call) for call in calls], device)
    return _in_turn(samples)


def _in_turn(samples: dict[str, Callable[[], float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in samples}
    order = list(samples)
    for number in range(12):
        for name in order:
            taken = samples[name]()
            if number:  # the first warms up
                found[name].append(taken)
        order.reverse()
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def _spills(call: Callable[[], object]) -> bool:
    """Whether a kernel that ``call`` launches has not registers enough and keeps some of them in memory."""
    with replay.launches() as launched:
        call()
    return any(kernel.n_spills for kernel, *_ in launched)


def _copies(device: torch.device, weights: int) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, math.ceil(2 * cache / (weights * 9 / 16)))) if weights >= 2**22 else 1


def _sampler(calls: list[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """A function that times calls in turn and returns the microseconds of one."""
    in_turn = [calls[i % len(calls)] for i in range(max(CALLS, len(calls)))]  # every copy, past what the cache holds
    if device.type != "cuda":

        def clocked() -> float:
            began = time.perf_counter()
            in_turn[0]()
            return 1e6 * (time.perf_counter() - began)

        return clocked
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for call in in_turn:
            call()

    def replayed() -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        return 1e3 * before.elapsed_time(after) / len(in_turn)

    return replayed


# Compiling ----------------------------------------------------------------------------------------------------------


def compile_ahead(device: torch.device, report: Report | None = None) -> int:
    """Compile what `measure` will launch, several kernels at a time, into Triton's cache on disk; returns how many.

    The candidates are called without being compiled or launched, and what Triton would have compiled for ``device`` is
    sent to processes that do not touch it. One shape stands for all: kernels are compiled for the divisors of sizes.
    """
    from triton.runtime import driver

    target = driver.active.get_current_target()
    wanted = _wanted(device)
    # What was called without its launches must not be repeated from what was recorded meanwhile.
    replay.reset()
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used a GPU cannot do without it
    count = max(1, min(MOST_COMPILERS, os.cpu_count() or 1, len(wanted)))
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures = [pool.submit(_compile, target, *each) for each in wanted]
        for done, future in enumerate(as_completed(futures)):
            if report is not None:
                report(done, len(futures), "compiling")
            # One that does not compile is met again, and left out, where it would be measured.
            if isinstance(future.exception(), BrokenProcessPool):
                warnings.warn(
                    f"harlora: a process that compiles kernels ahead ended ({future.exception()}); the others are "
                    "compiled one by one",
                    RuntimeWarning,
                    stacklevel=2,
                )
                break
    return sum(future.exception() is None for future in futures)


def _wanted(device: torch.device) -> list[tuple[str, str, str]]:
    """Each kernel that calls of the candidates launch: its module, its name, and how, as Triton serialises it."""
    from triton import knobs

    found: dict[tuple[str, str, str], None] = {}

    def note(*, fn: Any, **given: Any) -> bool:
        found[fn.module, fn.name, given["compile"]["specialization_data"]] = None
        return True  # do not compile, nor launch

    with patch.object(knobs.runtime, "jit_cache_hook", note):
        for operator, dtype, rows in product(configurations.OPERATORS, DTYPES, ROWS):
            size = (rows or MANY_ROWS, *WEIGHTS[0][0], RANK, "nf4", 64, False)
            call = dispatch.problem(operator, device, dtype, *size)
            for candidate in configurations.candidates(operator, dtype, size[0]):
                if candidate.way in configurations.WAYS:  # what CUDA C++ has is compiled
                    dispatch.launcher(operator, candidate)(*call)
    return list(found)


def _compile(target: Any, module: str, name: str, launch: str) -> None:
    """Compile a kernel for the GPU that is ``target``, which need not be here."""
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_current_target=lambda: target))
    getattr(import_module(module), name).preload(launch)


# Result -------------------------------------------------------------------------------------------------------------


def of_table(
    operator: str, device: torch.device, dtype: torch.dtype, rows: int, shape: Sequence[int]
) -> Configuration:  # fmt: skip
    """What the table has for such a call: for a layer of whole blocks, or for an encoder's blocks."""
    if operator == "encoder_blocks":
        return dispatch.encoder_way(device, dtype, rows)

    def can(configuration: Configuration) -> bool:
        in_features, out_features = shape
        weight = torch.empty(1, dtype=torch.uint8, device=device).expand(in_features * out_features // 2, 1)
        arguments: tuple[Any, ...] = (weight, weight, None, None, "nf4", 64)
        if operator == "qlora_linear":
            width, arguments = in_features, (*arguments, out_features, None, None, None, 1.0)
        else:
            mask = (True, False, False, False)
            width, arguments = out_features, (None, None, *arguments, in_features, None, None, 1.0, mask)
        arguments = (torch.empty(1, dtype=dtype, device=device).expand(rows, width), *arguments)
        return cuda.serves(operator, configuration.way, *arguments) and cuda.worth(configuration, *arguments)

    return dispatch.configuration(operator, device, dtype, rows, math.prod(shape), can)


def gain(device: torch.device, measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By title, the time of the fastest over that of the table's configuration, the geometric mean over the sizes."""
    found: dict[str, dict[str, float]] = {}
    for title in dict.fromkeys(case["title"] for case in measured):
        ratios = []
        operator, bits = title.split()
        dtype = torch.float32 if bits == "32" else torch.bfloat16
        for case in (each for each in measured if each["title"] == title):
            before = case["times_us"].get(str(of_table(operator, device, dtype, case["rows"], case["shape"])))
            if before:
                ratios.append(min(case["times_us"].values()) / before)
        if ratios:
            found[f"configurations of {title}"] = {
                "before": 1.0, "fastest": round(statistics.geometric_mean(ratios), 4)
            }  # fmt: skip
    return found
