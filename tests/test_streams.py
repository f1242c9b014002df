"""Sensors with clocks of their own, on made and on real streams."""

import csv
import io

import numpy as np
import pytest

from harlora.data import Interval
from harlora.data.streams import align, common_rate, intervals, labels_at
from harlora.errors import InputError

RNG = np.random.default_rng(0)


def curve(times):
    return np.stack([np.sin(2 * times), np.cos(times), 0.3 * times], axis=1)


def clock(start, stop, rate):
    times = np.arange(start, stop, 1 / rate)
    return times[RNG.random(len(times)) > 0.1]


def test_both_signals_are_those_of_the_same_moment():
    accel_s, gyro_s = clock(100.0, 160.0, 97.0), clock(100.7, 158.0, 61.0)
    ((start, accel, gyro),) = align(accel_s, curve(accel_s), gyro_s, curve(gyro_s), rate_hz=50, longest_gap_s=1.0)
    assert start == max(accel_s[0], gyro_s[0])
    times = start + np.arange(len(accel)) / 50
    assert times[-1] <= min(accel_s[-1], gyro_s[-1])
    assert len(times) == pytest.approx(50 * 57.2, abs=20)
    np.testing.assert_allclose(accel, curve(times), atol=0.01)
    np.testing.assert_allclose(gyro, curve(times), atol=0.01)


def test_nothing_is_interpolated_across_a_gap():
    accel_s = np.concatenate([clock(0, 10, 50), clock(14, 20, 50)])
    gyro_s = np.concatenate([clock(0, 5, 50), clock(7, 20, 50)])
    stretches = list(align(accel_s, curve(accel_s), gyro_s, curve(gyro_s), rate_hz=50, longest_gap_s=0.5))
    spans = [(round(start), round(start + len(accel) / 50)) for start, accel, _ in stretches]
    assert spans == [(0, 5), (7, 10), (14, 20)]


def test_pieces_of_both_sensors_that_end_anywhere():
    """As the pairs of all pieces with all pieces would be."""
    for _ in range(20):
        bounds = [np.sort(RNG.choice(400, 12, replace=False)) / 2 for _ in range(2)]
        clocks = [np.concatenate([np.arange(a, b, 0.02) for a, b in zip(one[::2], one[1::2], strict=True)])
                  for one in bounds]  # fmt: skip
        pieces = [np.split(one, np.flatnonzero(np.diff(one) > 0.1) + 1) for one in clocks]
        expected = sorted((max(a[0], b[0]), min(a[-1], b[-1])) for a in pieces[0] for b in pieces[1])
        expected = [(start, stop) for start, stop in expected if start < stop]
        found = align(clocks[0], curve(clocks[0]), clocks[1], curve(clocks[1]), rate_hz=50)
        spans = [(start, start + (len(accel) - 1) / 50) for start, accel, _ in found]
        np.testing.assert_allclose(spans, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [((50.0, 50.0), 50), ((25.0, 20.0), 50), ((51.0, 49.0), 50), ((60.0, 50.0), 100), ((98.7, 98.8), 100),
     ((50.0, 198.4), 200), ((203.0, 200.0), 200)],
)  # fmt: skip
def test_the_rate_to_align_at(rates, expected):
    clocks = [np.arange(0, 20, 1 / rate) for rate in rates]
    clocks = [np.delete(np.concatenate([one, one[5:] + 500.0]), [3, 50, 51]) for one in clocks]  # a gap, lost samples
    assert common_rate(*(RNG.permutation(one) for one in clocks)) == expected


def test_labels_between_samples():
    label_s, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1])
    times = np.array([0.5, 1.0, 1.7, 2.0, 2.5, 3.0, 3.5, 4.0 + 1e-9, 4.5])
    found = labels_at(times, label_s, labels)
    assert found.tolist() == [-1, 0, 0, 0, -1, 1, 1, 1, -1]
    assert intervals(found, ("sit", "walk")) == (Interval(1, 4, "sit"), Interval(5, 8, "walk"))
    assert intervals(np.array([1, 1, 0]), ("sit", "walk")) == (Interval(0, 2, "walk"), Interval(2, 3, "sit"))
    assert intervals(np.array([-1, -1]), ("sit",)) == ()


def test_order_and_repetition_do_not_matter():
    times = clock(0, 10, 50)
    values = curve(times)
    order = RNG.permutation(len(times))
    mixed = np.concatenate([times[order], times[:30]]), np.concatenate([values[order], values[:30]])
    (plain,) = align(times, values, times, values, rate_hz=50, longest_gap_s=1.0)
    (other,) = align(*mixed, *mixed, rate_hz=50, longest_gap_s=1.0)
    np.testing.assert_array_equal(plain[1], other[1])


def test_of_several_samples_with_one_time_the_first_counts():
    times = np.arange(50) / 50
    values = curve(times)
    twice, others = np.concatenate([times, times[20:30]]), np.concatenate([values, values[20:30] + 1])
    ((_, accel, gyro),) = align(twice, others, twice, others, rate_hz=50)
    np.testing.assert_allclose(accel, values, atol=1e-6)
    np.testing.assert_array_equal(gyro, accel)


def test_wrong_streams_are_refused():
    with pytest.raises(InputError, match="the gyroscope requires one finite time a sample, got 2 times for 3"):
        list(align(np.arange(3.0), np.zeros((3, 3)), np.arange(2.0), np.zeros((3, 3)), rate_hz=50, longest_gap_s=1.0))


def test_real_streams_of_a_phone(real_data):
    """HHAR: accelerometer and gyroscope of one phone, rows that do not correspond."""
    streams = []
    for sensor in ("accelerometer", "gyroscope"):
        text = real_data(f"hhar_sample/headerless/Phones_{sensor}.csv").read_text()
        rows = np.array([[float(v) for v in row[1:6]] for row in csv.reader(io.StringIO(text))])
        streams += [rows[:, 1] / 1e9, rows[:, 2:5]]
    stretches = list(align(*streams, rate_hz=50, longest_gap_s=0.5))
    assert sum(len(accel) for _, accel, _ in stretches) > 2000
    for _, accel, gyro in stretches:
        assert accel.shape == gyro.shape
        assert 9 < np.median(np.linalg.norm(accel, axis=1)) < 11
