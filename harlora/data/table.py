"""Recordings as tables of one's own: a row a moment, CSV or Parquet, checked and turned into `Recording`s.

Required columns: ``timestamp, ax, ay, az, gx, gy, gz``; ``label`` and ``subject`` beside them. Everything that a table
can have wrong is found here, with file, column and row.
"""

import csv
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from harlora.data.labels import LABEL_INDEX, VOCABULARY
from harlora.data.recording import STANDARD_GRAVITY, Interval, Recording
from harlora.data.streams import LONGEST_GAP_S, align
from harlora.data.windows import RATE_HZ, WINDOW
from harlora.errors import InputError

if TYPE_CHECKING:
    import polars as pl

TimeUnit = Literal["auto", "s", "ms", "us", "ns"]
AccelUnit = Literal["auto", "m/s2", "g"]
GyroUnit = Literal["auto", "rad/s", "deg/s"]
SubjectFrom = Literal["column", "file", "folder"]

AXES = ("ax", "ay", "az", "gx", "gy", "gz")
REQUIRED = ("timestamp", *AXES)
SUFFIXES = (".csv", ".tsv", ".parquet")  # found in a folder; a file that is named may also end in .txt
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_MISSING = ("", "nan", "na", "n/a", "null", "none")
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+([eE][-+]?\d+)?")

_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_ACCEL = {"m/s2": 1.0, "g": STANDARD_GRAVITY}
_GYRO = {"rad/s": 1.0, "deg/s": np.pi / 180}
_PLAUSIBLE_STEP_S = (0.002, 0.1)  # the units lie a factor of 1000 apart, so no step is plausible in two of them
_RATES_HZ = (10.0, 1000.0)
_BLOCK_S = 2.56
_ONE_MISSING = 2.5  # steps: of slow sensors a single sample may be missing
_ROUNDING_S = 1e-6  # of times since 1970, so that a gap of exactly 0.1 s is none
_UNEVEN = 0.1  # of a step; below, samples count as evenly spaced and are taken as they stand
_BACK_S = 1.0  # a time so much earlier is not a row out of order but another recording
_REPEATED = 0.1  # share of rows with another row's time and other values, from which on they are another device's


@dataclass(frozen=True)
class Units:
    """In which units the tables are; "auto" finds out."""

    time: TimeUnit = "auto"
    accel: AccelUnit = "auto"
    gyro: GyroUnit = "auto"


@dataclass(frozen=True, eq=False)
class Track:
    """One subject's rows of one file in order of time, each time once.

    rows: ``(n,)``, where they stand in the file; in CSV the header is row 1.
    times: ``(n,)``, float64, seconds since the first row of the file. origin_s: that row's time since 1970, or None.
    accel, gyro: ``(n, 3)``, float64, m/s² and rad/s. labels: ``(n,)``, indices into ``label_names``; -1 is none.
    rate_hz: of steps that are not gaps. read, incomplete, disordered, repeated: rows read, and of those how many lack
    a value, stood out of order, or had the time of another row (the first of them counts).
    """

    source: str
    subject: str
    rows: np.ndarray
    times: np.ndarray
    origin_s: float | None
    accel: np.ndarray
    gyro: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    rate_hz: float
    read: int
    incomplete: int
    disordered: int
    repeated: int


@dataclass(frozen=True, eq=False)
class Tables:
    """What was read, and how.

    time_unit, accel_unit, gyro_unit: as given or found. columns: beside the known ones, ignored.
    forms: how the files are written, for example "comma".
    """

    tracks: tuple[Track, ...]
    time_unit: str
    accel_unit: str
    gyro_unit: str
    columns: tuple[str, ...]
    forms: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Stretch:
    """An uninterrupted part of a track.

    start_s: its first sample, in the track's seconds. even: the file's own samples; or else put on an even clock.
    """

    start_s: float
    recording: Recording
    even: bool


