"""The command line: one dataclass a command, its fields the options, its ``run`` the call."""

import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from harlora.bench import peers, report
from harlora.bench.run import RESULT, Options, Preset, measure, where
from harlora.data import imported
from harlora.data.catalog import (
    DATASETS,
    ROOT_VARIABLE,
    Dataset,
    available,
    data_root,
    dataset,
    known,
    load_windows,
    named_root,
)
from harlora.data.download import MIRROR_VARIABLE, download, present, size_text, source, wanted
from harlora.data.inspect import draw, hours
from harlora.data.labels import VOCABULARY
from harlora.data.table import AccelUnit, GyroUnit, SubjectFrom, TimeUnit, Units
from harlora.data.windows import HOP, RATE_HZ
from harlora.errors import InputError
from harlora.progress import Bars, Transfer
from harlora.report import timeline
from harlora.report.build import build_report
from harlora.report.tables import COLUMNS, LEGEND, MEMORY_LEGEND, groups, heading, memory, pooled, row, titled
from harlora.train.capture import Capture, captures
from harlora.train.execute import Ledger, Workers, carry_out
from harlora.train.experiment import PRESETS, Adaptation, Experiment, load_experiment
from harlora.train.finetune import CHECKPOINT, METHODS, FinetuneConfig, finetune, method_bytes
from harlora.train.fit import silent
from harlora.train.lodo import Study
from harlora.train.predict import predict
from harlora.train.pretrain import PretrainConfig, load_pretrained, pretrain

RESULTS = Path("bench/results/lodo")
SHOWN = 20  # problems that the doctor prints: one wrong kernel has many

# A terminal says how wide it is; a log file does not, and a table broken into slivers helps nobody. Names and paths of
# users' files may have square brackets, which are no markup, in tables neither.
console = Console(width=None if sys.stdout.isatty() else 160, markup=False)


