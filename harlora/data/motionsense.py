"""MotionSense: an iPhone 6s in the front pocket of 24 people (Malekzadeh et al. 2018)."""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import STANDARD_GRAVITY, Interval, LeftOut, Recording
from harlora.errors import InputError

_FILE = re.compile(r"(?:.*/)?([a-z]{3})_(\d+)/sub_(\d+)\.csv")
_COLUMNS = [f"{sensor}.{axis}" for sensor in ("gravity", "userAcceleration", "rotationRate") for axis in "xyz"]
_PLACEMENT = "front pocket"
_RATE_HZ = 50.0  # the files carry no timestamps; the authors state the rate


def read(archive: Archive) -> Iterator[Recording | LeftOut]:
    """Every trial as one recording, in numerical order of subjects.

    The phone reports gravity and user acceleration apart, in g; their sum is what an accelerometer measures. A trial
    that is the copy of another is left out and counted: the archive has subject 1 sitting twice (5 and 13).
    """
    matches = [(name, match) for name in archive.names if (match := _FILE.fullmatch(name))]
    trials = sorted((int(match[3]), int(match[2]), match[1], name) for name, match in matches)
    if not trials:
        raise InputError(
            f"{archive.path}: no files named like dws_1/sub_1.csv; required the archive A_DeviceMotion_data.zip"
        )
    seen: set[bytes] = set()
    for subject, _, activity, name in trials:
        digest = hashlib.sha256(archive.read(name)).digest()
        if digest in seen:
            yield LeftOut(dataset="motionsense", placement=_PLACEMENT, reason="copies of another recording")
            continue
        seen.add(digest)
        table = archive.numbers(name, columns=_COLUMNS, delimiter=",", header=True)
        yield Recording(
            dataset="motionsense",
            subject=str(subject),
            placement=_PLACEMENT,
            rate_hz=_RATE_HZ,
            accel=((table[:, 0:3] + table[:, 3:6]) * STANDARD_GRAVITY).astype(np.float32),
            gyro=table[:, 6:9].astype(np.float32),
            intervals=(Interval(0, len(table), activity),),
            source=name,
        )
