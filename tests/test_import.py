"""Recordings of one's own: what is read, what is found, what is refused, and what comes out."""

import itertools
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

from harlora.data import available, cut, dataset, imported, load_windows
from harlora.data.catalog import known, require_apart
from harlora.data.recording import STANDARD_GRAVITY, Recording
from harlora.data.table import Units, read_tables, stretches
from harlora.errors import InputError
from harlora.report.tables import preset_of
from harlora.train.finetune import adaptation_identity, finetune
from harlora.train.lodo import Study
from harlora.train.pretrain import load_pretrained, pretrain
from small import FINETUNE, PRETRAIN
from tables import HEADER, joined, made, rows_of, write

CPU = torch.device("cpu")
DEGREES = 180 / np.pi


def bring(root, *files, name="mine", **options):
    taken = {entry.name: entry.domain for entry in known(root).values()}
    return imported.import_tables(files, name, root, taken=taken, **options)


def found(facts):
    return {what: (value, meaning) for what, value, meaning in facts.checks}


def same_windows(ours, theirs):
    assert np.array_equal(ours.signals, theirs.signals)
    assert np.array_equal(ours.labels, theirs.labels)
    assert np.array_equal(ours.subjects, theirs.subjects)
    assert ours.subject_names == theirs.subject_names


@pytest.fixture
def table(tmp_path):
    """One table with sit and walk of three subjects."""
    return write(tmp_path / "mine.csv", itertools.chain(*(rows_of(joined(made_of(s))) for s in "123")))


def made_of(subject):
    return [recording for recording in made() if recording.subject == subject]


# What comes out


def motionsense(real_data):
    path = real_data("motionsense/A_DeviceMotion_data.zip")
    recordings = itertools.islice(dataset("motionsense").recordings(path.parent.parent), 15)
    return [one for one in recordings if isinstance(one, Recording)]  # of subject 1, whose one copy is left out


LABELS = ("wlk=walk", "std=stand", "ups=upstairs", "dws=downstairs", "jog=run")


def test_real_recordings_give_the_windows_of_their_own_reader(tmp_path, real_data):
    recordings = motionsense(real_data)
    for number, one in enumerate(recordings):
        write(tmp_path / "tables" / f"{number:02}.csv", rows_of(one))
    bring(tmp_path / "root", tmp_path / "tables", labels=LABELS)
    same_windows(load_windows("mine", tmp_path / "root"), cut(recordings))


def test_the_same_twice_is_refused(tmp_path):
    (one,) = itertools.islice(made(), 1)
    for name in ("monday", "tuesday"):
        write(tmp_path / "tables" / f"{name}.csv", rows_of(one))
    with pytest.raises(InputError, match=r"monday.csv and .*tuesday.csv: are the same"):
        bring(tmp_path / "root", tmp_path / "tables")


def test_real_recordings_in_other_units_and_at_another_rate_give_nearly_the_same(tmp_path, real_data):
    recordings = motionsense(real_data)
    theirs = cut(recordings)
    for number, one in enumerate(recordings):
        write(tmp_path / "units" / f"{number:02}.csv", rows_of(one, accel=1 / STANDARD_GRAVITY, gyro=DEGREES))
        fast = {
            key: resample_poly(getattr(one, key), 2, 1, axis=0, padtype="line").astype(np.float32)
            for key in ("accel", "gyro")
        }
        intervals = tuple(replace(i, start=2 * i.start, stop=2 * i.stop) for i in one.intervals)
        write(tmp_path / "fast" / f"{number:02}.csv",
              rows_of(replace(one, rate_hz=100.0, intervals=intervals, **fast)))  # fmt: skip
    facts = bring(tmp_path, tmp_path / "units", name="units_too", labels=LABELS)
    assert found(facts)["acceleration"] == ("g, gravity included", "made m/s²")
    assert found(facts)["angular velocity"] == ("deg/s", "made rad/s")
    np.testing.assert_allclose(load_windows("units_too", tmp_path).signals, theirs.signals, rtol=1e-5, atol=1e-5)
    facts = bring(tmp_path, tmp_path / "fast", name="fast_too", labels=LABELS)
    assert found(facts)["rate"] == ("100 Hz", "resampled to 50 Hz")
    ours = load_windows("fast_too", tmp_path)
    assert np.array_equal(ours.labels, theirs.labels)
    # A filter up and one down again take something of what lies just below 25 Hz.
    assert np.std(ours.signals - theirs.signals) < 0.03 * np.std(theirs.signals)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("comma", {}),
        ("semicolon, decimal comma", {"separator": ";", "decimal": ","}),
        ("tab", {"separator": "\t", "start": "\ufeff"}),
    ],
)
def test_forms_of_text_read_alike(tmp_path, form, options):
    recordings = made()
    rows = itertools.chain(*(rows_of(joined(made_of(s))) for s in "123"))
    facts = bring(tmp_path, write(tmp_path / "mine.csv", rows, **options))
    assert found(facts)["files"][0] == f"1: {form}"
    ours, theirs = load_windows("mine", tmp_path), cut(recordings)
    assert len(ours) == len(theirs)
    same_windows(ours, cut([joined(made_of(s)) for s in "123"]))


