"""HHAR: phones at the waist and watches on the wrists of 9 people, of six models (Stisen et al. 2015)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harlora.data.archive import Archive
from harlora.data.recording import LeftOut, Recording
from harlora.data.streams import LONGEST_GAP_S, align, common_rate, intervals, labels_at
from harlora.data.tables import frames
from harlora.errors import InputError

_COLUMNS = ("Index", "Arrival_Time", "Creation_Time", "x", "y", "z", "User", "Model", "Device", "gt")
_SENSORS = ("accelerometer", "gyroscope")
PLACEMENTS = {"waist": "Phones", "wrist": "Watch"}
ACTIVITIES = ("null", "bike", "sit", "stand", "walk", "stairsup", "stairsdown")
_UNLABELLED = ("", "nan", "null")


@dataclass(frozen=True, eq=False)
class _Stream:
    """The samples of one sensor of one device on one person, in the order of their arrival.

    arrival_s, creation_s: when Android handed the sample over, and when the sensor says that it took it.
    """

    arrival_s: np.ndarray
    creation_s: np.ndarray
    values: np.ndarray
    labels: np.ndarray


def read(archive: Archive, placements: Sequence[str] = tuple(PLACEMENTS)) -> Iterator[Recording | LeftOut]:
    """Every stretch in which both sensors of a device ran, user by user; m/s² and rad/s as in the files.

    A person wore up to eight phones at once: each device is a recording of its own, all are the same subject. Devices
    that lack one of the sensors (the Galaxy S+ has no gyroscope) are left out and counted.
    """
    if not any(_file(archive, kind, sensor) for kind in PLACEMENTS.values() for sensor in _SENSORS):
        inner = [name for name in archive.names if name.lower().endswith("activity recognition exp.zip")]
        if not inner:
            raise InputError(
                f"{archive.path}: no Phones_accelerometer.csv and no Activity recognition exp.zip; required the "
                "archive of HHAR"
            )
        archive = archive.nested(inner[0])
    found = False
    for placement in placements:
        kind = PLACEMENTS[placement]
        files = [_file(archive, kind, sensor) for sensor in _SENSORS]
        if None in files:
            if any(files):
                missing = f"{kind}_{_SENSORS[files.index(None)]}.csv"
                raise InputError(f"{archive.path}: {missing} is missing beside {max(filter(None, files))}")
            continue
        found = True
        accel, gyro = (_streams(archive, name) for name in files if name)
        for user, device in sorted(accel.keys() | gyro.keys()):
            one, other = accel.pop((user, device), None), gyro.pop((user, device), None)
            if one is None or other is None:
                reason = f"devices without {_SENSORS[one is not None]}"
                yield LeftOut(dataset="hhar", placement=placement, reason=reason)
                continue
            yield from _recordings(one, other, user, placement, f"{files[0]}: user {user}, device {device}")
    if not found:
        wanted = " or ".join(f"{PLACEMENTS[placement]}_accelerometer.csv" for placement in placements)
        raise InputError(f"{archive.path}: no {wanted}; required the archive of HHAR")


def _file(archive: Archive, kind: str, sensor: str) -> str | None:
    found = [name for name in archive.names if name.rsplit("/", 1)[-1] == f"{kind}_{sensor}.csv"]
    if len(found) > 1:
        raise InputError(f"{archive.path}: {' and '.join(found)} are the same file twice; keep one")
    return found[0] if found else None


def _streams(archive: Archive, name: str) -> dict[tuple[str, str], _Stream]:
    parts: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    wanted = [column for column in _COLUMNS if column not in ("Index", "Model")]
    text = ("User", "Device", "gt")
    table = frames(archive, name, columns=_COLUMNS, wanted=wanted, text=text, gaps=("gt",), delimiters=",\t")
    for frame in table:
        activities = frame["gt"].unique().to_list()
        unknown = sorted(set(activities) - set(ACTIVITIES) - set(_UNLABELLED))
        if unknown:
            raise InputError(f"{archive.path}: {name}: gt must be one of {', '.join(ACTIVITIES)}, got {unknown}")
        numbers = {a: 0 if a in _UNLABELLED else ACTIVITIES.index(a) for a in activities}
        frame = frame.with_columns(frame["gt"].replace_strict(numbers))
        for key, group in frame.partition_by("User", "Device", as_dict=True, include_key=False).items():
            times = group.select("Arrival_Time", "Creation_Time").to_numpy()
            values = group.select("x", "y", "z", "gt").to_numpy().astype(np.float32)
            parts.setdefault((str(key[0]), str(key[1])), []).append((times, values))
    made = {}
    for stream in list(parts):
        pieces = parts.pop(stream)
        times = np.concatenate([piece for piece, _ in pieces])
        values = np.concatenate([piece for _, piece in pieces])
        order = np.argsort(times[:, 0], kind="stable")
        times, values = times[order], values[order]
        labels = values[:, 3].astype(np.int8)
        made[stream] = _Stream(times[:, 0] / 1e3, times[:, 1] / 1e9, values[:, :3], labels)
    return made


def _recordings(accel: _Stream, gyro: _Stream, user: str, placement: str, source: str) -> Iterator[Recording]:
    accel_s, gyro_s = _common_clock(accel, gyro, source)
    rate_hz = common_rate(accel_s, gyro_s)
    tracks = []
    for times, stream in ((accel_s, accel), (gyro_s, gyro)):
        order = np.argsort(times, kind="stable")
        tracks.append((times[order], stream.labels[order]))
    for start, accelerations, rates in align(accel_s, accel.values, gyro_s, gyro.values, rate_hz=rate_hz):
        grid = start + np.arange(len(accelerations)) / rate_hz
        labels, others = (labels_at(grid, *track) for track in tracks)
        labels[labels != others] = -1
        yield Recording(
            dataset="hhar",
            subject=user,
            placement=placement,
            rate_hz=rate_hz,
            accel=accelerations,
            gyro=rates,
            intervals=intervals(labels, ACTIVITIES),
            source=f"{source}, from {start:.3f} s",
            fragment=True,
        )


# A phone writes two times beside a sample. Creation_Time is the sensor's, fine and even, but on some devices it counts
# from the device's start and stands still while it sleeps, on some the two sensors count from different moments, and
# a spreadsheet may have rounded it to nothing. Arrival_Time is the clock on the wall, in milliseconds, late by as much
# as the phone was busy. So Creation_Time says how far apart samples are, and Arrival_Time which moment it was.


def _common_clock(accel: _Stream, gyro: _Stream, source: str) -> tuple[np.ndarray, np.ndarray]:
    """The times of both sensors' samples, in seconds on the clock of Arrival_Time."""
    streams = (accel, gyro)
    fine = [_tells_apart(stream.creation_s, stream) for stream in streams]
    for stream, usable, sensor in zip(streams, fine, _SENSORS, strict=True):
        if not usable and not _tells_apart(stream.arrival_s, stream):
            raise InputError(
                f"{source}: neither Creation_Time nor Arrival_Time of the {sensor} tells its samples apart; "
                "both were damaged, by a spreadsheet perhaps; download the archive again"
            )
    if all(fine) and _same_base(accel, gyro):
        # Shifted as one, for what passes between taking a sample and handing it over differs from sensor to sensor.
        arrival_s = np.concatenate([accel.arrival_s, gyro.arrival_s])
        creation_s = np.concatenate([accel.creation_s, gyro.creation_s])
        order = np.argsort(arrival_s, kind="stable")
        times = np.empty_like(arrival_s)
        times[order] = _shifted(arrival_s[order], creation_s[order])
        return times[: len(accel.arrival_s)], times[len(accel.arrival_s) :]
    accel_s, gyro_s = (
        _shifted(stream.arrival_s, stream.creation_s) if usable else stream.arrival_s
        for stream, usable in zip(streams, fine, strict=True)
    )
    return accel_s, gyro_s


