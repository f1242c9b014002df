"""The reader of HHAR, on small archives in the authors' form that the tests make, quirks included."""

import numpy as np
import pytest
from archives import extracted, packed, stretches, zipped

from harlora.data import cut, dataset, hhar, load_windows
from harlora.data.labels import VOCABULARY
from harlora.errors import InputError

HEADER = "Index,Arrival_Time,Creation_Time,x,y,z,User,Model,Device,gt\n"
START = 1424696633.0  # seconds; a phone's Arrival_Time
FOLDER = "Activity recognition exp/"


def accel_of(times):
    t = times - START
    return np.stack([2 * np.sin(2 * np.pi * 1.7 * t), np.cos(2 * np.pi * 0.6 * t), 9.8 + 0 * t], axis=1)


def gyro_of(times):
    t = times - START
    return np.stack([np.sin(2 * np.pi * 1.1 * t), 0.5 * np.cos(2 * np.pi * 1.9 * t), 0 * t + 0.25], axis=1)


def clock(seconds, rate=100.0, start=0.0):
    return START + start + np.arange(round(seconds * rate)) / rate


def rows(times, values, *, user="a", device="nexus4_1", gt="walk", arrival=None, creation=None, number="{:d}"):
    """Lines of a file. times: when it happened. arrival, creation: what the phone wrote, seconds."""
    arrival = times + 0.01 if arrival is None else arrival
    creation = times - 2.0 if creation is None else creation
    labels = [gt] * len(times) if isinstance(gt, str) else gt
    model = device.rsplit("_", 1)[0]
    where = f"{user},{model},{device}"
    return [
        f"{i},{round(a * 1e3)},{number.format(round(c * 1e9))},{x:.6f},{y:.6f},{z:.6f},{where},{label}\n"
        for i, (a, c, (x, y, z), label) in enumerate(zip(arrival, creation, values, labels, strict=True))
    ]


def both(times, other=None, **options):
    """The rows of both sensors; ``other``: times of the gyroscope's samples if they differ."""
    other = times if other is None else other
    return rows(times, accel_of(times), **options), rows(other, gyro_of(other), **options)


def files(accel, gyro, kind="Phones", header=HEADER):
    return {
        f"{FOLDER}{kind}_accelerometer.csv": header + "".join(accel),
        f"{FOLDER}{kind}_gyroscope.csv": header + "".join(gyro),
    }


def read(path, accel, gyro):
    return list(hhar.read(zipped(path / "a.zip", files(accel, gyro))))


def errors(recordings):
    """The largest difference from the true signals at the times that the recordings claim, of each sensor."""
    worst = [0.0, 0.0]
    for one, (start, _) in zip(recordings, stretches(recordings), strict=True):
        times = start - 0.01 + np.arange(len(one.accel)) / one.rate_hz
        worst[0] = max(worst[0], np.abs(one.accel - accel_of(times)).max())
        worst[1] = max(worst[1], np.abs(one.gyro - gyro_of(times)).max())
    return worst


def test_a_phone(tmp_path):
    (one,) = read(tmp_path, *both(clock(6)))
    assert (one.dataset, one.subject, one.placement, one.rate_hz) == ("hhar", "a", "waist", 100.0)
    assert [(i.start, i.stop, i.activity) for i in one.intervals] == [(0, 600, "walk")]
    assert max(errors([one])) < 0.01  # m/s² and rad/s as they are
    windows = cut([one])
    assert windows.label_names() == ("walk",)
    assert len(windows) == 3


ACCEL, GYRO = both(clock(6))
WATCH = files(*both(clock(6), device="gear_1"), kind="Watch")


@pytest.mark.parametrize(
    "made",
    [
        files(ACCEL, GYRO),
        files(ACCEL, GYRO, header=""),
        {name: text.replace(",", "\t") for name, text in files(ACCEL, GYRO).items()},
        {**files(ACCEL, GYRO), f"{FOLDER}Phones_gyroscope.csv": "".join(GYRO).replace(",", "\t")},
        {name.removeprefix(FOLDER): text for name, text in files(ACCEL, GYRO).items()},
        {**files(ACCEL, GYRO), **WATCH, "__MACOSX/Activity recognition exp/Phones_gyroscope.csv": "resource fork"},
        {"Activity recognition exp.zip": packed(files(ACCEL, GYRO)), "Still exp.zip": packed({"x.csv": "not read"})},
    ],
    ids=["header", "no header", "tabs", "each its own", "no folder", "watches", "zip in zip"],
)
def test_forms_of_the_archive(tmp_path, made):
    for archive in (zipped(tmp_path / "a.zip", made), extracted(tmp_path / "folder", made)):
        (one,) = hhar.read(archive, placements=("waist",))
        assert max(errors([one])) < 0.01
        assert len(one.accel) == 600


