"""Recordings, resampling and windows."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from harlora.data import Interval, Normalizer, Recording, cut, resample, sliding_windows
from harlora.data.labels import ACTIVITY_LABELS, VOCABULARY
from harlora.data.recording import LeftOut
from harlora.errors import InputError

UP = np.array([0.0, 0.0, 9.81], dtype=np.float32)


def recording(length=1000, intervals=None, rate_hz=50.0, dataset="motionsense", subject="1", accel=None):
    time = np.arange(length, dtype=np.float32)
    accel = UP + 0.001 * time[:, None] if accel is None else accel
    return Recording(
        dataset=dataset,
        subject=subject,
        placement="waist",
        rate_hz=rate_hz,
        accel=accel.astype(np.float32),
        gyro=np.stack([time, time, time], axis=1),
        intervals=tuple(Interval(*i) for i in (intervals if intervals is not None else [(0, length, "wlk")])),
        source="made.csv",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gyro": np.zeros((9, 3), np.float32)}, "equally long"),
        ({"accel": np.zeros((10, 2), np.float32)}, r"must both be \(time, 3\)"),
        ({"rate_hz": 0.0}, "rate_hz must be positive"),
        (
            {"gyro": np.full((10, 3), np.nan, np.float32)},
            "gyroscope has a value that is not a finite number at sample 0",
        ),
        ({"intervals": (Interval(0, 11, "wlk"),)}, "leaves the recording of 10 samples"),
        ({"intervals": (Interval(0, 5, "wlk"), Interval(4, 9, "sit"))}, "overlaps the one before it"),
        ({"intervals": (Interval(3, 3, "wlk"),)}, "overlaps the one before it or leaves"),
    ],
)
def test_a_recording_is_checked(changes, message):
    fields = {**vars(recording(10)), **changes}
    with pytest.raises(InputError, match=message):
        Recording(**fields)


@settings(deadline=None)
@given(length=st.integers(1, 700), window=st.integers(1, 200), hop=st.integers(1, 200))
def test_number_and_content_of_windows(length, window, hop):
    signal = np.arange(length, dtype=np.float32)[:, None]
    if length < window:
        with pytest.raises(InputError, match=f"window of {window} samples exceeds the recording of {length}"):
            sliding_windows(signal, window, hop)
        return
    windows = sliding_windows(signal, window, hop)
    assert windows.shape == (1 + (length - window) // hop, window, 1)
    for i, one in enumerate(windows):
        assert np.array_equal(one, signal[i * hop : i * hop + window])


@pytest.mark.parametrize("rate_hz", [25.0, 50.0, 64.0, 100.0, 200.0, 40.0])
def test_resampling_keeps_slow_signals_and_gravity(rate_hz):
    time = np.arange(round(10 * rate_hz)) / rate_hz
    signal = np.stack([9.81 + np.sin(2 * np.pi * 1.5 * time), np.full(len(time), -9.81)], axis=1).astype(np.float32)
    out = resample(signal, rate_hz)
    assert len(out) == 500
    expected = 9.81 + np.sin(2 * np.pi * 1.5 * np.arange(500) / 50)
    inner = slice(25, -25)
    assert np.abs(out[inner, 0] - expected[inner]).max() < 0.02
    assert np.abs(out[:, 1] + 9.81).max() < 1e-3  # no ripple at the ends


def test_resampling_removes_what_50_hz_cannot_hold():
    time = np.arange(2000) / 200
    assert np.abs(resample(np.sin(2 * np.pi * 60 * time)[:, None], 200.0)[25:-25]).max() < 0.05


def test_windows_know_where_they_come_from():
    made = [
        recording(300, [(0, 140, "wlk"), (140, 290, "sit")], subject="7"),
        recording(200, [(10, 150, "jog")], subject="3"),
    ]
    windows = cut(made)
    assert windows.signals.shape == (3, 128, 6)
    assert [VOCABULARY[label] for label in windows.labels] == ["walk", "sit", "run"]
    assert windows.label_names() == ("sit", "walk", "run")
    assert [windows.subject_names[s] for s in windows.subjects] == ["7", "7", "3"]
    # The gyroscope counts samples: each window lies inside its own interval.
    assert windows.signals[:, 0, 3].tolist() == [0, 140, 10]
    assert windows.signals[:, -1, 3].tolist() == [127, 267, 137]
    assert windows.segments.tolist() == [0, 1, 2]


def test_a_dataset_without_gravity_or_in_g_is_refused():
    for accel in (np.random.default_rng(0).normal(0, 0.5, (300, 3)), np.tile(UP / 9.81, (300, 1))):
        with pytest.raises(InputError, match=r"magnitude is typically .*, required about 9.81"):
            cut([recording(300, accel=accel)])


def test_a_recording_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="made.csv: the recording has 100 samples at 50 Hz, required at least one"):
        cut([recording(100)])


def test_a_fragment_shorter_than_a_window_is_counted():
    windows = cut([recording(300), replace(recording(100), fragment=True), replace(recording(1), fragment=True)])
    assert len(windows) == 3
    assert windows.too_short == 2


def test_what_a_reader_left_out_is_counted():
    one, other = (LeftOut("motionsense", "waist", f"devices without {sensor}") for sensor in ("gyroscope", "both"))
    windows = cut([one, recording(300), one, other])
    assert windows.left_out == {"devices without gyroscope": 2, "devices without both": 1}
    assert len(windows) == 3
    with pytest.raises(InputError, match="motionsense: no window of a known activity.*devices without both': 1"):
        cut([other])


def test_a_short_interval_of_a_longer_recording_is_counted():
    windows = cut([recording(400, [(0, 100, "wlk"), (100, 400, "sit")])])
    assert windows.too_short == 1
    assert windows.label_names() == ("sit",)


def test_nothing_left_is_refused():
    with pytest.raises(InputError, match="no window of a known activity"):
        cut([recording(300, [(0, 300, "dancing")])])


def test_every_mapped_label_is_in_the_vocabulary():
    for names in ACTIVITY_LABELS.values():
        assert set(names.values()) <= set(VOCABULARY)


def test_normaliser():
    signals = np.random.default_rng(0).normal(3, 2, (50, 128, 6)).astype(np.float32)
    out = Normalizer.fit(signals)(signals)
    assert out.dtype == np.float32
    assert np.abs(out.mean(axis=(0, 1))).max() < 1e-5
    assert np.abs(out.std(axis=(0, 1)) - 1).max() < 1e-4
    assert np.isfinite(Normalizer.fit(np.ones((2, 4, 6), np.float32))(np.ones((2, 4, 6), np.float32))).all()
