"""Every dataset by name: where its files are looked for, who reads them, and its windows through a checked cache."""

import difflib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch

from harlora.data import dsa, hhar, imported, motionsense, pamap2, realworld, synthetic, uci_hapt, uci_har
from harlora.data.archive import Archive
from harlora.data.recording import LeftOut, Recording
from harlora.data.windows import HOP, WINDOW, Windows, cut
from harlora.errors import InputError
from harlora.files import load_tensors, save_tensors

ROOT_VARIABLE = "HARLORA_DATA"
CACHE_VARIABLE = "HARLORA_CACHE"
_KEPT_S = 30 * 86400.0  # a dataset's windows of other data or code, which another version or data root may still use


@dataclass(frozen=True)
class Dataset:
    """One dataset.

    domain: datasets of the same domain are the same people; never count them as two.
    folder: under the data root. download: the authors' address. licence: as found there.
    read: the reader, or None for synthetic data. files: what it reads in a folder is called, in small letters.
    placement: where the device sat; of a dataset with several, the one that is used.
    size: bytes of what ``download`` delivers, or None. checksum: ``sha256:`` or ``git:`` (the content's name in the
    authors' git repository) and hexadecimal digits, or None where none is known.
    """

    name: str
    title: str
    domain: str
    placement: str
    folder: str
    download: str
    licence: str
    read: Callable[[Archive], Iterator[Recording | LeftOut]] | None
    files: str = ""
    size: int | None = None
    checksum: str | None = None

    @property
    def is_synthetic(self) -> bool:
        """Whether the recordings are made up."""
        return self.read is None

    @property
    def file(self) -> str:
        """The name under which the authors distribute the archive."""
        return unquote(urlsplit(self.download).path.rpartition("/")[2])

    def target(self, root: Path) -> Path:
        """Where the archive belongs under ``root``."""
        return root / self.folder / self.file

    def find(self, root: Path) -> Path | None:
        """Its archive or extracted folder under ``root``, or None. Of several archives the authors' comes first.

        Other files alone, such as a licence or half a download, are no dataset.
        """
        folder = root / self.folder
        if self.is_synthetic or not folder.is_dir():
            return None
        if self.target(root).is_file():
            return self.target(root)
        archives = sorted(entry for entry in folder.glob("*.zip") if entry.is_file() and not entry.name.startswith("."))
        if archives:
            return archives[0]
        # A zip archive further down is one inside the authors', which readers open.
        wanted = (entry for entry in folder.rglob("*") if fnmatchcase(entry.name.lower(), self.files)
                  or entry.suffix.lower() == ".zip")  # fmt: skip
        return folder if any(entry.is_file() and not entry.name.startswith(".") for entry in wanted) else None

    def recordings(self, root: Path) -> Iterator[Recording | LeftOut]:
        """Its recordings, at the one placement that is used.

        Raises: InputError that says where to get the archive and where to put it, if it is not under ``root``.
        """
        if self.read is None:
            yield from synthetic.read(self.name)
            return
        path = self.find(root)
        if path is None:
            raise InputError(
                f"{self.name}: no archive in {root / self.folder}; run `harlora data download {self.name}`, or "
                f"download {self.download} and put the file there, or set {ROOT_VARIABLE} to the folder that has "
                f"{self.folder}/"
            )
        for recording in self.read(Archive(path)):
            if recording.placement == self.placement:
                yield recording


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="motionsense",
            title="MotionSense",
            domain="motionsense",
            placement="front pocket",
            folder="motionsense",
            download="https://github.com/mmalekzadeh/motion-sense/raw/master/data/A_DeviceMotion_data.zip",
            licence="MIT / ODbL; cite Malekzadeh et al. 2018",
            read=motionsense.read,
            files="sub_*.csv",
            checksum="git:78f9957d9f4d0a4b6457461009e1f2e0453a872d",
        ),
        Dataset(
            name="uci_hapt",
            title="UCI HAR (raw signals, HAPT)",
            domain="uci",
            placement="waist",
            folder="uci_hapt",
            download="https://archive.ics.uci.edu/static/public/341/"
            "smartphone+based+recognition+of+human+activities+and+postural+transitions.zip",
            licence="as is, no commercial use; cite Reyes-Ortiz et al. 2015",
            read=uci_hapt.read,
            files="acc_exp*.txt",
            # UCI publishes no checksums. These two are what several independent public projects found at the address.
            size=79_596_192,
            checksum="sha256:4ac4ae064227c07045a99551876b54d204837e995e298b6488559e209b3deb09",
        ),
        Dataset(
            name="uci_har",
            title="UCI HAR (windows)",
            domain="uci",
            placement="waist",
            folder="uci_har",
            download="https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip",
            licence="as is, no commercial use; cite Anguita et al. 2013",
            read=uci_har.read,
            files="subject_t*.txt",
            size=61_005_872,
            checksum="sha256:c00b803081a5c797cd5e4b83700a9810b38d53d9d84e01917e090e1fdbc81031",
        ),
        Dataset(
            name="dsa",
            title="Daily and Sports Activities",
            domain="dsa",
            placement="torso",
            folder="dsa",
            download="https://archive.ics.uci.edu/static/public/256/daily+and+sports+activities.zip",
            licence="UCI repository; cite Altun et al. 2010",
            read=dsa.read,
            files="s??.txt",
        ),
        Dataset(
            name="hhar",
            title="HHAR",
            domain="hhar",
            placement="waist",
            folder="hhar",
            download="https://archive.ics.uci.edu/static/public/344/heterogeneity+activity+recognition.zip",
            licence="UCI repository; cite Stisen et al. 2015",
            read=partial(hhar.read, placements=("waist",)),
            files="phones_*.csv",
        ),
        Dataset(
            name="realworld",
            title="RealWorld2016",
            domain="realworld",
            placement="waist",
            folder="realworld",
            download="https://wifo5-14.informatik.uni-mannheim.de/sensor/dataset/realworld2016/"
            "realworld2016_dataset.zip",
            licence="no open licence found; cite Sztyler and Stuckenschmidt 2016",
            read=partial(realworld.read, placements=("waist",)),
            files="acc_*",
        ),
        Dataset(
            name="pamap2",
            title="PAMAP2",
            domain="pamap2",
            placement="chest",
            folder="pamap2",
            download="https://archive.ics.uci.edu/static/public/231/pamap2+physical+activity+monitoring.zip",
            licence="UCI repository; cite Reiss and Stricker 2012",
            read=pamap2.read,
            files="subject*.dat",
        ),
        *(
            Dataset(
                name=name,
                title=f"SYNTHETIC {name[-1].upper()}",
                domain=name,
                placement=domain.placement,
                folder="",
                download="",
                licence="made by harlora",
                read=None,
            )
            for name, domain in synthetic.DOMAINS.items()
        ),
    )
}


