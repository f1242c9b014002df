"""The reader of PAMAP2, on small archives in the authors' form that the tests make, quirks included."""

import numpy as np
import pytest
from archives import extracted, packed, stretches, zipped

from harlora.data import cut, dataset, load_windows, pamap2
from harlora.data.labels import VOCABULARY
from harlora.errors import InputError

FOLDER = "PAMAP2_Dataset/Protocol/"
PLACES = ("hand", "chest", "ankle")


def accel_of(times, unit=0):
    return np.stack([np.sin(2 * np.pi * times) + unit, 0 * times - unit, 9.8 + 0.2 * np.cos(times)], axis=1)


def gyro_of(times, unit=0):
    return np.stack([np.sin(times), np.cos(3 * times) + unit, 0.1 * times], axis=1)


def sensors(times):
    """A file's 54 columns: time, activity, heart rate, and 17 of each unit."""
    made = np.full((len(times), 54), np.nan)
    made[:, 0] = times
    made[:, 1] = 4
    made[::11, 2] = 100
    for unit in range(3):
        first = 3 + 17 * unit
        made[:, first] = 30.0
        made[:, first + 1 : first + 4] = accel_of(times, unit)
        made[:, first + 4 : first + 7] = 0.5 * accel_of(times, unit)  # the ±6 g sensor, as if it saturated
        made[:, first + 7 : first + 10] = gyro_of(times, unit)
        made[:, first + 10 : first + 13] = 40.0
        made[:, first + 13 : first + 17] = [1, 0, 0, 0]
    return made


CHEST = slice(20, 37)


def text(table):
    return "".join(
        " ".join("NaN" if np.isnan(v) else f"{v:.2f}" if c == 0 else f"{v:.7g}" for c, v in enumerate(row)) + "\n"
        for row in table
    )


def clock(seconds, start=8.38):
    return start + np.arange(round(seconds * 100)) / 100


def read(path, *tables, place="chest"):
    files = {f"{FOLDER}subject10{number}.dat": text(one) for number, one in enumerate(tables, start=1)}
    return [one for one in pamap2.read(zipped(path / "a.zip", files)) if one.placement == place]


def errors(recordings):
    worst = [0.0, 0.0]
    for one, (start, _) in zip(recordings, stretches(recordings), strict=True):
        times, unit = start + np.arange(len(one.accel)) / 100, PLACES.index(one.placement)
        worst[0] = max(worst[0], np.abs(one.accel - accel_of(times, unit)).max())
        worst[1] = max(worst[1], np.abs(one.gyro - gyro_of(times, unit)).max())
    return worst


def spans(recordings):
    return [(round(start, 2), round(stop, 2)) for start, stop in stretches(recordings)]


def test_a_recording_of_each_unit(tmp_path):
    files = {f"{FOLDER}subject101.dat": text(sensors(clock(6)))}
    recordings = list(pamap2.read(zipped(tmp_path / "a.zip", files)))
    assert [one.placement for one in recordings] == list(PLACES)
    assert max(errors(recordings)) < 1e-3  # the ±16 g sensor; m/s² and rad/s as they are
    chest = recordings[1]
    assert (chest.dataset, chest.subject, chest.rate_hz) == ("pamap2", "101", 100.0)
    assert [(i.start, i.stop, i.activity) for i in chest.intervals] == [(0, 600, "walking")]
    assert dataset("pamap2").placement == "chest"
    windows = cut([chest])
    assert len(windows) == 3  # at 50 Hz
    assert np.abs(windows.signals[0, 10:-10, 0] - accel_of(8.38 + np.arange(10, 118) / 50, 1)[:, 0]).max() < 0.02


def test_forms_of_the_archive(tmp_path):
    files = {f"{FOLDER}subject10{number}.dat": text(sensors(clock(3))) for number in (1, 9)}
    files |= {
        "PAMAP2_Dataset/Optional/subject101.dat": text(sensors(clock(9))),
        "__MACOSX/PAMAP2_Dataset/Protocol/subject101.dat": "resource fork",
        "PAMAP2_Dataset/subjectInformation.pdf": "x",
    }
    twice = {"PAMAP2_Dataset.zip": packed(files), "readme.pdf": "x"}
    bare = {name.removeprefix("PAMAP2_Dataset/"): content for name, content in files.items()}
    for number, made in enumerate((files, twice, bare)):
        for archive in (zipped(tmp_path / f"{number}.zip", made), extracted(tmp_path / str(number), made)):
            recordings = [one for one in pamap2.read(archive) if one.placement == "chest"]
            assert [one.subject for one in recordings] == ["101", "109"]  # Optional is not read
            assert [len(one.accel) for one in recordings] == [300, 300]