def test_parquet_reads_alike(tmp_path, table):
    import polars as pl

    frame = pl.read_csv(table)
    first = datetime(2024, 5, 31, tzinfo=UTC)
    dates = [first + timedelta(microseconds=round(1e6 * t)) for t in frame["timestamp"]]
    parquet = tmp_path / "mine.parquet"
    frame.with_columns(pl.Series("timestamp", dates), pl.col("label").cast(pl.Categorical)).write_parquet(parquet)
    facts = bring(tmp_path, parquet)
    assert found(facts)["timestamps"][0] == "ISO 8601"
    same_windows(load_windows("mine", tmp_path), cut([joined(made_of(s)) for s in "123"]))


@pytest.mark.parametrize(
    ("unit", "written"),
    [
        ("s", lambda t: f"{1.7e9 + t:.3f}"),
        ("ms", lambda t: f"{1_700_000_000_000 + round(1e3 * t)}"),
        ("us", lambda t: f"{round(1e6 * t)}"),
        ("ns", lambda t: f"{1_700_000_000_000_000_000 + round(1e9 * t)}"),
        ("ISO 8601", lambda t: (datetime(2024, 5, 31, tzinfo=UTC) + timedelta(seconds=t)).isoformat()),
    ],
)
def test_timestamps_of_every_unit(tmp_path, unit, written):
    rows = rows_of(joined(made_of("1")))
    for row in rows:
        row[0] = written(float(row[0]))
    tables = read_tables([write(tmp_path / "a.csv", rows)], Units())
    assert tables.time_unit == unit
    assert tables.tracks[0].rate_hz == pytest.approx(50, rel=1e-5)
    assert (tables.tracks[0].origin_s is None) == (unit == "us")
    (stretch,) = stretches(tables.tracks[0], dataset="mine", placement="waist")
    assert stretch.even
    assert np.array_equal(stretch.recording.accel, joined(made_of("1")).accel)


