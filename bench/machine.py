"""Whether the cores are at full speed and near each other: looked at between samples, for a guest cannot know it.

A hypervisor moves the cores of a virtual machine: two may come to share one physical core, or to have a cache each.
Nothing in the guest shows that, and it does not slow every library alike.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("machine.c")
STEPS = 4000  # about 30 us of multiply-adds, less than a time slice of the scheduler
HANDOVERS = 50
APART_S = 2e-3  # the least between two looks
SHARE = 0.1  # of the time, spent on looking

# Between what is usual and what a shared physical core does, half as much; and a cache apart, several times as long.
SLOWEST, FARTHEST = 0.75, 2.0


class State(NamedTuple):
    """What one look saw.

    gflops: float32 multiply-adds of the slowest core, all of them busy.
    handover_ns: how long a cache line takes from one core to the next, the mean over a round of all; 0 for one core.
    """

    gflops: float
    handover_ns: float


class UnavailableError(Exception):
    """The cores cannot be looked at here; the text says why."""


@cache
def _library() -> Any:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnavailableError("no C compiler here")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "machine.so"
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        built = subprocess.run([*command, str(SOURCE), "-o", str(library)], capture_output=True, text=True, check=False)
        if built.returncode:
            said = [line.partition("error: ")[2] for line in built.stderr.splitlines() if "error: " in line]
            raise UnavailableError(f"the C compiler failed: {said[0] if said else 'no reason given'}")
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:  # a folder for temporary files that nothing may be run from
            raise UnavailableError(f"what was built in {tempfile.gettempdir()} cannot be loaded; set TMPDIR") from error


def _look(cores: Sequence[int], steps: int, handovers: int) -> tuple[list[float], float]:
    rates, handover = (ctypes.c_double * len(cores))(), ctypes.c_double()
    error = _library().look_at_cores(
        len(cores), (ctypes.c_int * len(cores))(*cores), ctypes.c_long(steps), ctypes.c_long(handovers), rates,
        ctypes.byref(handover),
    )  # fmt: skip
    if error:
        raise UnavailableError(f"threads cannot be placed on cores: {os.strerror(error)}")
    return list(rates), handover.value if len(cores) > 1 else 0.0  # alone, a loop's cost


def fma_gflops(cores: Sequence[int]) -> tuple[float | None, str]:
    """What all ``cores`` together do of float32 multiply-adds in registers, and how that was measured, or why not."""
    try:
        best = max(len(cores) * min(_look(cores, 5000 * STEPS, 1)[0]) for _ in range(3))
    except UnavailableError as reason:
        return None, f"skipped: {reason}"
    return best, "machine.c, built with -O3 -march=native"


class Watch:
    """Looks at the cores between samples, and tells which samples were taken in the machine's usual state.

    That is the best state it is in for more than a twentieth of the time: the 95th percentile of the speed and the 5th
    of the handover. The very best would be a laptop's first second, before it grows hot.
    cores: to be looked at; none where something else computes.
    note: what is watched, or why nothing is.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        self.states: list[State] = []
        self.note = "multiply-adds of each core in registers, and the handover of a cache line from core to core"
        self._cores = cores
        self._next = 0.0
        self._usual: tuple[int, State] | None = None
        if not cores:
            self.note = "nothing: a GPU computes; how fast the cores were that launch its work is not looked at"
            return
        try:
            _look(cores, STEPS, HANDOVERS)
        except UnavailableError as reason:
            self._cores = ()
            self.note = f"nothing: {reason}"

    def look(self, *, now: bool = False) -> int:
        """Looks if the last time is long enough ago, or ``now``; the number of looks so far."""
        if self._cores and (now or time.perf_counter() >= self._next):
            began = time.perf_counter()
            try:
                rates, handover = _look(self._cores, STEPS, HANDOVERS)
            except UnavailableError as reason:  # a core was taken from this process meanwhile
                self._cores = ()
                self.note += f", until {reason}"
                return len(self.states)
            self.states.append(State(min(rates), handover))
            ended = time.perf_counter()
            self._next = ended + max(APART_S, (ended - began) / SHARE)
        return len(self.states)

    def usual(self) -> State | None:
        """The machine's usual state so far; None before the first look."""
        if not self.states:
            return None
        if self._usual is None or self._usual[0] != len(self.states):
            speeds = sorted(state.gflops for state in self.states)
            handovers = sorted(state.handover_ns for state in self.states)
            twentieth = len(self.states) // 20
            self._usual = len(self.states), State(speeds[-1 - twentieth], handovers[twentieth])
        return self._usual[1]

    def steady(self, looks: int) -> bool:
        """Whether the looks before and after a sample, taken after so many looks, saw the usual state."""
        return all(self._is_usual(state) for state in self.states[max(0, looks - 1) : looks + 1])

    def facts(self) -> dict[str, Any]:
        """For the result: the usual state, and how often the machine was in it."""
        usual = self.usual()
        if usual is None:
            return {"watched": self.note}
        share = sum(map(self._is_usual, self.states)) / len(self.states)
        return {"watched": self.note, "looks": len(self.states), **usual._asdict(), "usual": round(share, 4)}

    def _is_usual(self, state: State) -> bool:
        usual = self.usual()
        assert usual is not None  # there is a look
        return state.gflops >= SLOWEST * usual.gflops and state.handover_ns <= FARTHEST * usual.handover_ns
