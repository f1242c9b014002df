"""From recordings to windows: one rate, no window across a gap, a subject or an activity, normalisation."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from harlora.data.labels import ACTIVITY_LABELS, LABEL_INDEX, VOCABULARY
from harlora.data.recording import LeftOut, Recording
from harlora.errors import InputError

RATE_HZ = 50.0
WINDOW = 128  # samples: 2.56 s at 50 Hz
HOP = 64
CHANNELS = ("accel x", "accel y", "accel z", "gyro x", "gyro y", "gyro z")


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of equal length with who, where and what.

    signals: ``(n, window, 6)``, float32; acceleration in m/s² with gravity, then angular velocity in rad/s.
    labels: ``(n,)``, int64, indices into `VOCABULARY`.
    subjects: ``(n,)``, int64, indices into ``subject_names``.
    segments: ``(n,)``, int64; windows of one uninterrupted stretch of signal share a number.
    starts: ``(n,)``, int64, first sample within that stretch, at the common rate.
    dropped: windows left out, by the dataset's own activity name, because it has no label in the vocabulary.
    too_short: stretches of a labelled activity that are shorter than one window.
    left_out: what the reader found but could make no recording of, by reason.
    domain, placement: whose people they are and where the device sat, as `harlora.data.catalog.Dataset`; empty where
    that is for the catalogue to say.
    """

    dataset: str
    signals: np.ndarray
    labels: np.ndarray
    subjects: np.ndarray
    subject_names: tuple[str, ...]
    segments: np.ndarray
    starts: np.ndarray
    dropped: dict[str, int]
    too_short: int
    left_out: dict[str, int] = field(default_factory=dict)
    domain: str = ""
    placement: str = ""

    def __len__(self) -> int:
        return len(self.signals)

    def take(self, indices: np.ndarray) -> "Windows":
        """The windows at ``indices``."""
        return replace(
            self,
            signals=self.signals[indices],
            labels=self.labels[indices],
            subjects=self.subjects[indices],
            segments=self.segments[indices],
            starts=self.starts[indices],
        )

    def fingerprint(self) -> str:
        """A hash of the signals, labels and subjects."""
        digest = hashlib.sha256()
        for array in (self.signals, self.labels, self.subjects):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def label_names(self) -> tuple[str, ...]:
        """The labels that occur, in the order of the vocabulary."""
        return tuple(VOCABULARY[index] for index in np.unique(self.labels))


def resampling(rate_hz: float, target_hz: float = RATE_HZ) -> Fraction:
    """The ratio by which `resample` changes a rate: ``target_hz / rate_hz`` in small numbers, off by up to 0.05 %.

    The rate that it reaches is ``rate_hz`` times this; where moments count, it is that one, not ``target_hz``.
    """
    return Fraction(target_hz / rate_hz).limit_denominator(1000)


def resample(signal: np.ndarray, rate_hz: float, target_hz: float = RATE_HZ) -> np.ndarray:
    """``signal`` of one uninterrupted stretch at ``target_hz``, as near as `resampling` comes, by polyphase filtering.

    The mean is set aside and the signal extended by its end-to-end line, so that gravity, a large constant, leaves no
    ripple, neither at the ends nor, through the filter's own, between the samples.

    signal: ``(time, channels)``.
    """
    ratio = resampling(rate_hz, target_hz)
    if ratio == 1:
        return signal
    from scipy.signal import resample_poly  # see train/metrics.py

    mean = signal.mean(axis=0, dtype=np.float64)
    moving = resample_poly(signal - mean, ratio.numerator, ratio.denominator, axis=0, padtype="line")
    return (moving + mean).astype(np.float32)


def sliding_windows(signal: np.ndarray, window: int = WINDOW, hop: int = HOP) -> np.ndarray:
    """The ``1 + (time - window) // hop`` windows of ``signal``, ``(n, window, channels)``, a view.

    signal: ``(time, channels)``, one uninterrupted stretch.
    Raises: InputError if ``window`` exceeds the length of the signal.
    """
    if len(signal) < window:
        raise InputError(
            f"sliding_windows: window of {window} samples exceeds the recording of {len(signal)} samples; "
            "record for longer or choose a shorter window"
        )
    return np.lib.stride_tricks.sliding_window_view(signal, window, axis=0)[::hop].swapaxes(1, 2)


