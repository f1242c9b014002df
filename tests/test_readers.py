"""The readers, on small archives in the authors' formats that the tests make, quirks included."""

import io
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from archives import packed, zipped

from harlora.data import DATASETS, cut, dsa, hhar, motionsense, pamap2, realworld, uci_hapt, uci_har
from harlora.data import archive as archive_module
from harlora.data.archive import Archive
from harlora.data.download import present
from harlora.data.labels import VOCABULARY
from harlora.errors import InputError

G = 9.80665
RNG = np.random.default_rng(3)


def text(table, delimiter, header=None):
    out = io.StringIO()
    np.savetxt(out, table, delimiter=delimiter, fmt="%.8g", header=header or "", comments="")
    return out.getvalue()


# MotionSense

HEADER = (
    ",attitude.roll,attitude.pitch,attitude.yaw,gravity.x,gravity.y,gravity.z,rotationRate.x,rotationRate.y,"
    "rotationRate.z,userAcceleration.x,userAcceleration.y,userAcceleration.z"
)


def motion_table(length=200):
    table = RNG.normal(0, 0.1, (length, 13))
    table[:, 0] = np.arange(length)
    table[:, 4:7] = [0.0, 1.0, 0.0]
    return table


def motionsense_archive(path, **extra):
    files = {f"A_DeviceMotion_data/{trial}/sub_{subject}.csv": text(motion_table(), ",", HEADER)
             for trial in ("dws_1", "wlk_15") for subject in (2, 10)}  # fmt: skip
    files["__MACOSX/A_DeviceMotion_data/dws_1/._sub_2.csv"] = "resource fork"
    files["__MACOSX/A_DeviceMotion_data/dws_1/sub_2.csv"] = "resource fork"
    files["A_DeviceMotion_data/.DS_Store"] = "binary"
    return zipped(path, {**files, **extra})


def test_motionsense(tmp_path):
    table = motion_table()
    archive = motionsense_archive(
        tmp_path / "a.zip", **{"A_DeviceMotion_data/jog_9/sub_1.csv": text(table, ",", HEADER)}
    )
    recordings = list(motionsense.read(archive))
    assert [(r.subject, r.intervals[0].activity) for r in recordings] == [
        ("1", "jog"), ("2", "dws"), ("2", "wlk"), ("10", "dws"), ("10", "wlk"),
    ]  # fmt: skip
    first = recordings[0]
    np.testing.assert_allclose(first.accel, (table[:, 4:7] + table[:, 10:13]) * G, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first.gyro, table[:, 7:10], rtol=1e-5, atol=1e-6)
    assert first.rate_hz == 50
    windows = cut(recordings)
    assert windows.subject_names == ("1", "2", "10")
    assert len(windows) == 5 * 2


def test_a_copy_of_another_trial_is_left_out_and_counted(tmp_path):
    """As subject 1 sitting in the authors' archive: the same windows would stand on both sides of a random split."""
    twice = text(motion_table(), ",", HEADER)
    archive = motionsense_archive(
        tmp_path / "a.zip",
        **{"A_DeviceMotion_data/sit_5/sub_1.csv": twice, "A_DeviceMotion_data/sit_13/sub_1.csv": twice},
    )
    windows = cut(motionsense.read(archive))
    assert windows.left_out == {"copies of another recording": 1}
    assert len(windows) == 5 * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text(motion_table(), ";", HEADER.replace(",", ";")), "required columns gravity.x.* with the right separator"),
        (text(motion_table()[:, :4], ",", HEADER[:44]), "required columns gravity.x"),
        (text(motion_table(), ",", HEADER) + "1,2,3\n", "not a table of numbers"),
        (text(motion_table(), ",", HEADER).replace("0,1,0", "0,x,0", 1), "not a table of numbers"),
        (HEADER + "\n" + "0," * 12 + "nan\n", r"row 2 has a value that is not a finite number"),
        (HEADER + "\n", "found 0 rows"),
        ("", "required columns gravity.x"),
    ],
)
def test_motionsense_with_a_bad_file_names_it(tmp_path, content, message):
    archive = motionsense_archive(tmp_path / "a.zip", **{"A_DeviceMotion_data/jog_9/sub_1.csv": content})
    with pytest.raises(InputError, match=r"a\.zip: A_DeviceMotion_data/jog_9/sub_1\.csv: .*" + message):
        list(motionsense.read(archive))


