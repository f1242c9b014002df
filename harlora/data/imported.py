"""Recordings of one's own as a dataset: checked once when they are imported, then read as the authors' archives are.

One safetensors file holds the signals as measured, in m/s² and rad/s, and all facts about them, in its header: a
dataset is whole or not there, nothing in it can disagree with another file, a checksum covers it, and it is read
without the libraries that tables need. Cutting, resampling and labels are the same code as every reader's.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harlora.data.archive import Archive
from harlora.data.labels import LABEL_INDEX, VOCABULARY
from harlora.data.recording import Interval, Recording
from harlora.data.table import (
    AXES,
    Stretch,
    SubjectFrom,
    Tables,
    Track,
    Units,
    label_map,
    longest_gap_s,
    read_tables,
    stretches,
    table_files,
)  # fmt: skip
from harlora.data.windows import RATE_HZ, Windows, cut
from harlora.errors import InputError
from harlora.files import load_tensors, read_info, save_tensors

FILE = "recordings.safetensors"
_KIND, _REMEDY = "recordings", "delete it and import the recordings again"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_CLIPS = {"accelerometer": 14.5, "gyroscope": 4.3}  # m/s² and rad/s: no sensor's range ends below


@dataclass(frozen=True)
class Facts:
    """What an imported dataset says of itself.

    checks: what was looked at, what was found, and what that means. windows: those of each class, by subject.
    """

    name: str
    domain: str
    placement: str
    checks: tuple[tuple[str, str, str], ...]
    windows: Mapping[str, Mapping[str, int]]


def find(root: Path | None, wrong: dict[str, InputError] | None = None) -> list[Facts]:
    """The imported datasets under a data root, by name.

    wrong: takes what is wrong with those that are damaged, by name.
    Raises: InputError if one of them is damaged, without ``wrong``.
    """
    if root is None or not root.is_dir():
        return []
    found = []
    for file in sorted(root.glob(f"*/{FILE}")):
        try:
            found.append(facts(file.parent))
        except InputError as error:
            if wrong is None:
                raise
            wrong[file.parent.name] = error
    return found


def facts(folder: Path) -> Facts:
    """What the imported dataset in ``folder`` says of itself.

    Raises: InputError if there is none, or it is damaged.
    """
    info = read_info(folder / FILE, kind=_KIND, remedy=_REMEDY)
    checks = tuple((what, found, meaning) for what, found, meaning in info["checks"])
    return Facts(folder.name, info["domain"], info["placement"], checks, info["windows"])


def read(archive: Archive) -> Iterator[Recording]:
    """The recordings of an imported dataset, one an uninterrupted stretch, with labels of the vocabulary."""
    tensors, info = load_tensors(archive.path / FILE, kind=_KIND, remedy=_REMEDY)
    accel, gyro, spans = tensors["accel"].numpy(), tensors["gyro"].numpy(), tensors["intervals"].numpy()
    names = [info["labels"].get(name, name) for name in info["activities"]]
    start = 0
    for number, one in enumerate(info["recordings"]):
        stop = start + one["samples"]
        yield Recording(
            dataset=archive.path.name,
            subject=one["subject"],
            placement=info["placement"],
            rate_hz=one["rate_hz"],
            accel=accel[start:stop],
            gyro=gyro[start:stop],
            intervals=tuple(Interval(int(i), int(j), names[a]) for _, i, j, a in spans[spans[:, 0] == number]),
            source=one["source"],
        )
        start = stop


def import_tables(
    paths: Sequence[Path],
    name: str,
    root: Path,
    *,
    domain: str = "",
    placement: str = "unknown",
    units: Units | None = None,
    labels: Sequence[str] = (),
    subject_from: SubjectFrom = "column",
    replace: bool = False,
    taken: Mapping[str, str],
    report: Callable[[int, int, str], None] = lambda done, steps, note: None,
) -> Facts:
    """Check the tables that ``paths`` name, write them under ``root`` as the dataset ``name``, and say what was found.

    domain: whose people they are, where another dataset has the same: its name or its domain; by default nobody else's.
    labels: ``own=vocabulary`` for activities that the vocabulary calls otherwise.
    taken: the domain of every dataset that is known, by its name.
    Raises: InputError if the name is taken, anything in a table is wrong, or no window would come out; nothing is
    written then.
    """
    folder = root / name
    whose = _checked_name(name, folder, domain, replace, taken)
    files = table_files(paths)
    origins = _hashes(files)
    tables = read_tables(files, units or Units(), subject_from=subject_from, report=report)
    pieces = [
        (track, list(stretches(track, dataset=name, placement=placement or "unknown"))) for track in tables.tracks
    ]
    found = [stretch for _, several in pieces for stretch in several]
    activities = list(dict.fromkeys(i.activity for stretch in found for i in stretch.recording.intervals))
    mapping = label_map(activities, labels)
    if not found:
        raise InputError(f"{files[0]}: no stretch without a gap is as long as one window of 2.56 s; record for longer")
    if not mapping:
        raise InputError(
            f"{files[0]}: no activity has a label of the vocabulary, {', '.join(VOCABULARY)}; the tables have "
            f"{', '.join(activities) or 'none'}: say what they are with --labels own=vocabulary"
        )
    info: dict[str, Any] = {
        "domain": whose,
        "placement": placement,
        "labels": mapping,
        "activities": activities,
        "recordings": [
            {
                "subject": stretch.recording.subject,
                "rate_hz": stretch.recording.rate_hz,
                "samples": len(stretch.recording.accel),
                "source": stretch.recording.source,
            }
            for stretch in found
        ],
        "files": origins,
        "units": {"timestamp": tables.time_unit, "accel": tables.accel_unit, "gyro": tables.gyro_unit},
    }
    windows = cut(_labelled(found, mapping))
    info["windows"] = _by_class(windows)
    info["checks"] = [
        *_read_checks(tables),
        *_time_checks(tables, pieces),
        *_signal_checks(tables),
        *_label_checks(pieces, mapping, windows),
    ]
    number = {activity: index for index, activity in enumerate(activities)}
    spans = [
        (position, interval.start, interval.stop, number[interval.activity])
        for position, stretch in enumerate(found)
        for interval in stretch.recording.intervals
    ]
    tensors = {
        "accel": np.concatenate([stretch.recording.accel for stretch in found]),
        "gyro": np.concatenate([stretch.recording.gyro for stretch in found]),
        "intervals": np.array(spans, dtype=np.int64).reshape(-1, 4),
    }
    try:
        save_tensors(
            folder / FILE, {key: torch.from_numpy(array) for key, array in tensors.items()}, kind=_KIND, info=info
        )
    except OSError as error:
        raise InputError(f"cannot write {folder / FILE} ({error}); choose another data root with --data") from error
    return facts(folder)


def _checked_name(name: str, folder: Path, domain: str, replace: bool, taken: Mapping[str, str]) -> str:
    """The domain of a dataset of this name."""
    there = (folder / FILE).exists()
    others = {other: theirs for other, theirs in taken.items() if other != name or not there}
    whose = others.get(domain, domain) or name
    if not _NAME.fullmatch(name) or name.startswith("synthetic"):
        raise InputError(
            f"--name must be of a to z, 0 to 9, _ and -, and not begin with synthetic, got {name!r}; choose another"
        )
    if not there and (name in others or name in others.values()):
        raise InputError(
            f"--name {name} is that of a known dataset or of its people; choose another"
            + ("" if domain else f", and add --domain {name} if they are the same people")
        )
    if whose != name and whose not in others.values():
        raise InputError(
            f"--domain {domain}: no dataset has these people; required one of "
            f"{', '.join(dict.fromkeys(others.values()))}, a dataset's name, or nothing if no other dataset has them"
        )
    if whose != name and (sharing := [other for other, theirs in others.items() if theirs == name]):
        raise InputError(
            f"--domain {domain}: {', '.join(sharing)} was imported with --domain {name}; required the same people for "
            f"both: import {sharing[0]} again with --domain {domain} before"
        )
    if there and not replace:
        raise InputError(f"{folder / FILE}: is there already; choose another --name, or add --replace")
    if not there and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is a folder with other files; choose another --name")
    return whose


def _hashes(files: Sequence[Path]) -> list[dict[str, Any]]:
    seen: dict[str, Path] = {}
    origins = []
    for file in files:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if (same := seen.setdefault(digest, file)) != file:
            raise InputError(
                f"{same} and {file}: are the same; required each recording once, or it is trained on and tested: "
                "leave one out"
            )
        origins.append({"name": file.name, "bytes": file.stat().st_size, "sha256": digest})
    return origins


def _labelled(found: Sequence[Stretch], mapping: Mapping[str, str]) -> Iterator[Recording]:
    for stretch in found:
        recording = stretch.recording
        intervals = tuple(Interval(i.start, i.stop, mapping.get(i.activity, i.activity)) for i in recording.intervals)
        yield Recording(**{**vars(recording), "intervals": intervals})


def _by_class(windows: Windows) -> dict[str, dict[str, int]]:
    return {
        label: {
            subject: int(((windows.labels == LABEL_INDEX[label]) & (windows.subjects == number)).sum())
            for number, subject in enumerate(windows.subject_names)
        }
        for label in windows.label_names()
    }


# What was looked at, what was found, what it means.

Check = tuple[str, str, str]
Pieces = Sequence[tuple[Track, Sequence[Stretch]]]


def duration(seconds: float) -> str:
    """Seconds as a reader likes them."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h"
    )  # fmt: skip