def table_files(paths: Iterable[Path]) -> list[Path]:
    """The tables that paths name: files, and those in folders and below, sorted.

    Raises: InputError if a path is missing, a folder has no table, or a file is not one.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise InputError(f"{path}: has no file that ends in {', '.join(SUFFIXES)}; name another folder or file")
            files += inside
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder; correct the path")
        elif path.suffix.lower() not in (*SUFFIXES, ".txt"):
            raise InputError(
                f"{path}: required a table that ends in {', '.join(SUFFIXES)} or .txt; save it as CSV or Parquet"
            )
        else:
            files.append(path)
    return list({file.resolve(): file for file in files}.values())


def read_tables(
    files: Sequence[Path],
    units: Units,
    *,
    subject_from: SubjectFrom = "column",
    needs_label: bool = True,
    report: Callable[[int, int, str], None] = lambda done, steps, note: None,
) -> Tables:
    """Every subject's rows of every file, in m/s², rad/s and seconds.

    subject_from: where one person ends and the next begins; without the column ``subject`` a single file is one person.
    report: called with the files read, their number and the present one.
    Raises: InputError that names file, column and row if a table is not one, a unit cannot be told or differs from
    file to file, times go backwards, gravity was removed, or subjects are to have names of files or folders and two
    of these are called alike.
    """
    if subject_from != "column":
        _require_names_apart(files, subject_from)
    raws = []
    columns: dict[str, None] = {}
    forms: dict[str, None] = {}
    for number, file in enumerate(files):
        report(number, len(files), file.name)
        table = _load(file, needs_label=needs_label)
        columns |= dict.fromkeys(table.columns)
        forms[table.form] = None
        raws += list(_by_subject(table, _subjects(table, subject_from, len(files))))
    time_unit = _time_unit(raws, units.time)
    tracks = [track for raw in raws if (track := _in_order(raw, time_unit)) is not None]
    if not tracks:
        raise InputError(f"{files[0]}: no subject has two complete rows; required a recording")
    accel_unit = _accel_unit(tracks, units.accel)
    gyro_unit = _gyro_unit(tracks, units.gyro, _ACCEL[accel_unit])
    scaled = tuple(
        Track(**{**vars(track), "accel": track.accel * _ACCEL[accel_unit], "gyro": track.gyro * _GYRO[gyro_unit]})
        for track in tracks
    )
    return Tables(scaled, time_unit, accel_unit, gyro_unit, tuple(columns), tuple(forms))


def longest_gap_s(rate_hz: float) -> float:
    """The longest silence that values are interpolated across, seconds: `LONGEST_GAP_S`, or one sample that is missing.

    Beyond, the recording is split.
    """
    return max(LONGEST_GAP_S, _ONE_MISSING / rate_hz) + _ROUNDING_S


def stretches(track: Track, *, dataset: str, placement: str) -> Iterator[Stretch]:
    """A track's uninterrupted parts of at least one window, with the activities in the table's own words.

    A part ends where nothing was measured for longer than `longest_gap_s`. Where its times lie on an even clock, up to
    a tenth of a step, its samples are taken as they stand; others are interpolated onto an even clock of the track's
    own rate. That keeps what the sensor measured above 25 Hz for the filter that brings every recording to 50 Hz.
    """
    longest = longest_gap_s(track.rate_hz)
    for part in np.split(np.arange(len(track.times)), np.flatnonzero(np.diff(track.times) > longest) + 1):
        times = track.times[part]
        if len(part) < 2:
            continue
        line = np.linspace(times[0], times[-1], len(times))
        even = bool(np.abs(times - line).max() <= _UNEVEN * (line[1] - line[0]))
        accel, gyro, labels, start, rate = track.accel[part], track.gyro[part], track.labels[part], times[0], 0.0
        if even:
            rate = (len(times) - 1) / (times[-1] - times[0])
        else:
            rate = track.rate_hz
            ((start, accel, gyro),) = align(times, accel, times, gyro, rate_hz=rate, longest_gap_s=longest)
            clock = start + np.arange(len(accel)) / rate
            labels = labels[np.searchsorted(times, clock, side="right") - 1]
        if round(len(accel) * RATE_HZ / rate) < WINDOW:
            continue
        first, last = track.rows[part[0]], track.rows[part[-1]]
        recording = Recording(
            dataset=dataset,
            subject=track.subject,
            placement=placement,
            rate_hz=rate,
            accel=accel.astype(np.float32),
            gyro=gyro.astype(np.float32),
            intervals=tuple(_intervals(labels, track.label_names)),
            source=f"{track.source}, rows {first} to {last}",
        )
        yield Stretch(float(start), recording, even)


def label_map(found: Iterable[str], given: Sequence[str]) -> dict[str, str]:
    """The vocabulary's label of each activity name that has one: the given one, or its own where it is spelled alike.

    given: each ``own=vocabulary``.
    Raises: InputError if one is written otherwise, or names an activity or label that there is not.
    """
    names = list(found)
    mapping = {}
    for name in names:
        if (label := re.sub(r"[\s-]+", "_", name.strip().casefold())) in LABEL_INDEX:
            mapping[name] = label
    for pair in given:
        own, equals, label = pair.rpartition("=")
        if not equals or label not in LABEL_INDEX:
            raise InputError(
                f"--labels: required own=vocabulary with one of {', '.join(VOCABULARY)}, got {pair!r}"
                + _nearest(label, VOCABULARY)
            )
        if own not in names:
            raise InputError(
                f"--labels: {pair!r} names an activity that the tables do not have; they have {', '.join(names)}"
                + _nearest(own, names)
            )
        mapping[own] = label
    return mapping


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _intervals(labels: np.ndarray, names: Sequence[str]) -> Iterator[Interval]:
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    for start, stop in itertools.pairwise(edges):
        if labels[start] >= 0:
            yield Interval(start, stop, names[labels[start]])


# Reading a file


@dataclass(frozen=True, eq=False)
class _Table:
    """One file: values as numbers, ``(rows, 6)``, NaN where missing; times as numbers, or seconds since 1970."""

    file: Path
    times: np.ndarray
    dated: bool
    values: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    subjects: list[str | None] | None
    columns: tuple[str, ...]
    form: str
    first_row: int


def _load(file: Path, *, needs_label: bool) -> _Table:
    import polars as pl

    parquet = file.suffix.lower() == ".parquet"
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty; required a table with the columns {', '.join(REQUIRED)}")
    try:
        if parquet:
            scan, form, first_row = pl.scan_parquet(file, glob=False), "Parquet", 1
        else:
            separator = _separator(file)
            form, first_row = SEPARATORS[separator], 2
            scan = pl.scan_csv(file, separator=separator, infer_schema=False, glob=False)
        schema = scan.collect_schema()
        if not parquet:
            # Of columns that are not asked for polars overlooks that a row has too many fields, and so that all others
            # have moved.
            scan.select(pl.all().null_count()).collect(engine="streaming")
        found = _columns(file, schema.names(), needs_label=needs_label)
        numbers, comma = _numbers(file, scan, {name: found[name] for name in REQUIRED}, schema, first_row)
        words = scan.select(
            pl.col(found[name]).cast(pl.String).str.strip_chars().alias(name)
            for name in ("label", "subject")
            if name in found
        ).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise InputError(_why_unreadable(file, error, parquet)) from error
    if not len(numbers.times):
        raise InputError(f"{file}: has no rows; required a recording below the line of column names")
    unlabelled: tuple[np.ndarray, tuple[str, ...]] = np.full(len(numbers.times), -1, dtype=np.int32), ()
    labels, label_names = _codes(words["label"]) if "label" in found else unlabelled
    others = tuple(name for name in schema.names() if name not in found.values())
    return _Table(
        file=file,
        times=numbers.times,
        dated=numbers.dated,
        values=numbers.values,
        labels=labels,
        label_names=label_names,
        subjects=words["subject"].to_list() if "subject" in found else None,
        columns=others,
        form=form + (", decimal comma" if comma else ""),
        first_row=first_row,
    )


def _separator(file: Path) -> str:
    with file.open("rb") as opened:
        start = opened.read(1 << 16)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise InputError(f"{file}: is UTF-16 or no text; save it as CSV in UTF-8")
    line = next(iter(start.decode("utf-8-sig", "replace").splitlines()), "")  # a byte order mark may be all
    heads = {separator: next(csv.reader([line], delimiter=separator), []) for separator in SEPARATORS}
    known = {separator: len({name.strip().lower() for name in heads[separator]} & {*REQUIRED}) for separator in heads}
    best = max(known, key=lambda separator: known[separator])
    if not known[best]:
        raise InputError(
            f"{file}: row 1 reads {line[:80]!r}; required the column names {', '.join(REQUIRED)}, separated by comma, "
            "semicolon or tab"
        )
    return best


def _columns(file: Path, names: Sequence[str], *, needs_label: bool) -> dict[str, str]:
    """The file's own name of every known column."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"_duplicated_\d+$", "", name).strip().lower()  # what polars calls the second of a name
        if plain not in (*REQUIRED, "label", "subject"):
            continue
        if plain in found:
            raise InputError(f"{file}: two columns are called {plain}; remove or rename one")
        found[plain] = name
    required = (*REQUIRED, "label") if needs_label else REQUIRED
    if missing := [name for name in required if name not in found]:
        remedy = "rename the columns that have them"
        if missing == ["label"]:
            remedy = "add one with the activity of each row; a recording without labels is for `harlora predict`"
        raise InputError(f"{file}: column {', '.join(missing)} is missing; it has {', '.join(names)}; {remedy}")
    return found


