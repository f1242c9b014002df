"""The reader of RealWorld2016, on small archives in the authors' form that the tests make, quirks included."""

import numpy as np
import pytest
from archives import extracted, packed, stretches, zipped

from harlora.data import cut, dataset, load_windows, realworld
from harlora.data.labels import VOCABULARY
from harlora.errors import InputError

START = 1435993159.0
HEADER = "id,attr_time,attr_x,attr_y,attr_z\n"


def accel_of(times):
    t = times - START
    return np.stack([4 * np.sin(2 * np.pi * 1.1 * t), np.cos(2 * np.pi * 0.6 * t), 9.8 + 0 * t], axis=1)


def gyro_of(times):
    t = times - START
    return np.stack([np.sin(2 * np.pi * 0.9 * t), 0.5 * np.cos(2 * np.pi * 1.3 * t), 0 * t + 0.25], axis=1)


def clock(seconds, start=0.0, rate=50.0):
    return START + start + np.arange(round(seconds * rate)) / rate


def table(times, values):
    lines = (
        f"{i + 1},{round(t * 1e3)},{x:.8g},{y:.8g},{z:.8g}\n"
        for i, (t, (x, y, z)) in enumerate(zip(times, values, strict=True))
    )
    return HEADER + "".join(lines)


def members(sensor, activity, times, places=("chest", "waist"), part=""):
    """The files in the archive of one sensor and activity."""
    name, truth = {"acc": ("acc", accel_of), "gyr": ("Gyroscope", gyro_of)}[sensor]
    made = {f"{name}_{activity}{part}_{place}.csv": table(times, truth(times)) for place in places}
    return {"readMe": "> entries 1", **made}


def recorded(subject, activity, times, other=None, **options):
    """Both archives as the authors made them; ``other``: times of the gyroscope's samples if they differ."""
    pairs = (("acc", times), ("gyr", times if other is None else other))
    return {
        f"proband{subject}/data/{sensor}_{activity}_csv.zip": packed(members(sensor, activity, clocked, **options))
        for sensor, clocked in pairs
    }


def read(path, made, **options):
    return list(realworld.read(zipped(path / "a.zip", made), **options))


def errors(recordings):
    worst = [0.0, 0.0]
    for one, (start, _) in zip(recordings, stretches(recordings), strict=True):
        times = start + np.arange(len(one.accel)) / one.rate_hz
        worst[0] = max(worst[0], np.abs(one.accel - accel_of(times)).max())
        worst[1] = max(worst[1], np.abs(one.gyro - gyro_of(times)).max())
    return worst


def test_a_recording_of_each_placement(tmp_path):
    chest, waist = read(tmp_path, recorded(1, "walking", clock(6)))
    assert (chest.dataset, chest.subject, chest.placement, chest.rate_hz) == ("realworld", "1", "chest", 50.0)
    assert waist.placement == dataset("realworld").placement
    assert [(i.start, i.stop, i.activity) for i in waist.intervals] == [(0, 300, "walking")]
    assert max(errors([chest, waist])) < 0.01  # m/s² and rad/s as they are
    assert len(cut([waist])) == 3
    assert [one.placement for one in read(tmp_path, recorded(1, "walking", clock(6)), placements=("waist",))] == [
        "waist"
    ]


def test_forms_of_the_archive(tmp_path):
    made = recorded(2, "walking", clock(6)) | recorded(10, "walking", clock(6))
    loose = {
        f"proband{subject}/data/{name}": text
        for subject in (2, 10)
        for sensor in ("acc", "gyr")
        for name, text in members(sensor, "walking", clock(6)).items()
    }
    deeper = {name.replace("data/", "data/walking_csv/"): text for name, text in loose.items()}
    prefixed = {f"realworld2016_dataset/{name}": content for name, content in made.items()}
    junk = {"__MACOSX/proband2/data/acc_walking_csv.zip": "fork", "proband2/images/a.png": "x",
            "proband2/data/mag_walking_csv.zip": "not read"}  # fmt: skip
    for number, files in enumerate((made, loose, deeper, prefixed, {**made, **junk}, {**made, **loose})):
        for archive in (zipped(tmp_path / f"{number}.zip", files), extracted(tmp_path / str(number), files)):
            recordings = list(realworld.read(archive))
            assert [one.subject for one in recordings] == ["2", "2", "10", "10"]
            assert [len(one.accel) for one in recordings] == [300] * 4
            assert max(errors(recordings)) < 0.01


@pytest.mark.parametrize(("subject", "activity"), [(4, "walking"), (6, "sitting"), (8, "standing"), (13, "walking")])
def test_odd_names_with_a_number_though_there_is_one_part(tmp_path, subject, activity):
    recordings = read(tmp_path, recorded(subject, activity, clock(6), part="_2"))
    assert [(one.placement, one.intervals[0].activity) for one in recordings] == [
        ("chest", activity), ("waist", activity),
    ]  # fmt: skip


