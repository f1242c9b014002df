"""RealWorld2016: phones and a watch at seven places of the body of 15 people (Sztyler and Stuckenschmidt 2016)."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import Interval, LeftOut, Recording
from harlora.data.streams import align, common_rate
from harlora.data.tables import frames
from harlora.errors import InputError

PLACEMENTS = ("chest", "forearm", "head", "shin", "thigh", "upperarm", "waist")
_ACTIVITIES = "climbingdown|climbingup|jumping|lying|running|sitting|standing|walking"
# As one archive for an activity, or what was in it. A part's number stands behind the activity; where a recording was
# begun a second time, that number is there although there is one part.
_FILE = re.compile(
    rf"(?:.*/)?proband(\d+)/(?:.*/)?(acc|gyr|gyroscope)_({_ACTIVITIES})(?:_\d+)?_(?:csv\.zip|[a-z]+\.csv)", re.I
)
_TABLE = re.compile(rf"(?:.*/)?(?:acc|gyr|gyroscope)_\w+_({'|'.join(PLACEMENTS)})\.csv", re.I)
_COLUMNS = ("id", "attr_time", "attr_x", "attr_y", "attr_z")


def read(archive: Archive, placements: Sequence[str] = PLACEMENTS) -> Iterator[Recording | LeftOut]:
    """Every stretch in which both sensors of a device ran, activity by activity; m/s² and rad/s as in the files.

    The sensors have clocks of their own and stop and start apart: all parts of an activity are joined and paired by
    time. Acceleration ends at ±19.6 m/s² (2 g), the range of the phones, and is left so: running and jumping are
    clipped.
    """
    files: dict[tuple[int, str], dict[str, list[str]]] = {}
    for name in archive.names:
        if match := _FILE.fullmatch(name):
            sensor = "acc" if match[2].lower() == "acc" else "gyr"
            files.setdefault((int(match[1]), match[3].lower()), {"acc": [], "gyr": []})[sensor].append(name)
    if not files:
        raise InputError(
            f"{archive.path}: no files named like proband1/data/acc_walking_csv.zip; required the archive of "
            "RealWorld2016"
        )
    for (subject, activity), names in sorted(files.items()):
        accel, gyro = (_streams(archive, names[sensor], placements) for sensor in ("acc", "gyr"))
        for placement in placements:
            if placement not in accel and placement not in gyro:
                continue  # the forearm of subject 2 climbing up, the thigh of subject 6 jumping
            if placement not in accel or placement not in gyro:
                sensor = "gyroscope" if placement in accel else "accelerometer"
                yield LeftOut(dataset="realworld", placement=placement, reason=f"activities without {sensor}")
                continue
            accel_s, gyro_s = accel[placement][:, 0] / 1e3, gyro[placement][:, 0] / 1e3
            rate_hz = common_rate(accel_s, gyro_s)
            stretches = align(accel_s, accel[placement][:, 1:], gyro_s, gyro[placement][:, 1:], rate_hz=rate_hz)
            for start, accelerations, rates in stretches:
                yield Recording(
                    dataset="realworld",
                    subject=str(subject),
                    placement=placement,
                    rate_hz=rate_hz,
                    accel=accelerations,
                    gyro=rates,
                    intervals=(Interval(0, len(accelerations), activity),),
                    source=f"proband{subject}, {activity}, {placement}, from {start:.3f} s",
                    fragment=True,
                )


def _streams(archive: Archive, names: Sequence[str], placements: Sequence[str]) -> dict[str, np.ndarray]:
    """Time in ms and three values of every sample, by placement."""
    parts: dict[str, list[np.ndarray]] = {}
    for holder, name in _tables(archive, names):
        match = _TABLE.fullmatch(name)
        if match and match[1].lower() in placements:
            table = frames(holder, name, columns=_COLUMNS, wanted=_COLUMNS[1:], delimiters=",")
            parts.setdefault(match[1].lower(), []).extend(frame.to_numpy() for frame in table)
    return {placement: np.concatenate(tables) for placement, tables in parts.items()}


def _tables(archive: Archive, names: Sequence[str]) -> Iterator[tuple[Archive, str]]:
    """The text files among the names and in the zip archives among them, however deep."""
    for name in names:
        if not name.lower().endswith(".zip"):
            yield archive, name
            continue
        inner = archive.nested(name)
        if not any(_TABLE.fullmatch(found) or found.lower().endswith(".zip") for found in inner.names):
            raise InputError(f"{inner.path}: no files named like acc_walking_waist.csv in it; download it again")
        yield from _tables(inner, inner.names)
