"""The readers on the authors' own archives, where HARLORA_DATA has them."""

import numpy as np
import pytest

from harlora.data import cut, dataset, dsa, hhar, load_windows, motionsense, realworld, uci_hapt
from harlora.data.archive import Archive
from harlora.data.labels import VOCABULARY
from harlora.data.recording import Recording


def counts(windows):
    return {name: int((windows.labels == VOCABULARY.index(name)).sum()) for name in windows.label_names()}


def test_motionsense(real_data):
    path = real_data("motionsense/A_DeviceMotion_data.zip")
    found = list(motionsense.read(Archive(path)))
    recordings = [each for each in found if isinstance(each, Recording)]
    assert len(found) == 360
    assert len(recordings) == 359  # subject 1 sits twice, the same recording
    assert sum(len(r.accel) for r in recordings) == 1_412_865 - 10_292
    assert [r.subject for r in recordings[::15]] == [str(n) for n in range(1, 25)]
    still = [r for r in recordings if r.intervals[0].activity in ("sit", "std")]
    for r in still:
        assert np.median(np.linalg.norm(r.accel, axis=1)) == pytest.approx(9.81, abs=0.15)
    windows = cut(recordings)
    assert len(windows) == 21_380
    assert set(counts(windows)) == {"sit", "stand", "walk", "upstairs", "downstairs", "run"}
    assert windows.dropped == {}


def test_hapt(real_data):
    path = real_data("uci_hapt/HAPT_RawData.zip")
    recordings = list(uci_hapt.read(Archive(path)))
    assert len(recordings) == 61
    assert len({r.subject for r in recordings}) == 30
    windows = cut(recordings)
    assert len(windows) == 10_411
    assert set(counts(windows)) == {"sit", "stand", "lie", "walk", "upstairs", "downstairs"}
    assert set(windows.dropped) == {
        "STAND_TO_SIT", "SIT_TO_STAND", "SIT_TO_LIE", "LIE_TO_SIT", "STAND_TO_LIE", "LIE_TO_STAND",
    }  # fmt: skip


def test_dsa(real_data):
    path = real_data("dsa/dsa_p1-p4.zip")
    recordings = list(dsa.read(Archive(path)))
    assert len(recordings) == 19 * 4 * 5
    assert {len(r.accel) for r in recordings} == {60 * 125}
    windows = cut([r for r in recordings if r.placement == "torso"])
    whole = 1 + (15_000 - 128) // 64
    # Subject 1 on the stairs: one second in five is zeros, so each segment of 4 s stands alone.
    assert len(windows) == (17 * 4 - 2) * whole + 2 * 60 * 2
    assert np.linalg.norm(windows.signals[:, :, :3], axis=2).mean(axis=1).min() > 5
    assert windows.dropped == {"a07": 4 * 233, "a08": 4 * 233}


def linked(folder, files):
    """An archive folder with these real files, under the names that their dataset gives them."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file.resolve())
    return Archive(folder)


def sensors(real_data, form):
    return {form.format(sensor): real_data(f"hhar_sample/{form.format(sensor)}") for sensor in
            ("accelerometer", "gyroscope")}  # fmt: skip


def test_hhar_through_a_spreadsheet(real_data, tmp_path):
    """A header, commas in one file and tabs in the other, Creation_Time of 15 digits, seven cuts of 1000 rows."""
    recordings = list(hhar.read(linked(tmp_path, sensors(real_data, "Phones_{}.csv"))))
    assert {(r.subject, r.placement, r.rate_hz) for r in recordings} == {("a", "waist", 200.0)}
    assert 34 < sum(len(r.accel) for r in recordings) / 200 < 37  # seconds
    assert {i.activity for r in recordings for i in r.intervals} == {
        "stand", "sit", "null", "walk", "stairsup", "stairsdown", "bike",
    }  # fmt: skip
    windows = cut(recordings)
    assert windows.dropped == {"null": 2}
    assert set(counts(windows)) == {"sit", "stand", "walk", "upstairs", "downstairs", "cycle"}


def test_hhar_without_header(real_data, tmp_path):
    recordings = list(hhar.read(linked(tmp_path, sensors(real_data, "headerless/Phones_{}.csv"))))
    # 65 s with three gaps of 5 s, in both sensors.
    assert [round(len(r.accel) / r.rate_hz, 1) for r in recordings] == [3.9, 3.4, 3.8, 39.3]
    for r in recordings:
        assert np.median(np.linalg.norm(r.accel, axis=1)) == pytest.approx(10.1, abs=0.1)
        assert np.abs(np.median(r.gyro, axis=0)).max() < 0.05  # the person stands
    assert len(cut(recordings)) == 34


def test_hhar_a_watch_that_sleeps(real_data, tmp_path):
    recordings = list(hhar.read(linked(tmp_path, sensors(real_data, "headerless/Watch_{}.csv"))))
    assert {(r.placement, r.rate_hz) for r in recordings} == {("wrist", 100.0)}
    # It woke for 3 to 5 s at a time, through 540 s in which its own clock counted 136.
    assert 60 < sum(len(r.accel) for r in recordings) / 100 < 110
    assert max(len(r.accel) for r in recordings) / 100 < 8
    starts = [float(r.source.rsplit("from ", 1)[1].removesuffix(" s")) for r in recordings]
    assert starts[-1] - starts[0] > 500


def test_realworld(real_data, tmp_path):
    names = ("acc_walking_shin.csv", "Gyroscope_walking_shin.csv")
    files = {f"proband1/data/{name}": real_data(f"realworld_sample/{name}") for name in names}
    recordings = list(realworld.read(linked(tmp_path, files)))
    assert {(r.subject, r.placement, r.rate_hz) for r in recordings} == {("1", "shin", 50.0)}
    # 640 s, with about 50 gaps longer than 0.1 s.
    assert 45 < len(recordings) < 60
    assert 620 < sum(len(r.accel) for r in recordings) / 50 < 640
    assert max(np.abs(r.accel).max() for r in recordings) == pytest.approx(19.6, abs=0.05)
    windows = cut(recordings)
    assert counts(windows) == {"walk": len(windows)}
    assert 400 < len(windows) < 498


@pytest.mark.parametrize("name", ["motionsense", "uci_hapt", "dsa"])
def test_windows_of_one_stretch_overlap_by_half(real_data, name):
    entry = dataset(name)
    root = real_data(entry.folder).parent
    windows = load_windows(name, root)
    following = np.flatnonzero(np.diff(windows.segments) == 0)
    assert (windows.starts[following + 1] - windows.starts[following] == 64).all()
    assert np.array_equal(windows.signals[following, 64:], windows.signals[following + 1, :64])
    assert (windows.starts[np.flatnonzero(np.diff(windows.segments) != 0) + 1] == 0).all()
    for segment in np.unique(windows.segments)[::50]:
        members = windows.segments == segment
        assert len(np.unique(windows.subjects[members])) == 1
        assert len(np.unique(windows.labels[members])) == 1