def test_short_dropouts_are_interpolated(tmp_path):
    table = sensors(clock(6))
    for start in range(50, 600, 50):
        table[start : start + 5, CHEST] = np.nan
    (one,) = read(tmp_path, table)
    assert len(one.accel) == 600
    assert max(errors([one])) < 0.03


def test_a_dropout_of_one_sensor_leaves_the_other(tmp_path):
    table = sensors(clock(6))
    table[100:105, 21:24] = np.nan
    gyro = read(tmp_path, table)[0].gyro
    np.testing.assert_array_equal(gyro, read(tmp_path, sensors(clock(6)))[0].gyro)


def test_longer_dropouts_end_a_stretch_of_that_unit_alone(tmp_path):
    table = sensors(clock(9))
    table[300:340, CHEST] = np.nan
    table[700:705, 27:30] = np.nan
    recordings = read(tmp_path, table)
    assert spans(recordings) == [(8.38, 11.37), (11.78, 17.37)]
    assert max(errors(recordings)) < 0.03
    assert len(cut(recordings)) == 1 + 3
    assert [len(one.accel) for one in read(tmp_path, table, place="ankle")] == [900]


def test_a_gap_of_the_time_column_ends_a_stretch(tmp_path):
    recordings = read(tmp_path, sensors(np.concatenate([clock(3), clock(4, start=12.5), clock(1, start=17.0)])))
    assert spans(recordings) == [(8.38, 11.37), (12.5, 16.49), (17.0, 17.99)]
    windows = cut(recordings)
    assert windows.too_short == 1
    assert len(windows) == 1 + 2


def test_activity_0_is_dropped_and_counted(tmp_path):
    table = sensors(clock(12))
    table[:, 1] = np.repeat([0, 4, 0, 12], 300)
    windows = cut(read(tmp_path, table))
    assert windows.dropped == {"other": 2}
    assert [VOCABULARY[label] for label in windows.labels] == ["walk", "upstairs"]


def test_every_activity_has_its_label(tmp_path):
    numbers = (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 24, 9, 19)
    table = sensors(clock(3 * len(numbers)))
    table[:, 1] = np.repeat(numbers, 300)
    windows = cut(read(tmp_path, table))
    assert [VOCABULARY[label] for label in windows.labels] == [
        "lie", "sit", "stand", "walk", "run", "cycle", "nordic_walk", "upstairs", "downstairs", "vacuum", "iron",
        "rope_jump",
    ]  # fmt: skip
    assert windows.dropped == {"watching TV": 1, "house cleaning": 1}


LINE = text(sensors(clock(0.01)))
FILE = f"{FOLDER}subject101.dat"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"PAMAP2_Dataset/Optional/subject101.dat": LINE}, "no Protocol/subject101.dat; required the archive of PAM"),
        ({"PAMAP2_Dataset.zip": b"no zip"}, r"PAMAP2_Dataset\.zip: not a complete zip archive"),
        ({FILE: ""}, r"subject101\.dat: the file has no rows"),
        ({FILE: "1 2 3\n"}, "required 54 columns .* with a space between them"),
        ({FILE: LINE + LINE[:90] + "\n"}, r"subject101\.dat: row 2 has \d+ columns, required 54"),
        ({FILE: LINE.replace("8.38", "NaN")}, "row 1 has no finite number in the column 1;"),
        ({FILE: LINE.replace("8.38 4 ", "8.38 8 ")}, r"activity numbers must be among .*got \[8.0\]"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        list(pamap2.read(zipped(tmp_path / "a.zip", files)))


def test_the_catalogue_reads_and_caches(tmp_path):
    (tmp_path / "pamap2").mkdir()
    inner = packed({FILE: text(sensors(clock(6)))})
    zipped(tmp_path / "pamap2" / "pamap2.zip", {"PAMAP2_Dataset.zip": inner})
    first, again = (load_windows("pamap2", tmp_path, tmp_path / "cache") for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert len(first) == 3  # of the chest
