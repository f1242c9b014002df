"""HAPT: the raw signals behind UCI HAR, a Galaxy S II on the waist of 30 people (Reyes-Ortiz et al. 2015)."""

import re
from collections.abc import Iterator

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import STANDARD_GRAVITY, Interval, Recording
from harlora.errors import InputError

_FILE = re.compile(r"(?:.*/)?acc_exp(\d+)_user(\d+)\.txt")
_RATE_HZ = 50.0
ACTIVITIES = {
    1: "WALKING",
    2: "WALKING_UPSTAIRS",
    3: "WALKING_DOWNSTAIRS",
    4: "SITTING",
    5: "STANDING",
    6: "LAYING",
    7: "STAND_TO_SIT",
    8: "SIT_TO_STAND",
    9: "SIT_TO_LIE",
    10: "LIE_TO_SIT",
    11: "STAND_TO_LIE",
    12: "LIE_TO_STAND",
}


def read(archive: Archive) -> Iterator[Recording]:
    """Every experiment as one recording with its labelled intervals.

    The files hold acceleration in g with gravity and angular velocity in rad/s; the labels' samples count from 1 and
    include the last.
    """
    experiments = [(int(match[1]), int(match[2]), name) for name in archive.names if (match := _FILE.fullmatch(name))]
    labels = next((name for name in archive.names if name.rsplit("/", 1)[-1] == "labels.txt"), None)
    if not experiments or labels is None:
        raise InputError(
            f"{archive.path}: no RawData/acc_exp01_user01.txt or no RawData/labels.txt; required the raw part of HAPT"
        )
    table = archive.numbers(labels, columns=5, delimiter=None).astype(np.int64)
    unknown = sorted(set(table[:, 2].tolist()) - set(ACTIVITIES))
    if unknown:
        raise InputError(f"{archive.path}: {labels}: activity numbers must be 1 to 12, got {unknown}")
    for experiment, user, name in sorted(experiments):
        accel = archive.numbers(name, columns=3, delimiter=None)
        gyro = archive.numbers(name.replace("acc_exp", "gyro_exp"), columns=3, delimiter=None)
        rows = table[(table[:, 0] == experiment) & (table[:, 1] == user)]
        rows = rows[np.argsort(rows[:, 3])]
        yield Recording(
            dataset="uci_hapt",
            subject=str(user),
            placement="waist",
            rate_hz=_RATE_HZ,
            accel=(accel * STANDARD_GRAVITY).astype(np.float32),
            gyro=gyro.astype(np.float32),
            intervals=tuple(Interval(int(start) - 1, int(stop), ACTIVITIES[int(a)]) for _, _, a, start, stop in rows),
            source=name,
        )
