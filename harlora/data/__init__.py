"""Recordings, windows and splits of human activity datasets."""

from harlora.data.catalog import DATASETS, available, data_root, dataset, load_windows
from harlora.data.recording import Interval, Recording
from harlora.data.splits import PROTOCOLS, Split, fewer_labels, split
from harlora.data.windows import Normalizer, Windows, cut, resample, sliding_windows

__all__ = [
    "DATASETS",
    "PROTOCOLS",
    "Interval",
    "Normalizer",
    "Recording",
    "Split",
    "Windows",
    "available",
    "cut",
    "data_root",
    "dataset",
    "fewer_labels",
    "load_windows",
    "resample",
    "sliding_windows",
    "split",
]
