"""Times the layers on this CPU against bitsandbytes with PEFT, and against float32.

    python bench/cpu.py                        everything: some minutes on two cores
    python bench/cpu.py --quick                a look: few sizes, few rounds
    python bench/cpu.py --cases layer --shapes 192x768 --rows 1 64

Competitors, and what is exactly compared: peers.py. Writes one JSON and prints every ratio beside its target.
"""

import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import ceilings
import memory
import peers
import torch
import tyro
from cases import COPIES, LARGE, Case, encoder_cases, layer_cases, step_cases
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from harlora.files import write_json
from harlora.kernels import cpp, dispatch
from harlora.train.runs import provenance

SHAPES = ("192x192", "192x512", "512x192", "192x768", "4096x4096")
ROWS = (1, 8, 16, 32, 64, 128, 512, 2048)
FLAGS = re.compile(r"avx2|fma|avx512f|avx512_bf16|avx512_vnni|avx512_fp16|amx_\w+|asimd|sve2?|bf16|i8mm")

SAMPLE_S = 200e-6  # a sample is at least this long, which the clock's resolution and the loop do not touch
MEMORY_TARGET = 2 * 2**20
BUSY = 0.03  # share of the cores' time from which on others disturb
METHOD = {
    "samples": "competitors take turns, in alternating order; each sample is the mean of `inner` calls, as many for all"
    " competitors of a case as take the fastest 200 us; one untimed call before each",
    "rounds": "until both the least number of rounds and the seconds of a case are reached; garbage collection is off",
    "weights": f"a layer of {LARGE} weights or more is held {COPIES} times (weight_copies) by every"
    " competitor and the copies take turns, so that the packed weight does not stay in a cache between calls; smaller"
    " ones and whole models are held once",
    "relative_error": "‖y - y64‖ / ‖y64‖, y64 in float64 with the competitor's own dequantised weights; for a step:"
    " of the gradients of all trainable parameters, head dropout off",
    "taken_by_others": "share of the used cores' time that other processes or the hypervisor took during the run",
    "ratio": "median of the competitor (`over`) / median of `of`",
    "memory": "bytes beyond inputs, outputs, gradients and saved t, in a fresh process",
}

VERDICTS = {True: "reached", False: "MISSED", None: "not comparable"}

Row = dict[str, Any]
say = Console(stderr=True)


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long."""

    cases: tuple[Literal["layer", "encoder", "step", "memory", "ceilings"], ...] = (
        "layer", "encoder", "step", "memory", "ceilings",
    )  # fmt: skip
    """Which cases."""
    shapes: tuple[str, ...] = ()
    """Layers, in_features x out_features; by default 192x192 192x512 512x192 192x768 4096x4096."""
    rows: tuple[int, ...] = ()
    """Rows of a layer's input; by default 1 8 16 32 64 128 512 2048."""
    models: tuple[Literal["A", "B"], ...] = ()
    """Whole models: A has FFN 512 and 16 tokens, B has FFN 384 and 8; by default both."""
    windows: tuple[int, ...] = (1, 64)
    """Windows an encoder takes at once."""
    seconds: float | None = None
    """Time for a case, all competitors together; by default 1.5. A slow case takes longer, for 15 rounds."""
    quick: bool = False
    """192x192 and 4096x4096 with 1 and 64 rows, model B, 0.2 seconds and 5 rounds, unless given."""
    threads: int = 0
    """Threads, and cores that the process is confined to; 0 is all cores."""
    out: Path | None = None
    """The result; by default bench/results/cpu/<time>.json."""

    def sizes(self) -> list[tuple[int, int]]:
        shapes = self.shapes or (("192x192", "4096x4096") if self.quick else SHAPES)
        for shape in shapes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
                sys.exit(f"--shapes must be like 192x768 (in_features x out_features), got {shape!r}")
        return [(int(a), int(b)) for a, b in (shape.split("x") for shape in shapes)]

    def check(self) -> None:
        self.sizes()
        if not self.cases:
            sys.exit("--cases must name at least one case")
        if min((*self.rows, *self.windows), default=1) < 1:
            sys.exit("--rows and --windows must be at least 1")
        cores = len(os.sched_getaffinity(0))
        if not 0 <= self.threads <= cores:
            sys.exit(f"--threads must be 1 to {cores}, the cores this process may use, got {self.threads}")

    def planned(self) -> Iterator[Case]:
        if "layer" in self.cases:
            yield from layer_cases(self.sizes(), self.counts())
        if "encoder" in self.cases:
            yield from encoder_cases(self.whole(), self.windows)
        if "step" in self.cases:
            yield from step_cases(self.whole())

    def planned_count(self) -> int:
        counts = {
            "layer": len(self.sizes()) * len(self.counts()),
            "encoder": len(self.whole()) * len(self.windows),
            "step": len(self.whole()),
            "memory": 2 * len(self.memory_rows()),
            "ceilings": 1,
        }
        return sum(counts[name] for name in self.cases)

    def counts(self) -> tuple[int, ...]:
        return self.rows or ((1, 64) if self.quick else ROWS)

    def whole(self) -> tuple[str, ...]:
        return self.models or (("B",) if self.quick else ("A", "B"))

    def memory_rows(self) -> tuple[int, ...]:
        return (64,) if self.quick else (1, 64)