def _read_checks(tables: Tables) -> Iterator[Check]:
    tracks = tables.tracks
    files = len({track.source for track in tracks})
    yield "files", f"{files}: {', '.join(tables.forms)}", ""
    if tables.columns:
        yield "other columns", ", ".join(tables.columns), "ignored"
    yield "rows", f"{sum(track.read for track in tracks):,}", ""
    subjects = list(dict.fromkeys(track.subject for track in tracks))
    few = "the subject protocol requires 3" if len(subjects) < 3 else ""
    yield "subjects", f"{len(subjects)}: {', '.join(subjects[:12])}{' …' if len(subjects) > 12 else ''}", few
    alike: dict[str, list[str]] = {}
    for subject in subjects:
        alike.setdefault("".join(subject.split()).casefold(), []).append(subject)
    if doubtful := ["/".join(names) for names in alike.values() if len(names) > 1]:
        yield "subjects spelled alike", ", ".join(doubtful), "one person? That would be trained on and tested"
    for what, count, meaning in (
        ("incomplete rows", sum(track.incomplete for track in tracks), "left out, as if nothing was measured"),
        ("rows out of order", sum(track.disordered for track in tracks), "sorted by time"),
        ("rows of the same time", sum(track.repeated for track in tracks), "the first counts"),
    ):
        yield what, f"{count:,}", meaning if count else ""


