"""Two sensors with clocks of their own on one common clock."""

from collections.abc import Iterator

import numpy as np

from harlora.errors import InputError


def align(
    accel_s: np.ndarray,
    accel: np.ndarray,
    gyro_s: np.ndarray,
    gyro: np.ndarray,
    *,
    rate_hz: float,
    longest_gap_s: float,
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
        times = start + np.arange(int((stop - start) * rate_hz) + 1) / rate_hz
        yield float(start), _at(times, a_times, a_values), _at(times, g_times, g_values)


Piece = tuple[np.ndarray, np.ndarray]


def _pieces(times: np.ndarray, rows: np.ndarray, breaks: np.ndarray) -> Iterator[Piece]:
    return zip(np.split(times, breaks), np.split(rows, breaks), strict=True)


def _overlapping(ones: list[Piece], others: list[Piece]) -> Iterator[tuple[Piece, Piece]]:
    for one in ones:
        for other in others:
            if max(one[0][0], other[0][0]) < min(one[0][-1], other[0][-1]):
                yield one, other


def _at(times: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(times, known, values[:, axis]) for axis in range(3)], axis=1).astype(np.float32)
