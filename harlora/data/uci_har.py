"""UCI HAR: the same recordings as HAPT, already cut into windows of 128 samples (Anguita et al. 2013)."""

from collections.abc import Iterator

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import STANDARD_GRAVITY, Interval, Recording
from harlora.data.uci_hapt import ACTIVITIES
from harlora.errors import InputError

_WINDOW, _HOP, _RATE_HZ = 128, 64, 50.0
_SIGNALS = [f"{sensor}_{axis}" for sensor in ("total_acc", "body_gyro") for axis in "xyz"]


def read(archive: Archive) -> Iterator[Recording]:
    """Recordings put together again from windows that overlap by half.

    A window continues the one before it when subject and activity are the same and its first 64 samples are that
    one's last 64; cutting such a recording again gives back exactly the authors' windows. The repository's download
    holds the dataset as a zip archive inside the zip archive; both forms are read.
    """
    inner = [name for name in archive.names if name.lower().endswith(".zip")]
    if inner and not any("Inertial Signals" in name for name in archive.names):
        archive = archive.nested(inner[0])
    found = False
    for part in ("train", "test"):
        subjects_name = next((name for name in archive.names if name.endswith(f"{part}/subject_{part}.txt")), None)
        if subjects_name is None:
            continue
        found = True
        folder = subjects_name.removesuffix(f"subject_{part}.txt")
        subjects = archive.numbers(subjects_name, columns=1, delimiter=None)[:, 0].astype(int)
        activities = archive.numbers(f"{folder}y_{part}.txt", columns=1, delimiter=None)[:, 0].astype(int)
        unknown = sorted(set(activities.tolist()) - set(range(1, 7)))
        if unknown:
            raise InputError(f"{archive.path}: {folder}y_{part}.txt: activity numbers must be 1 to 6, got {unknown}")
        signals = np.stack(
            [
                archive.numbers(f"{folder}Inertial Signals/{signal}_{part}.txt", columns=_WINDOW, delimiter=None)
                for signal in _SIGNALS
            ],
            axis=-1,
        )  # (windows, 128, 6)
        if not len(signals) == len(subjects) == len(activities):
            raise InputError(
                f"{archive.path}: {folder}: {len(signals)} windows, {len(subjects)} subjects and "
                f"{len(activities)} activities; required one of each a window"
            )
        continues = (
            (subjects[1:] == subjects[:-1])
            & (activities[1:] == activities[:-1])
            & (signals[1:, :_HOP] == signals[:-1, _HOP:]).all(axis=(1, 2))
        )
        starts = np.flatnonzero(np.concatenate([[True], ~continues]))
        for start, stop in zip(starts, [*starts[1:], len(signals)], strict=True):
            joined = np.concatenate([signals[start], *signals[start + 1 : stop, _HOP:]])
            yield Recording(
                dataset="uci_har",
                subject=str(subjects[start]),
                placement="waist",
                rate_hz=_RATE_HZ,
                accel=(joined[:, :3] * STANDARD_GRAVITY).astype(np.float32),
                gyro=joined[:, 3:].astype(np.float32),
                intervals=(Interval(0, len(joined), ACTIVITIES[int(activities[start])]),),
                source=f"{folder}Inertial Signals, windows {start + 1} to {stop}",
            )
    if not found:
        raise InputError(f"{archive.path}: no train/subject_train.txt or test/subject_test.txt; required UCI HAR")