def _tells_apart(times: np.ndarray, stream: _Stream) -> bool:
    # Rows that are wholly repeated count once. Arrival_Time of a good file, in milliseconds, gives three of four
    # samples of 200 Hz a time of their own.
    samples = _distinct(stream.arrival_s, stream.creation_s, stream.values.sum(axis=1))
    return _distinct(times) >= 0.5 * samples


def _distinct(*columns: np.ndarray) -> int:
    order = np.lexsort(columns)
    return 1 + int(np.any([np.diff(column[order]) != 0 for column in columns], axis=0).sum())


def _same_base(accel: _Stream, gyro: _Stream) -> bool:
    late = np.interp(accel.arrival_s, gyro.arrival_s, gyro.arrival_s - gyro.creation_s)
    return bool(np.median(np.abs(accel.arrival_s - accel.creation_s - late)) < LONGEST_GAP_S)


def _shifted(arrival_s: np.ndarray, creation_s: np.ndarray) -> np.ndarray:
    """``creation_s`` on the clock of ``arrival_s``, which is sorted.

    Where one clock goes on by more than the longest gap beyond the other, the sensor's clock stood still, began anew
    or the sample was handed over late. From there on the shift is taken anew, from the sample handed over soonest.
    """
    ahead = np.abs(np.diff(arrival_s) - np.diff(creation_s)) > LONGEST_GAP_S
    starts = np.concatenate([[0], np.flatnonzero(ahead) + 1])
    shifts = np.minimum.reduceat(arrival_s - creation_s, starts)
    return creation_s + np.repeat(shifts, np.diff([*starts, len(creation_s)]))
