"""Looking at a dataset: counts for a table, and a picture of example windows."""

from pathlib import Path

import matplotlib
import numpy as np

from harlora.data.labels import LABEL_INDEX
from harlora.data.windows import HOP, RATE_HZ, Windows
from harlora.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_AXES = ("x", "y", "z")
_COLOURS = ("#0072b2", "#d55e00", "#009e73")


def hours(windows: Windows) -> float:
    """Hours of labelled signal that the windows cover, overlaps counted once."""
    stretches = len(np.unique(windows.segments))
    samples = len(windows) * HOP + stretches * (windows.signals.shape[1] - HOP)
    return samples / RATE_HZ / 3600


def draw(windows: Windows, title: str, file: Path, *, columns: int = 3, seed: int = 0) -> None:
    """Draw example windows to a PNG: a row for each class, each column another subject where there is one."""
    labels = windows.label_names()
    rng = np.random.default_rng(seed)
    time = np.arange(windows.signals.shape[1]) / RATE_HZ
    size = (3.0 * columns + 2, 1.25 * len(labels) + 1.0)
    figure, axes = plt.subplots(
        len(labels), 2 * columns, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for row, label in enumerate(labels):
        members = np.flatnonzero(windows.labels == LABEL_INDEX[label])
        subjects = rng.permutation(np.unique(windows.subjects[members]))
        chosen = [
            rng.choice(members[windows.subjects[members] == subjects[column % len(subjects)]])
            for column in range(columns)
        ]
        for sensor, name in enumerate(("accelerometer, m/s²", "gyroscope, rad/s")):
            signals = windows.signals[chosen, :, 3 * sensor : 3 * sensor + 3]
            margin = 0.05 * np.ptp(signals)
            for column, window in enumerate(chosen):
                axis = axes[row, column + sensor * columns]
                for channel in range(3):
                    axis.plot(time, signals[column, :, channel], color=_COLOURS[channel], linewidth=0.8,
                              label=_AXES[channel])  # fmt: skip
                # One scale for a class and sensor, so that its windows can be compared.
                axis.set_ylim(signals.min() - margin, signals.max() + margin)
                axis.tick_params(labelsize=6, labelleft=column == 0)
                axis.set_title(
                    f"subject {windows.subject_names[windows.subjects[window]]}", fontsize=5, loc="right", pad=2
                )
                if row == 0 and column == 0:
                    axis.set_title(name, fontsize=8, loc="left")
        axes[row, 0].set_ylabel(label, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("s", fontsize=7)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3, fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
