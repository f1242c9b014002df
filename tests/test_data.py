"""The catalogue, the cache, splits and the synthetic datasets."""

import os
import re

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harlora import files
from harlora.data import DATASETS, available, data_root, dataset, fewer_labels, load_windows, split, synthetic
from harlora.data import catalog as catalog_module
from harlora.data.augment import half_turns, rotate
from harlora.data.download import present
from harlora.data.inspect import draw, hours
from harlora.data.windows import HOP, WINDOW
from harlora.errors import InputError
from harlora.files import load_tensors, read_info, save_tensors
from harlora.report.paper import SCORES


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return load_windows("synthetic_c", tmp_path_factory.mktemp("none"), tmp_path_factory.mktemp("cache"))


def test_synthetic_datasets_are_what_they_claim(tmp_path):
    names = [entry.name for entry in available(tmp_path)]
    assert names == [f"synthetic_{letter}" for letter in "abcde"]
    all_windows = [load_windows(name, tmp_path) for name in names]
    for one in all_windows:
        assert len(one.subject_names) >= 5
        assert {"sit", "stand", "lie", "walk", "upstairs", "downstairs", "run"} == set(one.label_names())
        assert np.isfinite(one.signals).all()
        assert one.signals.shape[1:] == (WINDOW, 6)
    # Domain shift: gravity lies along another axis from one to the next.
    gravity = np.stack([one.signals[one.labels == 1, :, :3].mean(axis=(0, 1)) for one in all_windows])
    unit = gravity / np.linalg.norm(gravity, axis=1, keepdims=True)
    assert (unit @ unit.T)[np.triu_indices(5, 1)].min() < 0.3
    rates = {next(synthetic.read(name)).rate_hz for name in names}
    assert len(rates) == 5
    reached = np.concatenate([np.abs(recording.accel).ravel() for recording in synthetic.read("synthetic_c")])
    assert (reached == reached.max()).sum() > 100  # the sensor's range ends at 2 g


def test_synthetic_data_is_the_same_every_time(tmp_path):
    one, other = (load_windows("synthetic_a", tmp_path, tmp_path / name) for name in ("x", "y"))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != load_windows("synthetic_b", tmp_path).fingerprint()


def test_cache_returns_the_same_windows(tmp_path):
    first = load_windows("synthetic_a", tmp_path, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = load_windows("synthetic_a", tmp_path, tmp_path / "cache")
    assert first.fingerprint() == again.fingerprint()
    for key, value in vars(first).items():
        if isinstance(value, np.ndarray):
            assert value.dtype == vars(again)[key].dtype
            assert np.array_equal(value, vars(again)[key])
        else:
            assert value == vars(again)[key]


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_corrupt_cache_file_is_named(tmp_path, damage):
    load_windows("synthetic_a", tmp_path, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-1000] ^= 255
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}.*delete it, it will be made again"):
        load_windows("synthetic_a", tmp_path, tmp_path / "cache")
    file.unlink()
    load_windows("synthetic_a", tmp_path, tmp_path / "cache")


def test_without_a_cache_that_can_be_written_it_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "cache"
    message = f"windows cannot be cached in {folder} (Not a directory) and are read anew each time; set HARLORA_CACHE"
    with pytest.warns(UserWarning, match=re.escape(message)):
        windows = load_windows("synthetic_a", tmp_path, folder)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.warns(UserWarning, match="No space left on device .* or make room"):
        assert load_windows("synthetic_a", tmp_path).fingerprint() == windows.fingerprint()
    assert not list((tmp_path / "cache").iterdir())


def test_windows_of_old_data_or_code_leave_the_cache(tmp_path):
    names = [f"synthetic_{who}-128-64-{digit * 16}.safetensors" for who, digit in ("a0", "a1", "b2")]
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in names:
        (cache / name).write_text("x")
    for name in names[1:]:
        os.utime(cache / name, (0, 0))
    load_windows("synthetic_a", tmp_path, cache)
    assert len(list(cache.iterdir())) == 3
    assert not (cache / names[1]).exists()