def cut(recordings: Iterable[Recording | LeftOut], *, window: int = WINDOW, hop: int = HOP) -> Windows:
    """All windows of one dataset's recordings, every labelled interval resampled to 50 Hz on its own.

    Raises: InputError if a recording that is no fragment is shorter than a window, if no window is left, or if the
    acceleration has no gravity or another unit.
    """
    signals: list[np.ndarray] = []
    rows: list[tuple[int, int, int, int]] = []  # label, subject, segment, windows
    subjects: dict[str, int] = {}
    dropped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    magnitudes: list[float] = []
    too_short = 0
    dataset = ""
    for recording in recordings:
        dataset = recording.dataset
        if isinstance(recording, LeftOut):
            left_out[recording.reason] += 1
            continue
        length = round(len(recording.accel) * RATE_HZ / recording.rate_hz)
        if length < window and not recording.fragment:
            raise InputError(
                f"{dataset}: {recording.source}: the recording has {length} samples at {RATE_HZ:g} Hz, required at "
                f"least one window of {window}; remove the file"
            )
        names = ACTIVITY_LABELS.get(dataset, {label: label for label in VOCABULARY})
        both = np.concatenate([recording.accel, recording.gyro], axis=1)
        for interval in recording.intervals:
            count = 1 + (round((interval.stop - interval.start) * RATE_HZ / recording.rate_hz) - window) // hop
            label = names.get(interval.activity)
            if label is None:
                dropped[interval.activity] += max(count, 0)
                continue
            if math.ceil((interval.stop - interval.start) * RATE_HZ / recording.rate_hz) < window:
                too_short += 1
                continue
            stretch = resample(both[interval.start : interval.stop], recording.rate_hz)
            magnitudes.append(float(np.median(np.linalg.norm(stretch[:, :3], axis=1))))
            signals.append(sliding_windows(stretch, window, hop))
            subject = subjects.setdefault(recording.subject, len(subjects))
            rows.append((LABEL_INDEX[label], subject, len(rows), len(signals[-1])))
    if not rows:
        raise InputError(
            f"{dataset or 'recordings'}: no window of a known activity; dropped: {dict(dropped)}, stretches too short: "
            f"{too_short}, left out: {dict(left_out)}"
        )
    _require_gravity(dataset, magnitudes)
    table = np.array(rows, dtype=np.int64)
    counts = table[:, 3]
    return Windows(
        dataset=dataset,
        signals=np.concatenate(signals).astype(np.float32),
        labels=np.repeat(table[:, 0], counts),
        subjects=np.repeat(table[:, 1], counts),
        subject_names=tuple(subjects),
        segments=np.repeat(table[:, 2], counts),
        starts=np.concatenate([np.arange(count, dtype=np.int64) * hop for count in counts]),
        dropped=dict(dropped),
        too_short=too_short,
        left_out=dict(left_out),
    )


def _require_gravity(dataset: str, magnitudes: Sequence[float]) -> None:
    # Over a dataset most stretches are near one g whatever the activity; a set without gravity is near zero, one in
    # g near one. Mixing either with the others would teach the encoder the dataset instead of the activity.
    typical = float(np.median(magnitudes))
    if not 8.0 < typical < 12.0:
        raise InputError(
            f"{dataset}: accelerometer magnitude is typically {typical:.2f}, required about 9.81: m/s² with gravity "
            "included; convert from g, or add the gravity that was removed"
        )


@dataclass(frozen=True)
class Normalizer:
    """Per-channel mean and standard deviation, taken from training windows only."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, signals: np.ndarray) -> "Normalizer":
        """Statistics of windows ``(n, window, channels)``, accumulated in float64."""
        mean = signals.mean(axis=(0, 1), dtype=np.float64)
        std = np.maximum(signals.std(axis=(0, 1), dtype=np.float64), 1e-6)  # a channel that never moves stays finite
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, signals: np.ndarray) -> np.ndarray:
        """``(signals - mean) / std``, float32."""
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        return (signals - mean) / std