def target(facts: Mapping[str, Any], over: str) -> float | None:
    """What H's lead over a competitor is to be at least, if anything."""
    if facts["case"] == "step":
        return {"P": 2.2, "D": 1.6}[over]
    if facts["case"] == "encoder":
        return {1: {"P": 10.0, "D": 6.0, "F": 3.0}, 64: {"P": 3.2, "D": 1.8, "F": 1.2}}.get(facts["windows"], {}).get(
            over
        )
    shape, rows = (facts["in_features"], facts["out_features"]), facts["rows"]
    if shape == (4096, 4096):
        if over == "D":
            return 2.0 if rows == 1 else 1.0
        return 1.6 if rows == 1 else 2.0 if 8 <= rows <= 128 else 1.5
    if over == "D":
        return 1.0
    if shape in ((192, 192), (192, 768)) and rows in (1, 64):
        return {1: 8.0, 64: 3.0}[rows]
    return 1.5 if rows <= 2048 else None


def samples_s(
    calls: Mapping[str, Callable[[], object]], seconds: float, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds a call of every sample, by competitor, and the calls in a sample."""

    def lasts(call: Callable[[], object], count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count

    for call in calls.values():
        call()
    fastest = min(min(lasts(call, 1) for _ in range(5)) for call in calls.values())
    inner = max(1, math.ceil(SAMPLE_S / fastest))
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    order, done = list(calls), 0
    gc.collect()
    gc.disable()
    try:
        while done < rounds or time.perf_counter() < end:
            for name in order:
                # Brings back what the competitor before took from the caches.
                calls[name]()
                found[name].append(lasts(calls[name], inner))
            order.reverse()
            done += 1
    finally:
        gc.enable()
    return found, inner


def run_case(case: Case, seconds: float, rounds: int) -> list[Row]:
    """A row for every competitor; one that raises or is wrong is not timed, and its row says so in ``status``."""
    rows: dict[str, Row] = {}
    calls = {}
    for name, make in case.contenders.items():
        rows[name] = {**case.facts, "competitor": name, "status": "ok"}
        try:
            contender = make()
        except Exception as error:
            rows[name]["status"] = without_folders(f"raised {type(error).__name__}: {error}")
            continue
        finite = math.isfinite(contender.relative_error)
        rows[name]["relative_error"] = contender.relative_error if finite else None  # JSON has no NaN
        if finite and contender.relative_error <= peers.ERROR_LIMIT[name]:
            calls[name] = contender.call
        else:
            rows[name]["status"] = f"wrong: relative error above {peers.ERROR_LIMIT[name]:g}"
    if calls:
        with nullcontext() if case.grad else torch.no_grad():
            found, inner = samples_s(calls, seconds, rounds)
        for name, times in found.items():
            p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
            rows[name] |= {
                "median_us": 1e6 * statistics.median(times), "p20_us": 1e6 * p20, "p80_us": 1e6 * p80,
                "rounds": len(times), "inner": inner,
            }  # fmt: skip
    return list(rows.values())


def run_memory(name: str, count: int, threads: int) -> Row:
    row = {
        "case": "memory", "in_features": memory.FEATURES, "out_features": memory.FEATURES, "rows": count,
        "competitor": name, "status": "ok",
    }  # fmt: skip
    try:
        row |= memory.measure(name, count, threads)
    except (RuntimeError, ValueError) as error:
        row["status"] = without_folders(f"raised {error}")
    if name == "H":
        measured = [row.get("extra_native_bytes"), row.get("extra_torch_bytes")]
        row["target_bytes"] = MEMORY_TARGET
        row["reached"] = None if None in measured else max(measured) < MEMORY_TARGET
    return row


def ratios(rows: Sequence[Row]) -> list[Row]:
    """H's lead over every other competitor of each case, H16's and H8's over P; None where either was not timed."""
    found = []
    ours: dict[str, Row] = {}
    for row in rows:
        name = row["competitor"]
        if row["case"] == "memory" or name in peers.PRECISIONS:  # these come first in every case
            ours = {name: row} if name == "H" else {**ours, name: row}
            continue
        facts = {
            key: row[key] for key in ("case", "in_features", "out_features", "rows", "model", "windows") if key in row
        }
        for of in peers.PRECISIONS if name == "P" else ("H",):
            if of not in ours:
                continue
            aim = target(row, name) if of == "H" else None
            timed = "median_us" in row and "median_us" in ours[of]
            ratio = row["median_us"] / ours[of]["median_us"] if timed else None
            # Against one that gave no right answer nothing is reached and nothing missed; H's own failure is a miss.
            comparable = aim is not None and ("median_us" in row or "median_us" not in ours[of])
            reached = (ratio is not None and ratio >= aim) if comparable else None
            found.append({**facts, "of": of, "over": name, "ratio": ratio, "target": aim, "reached": reached})
    return found


def without_folders(text: str) -> str:
    """``text`` with absolute paths cut to their last part: a result does not say whose machine it is from."""
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", text)


def surroundings(options: Options) -> Row:
    """Where and with what this is measured."""
    facts = provenance(torch.device("cpu"))
    facts["command"] = without_folders(" ".join(["python bench/cpu.py", *sys.argv[1:]]))
    facts["versions"] |= {name: version(name) for name in ("bitsandbytes", "peft")}
    information = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", information, re.MULTILINE)
    facts["cpu_flags"] = [flag for flag in (flags[1].split() if flags else []) if FLAGS.fullmatch(flag)]
    facts["threads"] = torch.get_num_threads()
    facts["cores_used"] = len(os.sched_getaffinity(0))
    # Two OpenMP runtimes in one process keep two pools of threads, which can be in each other's way.
    mapped = Path("/proc/self/maps").read_text()
    facts["openmp"] = sorted(set(re.findall(r"/(lib(?:gomp|iomp5|omp)[^/\s]*)$", mapped, re.MULTILINE)))
    facts["seed"] = 0
    return facts | {"quick": options.quick}


def serving() -> dict[str, str]:
    """Which kernels compute H and P."""
    reason = cpp.load_extension()
    compiled = dispatch.select("qlora_linear", torch.device("cpu"), torch.float32) is cpp.qlora_linear
    ours = (
        f"cpp, {cpp.selected_kernels()}"
        if compiled
        else f"reference ({reason or 'HARLORA_BACKEND, or a failed probe'})"
    )
    return {"H": ours, "P": peers.bitsandbytes_kernel()}


def spent_s(cores: Sequence[int]) -> tuple[float, float]:
    """Seconds that some cores were busy or taken by the hypervisor, and seconds that this process used, since boot."""
    busy = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in {f"cpu{core}" for core in cores}:
            user, nice, system, _, _, *others = map(int, ticks[:8])  # idle and waiting for disks left out
            busy += (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4])  # children's included


