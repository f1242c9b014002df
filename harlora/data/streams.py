"""Two sensors with clocks of their own on one common clock."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from harlora.data.recording import Interval
from harlora.data.windows import RATE_HZ
from harlora.errors import InputError

# On HAPT's walking a straight line from one sample to another 0.1 s later is wrong by 0.7 standard deviations of the
# signal, over 0.2 s by a whole one: it knows nothing more. Below 0.1 s the phones of RealWorld, which skip a sample
# every two seconds, would leave no stretch as long as a window.
LONGEST_GAP_S = 0.1
_ROUNDING = 1e-6  # of a time, or of a number of samples


def align(
    accel_s: np.ndarray,
    accel: np.ndarray,
    gyro_s: np.ndarray,
    gyro: np.ndarray,
    *,
    rate_hz: float,
    longest_gap_s: float = LONGEST_GAP_S,
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Every stretch in which both sensors ran: its first time, and both signals at ``rate_hz``.

    Values are interpolated between the samples around each time, by time and never by row number: the two streams
    start apart, drop samples and run at different rates. A stretch ends where either sensor is silent for longer
    than ``longest_gap_s``; nothing is interpolated across. Samples may be out of order and repeated; of several with
    the same time the first counts.

    accel_s, gyro_s: ``(samples,)``, seconds; accel, gyro: ``(samples, 3)``.
    Yields: ``(time, 3)`` each, float32.
    Raises: InputError if times and values disagree in number or a time is not finite.
    """
    streams = []
    for name, times, values in (("accelerometer", accel_s, accel), ("gyroscope", gyro_s, gyro)):
        if len(times) != len(values) or not np.isfinite(times).all():
            raise InputError(
                f"align: the {name} requires one finite time a sample, got {len(times)} times for {len(values)} samples"
            )
        times, first = np.unique(times, return_index=True)
        breaks = np.flatnonzero(np.diff(times) > longest_gap_s) + 1
        streams.append([(part, values[rows]) for part, rows in _pieces(times, first, breaks)])
    for (a_times, a_values), (g_times, g_values) in _overlapping(*streams):
        start, stop = max(a_times[0], g_times[0]), min(a_times[-1], g_times[-1])
        times = start + np.arange(int((stop - start) * rate_hz + _ROUNDING) + 1) / rate_hz
        yield float(start), _at(times, a_times, a_values), _at(times, g_times, g_values)


Piece = tuple[np.ndarray, np.ndarray]


def _pieces(times: np.ndarray, rows: np.ndarray, breaks: np.ndarray) -> Iterator[Piece]:
    return zip(np.split(times, breaks), np.split(rows, breaks), strict=True)


def _overlapping(ones: list[Piece], others: list[Piece]) -> Iterator[tuple[Piece, Piece]]:
    i = j = 0
    while i < len(ones) and j < len(others):
        one, other = ones[i], others[j]
        if max(one[0][0], other[0][0]) < min(one[0][-1], other[0][-1]):
            yield one, other
        if one[0][-1] < other[0][-1]:
            i += 1
        else:
            j += 1


def _at(times: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(times, known, values[:, axis]) for axis in range(3)], axis=1).astype(np.float32)


def common_rate(*clocks: np.ndarray) -> float:
    """The rate to align at: the least multiple of 50 Hz that the fastest of the sensors does not exceed.

    Interpolation onto a slower grid would fold what the grid cannot hold into the band of walking. So a sensor of
    200 Hz is aligned at 200 Hz, and `cut` takes the signal to 50 Hz through a filter.

    clocks: of each sensor the times of its samples, seconds, in any order. The rate of one is its mean where it ran.
    """
    rates = []
    for times in clocks:
        steps = np.diff(np.unique(times))
        steps = steps[steps <= LONGEST_GAP_S]
        rates.append(1 / steps.mean() if len(steps) else 0.0)
    return RATE_HZ * max(1, math.ceil(max(rates) / RATE_HZ - 0.1))  # 0.1: clocks are not exact


def labels_at(times: np.ndarray, label_s: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label at each time, -1 where it is unknown: between two samples with different labels, and outside.

    label_s: ``(samples,)``, seconds, increasing; labels: ``(samples,)``, integers from 0.
    """
    after = np.searchsorted(label_s, times, side="left").clip(max=len(labels) - 1)
    before = (np.searchsorted(label_s, times, side="right") - 1).clip(min=0)
    inside = (times >= label_s[0] - _ROUNDING) & (times <= label_s[-1] + _ROUNDING)
    return np.where(inside & (labels[before] == labels[after]), labels[before], -1)


def intervals(labels: np.ndarray, activities: Sequence[str]) -> tuple[Interval, ...]:
    """The stretches with one label; samples with label -1 are in none.

    labels: ``(time,)``, indices into ``activities``.
    """
    edges = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1, [len(labels)]])
    return tuple(
        Interval(int(start), int(stop), activities[labels[start]])
        for start, stop in pairwise(edges)
        if labels[start] >= 0
    )
