"""The readers on the authors' own archives, where HARLORA_DATA has them."""

import numpy as np
import pytest

from harlora.data import cut, dataset, dsa, load_windows, motionsense, uci_hapt
from harlora.data.archive import Archive
from harlora.data.labels import VOCABULARY


def counts(windows):
    return {name: int((windows.labels == VOCABULARY.index(name)).sum()) for name in windows.label_names()}


def test_motionsense(real_data):
    path = real_data("motionsense/A_DeviceMotion_data.zip")
    recordings = list(motionsense.read(Archive(path)))
    assert len(recordings) == 360
    assert sum(len(r.accel) for r in recordings) == 1_412_865
    assert [r.subject for r in recordings[::15]] == [str(n) for n in range(1, 25)]
    still = [r for r in recordings if r.intervals[0].activity in ("sit", "std")]
    for r in still:
        assert np.median(np.linalg.norm(r.accel, axis=1)) == pytest.approx(9.81, abs=0.15)
    windows = cut(recordings)
    assert len(windows) == 21_539
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