@dataclass(frozen=True)
class Machine:
    """Where it runs."""

    data: Path | None = None
    """Folder with the datasets; by default $HARLORA_DATA, else ./data."""
    device: str = "cpu"
    """cpu, cuda or cuda:0."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    capture: Capture = "off"
    """Training steps as one CUDA graph each: auto on every GPU, on only there, off never. Results agree within
    rounding, so a run is the same run either way. Off unless asked for: it has not run on a GPU yet."""

    def ready(self) -> tuple[Path, torch.device]:
        """The data root and the device, after checking both."""
        device = _device(self.device, self.threads)
        captures(self.capture, device)
        return data_root(self.data), device


def _device(name: str, threads: int) -> torch.device:
    """The device of that name, after setting the number of CPU threads; 0 leaves it."""
    if threads < 0:
        raise InputError(f"--threads must be at least 0, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu, cuda or cuda:0, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"--device must be cpu or one of {torch.cuda.device_count()} GPUs, as cuda:0, got {name!r}")
    return device


@dataclass(frozen=True)
class DataList:
    """What is found where: subjects, windows of each class, hours."""

    data: Path | None = None
    """Folder with the datasets; by default $HARLORA_DATA, else ./data."""

    def run(self) -> None:
        root = data_root(self.data)
        wrong: dict[str, InputError] = {}
        entries = known(root, wrong)
        used = {entry.name for entry in available(root, wrong)}
        table = Table(title=f"Datasets under {root}", title_justify="left", show_lines=True)
        for column in ("dataset", "found", "subjects", "hours", "windows", "of each class", "dropped", "licence"):
            table.add_column(column, overflow="fold")
        for name in wrong:
            table.add_row(name, "cannot be read", "", "", "", "", "", "your own")
        missing = []
        for entry in entries.values():
            path = entry.find(root)
            if path is None and not entry.is_synthetic:
                missing.append(entry)
                table.add_row(entry.name, "no", "", "", "", "", "", entry.licence)
                continue
            try:
                with console.status(f"reading {entry.title}"):
                    windows = load_windows(entry.name, root)
            except InputError as error:
                wrong[entry.name] = error
                table.add_row(entry.name, "cannot be read", "", "", "", "", "", entry.licence)
                continue
            classes = ", ".join(
                f"{label} {int((windows.labels == VOCABULARY.index(label)).sum())}" for label in windows.label_names()
            )
            dropped = [", ".join(f"{name} {count}" for name, count in windows.dropped.items())]
            dropped += [f"{windows.too_short} stretches too short"] if windows.too_short else []
            dropped += [f"{count} {reason}" for reason, count in windows.left_out.items()]
            table.add_row(
                entry.name + ("" if entry.name in used else " (not used)"),
                "SYNTHETIC, made on the fly" if path is None else str(path.relative_to(root)),
                str(len(windows.subject_names)),
                f"{hours(windows):.1f}",
                str(len(windows)),
                classes,
                "; ".join(filter(None, dropped)),
                entry.licence,
            )
        console.print(table)
        for entry in missing:
            by_hand = f"put {entry.download} at {entry.target(root)}"
            console.print(
                f"{entry.name} is missing: `harlora data download {entry.name}`, or {by_hand}",
                highlight=False,
                soft_wrap=True,
            )
        console.print(
            "Windows of 128 samples at 50 Hz with 50 % overlap. Dropped: windows whose activity has no label in the "
            "vocabulary, stretches shorter than a window, and what lacks one of the sensors. Not used by "
            "`harlora lodo`: the same people as another set, or synthetic beside real data."
        )
        if wrong:
            raise InputError("\n".join(f"{name} cannot be read: {why}" for name, why in wrong.items()))


@dataclass(frozen=True)
class DataInspect:
    """Draw example windows of each class to a PNG."""

    name: tyro.conf.Positional[str]
    """The dataset; `harlora data list` shows them."""
    out: Path | None = None
    """The picture; by default NAME.png in the current folder."""
    data: Path | None = None
    """Folder with the datasets; by default $HARLORA_DATA, else ./data."""

    def run(self) -> None:
        root = data_root(self.data)
        entry = dataset(self.name, root)
        with console.status(f"reading {entry.title}"):
            windows = load_windows(self.name, root)
        if entry.read is imported.read:
            _print_facts(imported.facts(root / entry.folder))
        file = self.out or Path(f"{self.name}.png")
        title = f"{entry.title}, {entry.placement}: {len(windows)} windows of {len(windows.subject_names)} subjects"
        draw(windows, title, file)
        console.print(f"{title}, {windows.signals.shape[1] / RATE_HZ:.2f} s each: {file}", highlight=False)


@dataclass(frozen=True)
class DataDownload:
    """Fetch the authors' archives to where the readers look, checked; an interrupted download goes on."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Datasets; `all` for every real one, but of those with the same people only the first (uci_hapt, not uci_har)."""
    yes: tyro.conf.FlagCreatePairsOff[bool] = False
    """Agree to the licences shown without being asked."""
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    """Fetch it even where it is there."""
    mirror: str | None = None
    """Folder or http(s) address that has FOLDER/FILE of every dataset as a data root does; by default
    $HARLORA_MIRROR, else the authors' addresses."""
    data: Path | None = None
    """Folder for the datasets, made if need be; by default $HARLORA_DATA, else ./data."""

    def run(self) -> None:
        entries, left_out = wanted(self.names)
        root = named_root(self.data)
        mirror = self.mirror or os.environ.get(MIRROR_VARIABLE)
        if left_out:
            console.print(f"Left out, the same people as another: {', '.join(left_out)}", highlight=False)
        failures: list[str] = []
        missing: dict[Dataset, str | Path] = {}
        for entry in entries:
            try:
                with Transfer(console, entry.name) as transfer:
                    there = None if self.force else present(entry, root, transfer)
                if there is None:
                    missing[entry] = source(entry, mirror)
                else:
                    console.print(there, highlight=False, markup=False, soft_wrap=True)
            except InputError as error:
                failures.append(str(error))
        for entry, origin in missing.items():
            for line in (
                f"{entry.name}: {entry.title}",
                f"  licence and citation: {entry.licence}",
                f"  from: {origin} ({size_text(entry.size)})",
                f"  to: {entry.target(root)}",
            ):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        if missing and not self.yes:
            refused = ""
            if not sys.stdin.isatty():
                refused = "nothing fetched: there is no terminal to ask; agree to the licences above with --yes"
            elif console.input("Fetch under these licences? [y/N] ", markup=False).strip().lower() not in ("y", "yes"):
                refused = "nothing fetched: the licences above were not agreed to"
            if refused:
                raise InputError("\n".join((*failures, refused)))
        for entry in missing:
            try:
                with Transfer(console, entry.name) as transfer:
                    said = download(entry, root, mirror=mirror, report=transfer)
            except InputError as error:
                failures.append(str(error))
            else:
                console.print(said, highlight=False, markup=False, soft_wrap=True)
        if failures:
            raise InputError("\n".join(failures))


