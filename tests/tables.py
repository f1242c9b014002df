"""Tables of one's own, as a user would have them, shared by the tests of import and prediction."""

import numpy as np

from harlora.data import Recording, synthetic

HEADER = ("timestamp", "ax", "ay", "az", "gx", "gy", "gz", "label", "subject")


def made(subjects=3, labels=("sit", "walk"), name="synthetic_a"):
    """Recordings at 50 Hz, each of 45 s of one activity of one subject."""
    return [
        recording
        for recording in synthetic.read(name)
        if int(recording.subject) <= subjects and recording.intervals[0].activity in labels
    ]


def joined(recordings):
    """One recording of several after each other, without a gap."""
    first = recordings[0]
    intervals, start = [], 0
    for one in recordings:
        intervals += [type(i)(start + i.start, start + i.stop, i.activity) for i in one.intervals]
        start += len(one.accel)
    parts = {key: np.concatenate([getattr(one, key) for one in recordings]) for key in ("accel", "gyro")}
    return Recording(**{**vars(first), **parts, "intervals": tuple(intervals)})


def rows_of(recording, *, times=None, accel=1.0, gyro=1.0):
    """The fields of every row, as text; numbers so that float32 comes back exactly."""
    times = np.arange(len(recording.accel)) / recording.rate_hz if times is None else times
    labels = [""] * len(times)
    for interval in recording.intervals:
        labels[interval.start : interval.stop] = [interval.activity] * (interval.stop - interval.start)
    return [
        [f"{time:.6f}", *(repr(float(v) * accel) for v in a), *(repr(float(v) * gyro) for v in g), label,
         recording.subject]
        for time, a, g, label in zip(times, recording.accel, recording.gyro, labels, strict=True)
    ]  # fmt: skip


def write(file, rows, *, header=HEADER, separator=",", decimal=".", start=""):
    """A table as text."""
    lines = [separator.join(header)]
    lines += [separator.join(field if decimal == "." else field.replace(".", decimal) for field in row) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(start + "\n".join(lines) + "\n", encoding="utf-8")
    return file