def _time_checks(tables: Tables, pieces: Pieces) -> Iterator[Check]:
    tracks = tables.tracks
    yield "timestamps", tables.time_unit, ""
    steps = [np.diff(track.times) for track in tracks]
    rates = [track.rate_hz for track in tracks]
    rate = float(np.median(rates))
    spread = "" if max(rates) - min(rates) < 0.01 * rate else f", by recording {min(rates):.4g} to {max(rates):.4g} Hz"
    is_common = all(abs(each - RATE_HZ) < 0.0005 * RATE_HZ for each in rates)
    yield "rate", f"{rate:.5g} Hz{spread}", "" if is_common else f"resampled to {RATE_HZ:g} Hz"
    low, high = np.quantile(np.concatenate(steps), (0.05, 0.95)) * 1000
    stretched = [stretch for _, several in pieces for stretch in several]
    uneven = sum(not stretch.even for stretch in stretched)
    yield (
        "steps in time",
        f"{low:.4g} to {high:.4g} ms in 9 of 10",
        f"{uneven} of {len(stretched)} stretches interpolated onto an even clock" if uneven else "",
    )
    gaps = np.concatenate([each[each > longest_gap_s(one)] for each, one in zip(steps, rates, strict=True)])
    longest = f", the longest {duration(float(gaps.max()))}" if len(gaps) else ""
    yield "gaps", f"{len(gaps)}{longest}", "split there; nothing is interpolated across" if len(gaps) else ""
    missing = sum(
        int((np.round(each[each <= longest_gap_s(one)] * one) - 1).clip(0).sum())
        for each, one in zip(steps, rates, strict=True)
    )
    yield "samples missing in short gaps", str(missing), "interpolated" if missing else ""
    kept = sum(len(stretch.recording.accel) / stretch.recording.rate_hz for stretch in stretched)
    measured = sum(len(track.times) / track.rate_hz for track in tracks)
    lost = max(measured - kept, 0.0)
    short = f"{duration(lost)} lie in stretches shorter than a window" if lost > 0.5 else ""
    yield "duration", f"{duration(kept)} in {len(stretched)} stretches", short