def climbing(subject):
    """Three parts, each a zip in the zip; the first of the gyroscope has no number. Each sensor has its own parts."""
    parts = {
        "acc": [clock(6), clock(6, start=20.0), clock(8, start=40.0)],
        "gyr": [np.concatenate([clock(6), clock(6, start=20.0)]), clock(4, start=40.0), clock(3.98, start=44.02)],
    }
    made = {}
    for sensor, clocks in parts.items():
        inner = {}
        for number, times in enumerate(clocks, start=1):
            part = "" if number == 1 else f"_{number}"
            name = f"{sensor}_climbingup{'_1' if number == 1 and sensor == 'acc' else part}_csv.zip"
            inner[name] = packed(members(sensor, "climbingup", times, part=part))
        made[f"proband{subject}/data/{sensor}_climbingup_csv.zip"] = packed(inner)
    return made


def test_zip_in_zip_and_parts_that_pair_by_time(tmp_path):
    recordings = [one for one in read(tmp_path, climbing(7)) if one.placement == "waist"]
    spans = [(round(start - START, 2), round(stop - START, 2)) for start, stop in stretches(recordings)]
    assert spans == [(0.0, 5.98), (20.0, 25.98), (40.0, 47.98)]
    assert max(errors(recordings)) < 0.05
    assert {one.intervals[0].activity for one in recordings} == {"climbingup"}


def test_parts_beside_each_other_without_a_zip(tmp_path):
    made = {}
    for part, start in (("", 0.0), ("_2", 20.0), ("_3", 40.0)):
        for sensor in ("acc", "gyr"):
            for name, text in members(sensor, "climbingdown", clock(6, start=start), part=part).items():
                made[f"proband14/data/{name}"] = text
    recordings = [one for one in read(tmp_path, made) if one.placement == "waist"]
    assert [round(start - START) for start, _ in stretches(recordings)] == [0, 20, 40]


def test_files_that_the_authors_lack(tmp_path):
    """No forearm of subject 2 climbing up: nothing is missed. A gyroscope alone that is missing is counted."""
    both = recorded(2, "climbingup", clock(6), places=("chest", "waist"))
    assert [one.placement for one in read(tmp_path, both)] == ["chest", "waist"]
    lame = recorded(6, "jumping", clock(6)) | recorded(6, "running", clock(6))
    lame["proband6/data/gyr_jumping_csv.zip"] = packed(members("gyr", "jumping", clock(6), places=("chest",)))
    del lame["proband6/data/acc_running_csv.zip"]
    windows = cut(read(tmp_path, lame, placements=("chest",)))
    assert windows.left_out == {"activities without accelerometer": 1}
    with pytest.raises(InputError, match="left out: {'activities without gyroscope': 1, 'activities without accel"):
        cut(read(tmp_path, lame, placements=("waist",)))


def test_the_sensors_are_paired_by_time(tmp_path):
    rng = np.random.default_rng(0)
    times, other = clock(20), clock(20, start=0.3, rate=49.7)
    times, other = times[rng.random(len(times)) > 0.05], other[rng.random(len(other)) > 0.05]
    recordings = read(tmp_path, recorded(1, "walking", times, other))
    assert max(errors(recordings)) < 0.1  # rows paired by number would differ by 1 and more


def test_no_window_bridges_a_gap(tmp_path):
    times = np.concatenate([clock(4), clock(4, start=4.3), clock(1, start=10)])
    recordings = read(tmp_path, recorded(1, "walking", times), placements=("waist",))
    assert [len(one.accel) for one in recordings] == [200, 200, 50]
    windows = cut(recordings)
    assert len(windows) == 4
    assert windows.too_short == 1


def test_the_ends_of_the_range_are_left(tmp_path):
    times = clock(6)
    values = np.clip(5 * accel_of(times), -19.6133, 19.6133)
    made = recorded(1, "running", times, places=("waist",))
    made["proband1/data/acc_running_csv.zip"] = packed({"acc_running_waist.csv": table(times, values)})
    (one,) = read(tmp_path, made)
    np.testing.assert_allclose(one.accel, values, atol=1e-4)


def test_every_activity_has_its_label(tmp_path):
    names = ("climbingdown", "climbingup", "jumping", "lying", "running", "sitting", "standing", "walking")
    made = {}
    for activity in names:
        made |= recorded(1, activity, clock(3), places=("waist",))
    labels = [VOCABULARY[label] for label in cut(read(tmp_path, made)).labels]
    assert labels == ["downstairs", "upstairs", "jump", "lie", "run", "sit", "stand", "walk"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", r"acc_walking_csv\.zip: not a complete zip archive .*; download it again"),
        (packed({"readMe": "x"}), r"acc_walking_csv\.zip: no files named like acc_walking_waist.csv in it"),
        (packed({"acc_walking_waist.csv": HEADER}), r"csv\.zip: acc_walking_waist\.csv: the file has no rows"),
        (packed({"acc_walking_waist.csv": HEADER + "1,2,3\n"}), r"waist\.csv: row 2 has 3 columns, required 5"),
        (packed({"acc_walking_waist.csv": HEADER + "1,2,a,4,5\n"}), r"row 2 has 'a' in the column attr_x, required a"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    made = {**recorded(1, "walking", clock(6)), "proband1/data/acc_walking_csv.zip": content}
    with pytest.raises(InputError, match=message):
        read(tmp_path, made)


def test_the_catalogue_reads_and_caches(tmp_path):
    (tmp_path / "realworld").mkdir()
    zipped(tmp_path / "realworld" / "realworld2016_dataset.zip", recorded(1, "walking", clock(6)))
    first, again = (load_windows("realworld", tmp_path, tmp_path / "cache") for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert len(first) == 3  # of the waist
