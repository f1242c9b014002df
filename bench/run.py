"""Runs the cases: competitors checked, then timed in turns; one JSON, written anew after every case."""

import gc
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harlora.bench import ceilings, energy, machine, memory, peers
from harlora.bench.cases import DTYPES, Case, Contender, Layers, Plan, plan
from harlora.errors import InputError
from harlora.files import write_json
from harlora.kernels import cpp, tuning
from harlora.train.memory import step_peak_bytes
from harlora.train.runs import provenance

RESULT = "result.json"
FORMAT = 2
FLAGS = re.compile(r"avx2|fma|avx512f|avx512_bf16|avx512_vnni|avx512_fp16|avx_vnni|amx_\w+|asimd|sve2?|bf16|i8mm")

# A sample is at least this long: beyond the clock's resolution and the loop's cost, on a GPU beyond synchronising.
SAMPLE_S = {"cpu": 200e-6, "cuda": 2e-3}
# Before a sample: another's 64 MiB weight, freed, was seen to slow the next competitor's calls for about so long.
WARM_S = 1e-3
SECONDS = {"quick": 2.4, "standard": 2.4, "full": 1.5}  # for a case
ROUNDS = {"quick": 12, "standard": 20, "full": 9}
MOST_SECONDS = {"quick": 10.0, "standard": 60.0, "full": 60.0}
MINUTES = {"quick": 2.7, "standard": math.inf, "full": math.inf}
SWEEPS = {"quick": 4, "standard": 4, "full": 1}
# Rounds in the usual state that a ratio needs; with fewer, all rounds count and it is marked. So few, because two runs
# agree better on a few samples of that state than on many of a mixture.
FEW = 3
# Of a ratio: the spread from round to round from which on it is marked, and the width of its 95 % interval from which
# on its case is measured in further sweeps.
WIDE = 0.10
KEPT = 0.25  # share of the memory that models may hold from one sweep to the next
ENERGY_S = 0.3
BUSY = 0.03  # share of the cores' time from which on others disturb
METHOD = {
    "samples": "competitors take turns, in alternating order; each sample is the mean of `inner` calls, as many for all"
    " competitors of a case as take the fastest 200 us (a GPU: 2 ms, wall clock until all is done, launches included);"
    f" untimed calls for {1e3 * WARM_S:g} ms before each",
    "rounds": "until both the least number of rounds and the seconds of a case are reached, shared out over the sweeps;"
    " garbage collection is off",
    "sweeps": "cases are gone through more than once, so that a state the machine is in for some seconds does not meet"
    " one case alone; models that memory does not allow to keep are measured in the first sweep only. Up to as many"
    f" further sweeps go through the cases with a ratio whose 95 % interval is wider than {WIDE:.0%} of it",
    "state": "`machine`: the cores are looked at between samples. The usual state is that of the 95th percentile of"
    " multiply-adds and the 5th of handovers from core to core; samples between looks of which one saw less than"
    f" {machine.SLOWEST:g} of the former or more than {machine.FARTHEST:g} times the latter do not count,"
    f" unless fewer than {FEW} rounds would be left. `left_out_us` is their median, where there are as many",
    "ratio": "`over` in harlora's rows: median, 20th and 80th percentile of the other's sample / its own"
    " in the same round, over the rounds in which both count",
    "weights": "a layer of 2^24 weights or more is held weight_copies times by every competitor and the copies take"
    " turns, so that packed weights come from memory, not from the last cache; smaller ones and whole models are held"
    " once, as they are in use",
    "directions": "forward: inference, eval mode without gradients; backward: dX, dA, dB of a kept graph; both: train"
    " mode, forward then backward",
    "relative_error": "‖y - y64‖ / ‖y64‖, y64 in float64 with the competitor's own dequantised weights; in training"
    " the largest of those of y, dX, dA, dB; of a step of those of every lora_A, every lora_B and the head",
    "peak_bytes": "the most that one call holds at once through torch's allocator beyond what was there before; not of"
    " a step in a CUDA graph, whose memory stays. Scratch of compiled CPU kernels is not seen by it; the case"
    " `memory` sees everything: bytes beyond inputs, outputs, gradients and saved t, in a fresh process",
    "joules": f"of one call, one reading over {ENERGY_S} s of calls, each waited for, the machine's rest included;"
    " where minutes are given, of whole models alone",
    "captured": "a step in a CUDA graph is the graph's replay alone",
    "taken_by_others": "share of the used cores' time that other processes or the hypervisor took during the run",
}