# HAPT


def hapt_files(gyro_length=600):
    accel, gyro = RNG.normal(0, 0.1, (600, 3)) + [1.0, 0, 0], RNG.normal(0, 0.1, (gyro_length, 3))
    return {
        "RawData/acc_exp01_user01.txt": text(accel, " "),
        "RawData/gyro_exp01_user01.txt": text(gyro, " "),
        "RawData/acc_exp02_user01.txt": text(accel, " "),
        "RawData/gyro_exp02_user01.txt": text(gyro, " "),
        "RawData/labels.txt": "1 1 5 1 200\n1 1 7 201 340\n1 1 1 341 600\n2 1 6 11 300\n",
        "activity_labels.txt": "1 WALKING\n",
    }, accel


def test_hapt(tmp_path):
    files, accel = hapt_files()
    first, second = uci_hapt.read(zipped(tmp_path / "a.zip", files))
    np.testing.assert_allclose(first.accel, accel * G, rtol=1e-5, atol=1e-5)
    assert [(i.start, i.stop, i.activity) for i in first.intervals] == [
        (0, 200, "STANDING"), (200, 340, "STAND_TO_SIT"), (340, 600, "WALKING"),
    ]  # fmt: skip
    windows = cut([first, second])
    assert windows.dropped == {"STAND_TO_SIT": 1}
    assert [VOCABULARY[label] for label in windows.labels] == ["stand"] * 2 + ["walk"] * 3 + ["lie"] * 3
    assert windows.subject_names == ("1",)


def test_hapt_under_other_folder_names(tmp_path):
    files, _ = hapt_files()
    renamed = {f"HAPT Data Set/{name.replace('RawData', 'Raw-Data')}": content for name, content in files.items()}
    assert len(list(uci_hapt.read(zipped(tmp_path / "a.zip", renamed)))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RawData/gyro_exp01_user01.txt": None}, "gyro_exp01_user01.txt is missing"),
        ({"RawData/labels.txt": None}, "no RawData/labels.txt"),
        ({"RawData/labels.txt": "1 1 13 1 200\n"}, r"activity numbers must be 1 to 12, got \[13\]"),
        ({"RawData/labels.txt": "1 1 5 1 900\n"}, "leaves the recording of 600 samples"),
        ({"RawData/labels.txt": "1 1 5 1\n"}, "required rows of 5 numbers"),
        ({"RawData/acc_exp01_user01.txt": "1,2,3\n4,5,6\n"}, "not a table of numbers separated by white space"),
    ],
)
def test_hapt_with_bad_files(tmp_path, change, message):
    files = {name: content for name, content in {**hapt_files()[0], **change}.items() if content is not None}
    with pytest.raises(InputError, match=message):
        list(uci_hapt.read(zipped(tmp_path / "a.zip", files)))


def test_hapt_with_sensors_of_different_length(tmp_path):
    with pytest.raises(InputError, match="equally long"):
        list(uci_hapt.read(zipped(tmp_path / "a.zip", hapt_files(gyro_length=599)[0])))


# UCI HAR


