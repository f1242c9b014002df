"""`Recording`, the one type that every reader returns."""

from dataclasses import dataclass

import numpy as np

from harlora.errors import InputError

STANDARD_GRAVITY = 9.80665  # m/s² in one g


@dataclass(frozen=True)
class Interval:
    """A stretch of one recording with one activity, in the dataset's own words.

    start, stop: samples, half-open.
    """

    start: int
    stop: int
    activity: str


@dataclass(frozen=True, eq=False)
class Recording:
    """Accelerometer and gyroscope of one device on one subject, without gaps.

    accel: ``(time, 3)``, float32, m/s², gravity included.
    gyro: ``(time, 3)``, float32, rad/s, sample by sample beside ``accel``.
    intervals: sorted, not overlapping; samples outside every interval are unlabelled.
    source: the file it came from, for messages.
    fragment: a piece between two gaps of a longer recording, which may be shorter than a window.
    Raises: InputError if shapes disagree, a value is not finite, or an interval lies outside or overlaps another.
    """

    dataset: str
    subject: str
    placement: str
    rate_hz: float
    accel: np.ndarray
    gyro: np.ndarray
    intervals: tuple[Interval, ...]
    source: str
    fragment: bool = False

    def __post_init__(self) -> None:
        where = f"{self.dataset}: {self.source}"
        if self.accel.ndim != 2 or self.accel.shape[1] != 3 or self.gyro.shape != self.accel.shape:
            raise InputError(
                f"{where}: accelerometer and gyroscope must both be (time, 3) and equally long, got "
                f"{self.accel.shape} and {self.gyro.shape}; download the dataset again"
            )
        if not self.rate_hz > 0:
            raise InputError(f"{where}: rate_hz must be positive, got {self.rate_hz}")
        for name, signal in (("accelerometer", self.accel), ("gyroscope", self.gyro)):
            if not np.isfinite(signal).all():
                row = int(np.flatnonzero(~np.isfinite(signal).all(axis=1))[0])
                raise InputError(
                    f"{where}: the {name} has a value that is not a finite number at sample {row}; "
                    "repair the file or remove it from the dataset"
                )
        end = 0
        for interval in self.intervals:
            if not end <= interval.start < interval.stop <= len(self.accel):
                raise InputError(
                    f"{where}: activity {interval.activity} at samples {interval.start} to {interval.stop} overlaps "
                    f"the one before it or leaves the recording of {len(self.accel)} samples; "
                    "the labels belong to another file"
                )
            end = interval.stop


@dataclass(frozen=True)
class LeftOut:
    """What a reader found but could make no recording of, such as a device without a gyroscope; it is counted.

    reason: in words, for many of them.
    """

    dataset: str
    placement: str
    reason: str