Row = dict[str, Any]
Preset = Literal["quick", "standard", "full"]


@dataclass(frozen=True)
class Options:
    """What to measure, where, and for how long. The command line shows the texts below the fields."""

    preset: Preset = "standard"
    device: str = "cpu"
    """cpu, cuda or cuda:0."""
    cases: tuple[Literal["ceilings", "layer", "encoder", "step", "memory"], ...] = (
        "ceilings", "layer", "encoder", "step", "memory",
    )  # fmt: skip
    """Which kinds of cases."""
    shapes: tuple[str, ...] = ()
    """Layers, in_features x out_features, like 192x768; by default those of the preset."""
    rows: tuple[int, ...] = ()
    """Rows of a layer's input; by default those of the preset."""
    competitors: tuple[str, ...] = ()
    """Names as in the result, like "bitsandbytes + PEFT"; by default all, with --quick all but torchao."""
    minutes: float | None = None
    """Begin no case after so many minutes; what is left out is reported. By default 2.7 with --quick."""
    seconds: float | None = None
    """Time for a case, all competitors together; a slow case takes longer."""
    threads: int = 0
    """Threads, and CPU cores that the process is confined to; 0 is all cores."""
    command: str = "harlora bench"

    def checked_device(self) -> torch.device:
        """The device, after checking all options.

        Raises: InputError that names the option.
        """
        if self.device not in {"cpu", "cuda"} and not re.fullmatch(r"cuda:\d+", self.device):
            raise InputError(f"--device must be cpu, cuda or cuda:0, got {self.device!r}")
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device must be one of {torch.cuda.device_count()} GPUs, got {self.device}")
        for shape in self.shapes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
                raise InputError(f"--shapes must be like 192x768 (in_features x out_features), got {shape!r}")
        if min(self.rows, default=1) < 1:
            raise InputError(f"--rows must be at least 1, got {min(self.rows)}")
        for name in self.competitors:
            if name not in peers.COMPETITORS:
                raise InputError(f"--competitors must be of {', '.join(peers.COMPETITORS)}; got {name!r}")
        cores = len(_cores())
        if not 0 <= self.threads <= cores:
            raise InputError(f"--threads must be 1 to {cores}, the cores this process may use, got {self.threads}")
        for name, value in (("minutes", self.minutes), ("seconds", self.seconds)):
            if value is not None and not value > 0:
                raise InputError(f"--{name} must be above 0, got {value}")
        return device

    def plan(self, device: torch.device) -> Plan:
        """The preset's cases, with the sizes and competitors that were asked for."""
        chosen = plan(self.preset, device)
        layers = chosen.layers if "layer" in self.cases else ()
        if self.shapes or self.rows:
            kinds = dict.fromkeys((layer.direction, layer.dtype, layer.rank) for layer in layers)
            shapes = dict.fromkeys((layer.in_features, layer.out_features) for layer in layers)
            if self.shapes:
                shapes = dict.fromkeys((int(a), int(b)) for a, b in (shape.split("x") for shape in self.shapes))
            rows = self.rows or tuple(sorted({count for layer in layers for count in layer.rows}))
            layers = tuple(
                Layers(in_features, out_features, rows, direction, dtype, rank)
                for in_features, out_features in shapes
                for direction, dtype, rank in kinds
            )
        compiled_rows = self.rows or chosen.compiled_rows if self.preset != "quick" else chosen.compiled_rows
        if not compiled_rows and any(name.endswith("compiled") for name in self.competitors):
            compiled_rows = tuple(sorted({count for layer in layers for count in layer.rows}))
        models = chosen.models if {"encoder", "step"} & set(self.cases) else ()
        return Plan(
            layers, models, chosen.windows if "encoder" in self.cases else (), self.competitors or chosen.competitors,
            compiled_rows, steps="step" in self.cases,
        )  # fmt: skip