def har_files(folder="UCI HAR Dataset/", stretches=((1, 5, 3), (1, 1, 2), (2, 1, 2))):
    """Two stretches of subject 1 (the second another activity) and one of subject 2, windows overlapping by half.

    stretches: of each the subject, the activity, and how many windows.
    """
    subjects, activities, windows, signals = [], [], [], []
    for subject, activity, count in stretches:
        signal = RNG.normal(0, 0.1, (64 * (count + 1), 6)) + [1, 0, 0, 0, 0, 0]
        signals.append(signal)
        windows += [signal[64 * i : 64 * i + 128] for i in range(count)]
        subjects += [subject] * count
        activities += [activity] * count
    stacked = np.stack(windows)
    files = {
        f"{folder}train/subject_train.txt": "\n".join(map(str, subjects)),
        f"{folder}train/y_train.txt": "\n".join(map(str, activities)),
    }
    names = [f"{sensor}_{axis}" for sensor in ("total_acc", "body_gyro") for axis in "xyz"]
    for channel, name in enumerate(names):
        lines = ["".join(f"  {value: .7e}" for value in row) for row in stacked[:, :, channel]]
        files[f"{folder}train/Inertial Signals/{name}_train.txt"] = "\n".join(lines)
    files[f"{folder}train/Inertial Signals/body_acc_x_train.txt"] = "not read: it has no gravity"
    return files, stacked


def test_uci_har_gives_back_the_authors_windows(tmp_path):
    files, stacked = har_files()
    recordings = list(uci_har.read(zipped(tmp_path / "a.zip", files)))
    assert [len(r.accel) for r in recordings] == [256, 192, 192]
    windows = cut(recordings)
    expected = stacked * np.array([G, G, G, 1, 1, 1])
    np.testing.assert_allclose(windows.signals, expected, rtol=1e-5, atol=1e-5)
    assert [VOCABULARY[label] for label in windows.labels] == ["stand"] * 3 + ["walk"] * 4
    assert windows.subjects.tolist() == [0] * 5 + [1] * 2
    assert windows.segments.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_uci_har_joins_only_windows_that_overlap(tmp_path):
    """Two trials of one person and activity follow each other without a sign."""
    files, stacked = har_files(stretches=[(1, 1, 2), (1, 1, 3)])
    recordings = list(uci_har.read(zipped(tmp_path / "a.zip", files)))
    assert [len(r.accel) for r in recordings] == [192, 256]
    windows = cut(recordings)
    np.testing.assert_allclose(windows.signals[..., 3:], stacked[..., 3:], rtol=1e-5, atol=1e-5)
    assert windows.segments.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(("name", "values"), [("subject", [1, 1, 2, 2]), ("y", [1, 1, 5, 5])])
def test_uci_har_joins_no_two_people_or_activities(name, values, tmp_path):
    files, _ = har_files(stretches=[(1, 1, 4)])
    files[f"UCI HAR Dataset/train/{name}_train.txt"] = "\n".join(map(str, values))
    assert [len(r.accel) for r in uci_har.read(zipped(tmp_path / "a.zip", files))] == [192, 192]


def test_uci_har_zipped_twice_and_extracted(tmp_path):
    files, stacked = har_files()
    inner = tmp_path / "inner.zip"
    zipped(inner, files)
    outer = zipped(tmp_path / "outer.zip", {"UCI HAR Dataset.names": "x", "UCI HAR Dataset.zip": inner.read_bytes()})
    assert len(cut(list(uci_har.read(outer)))) == len(stacked)
    with zipfile.ZipFile(inner) as archive:
        archive.extractall(tmp_path / "folder")
    assert len(cut(list(uci_har.read(Archive(tmp_path / "folder"))))) == len(stacked)


def test_uci_har_with_bad_files(tmp_path):
    files, _ = har_files()
    with pytest.raises(InputError, match="required UCI HAR"):
        list(uci_har.read(zipped(tmp_path / "a.zip", {"readme.txt": "x"})))
    bad = {**files, "UCI HAR Dataset/train/y_train.txt": "1\n2\n"}
    with pytest.raises(InputError, match="required one of each a window"):
        list(uci_har.read(zipped(tmp_path / "b.zip", bad)))
    bad = {**files, "UCI HAR Dataset/train/y_train.txt": "\n".join("9" * 7)}
    with pytest.raises(InputError, match=r"activity numbers must be 1 to 6, got \[9\]"):
        list(uci_har.read(zipped(tmp_path / "c.zip", bad)))