@dataclass(frozen=True, eq=False)
class _Numbers:
    times: np.ndarray
    dated: bool
    values: np.ndarray


def _numbers(
    file: Path, scan: "pl.LazyFrame", columns: Mapping[str, str], schema: "pl.Schema", first_row: int
) -> tuple[_Numbers, bool]:
    """The required columns as numbers, and whether they had decimal commas."""
    import polars as pl

    for name, column in columns.items():
        kind = schema[column]
        if not (kind.is_numeric() or kind == pl.String or (name == "timestamp" and kind == pl.Datetime)):
            raise InputError(f"{file}: column {name} is of type {kind}; required numbers")
    dated = None
    kind = schema[columns["timestamp"]]
    if kind == pl.Datetime:
        dated = scan.select(pl.col(columns["timestamp"]).dt.timestamp("us") / 1e6).collect(engine="streaming")
    elif kind == pl.String:
        text = pl.col(columns["timestamp"]).str.strip_chars()
        first = scan.select(text.drop_nulls().first()).collect().item()
        if first is not None and re.search(r"\d[-:]\d", first):
            dated = scan.select(text).collect(engine="streaming")
    plain = {name: column for name, column in columns.items() if name != "timestamp" or dated is None}
    commas: tuple[int, str, str] | None = None
    while True:
        table, bad = _parsed(scan, plain, schema, comma=commas is not None)
        if bad is None:
            break
        name, row = bad
        value = scan.select(pl.col(plain[name])).slice(row, 1).collect().item()
        where = f"{file}: column {name}, row {row + first_row}"
        if commas is not None:
            there, column, other = commas
            raise InputError(
                f"{where}: reads {value!r}, but row {there} has {other!r} in {column}; required decimal points, or "
                "decimal commas throughout"
            )
        if not _DECIMAL_COMMA.fullmatch(value.strip()):
            raise InputError(f"{where}: required a number, got {value!r}; correct it, or leave the field empty")
        commas = (row + first_row, name, value)
    times = table["timestamp"].to_numpy() if dated is None else _seconds(file, dated.to_series(), first_row)
    values = np.stack([table[axis].fill_null(np.nan).to_numpy() for axis in AXES], axis=1)
    times = np.asarray(times, dtype=np.float64)
    return _Numbers(times, dated is not None, values), commas is not None