@dataclass(frozen=True)
class UnitOptions:
    """In which units the tables are; auto finds out, and says so if it cannot."""

    time_unit: TimeUnit = "auto"
    """Of a timestamp that is a number; a date as 2024-05-31T12:00:00.020 (ISO 8601) needs none."""
    accel_unit: AccelUnit = "auto"
    """Of ax, ay, az; told from gravity, which must be included."""
    gyro_unit: GyroUnit = "auto"
    """Of gx, gy, gz; told from how fast a body can turn."""

    def units(self) -> Units:
        """As the readers of tables take them."""
        return Units(self.time_unit, self.accel_unit, self.gyro_unit)


@dataclass(frozen=True)
class DataImport:
    """Make recordings of your own a dataset: check them, say what was found, and write them under the data root.

    Tables, CSV or Parquet, with the columns timestamp, ax, ay, az, gx, gy, gz, label and subject; docs/data.md has an
    example. Nothing is written if anything is wrong.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Tables, or folders with tables."""
    name: str
    """What the dataset is called from now on, and its folder under the data root."""
    placement: str = "unknown"
    """Where on the body the device was, for example waist; of a pocket, training turns windows by more."""
    domain: str = ""
    """A dataset, if these are its people; they are then never trained on for it. By default nobody else's."""
    labels: tuple[str, ...] = ()
    """own=vocabulary, for each activity that the vocabulary calls otherwise: walking=walk."""
    subject_from: SubjectFrom = "column"
    """The column subject; or each file, or each folder, is another person."""
    replace: tyro.conf.FlagCreatePairsOff[bool] = False
    """Overwrite a dataset of this name that was imported before."""
    units: tyro.conf.OmitArgPrefixes[UnitOptions] = field(default_factory=UnitOptions)
    data: Path | None = None
    """Folder with the datasets; by default $HARLORA_DATA, else ./data."""

    def run(self) -> None:
        root = data_root(self.data)
        taken = {entry.name: entry.domain for entry in known(root).values()}
        with Bars(console) as bars:
            facts = imported.import_tables(
                self.files, self.name, root, domain=self.domain, placement=self.placement, units=self.units.units(),
                labels=self.labels, subject_from=self.subject_from, replace=self.replace, taken=taken,
                report=bars.run("reading", 1, 1),
            )  # fmt: skip
        _print_facts(facts)
        console.print(
            f"dataset {facts.name}: {root / facts.name / imported.FILE}\nnext: harlora data inspect {facts.name}, "
            f"harlora lodo --targets {facts.name}",
            highlight=False,
        )