def test_watches_are_another_placement(tmp_path):
    made = list(hhar.read(zipped(tmp_path / "a.zip", {**files(ACCEL, GYRO), **WATCH})))
    assert [(one.placement, one.source.split(": ")[1][:21]) for one in made] == [
        ("waist", "user a, device nexus4"), ("wrist", "user a, device gear_1"),
    ]  # fmt: skip
    assert dataset("hhar").placement == "waist"


def test_devices_are_recordings_of_their_own_and_users_are_subjects(tmp_path):
    times = clock(6)
    made = [both(times, user=user, device=device) for user, device in
            (("b", "s3_1"), ("a", "nexus4_1"), ("a", "s3_1"), ("a", "s3_2"))]  # fmt: skip
    mixed = [
        [line for lines in zip(*(one[sensor] for one in made), strict=True) for line in lines] for sensor in (0, 1)
    ]
    recordings = read(tmp_path, *mixed)
    assert [(one.subject, len(one.accel)) for one in recordings] == [("a", 600), ("a", 600), ("a", 600), ("b", 600)]
    assert max(errors(recordings)) < 0.01
    windows = cut(recordings)
    assert windows.subject_names == ("a", "b")
    assert np.bincount(windows.subjects).tolist() == [9, 3]


def test_devices_without_gyroscope_are_left_out_and_counted(tmp_path):
    accel, gyro = both(clock(6))
    for device in ("samsungold_1", "samsungold_2"):
        accel += both(clock(6), device=device)[0]
    gyro += both(clock(6), device="s3_1")[1]
    windows = cut(read(tmp_path, accel, gyro))
    assert windows.left_out == {"devices without gyroscope": 2, "devices without accelerometer": 1}
    assert len(windows) == 3


def test_the_sensors_are_paired_by_time(tmp_path):
    kept = clock(8, rate=50.0)
    kept = kept[np.random.default_rng(0).random(len(kept)) > 0.1]
    recordings = read(tmp_path, *both(clock(8), kept[20:]))
    assert max(errors(recordings)) < 0.1  # rows paired by number would differ by 1


def test_rows_out_of_order_and_repeated(tmp_path):
    times = clock(6)
    accel, gyro = both(times, arrival=np.floor(times / 0.05) * 0.05 + 0.06)  # handed over five at a time
    for lines in (accel, gyro):
        for i in range(0, 590, 7):
            lines[i], lines[i + 1] = lines[i + 1], lines[i]
        lines += lines[100:200]
    (one,) = read(tmp_path, accel, gyro)
    assert len(one.accel) == 600
    assert max(errors([one])) < 0.02


def test_no_window_bridges_a_gap(tmp_path):
    times = np.concatenate([clock(4), clock(4, start=4.2), clock(1, start=9.0)])
    recordings = read(tmp_path, *both(times))
    assert [(round(start - START, 1), round(stop - START, 1)) for start, stop in stretches(recordings)] == [
        (0.0, 4.0), (4.2, 8.2), (9.0, 10.0),
    ]  # fmt: skip
    windows = cut(recordings)
    assert len(windows) == 4
    assert windows.too_short == 1


def test_no_interval_crosses_a_change_of_activity(tmp_path):
    times = clock(12)
    gt = ["walk"] * 400 + ["null"] * 300 + ["stairsup"] * 500
    late = ["walk"] * 410 + ["null"] * 300 + ["stairsup"] * 490  # the gyroscope's rows change a little later
    (one,) = read(tmp_path, rows(times, accel_of(times), gt=gt), rows(times, gyro_of(times), gt=late))
    spans = [(i.start, i.stop, i.activity) for i in one.intervals]
    assert spans == [(0, 400, "walk"), (410, 700, "null"), (710, 1200, "stairsup")]
    windows = cut([one])
    assert windows.dropped == {"null": 1}
    assert [VOCABULARY[label] for label in windows.labels] == ["walk"] * 2 + ["upstairs"] * 2