def where(row: Row) -> str:
    if "model" in row:
        return f"model {row['model']}, {row['windows']} windows"
    return f"{row['in_features']}×{row['out_features']}, M={row['rows']}"


def show(result: Row, console: Console) -> None:
    """Every ratio with its target, reached or not, then memory, ceilings, and who was wrong."""
    table = Table(box=box.SIMPLE, title=f"Times of a call in µs; kernels of H: {result['kernels']['H']}")
    for column in ("case", "of", "over", "its time", "other", "its error", "other", "ratio", "target", ""):
        table.add_column(column, justify="left" if column in ("case", "of", "over", "") else "right")
    by_key = {(row["case"], where(row), row["competitor"]): row for row in result["rows"]}

    def number(row: Row, key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    for entry in result["ratios"]:
        ours, other = (by_key[entry["case"], where(entry), name] for name in (entry["of"], entry["over"]))
        table.add_row(
            f"{entry['case']} {where(entry)}", entry["of"], entry["over"], number(ours, "median_us", ".1f"),
            number(other, "median_us", ".1f"), number(ours, "relative_error", ".0e"),
            number(other, "relative_error", ".0e"), number(entry, "ratio", ".2f"), number(entry, "target", "g"),
            "" if entry["target"] is None else VERDICTS[entry["reached"]],
        )  # fmt: skip
    if result["ratios"]:
        console.print(table)
        for name, title in peers.TITLES.items():
            console.print(f"{name}  {title}", markup=False, highlight=False)
    for row in result["rows"]:
        if row["case"] == "memory" and row["status"] == "ok":
            native, held = (
                "not measured" if row[key] is None else f"{row[key] / 2**20:.2f} MiB"
                for key in ("extra_native_bytes", "extra_torch_bytes")
            )
            verdict = {True: "reached", False: "MISSED", None: "not known"}[row["reached"]] if "reached" in row else ""
            console.print(
                f"memory {row['competitor']} {where(row)}: {native} resident, {held} through torch"
                + (f"; target below {MEMORY_TARGET / 2**20:g} MiB: {verdict}" if verdict else ""),
                markup=False, highlight=False,
            )  # fmt: skip
        elif row["status"] != "ok":
            console.print(f"{row['case']} {where(row)}, {row['competitor']}: {row['status']}", markup=False)
    if result["ceilings"]:
        rates = result["ceilings"]
        fma = rates["fma_note"] if rates["fma_float32_gflops"] is None else f"{rates['fma_float32_gflops']:.0f} GFLOP/s"
        console.print(
            f"ceilings, {rates['threads']} threads: multiply-adds {fma}; torch.mm {rates['mm_float32_gflops']:.0f} "
            f"GFLOP/s; copy {rates['copy_gb_s']:.1f} GB/s", markup=False, highlight=False,
        )  # fmt: skip
    judged = [entry["reached"] for entry in (*result["ratios"], *result["rows"]) if entry.get("reached") is not None]
    taken = result["provenance"]["taken_by_others"]
    # Threads that wait for each other lose whole time slices, milliseconds, to whatever else runs.
    if taken > BUSY:
        console.print(f"NOT A MEASUREMENT: other processes took {taken:.0%} of the cores; repeat it on a quiet machine")
    console.print(f"{sum(judged)} of {len(judged)} targets reached", markup=False, highlight=False)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    options.check()
    cores = sorted(os.sched_getaffinity(0))
    threads = options.threads or len(cores)
    # Before the first operator: threads take over the affinity of the one that starts them.
    os.sched_setaffinity(0, cores[:threads])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    seconds = options.seconds if options.seconds is not None else 0.2 if options.quick else 1.5
    rounds = 5 if options.quick else 15
    result: Row = {
        "bench": "cpu", "provenance": surroundings(options), "kernels": serving(), "competitors": peers.TITLES,
        "method": {**METHOD, "seconds": seconds, "least_rounds": rounds}, "ceilings": None, "rows": [], "ratios": [],
    }  # fmt: skip
    began, (busy, own) = time.perf_counter(), spent_s(cores[:threads])
    # Drawn between cases only: a thread that redraws takes time from what is measured.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say, auto_refresh=False, transient=True, disable=not say.is_terminal) as bar:
        task = bar.add_task("", total=options.planned_count())

        def begin(what: str) -> None:
            bar.update(task, description=what, refresh=True)
            if not say.is_terminal:
                say.print(what, markup=False, highlight=False)

        if "ceilings" in options.cases:
            begin("ceilings")
            result["ceilings"] = ceilings.measure(threads, min(1.0, seconds))
            bar.advance(task)
        for case in options.planned():
            begin(f"{case.facts['case']} {where(dict(case.facts))}")
            result["rows"] += run_case(case, seconds, rounds)
            bar.advance(task)
        for count in options.memory_rows() if "memory" in options.cases else ():
            for name in "HP":
                begin(f"memory {name}, M={count}")
                result["rows"].append(run_memory(name, count, threads))
                bar.advance(task)
    result["ratios"] = ratios(result["rows"])
    busy_now, own_now = spent_s(cores[:threads])
    foreign = ((busy_now - busy) - (own_now - own)) / (time.perf_counter() - began) / threads
    result["provenance"]["taken_by_others"] = round(max(0.0, foreign), 4)
    named = time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())
    out = options.out or Path(__file__).resolve().parent / "results" / "cpu" / named
    write_json(out, result)
    console = Console(width=None if sys.stdout.isatty() else 140)
    show(result, console)
    console.print(f"written to {out}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