def _parsed(
    scan: "pl.LazyFrame", columns: Mapping[str, str], schema: "pl.Schema", *, comma: bool
) -> tuple["pl.DataFrame", tuple[str, int] | None]:
    """The columns as float64, null where nothing is, and the first field that is not a number, if any."""
    import polars as pl

    selected = []
    for name, column in columns.items():
        if schema[column].is_numeric():
            selected.append(pl.col(column).cast(pl.Float64).alias(name))
            continue
        text = pl.col(column).str.strip_chars()
        missing = text.is_null() | text.str.to_lowercase().is_in(_MISSING)
        number = text.str.replace(",", ".", literal=True) if comma else text
        value = pl.when(missing).then(None).otherwise(number).cast(pl.Float64, strict=False)
        wrong = value.is_null() & ~missing
        if comma:
            wrong = wrong | text.str.contains(".", literal=True)
        selected += [value.alias(name), wrong.alias(f"{name} is wrong")]
    table = scan.select(selected).collect(engine="streaming")
    first = [
        (int(rows[0]), name)
        for name in columns
        if f"{name} is wrong" in table.columns and len(rows := table[f"{name} is wrong"].arg_true())
    ]
    return table, (min(first)[1], min(first)[0]) if first else None


def _seconds(file: Path, dates: "pl.Series", first_row: int) -> np.ndarray:
    """Seconds since 1970 of ISO 8601 dates; those without a zone count as UTC."""
    if dates.dtype.is_numeric():
        return dates.fill_null(np.nan).to_numpy()
    times = np.full(len(dates), np.nan)
    for row, text in enumerate(dates):
        if text is None or text.lower() in _MISSING:
            continue
        try:
            date = datetime.fromisoformat(text)
        except ValueError as error:
            raise InputError(
                f"{file}: column timestamp, row {row + first_row}: required a date as 2024-05-31T12:00:00.020, "
                f"got {text!r}; correct it"
            ) from error
        times[row] = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return times