@pytest.mark.parametrize("missing", ["null", "", "nan"])
def test_without_activity_is_dropped_and_counted(tmp_path, missing):
    times = clock(6)
    accel, gyro = both(times)
    other = both(times, device="s3_1", gt=missing)
    windows = cut(read(tmp_path, accel + other[0], gyro + other[1]))
    assert windows.dropped == {"null": 3}
    assert windows.label_names() == ("walk",)


def test_every_activity_has_its_label(tmp_path):
    accel, gyro = [], []
    for number, activity in enumerate(("bike", "sit", "stand", "walk", "stairsup", "stairsdown")):
        one = both(clock(3, start=10.0 * number), gt=activity)
        accel += one[0]
        gyro += one[1]
    windows = cut(read(tmp_path, accel, gyro))
    assert [VOCABULARY[label] for label in windows.labels] == [
        "cycle",
        "sit",
        "stand",
        "walk",
        "upstairs",
        "downstairs",
    ]


# Times


def busy(times):
    """Arrival times of a phone that is busy: up to 60 ms late, never out of order."""
    late = 0.01 + 0.06 * np.random.default_rng(1).random(len(times))
    late[::10] = 0.01
    return np.maximum.accumulate(times + late)


def test_creation_time_says_how_far_apart_samples_are(tmp_path):
    times = clock(6)
    recordings = read(tmp_path, *both(times, arrival=busy(times)))
    assert max(errors(recordings)) < 0.02  # by Arrival_Time it would be above 0.4


def test_creation_time_that_a_spreadsheet_rounded_away_is_not_used(tmp_path):
    times = clock(6)
    recordings = read(tmp_path, *both(times, number="{:.2E}"))
    assert sum(len(one.accel) for one in recordings) == 600
    assert max(errors(recordings)) < 0.02


def test_creation_time_of_15_digits_still_serves(tmp_path):
    times = clock(6)
    recordings = read(tmp_path, *both(times, arrival=busy(times), number="{:.14E}"))
    assert max(errors(recordings)) < 0.02


def test_the_clock_is_chosen_device_by_device(tmp_path):
    times = clock(6)
    good, bad = both(times, arrival=busy(times)), both(times, device="s3_1", number="{:.2E}")
    recordings = read(tmp_path, good[0] + bad[0], good[1] + bad[1])
    assert len(recordings) == 2
    assert max(errors(recordings)) < 0.02


def test_one_sensor_alone_may_be_damaged(tmp_path):
    times = clock(6)
    accel, gyro = rows(times, accel_of(times), number="{:.3E}"), rows(times, gyro_of(times))
    recordings = read(tmp_path, accel, gyro)
    assert sum(len(one.accel) for one in recordings) in (599, 600)
    assert max(errors(recordings)) < 0.02


def test_the_sensors_may_count_from_different_moments(tmp_path):
    times = clock(6)
    accel = rows(times, accel_of(times), arrival=busy(times))
    gyro = rows(times, gyro_of(times), arrival=busy(times), creation=times - START + 5000.0)
    recordings = read(tmp_path, accel, gyro)
    assert len(recordings) == 1
    assert max(errors(recordings)) < 0.02


def test_rows_in_any_order(tmp_path):
    """Of a busy device that slept, whose samples have to be put in order before the clocks are compared."""
    times = np.concatenate([clock(4, start=29.0 * part) for part in range(3)])
    accel, gyro = both(times, arrival=busy(times), creation=27920.0 + np.arange(len(times)) / 100)
    for lines in (accel, gyro):
        np.random.default_rng(2).shuffle(lines)
    recordings = read(tmp_path, accel, gyro)
    assert [len(one.accel) for one in recordings] == [400, 400, 400]
    assert max(errors(recordings)) < 0.02


def test_sensors_that_count_from_one_moment_are_not_shifted_apart(tmp_path):
    """The gyroscope is always handed over 40 ms late; the sensors' own times are right."""
    times = clock(6)
    recordings = read(tmp_path, rows(times, accel_of(times)), rows(times, gyro_of(times), arrival=times + 0.05))
    assert max(errors(recordings)) < 0.02  # 0.3 if each were shifted by itself