def _signal_checks(tables: Tables) -> Iterator[Check]:
    yield "acceleration", f"{tables.accel_unit}, gravity included", "" if tables.accel_unit == "m/s2" else "made m/s²"
    yield "angular velocity", tables.gyro_unit, "" if tables.gyro_unit == "rad/s" else "made rad/s"
    clipped, constant = [], Counter[str]()
    signals = [np.concatenate([track.accel, track.gyro], axis=1) for track in tables.tracks]
    for index, axis in enumerate(AXES):
        constant[axis] = sum(np.ptp(signal[:, index]) == 0 for signal in signals)
        # A range ends at one value on both sides; a body rarely reaches the same extreme twice in a row.
        extreme = max(float(np.abs(signal[:, index]).max()) for signal in signals)
        at = [np.abs(signal[:, index]) >= extreme * (1 - 1e-4) for signal in signals]
        runs = sum(int((each[1:] & each[:-1]).sum()) for each in at)
        if runs >= 3 and extreme > _CLIPS["accelerometer" if index < 3 else "gyroscope"]:
            rows = sum(int(each.sum()) for each in at)
            clipped.append(f"{axis} at ±{extreme:.4g} {'m/s²' if index < 3 else 'rad/s'} in {rows:,} rows")
    meaning = "the sensor's range was too small there; the samples are kept" if clipped else ""
    yield "saturation", ", ".join(clipped) or "none", meaning
    dead = [f"{axis} in {count} of {len(signals)} recordings" for axis, count in constant.items() if count]
    yield (
        "axes that never change",
        ", ".join(dead) or "none",
        "is the sensor broken, or a column filled in?" if dead else "",
    )
    stuck = sum(_stuck_s(track, signal) for track, signal in zip(tables.tracks, signals, strict=True))
    meaning = "all axes stood still for a second or more: nothing was measured there?" if stuck else ""
    yield "stuck sensor", duration(stuck) if stuck else "never", meaning


def _stuck_s(track: Track, signal: np.ndarray) -> float:
    """Seconds in runs of a second or more in which no axis changes at all."""
    same = (np.diff(signal, axis=0) == 0).all(axis=1)
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
    runs = (edges[1::2] - edges[::2]) / track.rate_hz
    return float(runs[runs >= 1].sum())


def _label_checks(pieces: Pieces, mapping: Mapping[str, str], windows: Windows) -> Iterator[Check]:
    seconds: Counter[str] = Counter()
    whole = 0.0
    for _, several in pieces:
        for stretch in several:
            recording = stretch.recording
            whole += len(recording.accel) / recording.rate_hz
            for interval in recording.intervals:
                seconds[interval.activity] += (interval.stop - interval.start) / recording.rate_hz  # type: ignore[assignment]
    renamed = [f"{own} → {label}" if own != label else own for own, label in mapping.items()]
    yield "labels in the vocabulary", ", ".join(renamed), ""
    unknown = [
        f"{own} ({duration(seconds[own])}, {windows.dropped.get(own, 0)} windows)"
        for own in seconds
        if own not in mapping
    ]
    remedy = "dropped and counted; --labels own=vocabulary keeps them" if unknown else ""
    yield "labels not in it", ", ".join(unknown) or "none", remedy
    bare = whole - sum(seconds.values())
    yield "without a label", duration(bare), "dropped" if bare > 0 else ""
    too_short = f"{windows.too_short} stretches of one activity are shorter than a window" if windows.too_short else ""
    yield "windows that come out", f"{len(windows):,}", too_short