def _codes(words: "pl.Series") -> tuple[np.ndarray, tuple[str, ...]]:
    """Each word's index among those that occur, in the order in which they first do; -1 where there is none."""
    import polars as pl

    absent = words.is_null() | words.str.to_lowercase().is_in(_MISSING)
    present = words.set(absent, None)
    names = present.drop_nulls().unique(maintain_order=True).to_list()
    codes = present.cast(pl.Enum(names)).to_physical().cast(pl.Int32).fill_null(-1).to_numpy()
    return codes, tuple(names)


def _why_unreadable(file: Path, error: Exception, parquet: bool) -> str:
    if parquet:
        return f"{file}: not a complete Parquet file ({error}); write it again"
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            separator = _separator(file)
            rows = csv.reader(opened, delimiter=separator)
            width = len(next(rows))
            for number, row in enumerate(rows, start=2):
                if len(row) > width:
                    return (
                        f"{file}: row {number} has {len(row)} fields, the row of column names {width}; is the decimal "
                        f"sign also a {SEPARATORS[separator]}? Save the file with decimal points, or with semicolons "
                        "between columns"
                    )
    except UnicodeDecodeError:
        return f"{file}: is not UTF-8 text; save it as CSV in UTF-8"
    except csv.Error:
        pass
    return f"{file}: not a table ({error}); save it as CSV in UTF-8"


# From rows to tracks


@dataclass(frozen=True, eq=False)
class _Raw:
    """One subject's complete rows as they stand in the file, in its units."""

    table: _Table
    subject: str
    rows: np.ndarray  # from 0
    read: int


def _require_names_apart(files: Sequence[Path], subject_from: SubjectFrom) -> None:
    named: dict[str, Path] = {}
    for file in files:
        place = file if subject_from == "file" else file.resolve().parent
        name = _named_by(file, subject_from)
        if (other := named.setdefault(name, place)) != place:
            folder = "--subject-from folder if each folder is of another person, " if subject_from == "file" else ""
            raise InputError(
                f"--subject-from {subject_from}: {other} and {place} would both be subject {name!r}; required another "
                f"name for each: {folder}rename one if they are two people, or add the column subject if they are one"
            )


def _named_by(file: Path, subject_from: SubjectFrom) -> str:
    return file.resolve().parent.name if subject_from == "folder" else file.stem


def _subjects(table: _Table, subject_from: SubjectFrom, files: int) -> list[str]:
    """The subject of every row."""
    if subject_from != "column" or (table.subjects is None and files == 1):
        return [_named_by(table.file, subject_from)] * len(table.times)
    if table.subjects is None:
        raise InputError(
            f"{table.file}: column subject is missing, and there are {files} files; add it, or say --subject-from file "
            "if each is of another person, or --subject-from folder if each folder is"
        )
    for row, subject in enumerate(table.subjects):
        if subject is None or subject.lower() in _MISSING:
            raise InputError(
                f"{table.file}: column subject, row {row + table.first_row}: is empty; say whose row it is, or remove "
                "the column"
            )
    return [str(subject) for subject in table.subjects]