def test_dates_without_a_zone_are_utc(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        rows = rows_of(joined(made_of("1")))
        for row in rows:
            row[0] = (datetime(2024, 5, 31) + timedelta(seconds=float(row[0]))).isoformat(sep=" ")
        (track,) = read_tables([write(tmp_path / "a.csv", rows)], Units()).tracks
    finally:
        monkeypatch.undo()
        time.tzset()
    assert track.origin_s == datetime(2024, 5, 31, tzinfo=UTC).timestamp()


def test_subjects_in_turn_are_told_apart(tmp_path):
    several = [rows_of(joined(made_of(subject))) for subject in "123"]
    bring(tmp_path, write(tmp_path / "mine.csv", itertools.chain(*zip(*several, strict=True))))
    same_windows(load_windows("mine", tmp_path), cut([joined(made_of(s)) for s in "123"]))


def test_subjects_by_file_or_folder(tmp_path):
    for subject in "12":
        rows = [row[:-1] for row in rows_of(joined(made_of(subject)))]
        write(tmp_path / "tables" / f"person{subject}" / f"file{subject}.csv", rows, header=HEADER[:-1])
    with pytest.raises(InputError, match="column subject is missing, and there are 2 files; add it, or say"):
        bring(tmp_path, tmp_path / "tables")
    facts = bring(tmp_path, tmp_path / "tables", name="by_file", subject_from="file")
    assert found(facts)["subjects"] == ("2: file1, file2", "the subject protocol requires 3")
    facts = bring(tmp_path, tmp_path / "tables", name="by_folder", subject_from="folder")
    assert found(facts)["subjects"][0] == "2: person1, person2"
    facts = bring(tmp_path, tmp_path / "tables" / "person1" / "file1.csv", name="alone")
    assert found(facts)["subjects"][0] == "1: file1"


def test_two_files_or_folders_of_one_name_are_not_one_subject(tmp_path):
    for subject, day in (("1", "monday"), ("2", "monday")):
        rows = [row[:-1] for row in rows_of(joined(made_of(subject)))]
        write(tmp_path / "tables" / subject / day / "walk.csv", rows, header=HEADER[:-1])
    first, second = tmp_path / "tables" / "1" / "monday", tmp_path / "tables" / "2" / "monday"
    message = f"--subject-from file: {first / 'walk.csv'} and {second / 'walk.csv'} would both be subject 'walk'; "
    with pytest.raises(InputError, match=re.escape(message) + ".*--subject-from folder if"):
        bring(tmp_path, tmp_path / "tables", subject_from="file")
    message = f"--subject-from folder: {first} and {second} would both be subject 'monday'; required another name"
    with pytest.raises(InputError, match=re.escape(message)):
        bring(tmp_path, tmp_path / "tables", subject_from="folder")
    assert not (tmp_path / "mine").exists()


def test_subjects_that_may_be_one_are_reported(tmp_path, table):
    assert "subjects spelled alike" not in found(bring(tmp_path, table, name="apart"))
    rows = [
        [*row[:-1], name] for s, name in zip("123", ("Anna B", "annab", "Ben"), strict=True)
        for row in rows_of(joined(made_of(s)))
    ]  # fmt: skip
    facts = bring(tmp_path, write(tmp_path / "b.csv", rows))
    assert found(facts)["subjects"][0] == "3: Anna B, annab, Ben"
    assert found(facts)["subjects spelled alike"][0] == "Anna B/annab"


# Irregular times


def smooth(times):
    accel = np.stack([np.sin(2 * times), 2 * np.cos(3 * times), 9.8 + np.sin(times)], axis=1)
    return accel, 2 * np.stack([np.cos(times), np.sin(4 * times), np.sin(times)], axis=1)


def irregular(tmp_path, times, labels=None, order=None):
    accel, gyro = smooth(times)
    rows = [[f"{t:.6f}", *map(repr, map(float, (*a, *g)))] for t, a, g in zip(times, accel, gyro, strict=True)]
    labels = ["walk"] * len(times) if labels is None else labels
    rows = [[*row, label] for row, label in zip(rows, labels, strict=True)]
    if order is not None:
        rows = [rows[i] for i in order]
    return write(tmp_path / "a.csv", rows, header=HEADER[:-1])


RAD = Units(gyro="rad/s")


def test_irregular_times_are_put_on_an_even_clock_by_time(tmp_path):
    rng = np.random.default_rng(0)
    times = np.arange(6000) / 100 + rng.uniform(-0.003, 0.003, 6000)
    times = times[(rng.random(6000) > 0.02) & (rng.permutation(6000) > 0)]
    labels = ["walk" if t < 30 else "sit" for t in times]
    (track,) = read_tables([irregular(tmp_path, times, labels)], RAD).tracks
    assert track.rate_hz == pytest.approx(100, rel=0.01)
    (stretch,) = stretches(track, dataset="mine", placement="waist")
    assert not stretch.even
    one = stretch.recording
    at = times[0] + stretch.start_s + np.arange(len(one.accel)) / one.rate_hz
    accel, gyro = smooth(at)
    assert np.abs(one.accel - accel).max() < 0.01
    assert np.abs(one.gyro - gyro).max() < 0.02
    walk, sit = one.intervals
    assert at[walk.stop - 1] < 30.02
    assert at[sit.start] > 29.98
    assert (walk.activity, sit.activity, sit.start) == ("walk", "sit", walk.stop)


def test_a_gap_splits_and_a_short_one_does_not(tmp_path):
    times = np.arange(2000) / 50
    kept = np.ones(2000, dtype=bool)
    kept[500:503] = False  # three samples: interpolated
    kept[1000:1100] = False  # two seconds
    facts = bring(tmp_path, irregular(tmp_path, times[kept]), units=RAD)
    checks = found(facts)
    assert checks["gaps"] == ("1, the longest 2.0 s", "split there; nothing is interpolated across")
    assert checks["samples missing in short gaps"] == ("3", "interpolated")
    assert checks["duration"][0] == "38.0 s in 2 stretches"
    one, other = dataset("mine", tmp_path).recordings(tmp_path)
    np.testing.assert_allclose(one.accel, smooth(times[:1000])[0], atol=0.02)
    np.testing.assert_allclose(other.accel, smooth(times[1100:])[0], atol=1e-4)


@pytest.mark.parametrize(
    ("rate_hz", "missing", "pieces"),
    [(200, 1, 1), (200, 19, 1), (200, 20, 2), (50, 4, 1), (50, 5, 2), (25, 1, 1), (25, 2, 2), (10, 1, 1), (10, 2, 2)],
)
def test_a_gap_is_a_matter_of_time_and_not_of_steps(tmp_path, rate_hz, missing, pieces):
    times = np.delete(1.7e9 + np.arange(20 * rate_hz) / rate_hz, slice(10 * rate_hz, 10 * rate_hz + missing))
    facts = bring(tmp_path, irregular(tmp_path, times), units=RAD)
    assert len(list(dataset("mine", tmp_path).recordings(tmp_path))) == pieces
    checks = found(facts)
    assert checks["gaps"][0].split(",")[0] == str(pieces - 1)
    assert checks["samples missing in short gaps"][0] == str(missing if pieces == 1 else 0)


def test_missing_values_are_as_if_nothing_was_measured(tmp_path):
    times = np.arange(1500) / 50
    file = irregular(tmp_path, times)
    lines = file.read_text().splitlines()
    for row, value in ((400, "NaN"), (401, ""), *((row, "nan") for row in range(700, 760))):
        fields = lines[row].split(",")
        fields[3] = value
        lines[row] = ",".join(fields)
    file.write_text("\n".join(lines))
    checks = found(bring(tmp_path, file, units=RAD))
    assert checks["incomplete rows"][0] == "62"
    assert checks["samples missing in short gaps"][0] == "2"
    assert checks["gaps"][0] == "1, the longest 1.2 s"


def test_rows_out_of_order_and_repeated(tmp_path):
    times = np.arange(1000) / 50
    order = list(range(1000))
    order[300], order[301] = order[301], order[300]
    order[600:600] = [599, 599]
    file = irregular(tmp_path, times, order=order)
    (track,) = read_tables([file], RAD).tracks
    assert (np.diff(track.times) > 0).all()
    facts = bring(tmp_path, file, file, tmp_path, units=RAD)  # a file that is named several times counts once
    assert found(facts)["files"][0] == "1: comma"
    assert found(facts)["rows out of order"] == ("1", "sorted by time")
    assert found(facts)["rows of the same time"] == ("2", "the first counts")
    (one,) = dataset("mine", tmp_path).recordings(tmp_path)
    assert np.array_equal(one.accel, smooth(times)[0].astype(np.float32))


# The report


def test_labels_are_mapped_or_counted(tmp_path):
    rows = rows_of(joined([*made_of("1"), *made_of("1")]))
    names = {"sit": "Sit", "walk": "strolling"}
    for number, row in enumerate(rows):
        row[7] = "" if number < 100 else "dance" if number > 6500 else names[row[7]]
    facts = bring(tmp_path, write(tmp_path / "a.csv", rows), labels=("strolling=walk",))
    checks = found(facts)
    assert checks["labels in the vocabulary"][0] == "Sit → sit, strolling → walk"
    assert checks["labels not in it"][0] == "dance (50.0 s, 38 windows)"
    assert checks["without a label"] == ("2.0 s", "dropped")
    windows = load_windows("mine", tmp_path)
    assert set(windows.label_names()) == {"sit", "walk"}
    assert sum(sum(counts.values()) for counts in facts.windows.values()) == len(windows)
    assert checks["windows that come out"][0] == f"{len(windows):,}"


def test_saturation_dead_axes_and_other_columns(tmp_path):
    rows = rows_of(joined(made_of("1")))
    for number, row in enumerate(rows):
        row[1] = "19.6" if number % 50 < 3 else row[1]
        row[6] = "0.25"
        row.append("7")
    for row in rows[1000:1100]:
        row[1:7] = rows[1000][1:7]
    facts = bring(tmp_path, write(tmp_path / "a.csv", rows, header=(*HEADER, "battery")), units=Units(accel="m/s2"))
    checks = found(facts)
    assert checks["saturation"][0].startswith("ax at ±19.6 m/s² in ")
    assert checks["axes that never change"][0] == "gz in 1 of 1 recordings"
    assert checks["stuck sensor"][0] == "2.0 s"
    assert checks["other columns"] == ("battery", "ignored")


# What is refused


def edited(row, column, value):
    def edit(rows):
        for each in range(*row) if isinstance(row, tuple) else (row,):
            rows[each - 2][HEADER.index(column)] = value

    return edit


def scaled(columns, factor, rows=slice(None)):
    def edit(table):
        for row in table[rows]:
            for column in columns:
                row[HEADER.index(column)] = repr(factor * float(row[HEADER.index(column)]))

    return edit


def without_gravity(rows):
    for column in (1, 2, 3):
        values = np.array([float(row[column]) for row in rows])
        for row, value in zip(rows, values - values.mean(), strict=True):
            row[column] = repr(float(value))


def again(rows):
    rows += [[*row] for row in rows]


def two_devices(rows):
    rows[:] = [line for row in rows for line in (row, [*row[:1], "0.5", *row[2:]])]


def coarse(rows):
    for row in rows:
        row[0] = str(int(float(row[0])))


def counted(rows):
    for number, row in enumerate(rows):
        row[0] = str(number)


ACCEL, GYRO = ("ax", "ay", "az"), ("gx", "gy", "gz")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(7, "ay", "fast"), "column ay, row 7: required a number, got 'fast'"),
        (edited(9, "gz", "1,5"), "row 9 has 10 fields, the row of column names 9; is the decimal sign also a comma?"),
        (edited(12, "timestamp", "noon"), "column timestamp, row 12: required a number, got 'noon'"),
        (edited(33, "subject", ""), "column subject, row 33: is empty"),
        (edited((2, 4502), "ax", ""), "no row has all of timestamp, ax"),
        (edited((2, 4502), "label", ""), "no activity has a label of the vocabulary"),
        (edited((2, 4502), "label", "dance"), "the tables have dance: say what they are with --labels"),
        (scaled(ACCEL, 1000), "averaged over 2.56 s the magnitude is 9.81e+03, required about 1 (g) or 9.81 (m/s²)"),
        (scaled(ACCEL, 1 / 9.80665, slice(3000, None)), "are in m/s2, but from about row 3"),
        (without_gravity, "gravity seems to have been removed: export the accelerometer itself"),
        (edited((2, 4502), "gx", "0"), ""),
        (scaled(GYRO, 0), "columns gx, gy, gz (subject 1): never change"),
        (again, "column timestamp, row 4502: goes back by 89.98 s (subject 1)"),
        (two_devices, "column timestamp, row 3: 4500 of 9000 rows have the time of another row and other values"),
        (coarse, "column timestamp goes on by 1 from row to row"),
        (counted, "goes on by 1 from row to row (is it the number of the row?)"),
        (scaled(["timestamp"], 50), "which is no usual rate in s, ms, us or ns; say what it is with --time-unit"),
        (lambda rows: rows.clear(), "has no rows"),
        (lambda rows: rows[20].append("x"), "row 22 has 10 fields, the row of column names 9"),
    ],
)  # fmt: skip
def test_what_a_table_can_have_wrong_is_named(tmp_path, edit, message):
    rows = rows_of(joined(made_of("1")))
    edit(rows)
    file = write(tmp_path / "bad.csv", rows)
    if not message:  # one axis alone may stand still
        bring(tmp_path / "root", file)
        return
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        bring(tmp_path / "root", file)
    assert "bad.csv" in str(raised.value)
    assert not (tmp_path / "root").exists()


