"""Progress bars of long jobs and of downloads, on the terminal or, where there is none, as one line a run."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from harlora.train.fit import Report


class Bars:
    """Two bars: the runs of a study, and the steps of the present run, with the time that remains of each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._study = self._progress.add_task("runs", total=1, note="", visible=False)
        self._run = self._progress.add_task("steps", total=1, note="", visible=False)
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def run(self, name: str, number: int, total: int) -> Report:
        """A run begins; what is returned takes its steps."""
        self._progress.update(self._study, completed=number - 1, total=total, visible=total > 1, description="runs")
        self._progress.reset(self._run, description=name, total=None, note="", visible=True)

        def report(done: int, steps: int, note: str) -> None:
            self._progress.update(self._run, completed=done, total=steps, note=note)
            self._progress.update(self._study, completed=number - 1 + done / steps)

        return report

    def say(self, text: str) -> None:
        """One line that stays, with the time since the start where no bar shows it."""
        if self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)
        else:
            self._console.print(f"[{time.monotonic() - self._began:6.0f} s] {text}", highlight=False, markup=False)


class Transfer:
    """A bar of bytes with their rate and the time that remains; call it with what is done, bytes done and all bytes."""

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Show it. What was done before another ``what`` began does not count for the rate."""
        if what != self._what or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._what = what
            self._task = self._progress.add_task(f"{self._name}: {what}", total=total, completed=done)
        self._progress.update(self._task, completed=done, total=total)
