"""Daily and Sports Activities: five Xsens units on each of 8 people (Altun, Barshan and Tunçel 2010)."""

import re
from collections.abc import Iterator

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import Interval, Recording
from harlora.errors import InputError

_FILE = re.compile(r"(?:.*/)?(a\d\d)/p(\d+)/s(\d\d)\.txt")
_RATE_HZ = 25.0
PLACEMENTS = ("torso", "right arm", "left arm", "right leg", "left leg")  # 9 columns each: accel, gyro, magnetometer


def read(archive: Archive) -> Iterator[Recording]:
    """Each activity of each person as one recording per unit; m/s² and rad/s as in the files.

    The 60 segments of 5 s are consecutive pieces of one recording and are joined; where a segment is missing, a new
    recording begins. Rows of zeros alone are where nothing was measured (subject 1 on the stairs: the last second of
    every segment) and lie outside the labelled intervals.
    """
    segments: dict[tuple[int, str], dict[int, str]] = {}
    for name in archive.names:
        if match := _FILE.fullmatch(name):
            segments.setdefault((int(match[2]), match[1]), {})[int(match[3])] = name
    if not segments:
        raise InputError(f"{archive.path}: no files named like a01/p1/s01.txt; required the archive of DSA")
    for (subject, activity), files in sorted(segments.items()):
        numbers = sorted(files)
        breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
        for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
            run = [files[number] for number in numbers[start:stop]]
            table = np.concatenate([archive.numbers(name, columns=45, delimiter=",") for name in run])
            edges = np.flatnonzero(np.diff(table.any(axis=1), prepend=False, append=False))
            intervals = tuple(Interval(int(i), int(j), activity) for i, j in zip(edges[::2], edges[1::2], strict=True))
            table = table.astype(np.float32)
            for unit, placement in enumerate(PLACEMENTS):
                yield Recording(
                    dataset="dsa",
                    subject=str(subject),
                    placement=placement,
                    rate_hz=_RATE_HZ,
                    accel=table[:, 9 * unit : 9 * unit + 3],
                    gyro=table[:, 9 * unit + 3 : 9 * unit + 6],
                    intervals=intervals,
                    source=f"{run[0]} to {run[-1].rsplit('/', 1)[-1]}",
                )
