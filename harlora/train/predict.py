"""A finetuned classifier on one recording of one's own: an activity for every window."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harlora.data.labels import VOCABULARY
from harlora.data.table import Stretch, Units, label_map, read_tables, stretches, table_files
from harlora.data.windows import HOP, RATE_HZ, Normalizer, resample, resampling, sliding_windows
from harlora.errors import InputError
from harlora.files import write_text
from harlora.train.finetune import load_checkpoint
from harlora.train.fit import Report, silent
from harlora.train.metrics import macro_f1, scores

_BATCH = 512


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a classifier says of one recording; times are seconds since the recording's first row.

    labels: the classifier's. target: the dataset that it was adapted to. origin_s: the first row, since 1970, or None.
    starts_s, ends_s: ``(n,)``, of each window. spans_s: ``(n, 2)``, the time that it speaks for: nearer to it than to
    its neighbours, and up to the edges of its stretch. probabilities: ``(n, labels)``, float32.
    truth: ``(n,)``, int64, index into ``labels`` where the table gives the whole window one of them, or else -1.
    given: start, end and name of every activity in the table, the vocabulary's where it has one.
    unscored: windows by why they have no truth. stretches: of each part without a gap its start, its rate in Hz (50, or
    as near as `harlora.data.windows.resampling` comes) and the magnitude of acceleration in m/s² at that rate.
    """

    labels: tuple[str, ...]
    target: str
    origin_s: float | None
    starts_s: np.ndarray
    ends_s: np.ndarray
    spans_s: np.ndarray
    probabilities: np.ndarray
    truth: np.ndarray
    given: tuple[tuple[float, float, str], ...]
    unscored: Mapping[str, int]
    stretches: tuple[tuple[float, float, np.ndarray], ...]

    @property
    def synthetic(self) -> bool:
        """Whether the classifier learned from made-up recordings."""
        return self.target.startswith("synthetic")

    @property
    def classes(self) -> np.ndarray:
        """The most probable label of each window, ``(n,)``, index into ``labels``."""
        return self.probabilities.argmax(axis=1)

    def shares(self) -> dict[str, float]:
        """Seconds of each activity that occurs, the longest first."""
        seconds = np.bincount(self.classes, self.spans_s[:, 1] - self.spans_s[:, 0], minlength=len(self.labels))
        return {self.labels[i]: float(seconds[i]) for i in np.argsort(-seconds, kind="stable") if seconds[i]}

    def scores(self) -> dict[str, Any] | None:
        """As `harlora.train.metrics.scores` of the windows with a truth, or None where none has one.

        ``macro_f1`` is the mean over the labels that the table has.
        """
        known = self.truth >= 0
        if not known.any():
            return None
        truth, predicted = self.truth[known], self.classes[known]
        return {**scores(truth, predicted, self.labels), "macro_f1": macro_f1(truth, predicted)}

    def write_csv(self, file: Path) -> None:
        """Write a row for each window: its times, label, probability, and that of every label; whole or not at all."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        with_truth = ["truth"] if self.given else []
        rows.writerow(["start_s", "end_s", "label", "probability", *(f"p_{name}" for name in self.labels), *with_truth])
        for start, end, best, each, truth in zip(
            self.starts_s, self.ends_s, self.classes, self.probabilities, self.truth, strict=True
        ):
            told = [self.labels[truth] if truth >= 0 else ""] if self.given else []
            chances = (f"{value:.4f}" for value in (each[best], *each))
            rows.writerow([f"{start:.3f}", f"{end:.3f}", self.labels[best], *chances, *told])
        write_text(file, text.getvalue())


def predict(
    model_file: Path,
    recording: Path,
    *,
    units: Units | None = None,
    labels: Sequence[str] = (),
    hop: int = HOP,
    device: torch.device,
    report: Report = silent,
) -> Prediction:
    """The activity in every window of a recording: one person's table, as `harlora data import` takes it.

    A window lies in one part without a gap, at 50 Hz; each part is resampled as a whole, as nothing says where an
    activity ends.

    labels: ``own=vocabulary`` for activities in the table that the vocabulary calls otherwise. hop: samples.
    Raises: InputError if the classifier or the table cannot be used, the table has several people, or nowhere as much
    as one window.
    """
    if hop < 1:
        raise InputError(f"--hop must be at least 1 sample, got {hop}")
    model, info = load_checkpoint(model_file)
    normalizer = Normalizer(tuple(info["normalizer"]["mean"]), tuple(info["normalizer"]["std"]))
    names = tuple(info["labels"])
    files = table_files([recording])
    if len(files) != 1:
        raise InputError(f"{recording}: has {len(files)} tables; required one recording, name its file")
    tables = read_tables(files, units or Units(), needs_label=False)
    if len(tables.tracks) > 1:
        subjects = ", ".join(track.subject for track in tables.tracks)
        raise InputError(f"{recording}: has rows of several subjects, {subjects}; required one recording of one person")
    (track,) = tables.tracks
    parts = list(stretches(track, dataset="recording", placement="unknown"))
    window = model.encoder.config.window
    mapping = label_map(track.label_names, labels)

    signals: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    traces: list[tuple[float, float, np.ndarray]] = []
    given: list[tuple[float, float, str]] = []
    unscored: Counter[str] = Counter()
    for part in parts:
        one = part.recording
        signal = resample(np.concatenate([one.accel, one.gyro], axis=1), one.rate_hz)
        if len(signal) < window:
            continue
        signals.append(sliding_windows(signal, window, hop))
        rate = one.rate_hz * float(resampling(one.rate_hz))  # at 50.02 Hz it stays: 1.4 s an hour from 50 Hz
        first = np.arange(len(signals[-1])) * hop / rate
        starts.append(part.start_s + first)
        ends.append(starts[-1] + window / rate)
        spans.append(part.start_s + _spans(first, window / rate, len(signal) / rate))
        traces.append((part.start_s, rate, np.linalg.norm(signal[:, :3], axis=1)))
        given += [
            (part.start_s + i.start / one.rate_hz, part.start_s + i.stop / one.rate_hz,
             mapping.get(i.activity, i.activity)) for i in one.intervals
        ]  # fmt: skip
        truths.append(_truth(part, first, window / rate, mapping, names, unscored))
    if not signals:
        raise InputError(
            f"{recording}: no part without a gap is as long as one window of {window / RATE_HZ:g} s; record for longer"
        )
    total = sum(map(len, signals))
    model.to(device)
    chances, done = [], 0
    with torch.inference_mode():
        for several in signals:
            for start in range(0, len(several), _BATCH):
                batch = torch.from_numpy(normalizer(several[start : start + _BATCH]))
                chances.append(model(batch.to(device)).softmax(dim=1).cpu().numpy())
                done += len(batch)
                report(done, total, "windows")
    return Prediction(
        labels=names,
        target=info["target"],
        origin_s=track.origin_s,
        starts_s=np.concatenate(starts),
        ends_s=np.concatenate(ends),
        spans_s=np.concatenate(spans),
        probabilities=np.concatenate(chances),
        truth=np.concatenate(truths),
        given=tuple(given),
        unscored=dict(unscored),
        stretches=tuple(traces),
    )


def _spans(starts_s: np.ndarray, window_s: float, length_s: float) -> np.ndarray:
    """The part of its stretch that each window speaks for."""
    centres = starts_s + window_s / 2
    between = (centres[1:] + centres[:-1]) / 2
    spans = np.stack([np.concatenate([[0.0], between]), np.concatenate([between, [length_s]])], axis=1)
    # Windows that do not touch leave what lies between them to nobody.
    first, last = spans[0, 0], spans[-1, 1]
    spans[:, 0] = np.maximum(spans[:, 0], starts_s)
    spans[:, 1] = np.minimum(spans[:, 1], starts_s + window_s)
    spans[0, 0], spans[-1, 1] = first, last
    return spans


def _truth(
    part: Stretch,
    starts_s: np.ndarray,
    window_s: float,
    mapping: Mapping[str, str],
    names: Sequence[str],
    unscored: Counter[str],
) -> np.ndarray:
    """For each window the index into ``names`` of the activity that it lies in from end to end, or -1."""
    truth = np.full(len(starts_s), -1, dtype=np.int64)
    rate = part.recording.rate_hz
    touched = np.zeros(len(starts_s), dtype=bool)
    within = np.zeros(len(starts_s), dtype=bool)
    slack = 0.5 / rate  # the last sample of an interval lasts until the next
    for interval in part.recording.intervals:
        start, stop = interval.start / rate, interval.stop / rate
        inside = (starts_s >= start - slack) & (starts_s + window_s <= stop + slack)
        touched |= (starts_s < stop) & (starts_s + window_s > start)
        within |= inside
        label = mapping.get(interval.activity)
        if label in names:
            truth[inside] = names.index(label)
        elif inside.any():
            whose = "the classifier does not know" if label in VOCABULARY else "is not in the vocabulary"
            unscored[f"of {interval.activity!r}, which {whose}"] += int(inside.sum())
    unscored["of several activities, or partly without"] += int((touched & ~within).sum())
    unscored["without a label"] += int((~touched).sum())
    return truth