def test_a_clock_that_stands_still_while_the_device_sleeps_hides_no_gap(tmp_path):
    """The watch of the authors: 3 s of samples, 25 s asleep, and Creation_Time goes on as if nothing had been."""
    times = np.concatenate([clock(4, start=29.0 * part) for part in range(3)])
    uptime = 27920.0 + np.arange(len(times)) / 100
    recordings = read(tmp_path, *both(times, creation=uptime))
    assert [len(one.accel) for one in recordings] == [400, 400, 400]
    assert max(errors(recordings)) < 0.02


def test_a_clock_that_begins_anew(tmp_path):
    times = np.concatenate([clock(4), clock(4, start=60.0)])
    uptime = np.tile(100.0 + np.arange(400) / 100, 2)  # the device was started again: the same times twice
    recordings = read(tmp_path, *both(times, creation=uptime + np.repeat([0.0, 0.003], 400)))
    assert [len(one.accel) for one in recordings] == [400, 400]
    assert max(errors(recordings)) < 0.02


def test_samples_handed_over_late_are_no_gap(tmp_path):
    times = clock(6)
    arrival = times + 0.01
    arrival[300:450] = arrival[450]  # for 1.5 s the phone did something else
    recordings = read(tmp_path, *both(times, arrival=arrival))
    assert [len(one.accel) for one in recordings] == [600]
    assert max(errors(recordings)) < 0.02


def test_faster_sensors_are_filtered_not_picked(tmp_path):
    """60 Hz in a signal of 200 Hz: at 50 Hz, every fourth sample alone would show a movement of 10 Hz."""
    times = clock(6, rate=200.0)
    values = accel_of(times)
    values[:, 0] += 3 * np.sin(2 * np.pi * 60 * (times - START))
    (one,) = read(tmp_path, rows(times, values), rows(times, gyro_of(times)))
    assert one.rate_hz == 200.0
    (window, *_) = cut([one]).signals
    assert np.abs(window[10:-10, 0] - accel_of(START + np.arange(10, 118) / 50)[:, 0]).max() < 0.3


@pytest.mark.parametrize(
    ("rate", "aligned"), [(48.0, 50.0), (50.0, 50.0), (98.0, 100.0), (150.0, 150.0), (198.0, 200.0)]
)
def test_each_device_has_its_own_rate(tmp_path, rate, aligned):
    (one,) = read(tmp_path, *both(clock(6, rate=rate)))
    assert one.rate_hz == aligned


# What is wrong with the files


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"Still exp.zip": packed({"x": "y"})}, "no Activity recognition exp.zip; required the archive of HHAR"),
        ({f"{FOLDER}Phones_accelerometer.csv": HEADER}, r"Phones_gyroscope.csv is missing beside .*accelerometer.csv"),
        ({f"{FOLDER}Watch_gyroscope.csv": HEADER}, r"Watch_accelerometer.csv is missing beside .*gyroscope.csv"),
        ({**files(ACCEL, GYRO), "b/Phones_gyroscope.csv": HEADER}, "are the same file twice; keep one"),
        (files(ACCEL, ["1,2,3\n"]), "Phones_gyroscope.csv: row 2 has 3 columns, required 10"),
        (files(ACCEL, [GYRO[0].replace("walk", "swim")]), r"gt must be one of null, bike, .*, got \['swim'\]"),
        (files(ACCEL, [GYRO[0].replace(",a,", ",,")]), "row 2 has no text in the column User"),
        (
            files(*both(clock(6), number="{:.2E}", arrival=np.full(600, START))),
            "user a, device nexus4_1: neither Creation_Time nor Arrival_Time of the accelerometer tells",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, made, message):
    with pytest.raises(InputError, match=message):
        list(hhar.read(zipped(tmp_path / "a.zip", made)))


def test_only_watches_asked_for_phones(tmp_path):
    with pytest.raises(InputError, match="no Phones_accelerometer.csv; required the archive of HHAR"):
        list(hhar.read(zipped(tmp_path / "a.zip", WATCH), placements=("waist",)))


def test_the_catalogue_reads_caches_and_counts(tmp_path):
    (tmp_path / "hhar").mkdir()
    accel = ACCEL + both(clock(6), device="samsungold_1")[0]
    zipped(tmp_path / "hhar" / "a.zip", {"Activity recognition exp.zip": packed({**files(accel, GYRO), **WATCH})})
    first, again = (load_windows("hhar", tmp_path, tmp_path / "cache") for _ in range(2))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert first.fingerprint() == again.fingerprint()
    assert again.left_out == {"devices without gyroscope": 1}
    assert len(first) == 3  # of the phone, none of the watch