def named_root(given: Path | None = None) -> Path:
    """The folder for datasets, there or not: ``given``, or ``HARLORA_DATA``, or ``data`` under the current folder."""
    return given or Path(os.environ.get(ROOT_VARIABLE) or "data")


def data_root(given: Path | None = None) -> Path:
    """The folder with the datasets, as `named_root` names it.

    Raises: InputError if the one that was named is no folder.
    """
    root = named_root(given)
    if (given or os.environ.get(ROOT_VARIABLE)) and not root.is_dir():
        raise InputError(
            f"{'--data' if given else ROOT_VARIABLE} names {root}, which is no folder; correct or unset it"
        )
    return root


def cache_folder() -> Path:
    """Where windows are cached: ``HARLORA_CACHE``, or ``harlora`` in the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harlora"


def known(root: Path | None, wrong: dict[str, InputError] | None = None) -> dict[str, Dataset]:
    """Every dataset by name: those of the catalogue, and those that `harlora data import` wrote under ``root``.

    wrong: takes what is wrong with imported ones that are damaged, by name; without it that is raised.
    """
    own = {
        facts.name: Dataset(
            name=facts.name,
            title=f"{facts.name} (own recordings)",
            domain=facts.domain,
            placement=facts.placement,
            folder=facts.name,
            download="",
            licence="your own",
            read=imported.read,
            files=imported.FILE,
        )
        for facts in imported.find(root, wrong)
        if facts.name not in DATASETS
    }
    return {**DATASETS, **own}


def dataset(name: str, root: Path | None = None) -> Dataset:
    """The dataset called ``name``, of the catalogue or imported under ``root``.

    Raises: InputError that lists the names if there is none, or says that it is damaged.
    """
    if name in DATASETS:
        return DATASETS[name]
    wrong: dict[str, InputError] = {}
    names = known(root, wrong)
    if name in wrong:
        raise wrong[name]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise InputError(f"unknown dataset {name!r}{hint} required one of {', '.join(names)}")
    return names[name]


def domain(name: str) -> str:
    """The people and devices that a dataset comes from; a dataset that is not in the catalogue is its own domain."""
    return DATASETS[name].domain if name in DATASETS else name


def title(name: str) -> str:
    """A dataset's title; a dataset that is not in the catalogue has none but its name."""
    return DATASETS[name].title if name in DATASETS else name


