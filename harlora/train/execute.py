"""Carrying out a plan: one run after the other, over the cores of this machine, or on a Ray cluster.

What a run is, where it is kept and how it goes on after a stop is decided in `runs`; here is only who does it when.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from harlora.data.catalog import load_windows
from harlora.data.windows import Windows
from harlora.errors import InputError
from harlora.files import read_json, write_json
from harlora.train.capture import Capture
from harlora.train.experiment import Adaptation
from harlora.train.finetune import METHODS, adaptation_identity, finetune
from harlora.train.fit import Report
from harlora.train.pretrain import PretrainConfig, Pretrained, load_pretrained, pretrain, pretraining_identity

_TRIES = 3  # of a run whose worker died; one that raises is not repeated


class Progress(Protocol):
    """Where a study shows how far it is."""

    def run(self, name: str, number: int, total: int) -> Report:
        """A run begins; what is returned takes its steps."""
        ...

    def say(self, text: str) -> None:
        """One line that stays."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who carries out the runs."""

    on: Literal["process", "cores", "ray"] = "process"
    """process: one after the other; cores: several at a time on this machine; ray: on a Ray cluster."""
    jobs: int = 0
    """Runs at a time; 0 takes one for each core, or as many as the cluster has cores for."""
    address: str = "auto"
    """Of the Ray cluster; auto finds the one of this machine, local starts one here."""
    threads_each: int = 1
    """CPU threads of each run, where several go at a time."""

    def check(self) -> None:
        """Raise InputError unless every setting has a possible value."""
        if self.on not in ("process", "cores", "ray"):
            raise InputError(f"on must be one of process, cores, ray; got {self.on!r}")
        for name, least in (("jobs", 0), ("threads_each", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.on == "process" and (self.jobs > 1 or self.threads_each != 1):
            raise InputError(
                "jobs and threads_each are of runs that go at a time, got "
                f"{self.jobs} and {self.threads_each} with on process; give on cores or ray, or threads instead"
            )
        if self.on == "ray" and self.jobs and self.address != "local":
            raise InputError(
                f"jobs: a Ray cluster takes as many runs as it has cores for, got {self.jobs}; leave it out, or give "
                "address local"
            )


def result_file(record: dict[str, Any]) -> str:
    """The name of a result's file: readable, and different for every configuration."""
    return _result_name(record["target"], record["config"], record["identity"])


def _result_name(target: str, config: dict[str, Any], identity: str) -> str:
    rank = f"-r{config['rank']}" if METHODS[config["method"]].ranked else ""
    return f"{target}-{config['protocol']}-{config['method']}{rank}-s{config['seed']}-{identity[:8]}.json"


class Ledger:
    """Which runs of a plan have results, and where those are.

    A result that lies in ``results`` counts as finished wherever it was computed.
    """

    def __init__(self, root: Path, results: Path, device: torch.device) -> None:
        self.root, self.results, self.device = root, results, device
        self._loaded: dict[str, Windows] = {}
        self._pretrainings: dict[tuple[tuple[str, ...], PretrainConfig], str] = {}

    def windows(self, name: str) -> Windows:
        """The windows of a dataset, read once."""
        if name not in self._loaded:
            self._loaded[name] = load_windows(name, self.root)
        return self._loaded[name]

    def identity(self, task: Adaptation) -> str:
        """The identity of a run, whether it has begun or not."""
        sources = [self.windows(name) for name in task.sources]
        key = task.sources, task.pretrain
        if key not in self._pretrainings:
            self._pretrainings[key] = pretraining_identity(task.pretrain, sources, self.device)
        return adaptation_identity(
            task.finetune,
            self.windows(task.target),
            sources,
            self._pretrainings[key],
            task.pretrain.model,
            self.device,
        )

    def find(self, task: Adaptation) -> dict[str, Any] | None:
        """The result of a run, or None if it has none yet."""
        identity = self.identity(task)
        file = self.results / _result_name(task.target, task.finetune.values(), identity)
        if not file.exists():
            return None
        record: dict[str, Any] = read_json(file, "delete it, the run is done again")
        return record

    def keep(self, task: Adaptation, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write a result, and return it as it is written."""
        record = {"preset": task.preset, **metrics}
        write_json(self.results / result_file(record), record)
        return record


def carry_out(
    tasks: Sequence[Adaptation],
    ledger: Ledger,
    runs: Path,
    *,
    workers: Workers | None = None,
    capture: Capture = "off",
    progress: Progress,
    impossible: Callable[[Adaptation, InputError], None] | None = None,
) -> list[dict[str, Any]]:
    """The results of all ``tasks``, in their order; those that are not there yet are computed and written.

    Pretraining is done once for all runs that begin from it. What was interrupted under ``runs`` goes on. A run whose
    worker dies is begun again, up to three times in all; one that raises ends the study, whose other results are kept.

    impossible: called with an adaptation that raises InputError, as where its dataset does not allow it or training
        diverges; the adaptation is then left out of the results, and the study goes on.
    """
    workers = workers or Workers()
    workers.check()
    records: dict[int, dict[str, Any]] = {}
    missing: dict[tuple[tuple[str, ...], PretrainConfig], list[int]] = {}
    for number, task in enumerate(tasks):
        record = ledger.find(task)
        if record is None:
            missing.setdefault((task.sources, task.pretrain), []).append(number)
        else:
            records[number] = record
    if records:
        progress.say(f"{len(records)} of {len(tasks)} runs have results already")

    def finished(number: int, metrics: dict[str, Any]) -> None:
        record = records[number] = ledger.keep(tasks[number], metrics)
        note = " (SYNTHETIC data)" if record["synthetic"] else ""
        progress.say(f"{tasks[number].title}: macro-F1 {record['scores']['macro_f1']:.3f}{note}")

    def failed(number: int, error: InputError) -> None:
        if impossible is None:
            raise error
        impossible(tasks[number], error)

    if missing:
        how = _one_by_one if workers.on == "process" else _at_once
        how(tasks, missing, ledger, runs, workers, capture, progress, finished, failed)
    return [records[number] for number in range(len(tasks)) if number in records]


_Finished = Callable[[int, dict[str, Any]], None]
_Failed = Callable[[int, InputError], None]
_Missing = dict[tuple[tuple[str, ...], PretrainConfig], list[int]]


def _one_by_one(
    tasks: Sequence[Adaptation],
    missing: _Missing,
    ledger: Ledger,
    runs: Path,
    workers: Workers,
    capture: Capture,
    progress: Progress,
    finished: _Finished,
    failed: _Failed,
) -> None:
    total = sum(1 + len(numbers) for numbers in missing.values())
    done = 0
    for (names, config), numbers in missing.items():
        done += 1
        sources = [ledger.windows(name) for name in names]
        report = progress.run(f"pretraining on {', '.join(names)}", done, total)
        checkpoint = pretrain(config, sources, runs, device=ledger.device, capture=capture, report=report)
        for number in numbers:
            done += 1
            task = tasks[number]
            report = progress.run(task.title, done, total)
            try:
                metrics = finetune(
                    task.finetune, ledger.windows(task.target), load_pretrained(checkpoint), runs, sources=sources,
                    device=ledger.device, capture=capture, report=report,
                )  # fmt: skip
            except InputError as error:
                failed(number, error)
            else:
                finished(number, metrics)


@dataclass(frozen=True)
class _Stored:
    """Windows that the worker reads itself."""

    name: str
    root: Path


_load = lru_cache(maxsize=16)(load_windows)


def _ready(windows: Windows | _Stored) -> Windows:
    if isinstance(windows, _Stored):
        return _load(windows.name, windows.root)
    # An object store hands out memory that cannot be written to, which torch refuses to share.
    return windows.take(np.arange(len(windows)))


def _pretrain(config: PretrainConfig, runs: Path, settings: "_Settings", *sources: Windows | _Stored) -> Pretrained:
    torch.set_num_threads(settings.threads)
    ready = [_ready(source) for source in sources]
    return load_pretrained(pretrain(config, ready, runs, device=settings.device, capture=settings.capture))


def _adapt(
    task: Adaptation, pretrained: Pretrained, runs: Path, settings: "_Settings", *windows: Windows | _Stored
) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    target, *sources = map(_ready, windows)
    return finetune(
        task.finetune, target, pretrained, runs, sources=sources, device=settings.device, capture=settings.capture
    )


@dataclass(frozen=True)
class _Settings:
    threads: int
    device: torch.device
    capture: Capture


class _Pool:
    """Processes of this machine; after one has died, new ones."""

    def __init__(self, workers: Workers, root: Path) -> None:
        self._jobs = workers.jobs or os.cpu_count() or 1
        self._root = root.absolute()
        self._executor: Executor | None = None

    def windows(self, name: str) -> _Stored:
        return _Stored(name, self._root)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._executor is None:
            # A forked child would have torch's threads in an undefined state.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._jobs, mp_context=context)
        try:
            return self._executor.submit(function, *arguments)
        except BrokenProcessPool:
            self._executor = None
            return self.submit(function, *arguments)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


class _Cluster:
    """A Ray cluster; windows go there once, results come back, runs are kept where they are computed."""

    def __init__(self, workers: Workers, ledger: Ledger) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise InputError(
                "on ray requires Ray, which is not installed; install harlora with its extra scale: "
                "pip install --no-build-isolation '.[har,scale]' in the source folder"
            ) from error
        self._ray = ray
        address = None if workers.address == "local" else workers.address
        cores = workers.jobs * workers.threads_each or max(os.cpu_count() or 1, workers.threads_each)
        options: dict[str, Any] = {} if address else {"num_cpus": cores}
        try:
            ray.init(
                address=address, log_to_driver=False, include_dashboard=False if address is None else None, **options
            )
        except ConnectionError as error:
            raise InputError(
                f"address: no Ray cluster at {workers.address!r} ({error}); start one with `ray start --head`, or give "
                "local"
            ) from error
        # Ray begins a task again whose worker died.
        self._remote = lru_cache(ray.remote(num_cpus=workers.threads_each, max_retries=_TRIES - 1))
        self._ledger = ledger
        self._references: dict[str, Any] = {}

    def windows(self, name: str) -> Any:
        if name not in self._references:
            self._references[name] = self._ray.put(self._ledger.windows(name))
        return self._references[name]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = self._remote(function).remote(*arguments).future()
        return future

    def close(self) -> None:
        self._ray.shutdown()


def _at_once(
    tasks: Sequence[Adaptation],
    missing: _Missing,
    ledger: Ledger,
    runs: Path,
    workers: Workers,
    capture: Capture,
    progress: Progress,
    finished: _Finished,
    failed: _Failed,
) -> None:
    settings = _Settings(workers.threads_each, ledger.device, capture)
    runs = runs.absolute()  # of a worker that was started elsewhere too
    total = sum(1 + len(numbers) for numbers in missing.values())
    report = progress.run("runs", 1, 1)
    done = 0
    with ExitStack() as stack:
        pool = _Cluster(workers, ledger) if workers.on == "ray" else _Pool(workers, ledger.root)
        stack.callback(pool.close)
        tries: dict[Future[Any], tuple[int, Callable[[], Future[Any]], Callable[[Any], None], int | None]] = {}

        def begin(
            submit: Callable[[], Future[Any]], then: Callable[[Any], None], task: int | None = None, number: int = 1
        ) -> None:
            tries[submit()] = number, submit, then, task

        def adapt(numbers: Iterable[int]) -> Callable[[Pretrained], None]:
            def with_encoder(pretrained: Pretrained) -> None:
                for number in numbers:
                    task = tasks[number]
                    windows = [pool.windows(name) for name in (task.target, *task.sources)]
                    begin(
                        lambda task=task, windows=windows: pool.submit(  # type: ignore[misc]
                            _adapt, task, pretrained, runs, settings, *windows
                        ),
                        lambda metrics, number=number: finished(number, metrics),  # type: ignore[misc]
                        number,
                    )

            return with_encoder

        for (names, config), numbers in missing.items():
            sources = [pool.windows(name) for name in names]
            begin(
                lambda config=config, sources=sources: pool.submit(  # type: ignore[misc]
                    _pretrain, config, runs, settings, *sources
                ),
                adapt(numbers),
            )
        report(0, total, "")
        while tries:
            for future in wait(tries, return_when=FIRST_COMPLETED).done:
                number, submit, then, which = tries.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    if number == _TRIES:
                        raise
                    begin(submit, then, which, number + 1)
                    continue
                except InputError as error:
                    # Ray's has the worker's traceback as its text, and the error itself as its cause.
                    own = getattr(error, "cause", None)
                    error = own if isinstance(own, InputError) else error
                    if which is None:
                        raise error from None
                    failed(which, error)
                    done += 1
                    report(done, total, "")
                    continue
                done += 1
                report(done, total, "")
                then(result)
