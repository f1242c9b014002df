"""PAMAP2: three Colibri units on hand, chest and ankle of 9 people (Reiss and Stricker 2012)."""

import re
from collections.abc import Iterator

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import Recording
from harlora.data.streams import align, intervals, labels_at
from harlora.data.tables import frames
from harlora.errors import InputError

_FILE = re.compile(r"(?:.*/)?Protocol/subject(\d+)\.dat")
_RATE_HZ = 100.0
_COLUMNS = tuple(str(number) for number in range(1, 55))
# The first of 17 columns of each unit: temperature, acceleration of the ±16 g sensor, that of the ±6 g sensor, which
# saturates in running and jumping, angular velocity, magnetic field, and an orientation that the authors call invalid.
PLACEMENTS = {"hand": 4, "chest": 21, "ankle": 38}
_ACCEL, _GYRO = 1, 7
ACTIVITIES = {
    0: "other",
    1: "lying",
    2: "sitting",
    3: "standing",
    4: "walking",
    5: "running",
    6: "cycling",
    7: "Nordic walking",
    9: "watching TV",
    10: "computer work",
    11: "car driving",
    12: "ascending stairs",
    13: "descending stairs",
    16: "vacuum cleaning",
    17: "ironing",
    18: "folding laundry",
    19: "house cleaning",
    20: "playing soccer",
    24: "rope jumping",
}


def read(archive: Archive) -> Iterator[Recording]:
    """Every stretch without dropouts of each unit; m/s² and rad/s as in the files.

    The units are wireless: where samples were lost the file has NaN, or no row. Up to the longest gap of
    `streams.align` (9 samples) is interpolated, sensor by sensor; what is longer ends the stretch. The ``Optional``
    folder, other activities of some of these people, is not read.
    """
    inner = [name for name in archive.names if name.lower().endswith("pamap2_dataset.zip")]
    if inner and not any(_FILE.fullmatch(name) for name in archive.names):
        archive = archive.nested(inner[0])
    files = sorted((int(match[1]), name) for name in archive.names if (match := _FILE.fullmatch(name)))
    if not files:
        raise InputError(f"{archive.path}: no Protocol/subject101.dat; required the archive of PAMAP2")
    numbers = sorted(ACTIVITIES)
    for subject, name in files:
        times, activities, units = _columns(archive, name)
        unknown = sorted(set(np.unique(activities).tolist()) - set(ACTIVITIES))
        if unknown:
            raise InputError(f"{archive.path}: {name}: activity numbers must be among {numbers}, got {unknown}")
        labels = np.searchsorted(numbers, activities)
        for placement, (accel, gyro) in units.items():
            here, there = (np.isfinite(signal).all(axis=1) for signal in (accel, gyro))
            stretches = align(times[here], accel[here], times[there], gyro[there], rate_hz=_RATE_HZ)
            for start, accelerations, rates in stretches:
                grid = start + np.arange(len(accelerations)) / _RATE_HZ
                yield Recording(
                    dataset="pamap2",
                    subject=str(subject),
                    placement=placement,
                    rate_hz=_RATE_HZ,
                    accel=accelerations,
                    gyro=rates,
                    intervals=intervals(labels_at(grid, times, labels), [ACTIVITIES[number] for number in numbers]),
                    source=f"{name}, {placement}, from {start:.2f} s",
                    fragment=True,
                )


def _columns(archive: Archive, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Time, activity, and acceleration and angular velocity of each unit."""
    chosen = [
        str(first + sensor + axis) for first in PLACEMENTS.values() for sensor in (_ACCEL, _GYRO) for axis in range(3)
    ]
    table = np.concatenate(
        [
            frame.to_numpy()
            for frame in frames(
                archive, name, columns=_COLUMNS, wanted=("1", "2", *chosen), gaps=chosen, delimiters=" "
            )
        ]
    )
    table = table[np.argsort(table[:, 0], kind="stable")]
    units = {
        placement: (table[:, 6 * unit + 2 : 6 * unit + 5], table[:, 6 * unit + 5 : 6 * unit + 8])
        for unit, placement in enumerate(PLACEMENTS)
    }
    return table[:, 0], table[:, 1], units