def measure(options: Options, file: Path, console: Console, more: Mapping[str, Any] | None = None) -> Row:
    """Runs everything and returns the result, which is also in ``file``: after every case, after Ctrl-C and an error.

    The result's ``complete`` is False after Ctrl-C (``stopped``), an error (``failed``), or when time was over.
    more: what else the result is to have.
    """
    device = options.checked_device()
    threads = options.threads or len(_cores())
    cores = _cores()[:threads]
    if hasattr(os, "sched_setaffinity"):
        # Before the first operator: threads take over the affinity of the one that starts them.
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    seconds, rounds = options.seconds or SECONDS[options.preset], ROUNDS[options.preset]
    sweeps, minutes = SWEEPS[options.preset], options.minutes or MINUTES[options.preset]
    everything: list[Measured] = []
    kept: list[Measured] = []
    held, room = 0, True
    watch = machine.Watch(cores if device.type == "cpu" else ())
    joules, source = energy.counter(device)
    chosen = options.plan(device)
    began, (busy, own) = time.perf_counter(), _spent_s(cores)
    result: Row = {
        "bench": "harlora", "format": FORMAT, "complete": False, "stopped": False,
        "provenance": surroundings(options, device), "competitors": peers.participants(device),
        "method": {**METHOD, "seconds": seconds, "least_rounds": rounds, "energy": source},
        "machine": {"watched": watch.note}, "ceilings": None, "rows": [], **(more or {}),
    }  # fmt: skip
    if math.isfinite(minutes):
        result["method"]["minutes"] = minutes

    def save() -> None:
        busy_now, own_now = _spent_s(cores)
        elapsed = time.perf_counter() - began
        foreign = ((busy_now - busy) - (own_now - own)) / elapsed / threads
        result["provenance"] |= {"taken_by_others": round(max(0.0, foreign), 4), "seconds": round(elapsed, 1)}
        write_json(file, result)

    memory_rows = [(name, count) for count in (1, 64) for name in (peers.OURS, peers.PEER)]
    if "memory" not in options.cases or device.type != "cpu":  # on a GPU peak_bytes sees everything
        memory_rows = []
    elif options.preset == "quick":
        memory_rows = memory_rows[2:]
    # Drawn between cases only: a thread that redraws takes time from what is measured.
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1 + sweeps * chosen.count() + len(memory_rows))

        def begin(what: str) -> None:
            bar.update(task, description=what, refresh=True)
            if not console.is_terminal:
                console.print(f"[{time.perf_counter() - began:5.0f} s] {what}", markup=False, highlight=False)

        def done(rows: list[Row]) -> None:
            result["rows"] += rows
            bar.advance(task)
            save()

        def over() -> bool:
            return time.perf_counter() - began > 60 * minutes

        try:
            if "ceilings" in options.cases:
                begin("ceilings")
                result["ceilings"] = ceilings.measure(device, cores, min(1.0, seconds))
            rates = result["ceilings"] or ceilings.guessed(device)
            done([])
            for name, count in memory_rows:
                begin(f"memory, {name}, M={count}")
                done([_memory(name, count, threads)])
            for case in chosen.cases(device, rates["cache_bytes"]):
                begin(where(case.facts))
                reason = f"left out: {minutes:g} minutes were over" if over() else ""
                # Forward and float64 reference included, by the rate of torch's own product.
                rate = rates[f"mm_{case.facts['dtype']}_gflops"]
                expected = case.facts.get("flop", 0) / rate / 1e9 * rounds * len(case.contenders)
                if expected > MOST_SECONDS[options.preset]:
                    reason = f"left out: would take about {expected / 60:.0f} minutes here"
                if reason:
                    done([{**case.facts, "competitor": name, "status": reason} for name in case.contenders])
                    continue
                measured = Measured(case, device, watch)
                measured.sample(seconds / sweeps, -(-rounds // sweeps))
                everything.append(measured)
                if joules is not None and options.preset != "quick" and ("model" in case.facts or minutes == math.inf):
                    measured.energy(joules)
                done(measured.rows)
                if case.held_bytes:  # by this case and those after it that say nothing
                    room = held + case.held_bytes < KEPT * _memory_bytes(device)
                    held += case.held_bytes * room
                if room:
                    kept.append(measured)
                else:
                    measured.release()
            for sweep in range(2, 2 * sweeps + 1):
                again = kept
                if sweep > sweeps:
                    again = [measured for measured in kept if measured.unsure()]
                    bar.update(task, total=(bar.tasks[task].total or 0) + len(again))
                for measured in again:
                    if not over():
                        begin(f"{where(measured.rows[0])}, sweep {sweep}")
                        measured.sample(seconds / sweeps, -(-rounds // sweeps) if sweep <= sweeps else 1)
                    done([])
            result["complete"] = not any(row["status"].endswith("were over") for row in result["rows"])
        except KeyboardInterrupt:
            result["stopped"] = True
            console.print("stopped; what was measured so far is kept", highlight=False)
        except Exception as error:
            result["failed"] = f"{type(error).__name__}: {without_folders(str(error))[:300]}"
            raise
        finally:
            for measured in everything:  # what is usual is known in the end
                measured.describe()
            result["machine"] = watch.facts()
            save()
    return result


class Sample(NamedTuple):
    seconds: float  # of a call
    looks: int  # at the machine, before it was taken


class Measured:
    """A case whose competitors are made and checked; every `sample` adds to what its rows say.

    rows: one for every competitor; one that is absent, raises or is wrong is not timed, and its ``status`` says so.
    """

    def __init__(self, case: Case, device: torch.device, watch: machine.Watch) -> None:
        self.rows: list[Row] = []
        self._device = device
        self._watch = watch
        self._gradients = nullcontext if case.grad else torch.no_grad
        self._calls: dict[str, Callable[[], object]] = {}
        self._samples: dict[str, list[Sample]] = {}
        self._inner = 0
        with self._gradients():
            for name, make in case.contenders.items():
                self.rows.append(row := {**case.facts, "competitor": name, "status": peers.absent(name) or "ok"})
                if row["status"] == "ok":
                    self._check(row, make)

    def _check(self, row: Row, make: Callable[[], Contender]) -> None:
        try:
            call, error = make()
            peak = step_peak_bytes(call, self._device)
        except Exception as problem:
            row["status"] = f"raised {type(problem).__name__}: {without_folders(str(problem))[:300]}"
            return
        limit = peers.error_limit(row["competitor"], DTYPES[row["dtype"]])
        row["relative_error"] = error if math.isfinite(error) else None  # JSON has no NaN
        if not error <= limit:
            row["status"] = f"wrong: relative error {error:.1g}, above {limit:g}"
            return
        row["peak_bytes"] = None if peers.COMPETITORS[row["competitor"]].captured else peak
        self._calls[row["competitor"]] = call
        self._samples[row["competitor"]] = []

    def sample(self, seconds: float, rounds: int) -> None:
        """Times the competitors in turns for ``seconds`` and at least ``rounds`` rounds."""
        if not self._calls:
            return
        with self._gradients():
            if not self._inner:
                gc.collect()  # what making the competitors left behind; in every sweep it would take longer than those
                self._inner = _inner(self._calls, self._device)
            _take_turns(self._calls, self._samples, self._inner, self._device, self._watch, seconds, rounds)
        self.describe()

    def describe(self) -> None:
        """Says in the rows what the samples come to, by what is now known of the machine's usual state."""
        for row in self.rows:
            own = self._samples.get(row["competitor"])
            if not own:
                continue
            times, unsteady = self._counting([sample.seconds for sample in own], own)
            row |= {f"{name}_us": 1e6 * value for name, value in _quantiles(times).items()}
            row |= {"rounds": len(times), "rounds_left_out": len(own) - len(times), "inner": self._inner, "over": {}}
            row["unsteady"] = unsteady
            others = [sample.seconds for sample in own if not self._watch.steady(sample.looks)]
            row["left_out_us"] = 1e6 * statistics.median(others) if len(others) >= FEW and not unsteady else None
            for name, rival in self._samples.items():
                if row["competitor"].startswith(peers.OURS) and name != row["competitor"]:
                    # Ctrl-C may have come in the middle of a round.
                    quotients = [other.seconds / one.seconds for one, other in zip(own, rival, strict=False)]
                    found, unsteady = self._counting(quotients, own, rival)
                    row["over"][name] = {**_quantiles(found), "rounds": len(found), "unsteady": unsteady}

    def _counting(self, values: Sequence[float], *of: Sequence[Sample]) -> tuple[list[float], bool]:
        """The values whose samples were taken in the usual state; all of them, and True, if those are too few."""
        steady = [
            value
            for value, *samples in zip(values, *of, strict=False)
            if all(self._watch.steady(sample.looks) for sample in samples)
        ]
        few = len(steady) < min(FEW, len(values))
        return (list(values), True) if few else (steady, False)

    def unsure(self) -> bool:
        """Whether a ratio of harlora's is not yet known as exactly as two runs need to agree."""
        for row in self.rows:
            for name, found in row.get("over", {}).items():
                if (name, row["competitor"]) in peers.COMPARED and uncertain(found):
                    return True
        return False

    def release(self) -> None:
        """Lets the models go; nothing can be sampled any more."""
        self._calls = {}

    def energy(self, joules: Callable[[], float]) -> None:
        """Adds the joules of a call to the rows."""
        with self._gradients():
            for row in self.rows:
                if row["competitor"] in self._calls:
                    row["joules"] = _joules(self._calls[row["competitor"]], joules, self._device)


def uncertain(found: Mapping[str, Any]) -> bool:
    """Whether the 95 % interval of a ratio, its rounds taken as independent, is wider than 10 % of it.

    found: what a row's ``over`` says of it. Too few rounds in the machine's usual state count as uncertain.
    """
    spread = (found["p80"] - found["p20"]) / found["median"]
    # Four standard errors of a median: each 1.25 standard deviations / √n, and 1.68 of those are the spread.
    return bool(found["unsteady"] or 4 * 1.25 / 1.68 * spread / math.sqrt(found["rounds"]) > WIDE)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": p20, "p80": p80}


def _lasts(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of a call, the mean of ``count``."""
    began = time.perf_counter()
    for _ in range(count):
        call()
    ceilings.synchronize(device)
    return (time.perf_counter() - began) / count


def _inner(calls: Mapping[str, Callable[[], object]], device: torch.device) -> int:
    """How many calls make a sample long enough."""
    for call in calls.values():
        call()
    ceilings.synchronize(device)
    fastest = min(min(_lasts(call, 1, device) for _ in range(5)) for call in calls.values())
    return max(1, math.ceil(SAMPLE_S[device.type] / fastest))


def _take_turns(
    calls: Mapping[str, Callable[[], object]], found: dict[str, list[Sample]], inner: int, device: torch.device,
    watch: machine.Watch, seconds: float, rounds: int,
) -> None:  # fmt: skip
    order, done = list(calls), 0
    gc.disable()
    watch.look(now=True)
    end = time.perf_counter() + seconds
    try:
        while done < rounds or time.perf_counter() < end:
            for name in order:
                looks = watch.look()
                warm = time.perf_counter() + WARM_S
                while True:
                    calls[name]()
                    ceilings.synchronize(device)
                    if time.perf_counter() > warm:
                        break
                found[name].append(Sample(_lasts(calls[name], inner, device), looks))
            order.reverse()
            done += 1
    finally:
        gc.enable()
        watch.look(now=True)


def where(facts: Mapping[str, Any]) -> str:
    """A case in words."""
    if facts["case"] == "memory":
        return f"memory {facts['in_features']}→{facts['out_features']}, M={facts['rows']}"
    if "model" in facts:
        return f"{facts['case']}, model {facts['model']}, {facts['windows']} window{'s' * (facts['windows'] > 1)}"
    words = [f"{facts['in_features']}→{facts['out_features']}", f"M={facts['rows']}", facts["direction"]]
    if facts["rank"] != peers.RANK:
        words.append(f"rank {facts['rank']}")
    return ", ".join([*words, facts["dtype"]])


def without_folders(text: str) -> str:
    """``text`` with absolute paths cut to their last part: a result does not say whose machine it is from."""
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", text)


def surroundings(options: Options, device: torch.device) -> Row:
    """Where and with what this is measured."""
    facts = provenance(device)
    facts["command"] = without_folders(options.command)
    facts["preset"] = options.preset
    # By `harlora doctor --tune`, for this very build: then the repository's table is not what is measured.
    facts["tuned"] = bool(tuning.table(device.type, cpp.extension_path()) or tuning.measured_configurations(device))
    cpu = _cpu()
    facts["cpu_mhz"], facts["cpu_flags"] = cpu.mhz, cpu.flags
    if device.type == "cpu":
        facts["device"] += cpu.model
    facts["kernel"] = platform.release()
    facts["threads"] = torch.get_num_threads()
    facts["cores_used"] = len(_cores())
    facts["seed"] = 0
    if Path("/proc/self/maps").exists():
        # Two OpenMP runtimes in one process keep two pools of threads, which can be in each other's way.
        mapped = Path("/proc/self/maps").read_text()
        facts["openmp"] = sorted(set(re.findall(r"/(lib(?:gomp|iomp5|omp)[^/\s]*)$", mapped, re.MULTILINE)))
    if device.type == "cuda":
        facts["versions"]["cuda"] = torch.version.cuda
        facts["gpu"] = _gpu(device)
    return facts


def _memory(name: str, count: int, threads: int) -> Row:
    row: Row = {
        "case": "memory", "in_features": memory.FEATURES, "out_features": memory.FEATURES, "rows": count,
        "competitor": name, "status": peers.absent(name) or "ok",
    }  # fmt: skip
    if row["status"] == "ok":
        try:
            row |= memory.measure(name, count, threads)
        except (RuntimeError, ValueError) as error:
            row["status"] = f"raised {without_folders(str(error))}"
    return row


def _joules(call: Callable[[], object], joules: Callable[[], float], device: torch.device) -> float:
    began, before, count = time.perf_counter(), joules(), 0
    while time.perf_counter() - began < ENERGY_S:
        call()
        ceilings.synchronize(device)
        count += 1
    return (joules() - before) / count


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _spent_s(cores: Sequence[int]) -> tuple[float, float]:
    """Seconds that some cores were busy or taken by the hypervisor, and seconds that this process used, since boot."""
    busy = 0.0
    names = {f"cpu{core}" for core in cores}
    for name, *ticks in _stat():
        if name in names:
            user, nice, system, _, _, *others = map(int, ticks[:8])  # idle and waiting for disks left out
            busy += (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4])  # children's included


def _stat() -> Iterator[list[str]]:
    file = Path("/proc/stat")
    if file.exists():
        yield from (line.split() for line in file.read_text().splitlines())


class _Cpu(NamedTuple):
    mhz: float | None  # the cores' mean clock now
    flags: list[str]  # the instruction sets that matter here
    model: str  # behind the name, which several generations share: ", family 25, model 17"


def _cpu() -> _Cpu:
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*: ([\d.]+)$", text, re.MULTILINE)]
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    known = [flag for flag in (flags[1].split() if flags else []) if FLAGS.fullmatch(flag)]
    numbers = [re.search(rf"^{name}\s*: (\d+)$", text, re.MULTILINE) for name in ("cpu family", "model")]
    model = ", family {}, model {}".format(*(found[1] for found in numbers if found)) if all(numbers) else ""
    return _Cpu(round(statistics.mean(clocks), 1) if clocks else None, known, model)


def _gpu(device: torch.device) -> Row:
    """What nvidia-smi says of the card: driver, clocks, power."""
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    properties = torch.cuda.get_device_properties(device)
    facts: Row = {
        "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", uuid]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return facts | {"nvidia_smi": f"not available ({type(error).__name__})"}
    return facts | dict(zip(asked, (value.strip() for value in said.split(",")), strict=False))