def test_the_header_of_a_file_has_a_checksum_too(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors, info = {"a": torch.ones(3)}, {"labels": {"x": "walk"}, "std": [1.5]}
    save_tensors(file, tensors, kind="recordings", info=info)
    assert load_tensors(file, kind="recordings", remedy="")[1] == info
    content = file.read_bytes()
    for old, new in ((b"walk", b"lieb"), (b"1.5", b"1.6")):
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))
        for read in (read_info, load_tensors):
            with pytest.raises(InputError, match="a.safetensors: checksum does not match its header.*; make it again"):
                read(file, kind="recordings", remedy="make it again")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    # Files that were written before headers had one are read as they were.
    save_file(tensors, file, {k: v for k, v in metadata.items() if k != "harlora.info_sha256"})
    assert load_tensors(file, kind="recordings", remedy="")[1]["std"] == [1.6]
    save_file(tensors, file, {k: v for k, v in metadata.items() if k != "harlora.info"})
    for read in (read_info, load_tensors):
        with pytest.raises(InputError, match="has no harlora.info in its header, the file is damaged; make it again"):
            read(file, kind="recordings", remedy="make it again")


def test_the_cache_follows_the_code_that_cuts_windows(tmp_path, monkeypatch):
    before = catalog_module._digest(None)
    source = tmp_path / "data"
    source.mkdir()
    (source / "windows.py").write_text("other code")
    monkeypatch.setattr(catalog_module, "__file__", str(source / "catalog.py"))
    assert catalog_module._digest(None) != before


def test_unknown_and_missing_datasets_are_named(tmp_path):
    with pytest.raises(InputError, match="unknown dataset 'motionsens'; did you mean motionsense\\?"):
        dataset("motionsens")
    with pytest.raises(
        InputError,
        match=r"uci_hapt: no archive in .*uci_hapt; run `harlora data download uci_hapt`, or download https://archive.ics",
    ):
        load_windows("uci_hapt", tmp_path)


def test_a_data_root_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HARLORA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="HARLORA_DATA names .*nowhere, which is no folder"):
        data_root()
    monkeypatch.delenv("HARLORA_DATA")
    assert data_root().name == "data"


def test_uci_is_one_domain(tmp_path):
    assert DATASETS["uci_hapt"].domain == DATASETS["uci_har"].domain
    for name in ("uci_hapt", "uci_har"):
        (tmp_path / name).mkdir()
    assert all(entry.is_synthetic for entry in available(tmp_path))  # empty folders hold no dataset
    for name, file in (("uci_hapt", "acc_exp01_user01.txt"), ("uci_har", "subject_train.txt")):
        (tmp_path / name / file).write_text("x")
    assert [entry.name for entry in available(tmp_path)] == ["uci_hapt"]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("motionsense", "A_DeviceMotion_data/dws_1/sub_1.csv"),
        ("uci_hapt", "RawData/acc_exp01_user01.txt"),
        ("uci_har", "UCI HAR Dataset/train/subject_train.txt"),
        ("uci_har", "inside/UCI HAR Dataset.zip"),
        ("dsa", "data/a01/p1/s01.txt"),
        ("hhar", "Activity recognition exp/Phones_accelerometer.csv"),
        ("hhar", "inside/Activity recognition exp.zip"),
        ("realworld", "proband1/data/acc_walking_csv.zip"),
        ("realworld", "proband1/data/acc_walking_csv/acc_walking_waist.csv"),
        ("pamap2", "PAMAP2_Dataset/Protocol/subject101.dat"),
    ],
)
def test_a_folder_counts_where_it_has_what_is_read(tmp_path, name, read):
    entry = DATASETS[name]
    strays = "LICENSE.txt", f"{entry.file}.crdownload", f"{entry.file}.part", ".hidden.zip", "__MACOSX/._a.zip", "r.md"
    for stray in strays:
        file = tmp_path / name / stray
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    assert entry.find(tmp_path) is None
    assert present(entry, tmp_path) is None
    with pytest.raises(InputError, match="no archive in"):
        load_windows(name, tmp_path)
    file = tmp_path / name / read
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    assert entry.find(tmp_path) == tmp_path / name
    (tmp_path / name / "B.zip").write_text("x")
    assert entry.find(tmp_path) == tmp_path / name / "B.zip"


@pytest.mark.parametrize("protocol", ["paper", "subject"])
def test_parts_share_no_window_and_cover_all(windows, protocol):
    parts = split(windows, protocol, seed=1)
    together = np.concatenate([parts.train, parts.validation, parts.test])
    assert np.array_equal(np.sort(together), np.arange(len(windows)))
    assert abs(len(parts.test) / len(windows) - 0.3) < 0.1
    assert len(parts.validation) > 0
    other = split(windows, protocol, seed=2)
    assert not np.array_equal(parts.test, other.test)
    assert np.array_equal(parts.test, split(windows, protocol, seed=1).test)