# DSA


def dsa_files(segments=(1, 2, 3), activity="a10"):
    files, tables = {}, []
    for segment in segments:
        table = RNG.normal(0, 0.1, (125, 45))
        table[:, 0] += 9.8
        table[:, 27] += 9.8  # right leg
        tables.append(table)
        files[f"data/{activity}/p2/s{segment:02}.txt"] = text(table, ",")
    return files, np.concatenate(tables)


def test_dsa(tmp_path):
    files, table = dsa_files()
    recordings = list(dsa.read(zipped(tmp_path / "a.zip", files)))
    assert [r.placement for r in recordings] == ["torso", "right arm", "left arm", "right leg", "left leg"]
    for unit, one in enumerate(recordings):
        np.testing.assert_allclose(one.accel, table[:, 9 * unit : 9 * unit + 3], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.gyro, table[:, 9 * unit + 3 : 9 * unit + 6], rtol=1e-5, atol=1e-5)
    windows = cut(recordings[:1])
    assert len(windows) == 1 + (2 * 375 - 128) // 64  # joined and upsampled from 25 Hz to 50 Hz
    assert windows.label_names() == ("walk",)


def test_dsa_breaks_where_a_segment_is_missing(tmp_path):
    files, _ = dsa_files(segments=(1, 2, 4, 5))
    recordings = [r for r in dsa.read(zipped(tmp_path / "a.zip", files)) if r.placement == "torso"]
    assert [len(r.accel) for r in recordings] == [250, 250]
    assert len(cut(recordings)) == 2 * (1 + (500 - 128) // 64)


def test_dsa_rows_of_zeros_were_not_measured(tmp_path):
    files, table = dsa_files(segments=(1, 2))
    table[100:125] = 0
    table[200:250] = 0
    files = {f"data/a05/p1/s{i + 1:02}.txt": text(table[125 * i : 125 * i + 125], ",") for i in range(2)}
    torso = next(dsa.read(zipped(tmp_path / "a.zip", files)))
    assert [(i.start, i.stop) for i in torso.intervals] == [(0, 100), (125, 200)]
    windows = cut([torso])
    assert len(windows) == 2 + 1
    assert np.abs(windows.signals[:, :, 0]).min() > 8


def test_every_activity_has_its_label(tmp_path):
    files = {}
    for number in range(1, 20):
        files |= dsa_files(segments=(1,), activity=f"a{number:02}")[0]
    made = [r for r in dsa.read(zipped(tmp_path / "dsa.zip", files)) if r.placement == "torso"]
    assert [VOCABULARY[label] for label in cut(made).labels[::2]] == [
        "sit", "stand", "lie", "lie", "upstairs", "downstairs", "walk", "walk", "walk", "run", "stepper",
        "cross_trainer", "cycle", "cycle", "row", "jump", "basketball",
    ]  # fmt: skip
    trials = ("sit_5", "std_6", "wlk_7", "ups_3", "dws_1", "jog_9")
    files = {f"{trial}/sub_{i}.csv": text(motion_table(130), ",", HEADER) for i, trial in enumerate(trials)}
    labels = cut(motionsense.read(zipped(tmp_path / "motionsense.zip", files))).labels
    assert [VOCABULARY[label] for label in labels] == ["sit", "stand", "walk", "upstairs", "downstairs", "run"]
    files, _ = hapt_files()
    files["RawData/labels.txt"] = "".join(f"1 1 {n} {100 * n - 99} {100 * n}\n" for n in range(1, 7))
    files["RawData/labels.txt"] += "".join(f"2 1 {n} {100 * n - 99} {100 * n}\n" for n in range(4, 7))
    windows = cut(uci_hapt.read(zipped(tmp_path / "hapt.zip", files)), window=100)
    assert [VOCABULARY[label] for label in windows.labels] == [
        "walk", "upstairs", "downstairs", "sit", "stand", "lie", "sit", "stand", "lie",
    ]  # fmt: skip


def test_dsa_lift_rides_are_dropped_and_counted(tmp_path):
    walk, _ = dsa_files()
    lift, _ = dsa_files(activity="a08")
    made = [r for r in dsa.read(zipped(tmp_path / "a.zip", walk | lift)) if r.placement == "torso"]
    windows = cut(made)
    assert windows.dropped == {"a08": 10}
    assert windows.label_names() == ("walk",)


def test_dsa_with_bad_files(tmp_path):
    with pytest.raises(InputError, match="required the archive of DSA"):
        list(dsa.read(zipped(tmp_path / "a.zip", {"x": "y"})))
    with pytest.raises(InputError, match=r"s01.txt: required rows of 45 numbers separated by ','"):
        list(dsa.read(zipped(tmp_path / "b.zip", {"data/a01/p1/s01.txt": "1,2\n3,4\n"})))


# Archives


def test_large_files_come_in_pieces_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "_BLOCK", 7)
    monkeypatch.setattr(archive_module, "_IN_MEMORY", 10)  # the inner archive goes to a temporary file
    content = "first\nsecond line longer than a block\n\nlast without an end"
    outer = zipped(tmp_path / "outer.zip", {"inner.zip": packed({"a.txt": content})})
    pieces = list(outer.nested("inner.zip").chunks("a.txt"))
    assert b"".join(pieces).decode() == content
    assert len(pieces) > 2
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def test_a_damaged_archive_inside_another_is_named(tmp_path):
    outer = zipped(tmp_path / "outer.zip", {"inner.zip": packed({"a.txt": "x" * 100})[:60]})
    with pytest.raises(InputError, match=r"outer\.zip/inner\.zip: not a complete zip archive .*download it again"):
        outer.nested("inner.zip")