def test_decimal_points_and_commas_in_one_file_are_named(tmp_path):
    rows = rows_of(joined(made_of("1")))
    rows[20] = [field.replace(".", ",") for field in rows[20]]
    message = "bad.csv: column ax, row 2: reads '5.9.*', but row 22 has '5,9.*' in ax; required decimal points"
    with pytest.raises(InputError, match=message):
        bring(tmp_path, write(tmp_path / "bad.csv", rows, separator=";"))


def test_too_short_a_recording_is_named(tmp_path):
    times = np.arange(600) / 50
    with pytest.raises(InputError, match="a.csv: no stretch without a gap is as long as one window of 2.56 s"):
        bring(tmp_path, irregular(tmp_path, times[times % 3 < 2.5]), units=RAD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; required a table with the columns timestamp, ax"),
        (b"\xef\xbb\xbf", "row 1 reads ''; required the column names"),
        (b"\xff\xfet\0i\0", "is UTF-16 or no text; save it as CSV in UTF-8"),
        (b"0.0,1,2,3,4,5,6\n", "row 1 reads '0.0,1,2,3,4,5,6'; required the column names"),
        (b"timestamp|ax|ay|az|gx|gy|gz|label\n", "row 1 reads 'timestamp|ax"),
        (b"timestamp,ax,ay,gx,gy,gz,label\n0,1,2,3,4,5,sit\n", "column az is missing; it has timestamp, ax, ay"),
        (b"timestamp,ax,ay,az,gx,gy,gz\n0,1,2,3,4,5,6\n", "column label is missing"),
        (b"timestamp,ax,AX,ay,az,gx,gy,gz,label\n", "two columns are called ax"),
        (b"timestamp,ax,ay,az,gx,gy,gz,label\n0,1,2,3,4,5,6,caf\xe9\n", "is not UTF-8 text"),
        (b"timestamp,ax,ay,az,gx,gy,gz,label\n0,0,5,1,2,3,4,5,6,sit\n", "is the decimal sign also a comma?"),
        (b"timestamp,ax,ay,az,gx,gy,gz,label\n2024-05-31T12:00,1,2,3,4,5,6,sit\n2024-05-31 noon,1,2,3,4,5,6,sit\n",
         "column timestamp, row 3: required a date as"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(tmp_path, content, message):
    file = tmp_path / "bad.csv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        bring(tmp_path / "root", file)
    assert str(raised.value).startswith(str(file))


def test_a_damaged_parquet_file_is_named(tmp_path, table):
    import polars as pl

    file = tmp_path / "bad.parquet"
    pl.read_csv(table).write_parquet(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"bad.parquet: not a complete Parquet file"):
        bring(tmp_path / "root", file)
    pl.read_csv(table).with_columns(ax=pl.col("ax") > 0).write_parquet(file)
    with pytest.raises(InputError, match="bad.parquet: column ax is of type Boolean; required numbers"):
        bring(tmp_path / "root", file)


def test_units_that_differ_between_files_are_named(tmp_path):
    write(tmp_path / "t" / "a.csv", rows_of(joined(made_of("1"))))
    other = joined(made_of("2"))
    cases = {
        "accelerations are in m/s2 in .*a.csv and in g in .*b.csv": rows_of(other, accel=1 / STANDARD_GRAVITY),
        "angular velocities are in rad/s in .*a.csv and in deg/s in .*b.csv": rows_of(other, gyro=DEGREES),
        "timestamps are in s in .*a.csv and in ms in .*b.csv": [[str(1000 * float(row[0])), *row[1:]]
                                                                for row in rows_of(other)],
    }  # fmt: skip
    for message, rows in cases.items():
        write(tmp_path / "t" / "b.csv", rows)
        with pytest.raises(InputError, match=message):
            bring(tmp_path, tmp_path / "t")


def test_units_that_are_given_are_checked(tmp_path, table):
    for units, message in (
        (Units(accel="g"), "the magnitude is 9.8.*, and --accel-unit is g; correct it to m/s2"),
        (Units(time="ms"), r"a rate of 5e\+04 Hz in ms; required 10 to 1000 Hz; correct --time-unit"),
    ):
        with pytest.raises(InputError, match=message):
            bring(tmp_path / "root", table, units=units)
    fast = write(tmp_path / "fast.csv", rows_of(joined(made_of("1")), gyro=DEGREES))
    with pytest.raises(InputError, match="reach .*, too much for --gyro-unit rad/s; correct it"):
        bring(tmp_path / "root", fast, units=Units(gyro="rad/s"))
    still = write(tmp_path / "still.csv", rows_of(made(1, ("sit",))[0]))
    with pytest.raises(InputError, match="could be rad/s or deg/s, as there is too little movement to tell; say it"):
        bring(tmp_path / "root", still)
    bring(tmp_path / "root", still, units=Units(gyro="deg/s"))
    windows = load_windows("mine", tmp_path / "root")
    np.testing.assert_allclose(windows.signals[0, :, 3:], made(1, ("sit",))[0].gyro[:128] / DEGREES, rtol=1e-5)


def test_names_paths_and_labels_that_cannot_be(tmp_path, table):
    root = tmp_path / "root"
    for options, message in (
        (
            {"name": "uci"},
            "--name uci is that of a known dataset or of its people; choose another, and add --domain uci",
        ),
        ({"name": "dsa"}, "--name dsa is that of a known dataset"),
        ({"name": "synthetic_z"}, "not begin with synthetic, got 'synthetic_z'"),
        ({"name": "../up"}, "--name must be of a to z"),
        ({"domain": "uc"}, "--domain uc: no dataset has these people; required one of motionsense, uci, dsa"),
        ({"domain": "mine2"}, "--domain mine2: no dataset has these people"),
        ({"labels": ("walk",)}, "--labels: required own=vocabulary with one of sit"),
        ({"labels": ("walk=wolk",)}, "got 'walk=wolk'; did you mean walk?"),
        ({"labels": ("wak=walk",)}, "'wak=walk' names an activity that the tables do not have; they have sit, walk"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            bring(root, table, **options)
    (tmp_path / "empty").mkdir()
    for path, message in (("empty", "has no file that ends in .csv"), ("none.csv", "no such file or folder")):
        with pytest.raises(InputError, match=message):
            bring(root, tmp_path / path)
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(InputError, match="required a table that ends in .csv, .tsv, .parquet or .txt"):
        bring(root, tmp_path / "a.xlsx")
    assert not root.exists()
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "other.txt").write_text("x")
    with pytest.raises(InputError, match="is a folder with other files; choose another --name"):
        bring(root, table)


# A dataset like the others


def test_what_is_there_is_replaced_on_request_alone(tmp_path, table):
    bring(tmp_path, table, placement="waist")
    with pytest.raises(InputError, match="is there already; choose another --name, or add --replace"):
        bring(tmp_path, table)
    bring(tmp_path, table, placement="chest", replace=True)
    assert dataset("mine", tmp_path).placement == "chest"
    assert [file.name for file in (tmp_path / "mine").iterdir()] == [imported.FILE]


def test_a_dataset_whose_people_another_has_is_replaced_too(tmp_path, table):
    bring(tmp_path, table)
    bring(tmp_path, table, name="more", domain="mine")
    assert bring(tmp_path, table, placement="chest", replace=True).domain == "mine"
    assert bring(tmp_path, table, domain="mine", replace=True).domain == "mine"
    message = "--domain uci_hapt: more was imported with --domain mine; .* import more again with --domain uci_hapt"
    with pytest.raises(InputError, match=message):
        bring(tmp_path, table, domain="uci_hapt", replace=True)
    bring(tmp_path, table, name="more", domain="uci_hapt", replace=True)
    assert bring(tmp_path, table, domain="more", replace=True).domain == "uci"


def test_a_damaged_dataset_is_named(tmp_path, table):
    bring(tmp_path, table)
    bring(tmp_path, table, name="other")
    file = tmp_path / "mine" / imported.FILE
    content = bytearray(file.read_bytes())
    content[-1000] ^= 255
    file.write_bytes(content)
    with pytest.raises(InputError, match="checksum does not match.*delete it and import the recordings again"):
        load_windows("mine", tmp_path)
    file.write_bytes(content[:100])
    with pytest.raises(InputError, match="recordings.safetensors: not a complete safetensors file"):
        known(tmp_path)
    with pytest.raises(InputError, match="recordings.safetensors: not a complete safetensors file"):
        dataset("mine", tmp_path)
    assert dataset("other", tmp_path).name == "other"  # which others do not miss


def test_it_is_found_beside_the_others(tmp_path, table):
    bring(tmp_path, table, name="mine")
    assert [entry.name for entry in available(tmp_path)] == ["mine"]
    with pytest.raises(InputError, match="unknown dataset 'min'; did you mean mine?"):
        dataset("min", tmp_path)
    with pytest.raises(InputError, match="unknown dataset 'mine'"):
        dataset("mine")
    assert load_windows("mine", tmp_path).domain == "mine"


def test_its_placement_decides_how_windows_are_turned(tmp_path, table):
    bring(tmp_path, table, placement="front pocket")
    first, again = load_windows("mine", tmp_path), load_windows("mine", tmp_path)
    assert first.placement == again.placement == "front pocket"
    other = load_windows("synthetic_b", tmp_path)
    assert other.placement == ""
    pretrained = load_pretrained(
        pretrain(replace(PRETRAIN, epochs=1, max_windows=64), [other], tmp_path / "runs", device=CPU)
    )
    config = replace(FINETUNE, method="linear_probe", epochs=1, max_windows=100)
    for windows, turned in ((first, 15.0), (replace(first, placement="waist"), 5.0)):
        metrics = finetune(config, windows, pretrained, tmp_path / "runs", device=CPU)
        assert metrics["config"]["turned_deg"] == turned
        assert preset_of({**metrics, "preset": "quick"}).turned_deg == turned
        arguments = windows, [], pretrained.identity, pretrained.encoder.config, CPU
        assert adaptation_identity(config, *arguments) == metrics["identity"]


def test_people_of_another_dataset_are_not_trained_on(tmp_path, table):
    bring(tmp_path, table, name="mine", domain="synthetic_b")
    windows = load_windows("mine", tmp_path)
    assert [entry.name for entry in known(tmp_path).values() if entry.domain == "synthetic_b"] == [
        "synthetic_b",
        "mine",
    ]
    target = load_windows("synthetic_b", tmp_path)
    with pytest.raises(InputError, match="are the same recordings of the same people"):
        pretrain(PRETRAIN, [windows, target], tmp_path / "runs", device=CPU)
    config = replace(PRETRAIN, epochs=1, max_windows=64)
    pretrained = load_pretrained(pretrain(config, [windows], tmp_path / "runs", device=CPU))
    with pytest.raises(InputError, match="the encoder was pretrained on mine, which has the people of synthetic_b"):
        finetune(FINETUNE, target, pretrained, tmp_path / "runs", device=CPU)
    # Whose people they are decides who may be a target, so it is another run where that was corrected.
    other = load_pretrained(pretrain(config, [replace(windows, domain="mine")], tmp_path / "runs", device=CPU))
    assert other.identity != pretrained.identity
    study = Study(targets=("synthetic_b",), sources=("mine",))
    with pytest.raises(InputError, match="leaving out synthetic_b leaves no dataset to pretrain on"):
        study.experiment().plan(tmp_path)
    with pytest.raises(InputError, match="mine and other"):
        require_apart({"mine": "a", "other": "a"})