def in_a_pocket(name: str, placement: str = "") -> bool:
    """Whether the people of a dataset carried the device in a pocket, where it sits as it may.

    placement: of a dataset that is not in the catalogue, as `Windows.placement`.
    """
    where = DATASETS[name].placement if name in DATASETS else placement
    return "pocket" in where.casefold()


def people(windows: Windows) -> str:
    """The domain that windows come from, also that of an imported dataset."""
    return windows.domain or domain(windows.dataset)


def require_apart(domains: Mapping[str, str]) -> None:
    """Raise InputError if two of the datasets are the same people.

    domains: of each dataset, by its name.
    """
    seen: dict[str, str] = {}
    for name, whose in domains.items():
        other = seen.setdefault(whose, name)
        if other != name:
            raise InputError(f"{other} and {name} are the same recordings of the same people; use one of them")


def available(root: Path, wrong: dict[str, InputError] | None = None) -> list[Dataset]:
    """The real datasets under ``root``, one of each domain; the synthetic ones if there is none.

    wrong: as for `known`.
    """
    found: dict[str, Dataset] = {}
    for entry in known(root, wrong).values():
        if entry.find(root) is not None:
            found.setdefault(entry.domain, entry)
    return list(found.values()) or [entry for entry in DATASETS.values() if entry.is_synthetic]


def _digest(path: Path | None) -> str:
    """A hash of the files that a dataset's windows depend on: its data, and the code that reads and cuts them."""
    digest = hashlib.sha256()
    sources = sorted(Path(__file__).parent.glob("*.py"))
    data = [] if path is None else [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in [*sources, *data]:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def load_windows(name: str, root: Path, cache: Path | None = None, *, window: int = WINDOW, hop: int = HOP) -> Windows:
    """All windows of a dataset, from the cache when its files and this code are unchanged.

    Where the cache cannot be written they are read anew each time, with one warning.

    Raises: InputError if the dataset is unknown, missing or damaged, or the cached file is.
    """
    entry = dataset(name, root)
    path = entry.find(root)
    if path is None and not entry.is_synthetic:
        next(iter(entry.recordings(root)))  # raises with the remedy
    folder = cache_folder() if cache is None else cache
    file = folder / f"{name}-{window}-{hop}-{_digest(path)}.safetensors"
    if os.access(file, os.R_OK):
        tensors, info = load_tensors(file, kind="windows", remedy="delete it, it will be made again")
        fields: dict[str, Any] = {key: tensor.numpy() for key, tensor in tensors.items()}
        return Windows(**fields, **{**info, "subject_names": tuple(info["subject_names"])})
    windows = cut(entry.recordings(root), window=window, hop=hop)
    if name not in DATASETS:
        windows = replace(windows, domain=entry.domain, placement=entry.placement)
    arrays = {key: value for key, value in vars(windows).items() if isinstance(value, np.ndarray)}
    info = {key: value for key, value in vars(windows).items() if key not in arrays}
    try:
        save_tensors(file, {key: torch.from_numpy(array) for key, array in arrays.items()}, kind="windows", info=info)
        for other in folder.glob(f"{name}-{window}-{hop}-{'?' * 16}.safetensors"):
            if other.stat().st_mtime < time.time() - _KEPT_S:
                other.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"windows cannot be cached in {folder} ({error.strerror or error}) and are read anew each time; set "
            f"{CACHE_VARIABLE} to a folder that can be written, or make room",
            stacklevel=2,
        )
    return windows