def test_truncated_and_damaged_archives_are_named(tmp_path):
    path = tmp_path / "a.zip"
    motionsense_archive(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.zip: not a complete zip archive .*download it again"):
        Archive(path)
    damaged = bytearray(content)
    damaged[200:260] = b"\0" * 60
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"a\.zip: A_DeviceMotion_data/.* in it is damaged"):
        list(motionsense.read(Archive(path)))
    with pytest.raises(InputError, match="no such file"):
        Archive(tmp_path / "none.zip")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("encrypted", "a.txt in it cannot be unpacked (File 'a.txt' is encrypted"),
        ("method", "a.txt in it cannot be unpacked (That compression method is not supported)"),
        ("lzma", "a.txt in it is damaged ("),
    ],
)
def test_members_that_cannot_be_unpacked_are_named(tmp_path, damage, message):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", "x" * 1000)
    content = bytearray(path.read_bytes())
    local, central = content.find(b"PK\x03\x04"), content.find(b"PK\x01\x02")
    if damage == "encrypted":
        content[local + 6] |= 1
        content[central + 8] |= 1
    elif damage == "method":
        content[local + 8] = content[central + 10] = 9
    else:
        content[local + 30 + len("a.txt") + 4 + 5 : central] = b"\xff" * (central - local - 44)
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        Archive(path).read("a.txt")
    entry = replace(DATASETS["motionsense"], folder="", download=f"https://example.org/{path.name}", checksum=None)
    with pytest.raises(InputError, match="not a complete zip archive"):
        present(entry, tmp_path)


@pytest.mark.parametrize("reader", [motionsense, uci_hapt, dsa, uci_har, hhar, realworld, pamap2])
def test_a_foreign_archive_is_refused(tmp_path, reader):
    with pytest.raises(InputError, match="required"):
        list(reader.read(zipped(tmp_path / "a.zip", {"readme.txt": "hello"})))