@dataclass(frozen=True)
class Data:
    """Look at datasets, fetch them, add your own."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[DataList, tyro.conf.subcommand("list")]
        | Annotated[DataInspect, tyro.conf.subcommand("inspect")]
        | Annotated[DataDownload, tyro.conf.subcommand("download")]
        | Annotated[DataImport, tyro.conf.subcommand("import")]
    ]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Pretrain:
    """Pretrain an encoder on unlabelled windows and print where its checkpoint is.

    Over several processes: `torchrun --nproc-per-node 2 -m harlora pretrain ...`; same losses, each step shared out.
    """

    sources: tuple[str, ...] = ()
    """Datasets to learn from; by default all that are found."""
    out: Path = Path("runs")
    """Folder for run directories; an unfinished run goes on, a finished one is not repeated."""
    config: tyro.conf.OmitArgPrefixes[PretrainConfig] = field(default_factory=PretrainConfig)
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> None:
        root, device = self.machine.ready()
        names = [dataset(name, root).name for name in self.sources] or [entry.name for entry in available(root)]
        windows = [load_windows(name, root) for name in names]
        first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one speaks
        with Bars(console) if first else nullcontext() as bars:
            progress = bars.run(f"pretraining on {', '.join(names)}", 1, 1) if bars else silent
            file = pretrain(
                self.config, windows, self.out, device=device, capture=self.machine.capture, report=progress
            )
        if not first:
            return
        pretrained = load_pretrained(file)
        console.print(f"masked MSE {pretrained.loss:.4f} after {pretrained.seconds:.0f} s: {file}", highlight=False)


@dataclass(frozen=True)
class Finetune:
    """Adapt a pretrained encoder to one dataset and score it on what it has not seen."""

    target: str
    """The dataset to adapt to; the encoder must not have seen it."""
    pretrained: Path
    """encoder.safetensors of a `harlora pretrain` run."""
    out: Path = Path("runs")
    """Folder for run directories; an unfinished run goes on, a finished one is not repeated."""
    config: tyro.conf.OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> None:
        root, device = self.machine.ready()
        self.config.check()
        dataset(self.target, root)
        pretrained = load_pretrained(self.pretrained)
        needed = pretrained.sources if self.config.method == "zero_shot" else ()
        sources = [load_windows(name, root) for name in needed]
        with Bars(console) as bars:
            progress = bars.run(f"{self.target}, {self.config.method}", 1, 1)
            metrics = finetune(
                self.config, load_windows(self.target, root), pretrained, self.out,
                sources=sources, device=device, capture=self.machine.capture, report=progress,
            )  # fmt: skip
        _print_tables([metrics])
        folder = self.out / f"{self.config.method}-{self.target}-{self.config.protocol}-{metrics['identity']}"
        console.print(f"classifier: {folder / CHECKPOINT}", highlight=False)


def _methods() -> str:
    """What each method of adapters does, and its options."""
    lines = []
    for name, method in METHODS.items():
        if method.adapter and not method.four_bits:
            listed = ", ".join(f"{option} {default!r}" for option, default in method.options.items())
            lines.append(f"{name}, q{name}: {method.about}" + (f" Options: {listed}." if listed else ""))
    return "\n\n".join(lines)


Finetune.__doc__ = (
    f"{Finetune.__doc__}\n\nMethods with adapters, over dense weights and, with a q before the name, over weights in 4 "
    f"bits:\n\n{_methods()}"
)


@dataclass(frozen=True)
class Predict:
    """Label a recording of your own: every window's activity as CSV, a picture over time, the time of each activity.

    The recording is a table as `harlora data import` takes it, of one person; with the column label it is scored.
    """

    recording: tyro.conf.Positional[Path]
    """CSV or Parquet with the columns timestamp, ax, ay, az, gx, gy, gz."""
    model: Path
    """classifier.safetensors of a `harlora finetune` or `harlora lodo` run."""
    out: Path | None = None
    """Folder for predictions.csv and timeline.png; by default runs/predict/NAME of the recording."""
    hop: int = HOP
    """Samples at 50 Hz from one window to the next; a window has 128."""
    labels: tuple[str, ...] = ()
    """own=vocabulary, for activities in the table that the vocabulary calls otherwise."""
    units: tyro.conf.OmitArgPrefixes[UnitOptions] = field(default_factory=UnitOptions)
    device: str = "cpu"
    """cpu, cuda or cuda:0."""

    def run(self) -> None:
        device = _device(self.device, 0)
        with Bars(console) as bars:
            found = predict(
                self.model, self.recording, units=self.units.units(), labels=self.labels, hop=self.hop, device=device,
                report=bars.run(self.recording.name, 1, 1),
            )  # fmt: skip
        folder = self.out or Path("runs/predict") / self.recording.stem
        try:
            found.write_csv(folder / "predictions.csv")
            timeline.draw(found, f"{self.recording.name}, by a classifier for {found.target}", folder / "timeline.png")
        except OSError as error:
            raise InputError(f"cannot write to {folder} ({error}); choose another folder with --out") from error
        if found.synthetic:
            console.print(
                "SYNTHETIC data: the classifier learned from made-up recordings; what it says means nothing.",
                style="bold red",
                highlight=False,
            )
        shares = found.shares()
        whole = sum(shares.values())
        body = [(name, timeline.clock(seconds), f"{seconds / whole:.1%}") for name, seconds in shares.items()]
        title = f"{self.recording.name}: {len(found.starts_s)} windows in {len(found.stretches)} stretches"
        _print_table(title, ("activity", "time", "share"), [*body, ("all", timeline.clock(whole), "100.0%")])
        if (score := found.scores()) is not None:
            rows = [
                (name, str(count), f"{f1:.3f}", *map(str, line))
                for name, count, f1, line in zip(
                    score["labels"], score["support"], score["f1"], score["confusion"], strict=True
                )
                if count
            ]
            title = f"Accuracy {score['accuracy']:.3f}, macro-F1 {score['macro_f1']:.3f} of the labels in the table"
            _print_table(title, ("true", "windows", "F1", *(f"→ {name}" for name in score["labels"])), rows)
        for why, count in found.unscored.items():
            if count and found.given:
                console.print(f"not scored: {count} windows {why}", highlight=False, markup=False)
        console.print(f"windows: {folder / 'predictions.csv'}\npicture: {folder / 'timeline.png'}", highlight=False)


@dataclass(frozen=True)
class Lodo:
    """Leave one dataset out: pretrain on the others, adapt to it by every method, and report what each cost and
    reached. Uses synthetic data where no real dataset is found.
    """

    study: tyro.conf.OmitArgPrefixes[Study] = field(default_factory=Study)
    out: Path = Path("runs")
    """Folder for run directories; a killed study goes on where it was."""
    results: Path | None = None
    """Folder for one JSON a run; by default bench/results/lodo/PRESET, with -synthetic behind it where data is."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)

    workers: tyro.conf.OmitArgPrefixes[Workers] = field(default_factory=Workers)

    def run(self) -> None:
        root, device = self.machine.ready()
        self.workers.check()
        experiment = self.study.experiment()
        tasks = experiment.plan(root)
        results = self.results or _results(tasks, self.study.preset)
        records, left_out = _carry_out(tasks, Ledger(root, results, device), self.out, self.workers, self.machine)
        _show(records, results, results / "report" / "results.md")
        _all_done(left_out, tasks)