def test_subject_protocol_shares_no_subject(windows):
    for seed in range(5):
        parts = split(windows, "subject", seed)
        groups = [set(windows.subjects[part]) for part in (parts.train, parts.validation, parts.test)]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]


def test_the_people_who_are_tested_may_be_named(windows):
    first, last = windows.subject_names[0], windows.subject_names[-1]
    parts = [split(windows, "subject", seed, (last, first)) for seed in range(5)]
    for part in parts:
        assert {windows.subject_names[who] for who in windows.subjects[part.test]} == {first, last}
        assert sum(map(len, (part.train, part.validation, part.test))) == len(windows)
        assert not set(windows.subjects[part.train]) & set(windows.subjects[part.validation])
    # Who validates is still drawn by the seed.
    assert len({tuple(part.validation) for part in parts}) > 1
    with pytest.raises(InputError, match="people to be tested must be some, all but two at most, of .*; got nobody"):
        split(windows, "subject", 0, ("nobody", first))
    with pytest.raises(InputError, match="all but two at most"):
        split(windows, "subject", 0, windows.subject_names[1:])
    with pytest.raises(InputError, match="with protocol subject alone, got paper"):
        split(windows, "paper", 0, (first,))


def test_paper_protocol_has_the_same_people_on_both_sides(windows):
    parts = split(windows, "paper", 0)
    assert set(windows.subjects[parts.test]) == set(windows.subjects[parts.train])


def test_unknown_protocol_and_too_few_subjects(windows):
    with pytest.raises(InputError, match="unknown protocol 'random'; required one of subject, paper"):
        split(windows, "random", 0)
    two = windows.take(np.flatnonzero(windows.subjects < 2))
    with pytest.raises(InputError, match="requires 3 subjects or more, got 2"):
        split(two, "subject", 0)


def test_fewer_labels(windows):
    train = split(windows, "paper", 0).train
    for options, expected in (({"fraction": 0.25}, 0.25 * len(train)), ({"per_class": 5}, 5 * 7)):
        kept = fewer_labels(windows, train, seed=0, **options)
        assert abs(len(kept) - expected) <= 7
        assert set(kept) <= set(train)
        assert len(np.unique(windows.labels[kept])) == 7
    assert np.array_equal(fewer_labels(windows, train, seed=0), train)
    one = fewer_labels(windows, train, per_class=1, seed=0)
    assert np.bincount(windows.labels[one])[np.unique(windows.labels)].tolist() == [1] * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "above 0 and at most 1"),
        ({"fraction": 1.5}, "above 0 and at most 1"),
        ({"per_class": 0}, "at least 1"),
        ({"per_class": 100_000}, "fewer than the 100000 windows per class"),
    ],
)
def test_impossible_label_numbers(windows, options, message):
    with pytest.raises(InputError, match=message):
        fewer_labels(windows, np.arange(len(windows)), seed=0, **options)


def test_hours_count_overlap_once(windows):
    stretches = len(np.unique(windows.segments))
    seconds = 45.0 * stretches
    assert 0.93 * seconds < hours(windows) * 3600 <= seconds
    assert len(windows) == stretches * (1 + (2250 - WINDOW) // HOP)


def test_half_turns_are_rotations_about_the_axes():
    turns = half_turns(200)
    assert torch.equal(turns @ turns, torch.eye(3).expand(200, 3, 3))
    assert torch.equal(torch.linalg.det(turns), torch.ones(200))
    assert len({tuple(turn.diagonal().tolist()) for turn in turns}) == 3
    about_z = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))[None]
    assert rotate(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]), about_z).tolist() == [[[-1, -2, 3, -4, -5, 6]]]


def test_no_window_of_a_small_batch_has_to_be_turned():
    assert rotate(torch.zeros(0, 150, 6), half_turns(0)).shape == (0, 150, 6)


def test_picture_of_windows(windows, tmp_path):
    file = tmp_path / "picture.png"
    draw(windows, "a title", file, columns=2)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_a_study_finds_what_is_there(tmp_path):
    names = ["motionsense", "uci_hapt", "dsa", "hhar", "realworld", "pamap2"]
    for name in [*names, "uci_har"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.zip").write_bytes(b"")
    assert [entry.name for entry in available(tmp_path)] == names


def test_each_table_of_the_paper_has_its_dataset():
    domains = {entry.domain for entry in DATASETS.values()}
    assert set(SCORES) <= domains
    assert set(SCORES) == {"hhar", "motionsense", "realworld", "uci", "pamap2"}