def _by_subject(table: _Table, subjects: Sequence[str]) -> Iterator[_Raw]:
    complete = np.isfinite(table.values).all(axis=1) & np.isfinite(table.times)
    if not complete.any():
        raise InputError(
            f"{table.file}: no row has all of {', '.join(REQUIRED)}; required both sensors in every row: put rows of "
            "the accelerometer and of the gyroscope together by time"
        )
    names, owner = np.unique(np.array(subjects), return_inverse=True)
    for number in dict.fromkeys(owner.tolist()):
        of_subject = owner == number
        rows = np.flatnonzero(of_subject & complete)
        yield _Raw(table, str(names[number]), rows, int(of_subject.sum()))


def _time_unit(raws: Sequence[_Raw], given: TimeUnit) -> str:
    seen: dict[str, Path] = {}
    for raw in raws:
        steps = np.diff(raw.table.times[raw.rows])
        steps = steps[steps > 0]
        if not len(steps):
            continue
        step = float(np.median(steps))
        file = raw.table.file
        if raw.table.dated:
            unit = "ISO 8601"
        elif given != "auto":
            unit = given
        else:
            low, high = _PLAUSIBLE_STEP_S
            unit = next((unit for unit, factor in _TIME.items() if low <= step * factor <= high), "")
        if not unit:
            row_number = " (is it the number of the row?)" if step == 1 else ""
            raise InputError(
                f"{file}: column timestamp goes on by {step:g} from row to row{row_number}, which is no usual rate "
                "in s, ms, us or ns; say what it is with --time-unit"
            )
        rate = 1 / (step * _TIME.get(unit, 1.0))
        if not _RATES_HZ[0] <= rate <= _RATES_HZ[1]:
            raise InputError(
                f"{file}: column timestamp goes on by {step:g} from row to row, a rate of {rate:.4g} Hz in {unit}; "
                f"required {_RATES_HZ[0]:g} to {_RATES_HZ[1]:g} Hz; correct --time-unit, or record faster"
            )
        seen.setdefault(unit, file)
    _require_one("--time-unit", "timestamps", seen)
    return next(iter(seen), "s")


def _require_one(option: str, what: str, seen: Mapping[str, object]) -> None:
    if len(seen) > 1:
        (one, first), (other, second) = list(seen.items())[:2]
        raise InputError(
            f"{what} are in {one} in {first} and in {other} in {second}; required one unit: import the files apart "
            f"under two names, or convert them; {option} says what they are in where that was misjudged"
        )


def _in_order(raw: _Raw, unit: str) -> Track | None:
    table = raw.table
    finite = table.times[np.isfinite(table.times)]
    factor = _TIME.get(unit, 1.0)
    times = (table.times[raw.rows] - finite[0]) * factor
    if len(times) < 2:
        return None
    back = np.diff(times)
    if back.min() < -_BACK_S:
        at = int(np.argmax(back < -_BACK_S))
        raise InputError(
            f"{table.file}: column timestamp, row {raw.rows[at + 1] + table.first_row}: goes back by {-back[at]:.4g} s "
            f"(subject {raw.subject}); required one recording a file and subject, in order of time: put each recording "
            "into a file of its own, or sort the rows by time"
        )
    disordered = int((times < np.maximum.accumulate(times)).sum())
    order = np.argsort(times, kind="stable")
    rows, times = raw.rows[order], times[order]
    again = np.concatenate([[False], np.diff(times) == 0])
    values = table.values[rows]
    differ = again & np.concatenate([[False], (values[1:] != values[:-1]).any(axis=1)])
    if differ.sum() > _REPEATED * len(times):
        raise InputError(
            f"{table.file}: column timestamp, row {rows[np.argmax(differ)] + table.first_row}: "
            f"{differ.sum()} of {len(times)} rows have the time of another row and other values; required one row a "
            "moment: are the timestamps whole seconds, or the rows those of two devices?"
        )
    kept = ~again
    rows, times, values = rows[kept], times[kept], values[kept]
    if len(times) < 2:
        return None
    steps = np.diff(times)
    step = np.median(steps)
    rate = 1 / float(steps[(steps > 0.5 * step) & (steps < 1.5 * step)].mean())
    origin = float(finite[0]) * factor
    return Track(
        source=str(table.file),
        subject=raw.subject,
        rows=rows + table.first_row,
        times=times,
        origin_s=origin if table.dated or origin > 1e8 else None,  # 1973
        accel=values[:, :3],
        gyro=values[:, 3:],
        labels=table.labels[rows],
        label_names=table.label_names,
        rate_hz=rate,
        read=raw.read,
        incomplete=raw.read - len(raw.rows),
        disordered=disordered,
        repeated=int(again.sum()),
    )