def _is_synthetic(tasks: Sequence[Adaptation]) -> bool:
    names = {name for task in tasks for name in (task.target, *task.sources)}
    return any(name in DATASETS and DATASETS[name].is_synthetic for name in names)


def _results(tasks: Sequence[Adaptation], preset: str) -> Path:
    return RESULTS / (preset + ("-synthetic" if _is_synthetic(tasks) else ""))


def _carry_out(
    tasks: Sequence[Adaptation], ledger: Ledger, runs: Path, workers: Workers, machine: Machine
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results, and the titles of those runs that were not possible."""
    if _is_synthetic(tasks):
        console.print(
            f"SYNTHETIC data: no dataset under {ledger.root}. The numbers show that the program works and nothing "
            f"else; `harlora data list` says where to get real recordings and {ROOT_VARIABLE} where they are.",
            style="bold red",
            highlight=False,
        )
    if workers.on != "process" and machine.threads:
        raise InputError(f"--threads {machine.threads}: with --on {workers.on} give --threads-each")
    left_out: list[str] = []
    with Bars(console) as bars:

        def impossible(task: Adaptation, error: InputError) -> None:
            bars.say(f"{task.title}: not possible: {error}")
            left_out.append(task.title)

        records = carry_out(
            tasks, ledger, runs, workers=workers, capture=machine.capture, progress=bars, impossible=impossible
        )
    return records, left_out


def _show(records: Sequence[dict[str, Any]], results: Path, page: Path, experiments: Sequence[Experiment] = ()) -> None:
    if records:
        _print_tables(records)
        build_report(results, page, experiments=experiments, records=records)
        console.print(f"one JSON a run: {results}\ntables and pictures: {page}", highlight=False)


def _all_done(left_out: Sequence[str], tasks: Sequence[Adaptation]) -> None:
    """Raise InputError if runs were left out."""
    if left_out:
        raise InputError(f"{len(left_out)} of {len(tasks)} runs were not possible, as said above; all others are done")


@dataclass(frozen=True)
class Run:
    """Carry out experiments that files describe, and build the report. Runs that have results are skipped, one that
    was stopped goes on. The folder experiments/ has a file for every table and figure of the study.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files; docs/experiments.md says what they may contain."""
    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only list the runs, and which of them have results."""
    targets: tuple[str, ...] = ()
    """Of the runs, only those on these datasets; by default all."""
    seeds: tuple[int, ...] = ()
    """Of the runs, only those with these seeds; by default all."""
    out: Path = Path("runs")
    """Folder for run directories."""
    results: Path | None = None
    """Folder for one JSON a run; by default bench/results/lodo/PRESET, with -synthetic behind it where data is."""
    report: Path | None = None
    """The page on these runs; by default report/results.md in the folder of results."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)
    workers: tyro.conf.OmitArgPrefixes[Workers] = field(default_factory=Workers)

    def run(self) -> None:
        root, device = self.machine.ready()
        self.workers.check()
        if not self.files:
            raise InputError("run requires at least one file, for example experiments/lodo.toml")
        experiments = [load_experiment(file) for file in self.files]
        tasks: list[Adaptation] = []
        for experiment in experiments:
            tasks += [task for task in experiment.plan(root) if task not in tasks and self._wanted(task)]
        if not tasks:
            raise InputError("run: no experiment has runs on these targets with these seeds; see --plan without them")
        presets = {experiment.preset for experiment in experiments}
        if len(presets) > 1:
            raise InputError(f"run takes experiments of one preset at a time, got {', '.join(sorted(presets))}")
        (preset,) = presets
        results = self.results or _results(tasks, preset)
        ledger = Ledger(root, results, device)
        if self.plan:
            _print_plan(tasks, ledger)
            return
        records, left_out = _carry_out(tasks, ledger, self.out, self.workers, self.machine)
        _show(records, results, self.report or results / "report" / "results.md", experiments)
        _all_done(left_out, tasks)

    def _wanted(self, task: Adaptation) -> bool:
        return (not self.targets or task.target in self.targets) and (
            not self.seeds or task.finetune.seed in self.seeds
        )


def _print_plan(tasks: Sequence[Adaptation], ledger: Ledger) -> None:
    body, left = [], 0
    for task in tasks:
        preset = PRESETS[task.preset].finetune.values()
        config, found = task.finetune, ledger.find(task) is not None
        left += not found
        changed = {
            name: value
            for name, value in config.values().items()
            if value != preset.get(name) and name not in ("method", "protocol", "seed")
        }
        body.append(
            [
                task.target,
                config.protocol,
                config.method,
                str(config.seed),
                " ".join(f"{name}={value}" for name, value in changed.items()),
                "finished" if found else "to do",
            ]
        )
    heads = ("target", "protocol", "method", "seed", "beside the preset", "state")
    pretrainings = len({(task.sources, task.pretrain) for task in tasks})
    title = f"{len(tasks)} runs, {left} to do; {pretrainings} pretrainings"
    _print_table(title, heads, body)


@dataclass(frozen=True)
class Export:
    """Write a finetuned classifier as a file that runs outside of harlora, and check it against the PyTorch model.

    It takes raw windows (n, 128, 6), m/s² with gravity and rad/s at 50 Hz, and gives logits and probabilities.
    """

    model: Path
    """classifier.safetensors of a `harlora finetune` run."""
    out: Path
    """Folder for the model and export.json; one folder an export."""
    format: str = "onnx"
    """onnx or torch: adapters merged, float32 weights. onnx-4bit: 4-bit weights as they are, and the adapters, for
    ONNX Runtime's MatMulBnb4. torch-4bit: the same with harlora's operators; to run it, import harlora."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Of the 4-bit formats: merge the adapters and quantise the result anew. Changes results; the report says how
    much. Also for classifiers whose weights are not in 4 bits."""
    threads: int = 1
    """CPU threads of both models in the comparison."""
    data: Path | None = None
    """Folder with the datasets, whose windows it is compared on; by default $HARLORA_DATA, else ./data."""

    def run(self) -> None:
        from harlora.export import REPORT, export, tables

        with Bars(console) as bars:
            result = export(
                self.model, self.out, self.format, data=data_root(self.data), merge=self.merge, threads=self.threads,
                report=bars.run(f"export to {self.format}", 1, 1),
            )  # fmt: skip
        for title, heads, body in tables(result):
            _print_table(title, heads, body)
        console.print(
            f"model: {self.out / result['file']}\nreport: {self.out / REPORT}", highlight=False, soft_wrap=True
        )


@dataclass(frozen=True)
class Report:
    """Build the results page and its pictures from results JSON alone."""

    results: tyro.conf.Positional[Path] = RESULTS / "standard"
    """Folder with the JSON files of `harlora lodo`."""
    out: Path = Path("docs/results.md")
    """The page; pictures go to the folder images beside it."""
    readme: Path | None = None
    """A file in which the lines between <!-- results --> and <!-- /results --> become the headline table."""
    experiments: tuple[Path, ...] | None = None
    """TOML files, each of which gets a section of its own; by default, on the standard results, all of the folder
    experiments."""

    def run(self) -> None:
        files = self.experiments
        if files is None:
            files = tuple(sorted(Path("experiments").glob("*.toml"))) if self.results == RESULTS / "standard" else ()
        experiments = [load_experiment(file) for file in files]
        console.print(f"{build_report(self.results, self.out, self.readme, experiments)}", highlight=False)


@dataclass(frozen=True)
class Memory:
    """Measure what each method holds in memory in training, by what it is for, on this machine and without any dataset.

    The model has its default sizes and random weights; one training step on random windows is traced.
    """

    methods: tuple[str, ...] = ("full", "lora", "qlora", "linear_probe")
    """Of zero_shot, linear_probe, scratch, full, lora and qlora."""
    rank: int = 16
    """Of LoRA and QLoRA."""
    batch_size: int = 64
    """Windows a step."""
    classes: int = 6
    """Activities to tell apart."""
    quant_type: str = "nf4"
    """nf4 or fp4, of QLoRA's weights."""
    blocksize: int = 64
    """Weights that share a scale in QLoRA."""
    double_quant: bool = True
    """Store QLoRA's scales in 8 bits."""
    device: str = "cpu"
    """cpu, cuda or cuda:0."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON of bytes and nothing else."""

    def run(self) -> None:
        device = _device(self.device, self.threads)
        if self.classes < 1 or not self.methods:
            raise InputError(
                f"--classes must be at least 1 and --methods name one, got {self.classes} and {self.methods}"
            )
        configs = [
            FinetuneConfig(
                method=method, rank=self.rank, batch_size=self.batch_size, quant_type=self.quant_type,
                blocksize=self.blocksize, double_quant=self.double_quant,
            )
            for method in dict.fromkeys(self.methods)
        ]  # fmt: skip
        for config in configs:  # all of them before the first is measured
            config.check()
        columns = []
        with Bars(Console(stderr=True, markup=False)) as bars:
            progress = bars.run("one training step each", 1, 1)
            for done, config in enumerate(configs):
                progress(done, len(configs), config.method)
                size = method_bytes(config, device, classes=self.classes)
                columns.append((config.method, titled(config.method, self.rank), size))
            progress(len(configs), len(configs), "")
        if self.json:
            print(json.dumps({method: size for method, _, size in columns}, indent=1))
            return
        title = f"Memory in training, batches of {self.batch_size} windows, {device}"
        _print_table(title, *memory(columns))
        console.print(MEMORY_LEGEND, highlight=False)


@dataclass(frozen=True)
class Bench(Options):
    """Time harlora against bitsandbytes + PEFT and others on this machine: layers, whole encoders, training steps.

    Every competitor is checked against float64 before it is timed; one that is absent, fails or is wrong is reported.
    Leaves result.json, a page for the browser (index.html) and its pictures; Ctrl-C keeps what was measured.
    """

    preset: tyro.conf.Suppress[Preset] = "standard"
    command: tyro.conf.Suppress[str] = "harlora bench"
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Few sizes, without torchao, below 3 minutes on two cores."""
    full: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also sizes of language models, up to 8192 rows, other ranks and dtypes: hours on a CPU."""
    out: Path | None = None
    """Folder for the result; by default runs/bench/TIME."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing: say what changed from one result to another beyond the noise."""

    def run(self) -> None:
        if self.compare is not None:
            old, new = map(report.load, self.compare)
            for table in report.comparison(old, new):
                _print_table(table.title, table.heads, table.body)
            return
        if self.quick and self.full:
            raise InputError("--quick and --full exclude each other; give one of them or none")
        options = replace(
            self,
            preset="quick" if self.quick else "full" if self.full else "standard",
            command=" ".join(["harlora", *map(shlex.quote, sys.argv[1:])]),
        )
        folder = self.out or Path("runs/bench") / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        result = measure(options, folder / RESULT, Console(stderr=True, markup=False))
        for text in (report.setting(result), *report.summary(result)):
            console.print(text, highlight=False, markup=False)
        for table in report.overview(result):
            _print_table(table.title, table.heads, table.body)
        page = report.write_page(result, folder)
        console.print(f"page: {page}\nresult: {folder / RESULT}", highlight=False, markup=False, soft_wrap=True)
        if result["stopped"]:
            sys.exit(130)


@dataclass(frozen=True)
class Doctor:
    """Check that harlora works here: what serves and why, whether every kernel is right, how fast this machine is.

    Ends with status 1 where something is wrong, and says what to do.
    """

    device: str = "cpu"
    """cpu, cuda or cuda:0."""
    tune: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure which kernels are fastest on this device, and use them from now on."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON and nothing else."""
    no_speed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out ceilings and the comparison with other libraries, which take one to two minutes."""

    def run(self) -> None:
        from harlora import doctor

        rivals = (peers.OURS, peers.PEER, peers.DENSE)
        options = Options(
            "quick", self.device, ("ceilings", "layer", "encoder", "step"), competitors=rivals, minutes=1.7,
            command="harlora doctor",
        )  # fmt: skip
        device = options.checked_device()
        status = Console(stderr=True, markup=False)
        found: dict[str, Any] = {}
        with Bars(status) as bars:
            try:
                found["state"], problems = doctor.state(device)
            except (RuntimeError, ValueError) as error:  # a name in HARLORA_CPU or HARLORA_BACKEND that is none
                raise InputError(re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])) from error
            test = doctor.self_test(device, bars.run("self-test", 1, 1))
            found["self_test"] = {"comparisons": test.comparisons, "covered": test.covered}
            problems += test.problems
            if self.tune:
                try:
                    found["tuned"] = doctor.tune(device, problems, bars.run("tuning", 1, 1))
                except (ValueError, OSError) as error:
                    raise InputError(f"--tune: {error}") from error
        shown: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [*doctor.tables(found)]
        if not self.no_speed:
            with tempfile.TemporaryDirectory() as folder:
                result = measure(options, Path(folder) / RESULT, status)
            found["speed"] = {
                name: result[name] for name in ("provenance", "machine", "ceilings", "competitors", "rows")
            }
            for row in result["rows"]:
                if row["competitor"] == peers.OURS and row["status"].startswith(("wrong", "raised")):
                    problems.append(doctor.Problem(f"{where(row)}: {row['status']}", doctor.WRONG))
            shown += report.overview(result)
        found["problems"] = [each._asdict() for each in problems]
        if self.json:
            print(json.dumps(found, indent=1, allow_nan=False))
        else:
            for title, heads, body in shown:
                _print_table(title, heads, body)
            if not self.no_speed:
                for text in (report.setting(result), *report.summary(result)):
                    console.print(text, highlight=False, markup=False)
            for each in problems[:SHOWN]:
                console.print(f"PROBLEM: {each.problem}", style="bold red", highlight=False, markup=False)
            for remedy in dict.fromkeys(each.remedy for each in problems):
                console.print(f"Remedy: {remedy}", highlight=False, markup=False)
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
            count += f", of which the first {SHOWN} are shown; --json has all" if len(problems) > SHOWN else ""
            console.print(count if problems else "Nothing is wrong.", highlight=False)
        if problems:
            sys.exit(1)


Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Lodo, tyro.conf.subcommand("lodo")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def _print_table(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        # Numbers, with what may stand in their place, to the right.
        numbers = all(re.match(r"[\d–]|fails$|$", line[number]) for line in body)
        table.add_column(head, justify="right" if numbers and number else "left", overflow="fold")
    for line in body:
        table.add_row(*line)
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table if body else "  none\n")


def _print_facts(facts: imported.Facts) -> None:
    _print_table(f"{facts.name}: what was found", ("checked", "found", ""), facts.checks)
    subjects = list(dict.fromkeys(subject for counts in facts.windows.values() for subject in counts))
    heads = ("subject", *facts.windows, "all")
    body = [(subject, *(str(counts[subject]) for counts in facts.windows.values()),
             str(sum(counts[subject] for counts in facts.windows.values()))) for subject in subjects]  # fmt: skip
    sums = [sum(counts.values()) for counts in facts.windows.values()]
    body.append(("all", *map(str, sums), str(sum(sums))))
    _print_table("Windows that come out, by subject and class", heads, body)


def _print_tables(records: Sequence[dict[str, Any]]) -> None:
    everything = range(len(COLUMNS))
    # Scores and costs below each other where they do not fit side by side.
    parts = [everything] if console.width >= 145 else [everything[:5], (0, *everything[5:])]
    for members in groups(pooled(records)):
        console.print(heading(members), style="bold", highlight=False)
        for columns in parts:
            table = Table(box=box.SIMPLE_HEAD)
            for column in columns:
                table.add_column(COLUMNS[column], justify="right" if column else "left")
            for record in members:
                cells = row(record)
                table.add_row(*(cells[column] for column in columns))
            console.print(table)
    console.print(LEGEND, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """The program ``harlora``."""
    command = tyro.cli(
        Command,
        prog="harlora",
        description="4-bit QLoRA for human activity recognition: data, training, export, reports, benchmarks, "
        "self-test.",
        args=arguments,
    )
    try:
        command.run()
    except InputError as error:
        if os.environ.get("HARLORA_TRACEBACK"):
            raise
        Console(stderr=True, width=10_000).print(f"harlora: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True, markup=False).print(
            "harlora: stopped; the same command goes on from here", highlight=False
        )
        sys.exit(130)