# Units


def _blocks(track: Track, signal: np.ndarray) -> np.ndarray:
    """The signal in parts of about one window, ``(blocks, samples, 3)``; what is shorter is one block."""
    length = min(max(2, round(_BLOCK_S * track.rate_hz)), len(signal))
    count = len(signal) // length
    return signal[: count * length].reshape(count, length, 3)


def _accel_unit(tracks: Sequence[Track], given: AccelUnit) -> str:
    """The unit in which the mean over seconds, which is gravity whatever the movement, is about one g."""
    seen: dict[str, str] = {}
    for track in tracks:
        means = np.linalg.norm(_blocks(track, track.accel).mean(axis=1), axis=1)
        still = float(np.median(means))
        fitting = [unit for unit, factor in _ACCEL.items() if 0.6 < still * factor / STANDARD_GRAVITY < 1.6]
        if not fitting or given not in ("auto", *fitting):
            where = f"{track.source}: columns ax, ay, az (subject {track.subject})"
            found = f"averaged over {_BLOCK_S:g} s the magnitude is {still:.3g}, required about 1 (g) or 9.81 (m/s²)"
            if fitting:
                raise InputError(f"{where}: {found}, and --accel-unit is {given}; correct it to {fitting[0]}")
            gone = still < 0.6 * STANDARD_GRAVITY
            raise InputError(
                f"{where}: {found}; "
                + ("gravity seems to have been removed: export the accelerometer itself, not the linear acceleration, "
                   "or add the gravity to it; if it was not, convert to m/s²" if gone else "convert it to m/s²")
            )  # fmt: skip
        (other,) = _ACCEL.keys() - {fitting[0]}
        odd = np.abs(np.log(means.clip(1e-9) * _ACCEL[other] / STANDARD_GRAVITY)) < 0.3
        if odd.sum() > max(2, 0.02 * len(means)):
            row = track.rows[np.argmax(odd) * (len(track.rows) // len(means))]
            raise InputError(
                f"{track.source}: columns ax, ay, az (subject {track.subject}): are in {fitting[0]}, but from about "
                f"row {row} on in {other}; required one unit throughout: convert those rows"
            )
        seen.setdefault(fitting[0], track.source)
    _require_one("--accel-unit", "accelerations", seen)
    return next(iter(seen))


def _gyro_unit(tracks: Sequence[Track], given: GyroUnit, accel_factor: float) -> str:
    """The unit of angular velocity: no body turns at 35 rad/s, no sensor goes far beyond; walking is telling else."""
    seen: dict[str, str] = {}
    speeds = []
    for track in tracks:
        if (np.ptp(track.gyro, axis=0) == 0).all():
            raise InputError(
                f"{track.source}: columns gx, gy, gz (subject {track.subject}): never change; required a gyroscope "
                "that measures: leave this recording out"
            )
        fast = float(np.quantile(np.linalg.norm(track.gyro, axis=1), 0.99))
        magnitude = np.linalg.norm(_blocks(track, track.accel), axis=2) * accel_factor
        moving = magnitude.std(axis=1) > 1.0  # m/s²: steps, not sitting
        speed = np.sqrt((_blocks(track, track.gyro) ** 2).sum(axis=2).mean(axis=1))
        typical = float(np.median(speed[moving])) if moving.sum() >= 4 else None
        speeds.append(f"{fast:.3g}")
        if fast > 35:
            unit = "deg/s"
        elif typical is not None and typical < 8:
            unit = "rad/s"
        else:
            continue
        if given == "rad/s" and unit == "deg/s":
            raise InputError(
                f"{track.source}: columns gx, gy, gz (subject {track.subject}): reach {fast:.3g}, too much for "
                "--gyro-unit rad/s; correct it"
            )
        seen.setdefault(unit, track.source)
    if given != "auto":
        return given
    _require_one("--gyro-unit", "angular velocities", seen)
    if not seen:
        raise InputError(
            f"{tracks[0].source}: columns gx, gy, gz: reach {speeds[0]} and could be rad/s or deg/s, as there is too "
            "little movement to tell; say it with --gyro-unit"
        )
    return next(iter(seen))
