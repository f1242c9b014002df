"""One recording over time: a coloured band of activities, the acceleration below it, and how sure the classifier is."""

import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np

from harlora.data.labels import VOCABULARY
from harlora.data.recording import STANDARD_GRAVITY
from harlora.report.plots import save, stamp
from harlora.train.predict import Prediction

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = dict(
    zip(
        VOCABULARY,
        (
            "#56b4e9", "#0072b2", "#7a5195", "#009e73", "#e69f00", "#d55e00", "#b3122f", "#8c6d31", "#cc79a7",
            "#66c2a5", "#a6761d", "#6b7280", "#e7298a", "#a5a800", "#17becf", "#1b3a5b", "#ff9896",
        ),
        strict=True,
    )
)  # fmt: skip
_OTHER, _GAP = "#c8c8c8", "#ececec"
_ROWS = 6
_MINUTES = (2, 5, 10, 15, 20, 30, 60, 120, 180, 240, 360, 720, 1440)
_POINTS = 2000  # of a line in a row; more are drawn as the range that they cover

Span = tuple[float, float, str]


def draw(prediction: Prediction, title: str, file: Path) -> None:
    """Draw a recording to a PNG, in rows of some minutes where it is long; gaps are hatched."""
    end = max(start + len(trace) / rate for start, rate, trace in prediction.stretches)
    length = _row_s(end)
    rows = max(1, int(np.ceil(end / length - 1e-9)))
    predicted = _merged(zip(*prediction.spans_s.T, (prediction.labels[i] for i in prediction.classes), strict=True))
    bands = [("classifier", predicted)] + ([("table", list(prediction.given))] if prediction.given else [])
    gaps = _gaps(prediction)
    height = 1.45 + 0.28 * len(bands)
    figure = plt.figure(figsize=(13, rows * height + 1.0))
    top, bottom = 1 - 0.72 / (rows * height + 1.0), 0.42 / (rows * height + 1.0)
    outer = figure.add_gridspec(rows, 1, hspace=0.28, left=0.075, right=0.985, top=top, bottom=bottom)
    everything = np.concatenate([trace for *_, trace in prediction.stretches])
    highest = max(15.0, 1.05 * float(np.quantile(everything, 0.9995)))
    for row in range(rows):
        inner = outer[row].subgridspec(3, 1, height_ratios=[0.28 * len(bands), 0.8, 0.36], hspace=0.16)
        band, signal, chance = (figure.add_subplot(inner[part]) for part in range(3))
        left, right = row * length, (row + 1) * length
        for axis in (band, signal, chance):
            axis.set_xlim(left, right)
            axis.tick_params(labelsize=7, labelbottom=axis is chance, bottom=axis is chance)
            for start, stop in gaps:
                axis.axvspan(max(start, left), min(stop, right), facecolor=_GAP, edgecolor="#bbbbbb", hatch="////",
                             linewidth=0) if start < right and stop > left else None  # fmt: skip
        _bands(band, bands, left, right)
        _signal(signal, prediction, left, right, highest)
        _chance(chance, prediction)
        chance.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(12, steps=[1, 1.5, 3, 6, 10]))
        chance.xaxis.set_major_formatter(lambda value, _: clock(value))
    _legend(figure, bands, gaps)
    began = "" if prediction.origin_s is None else (
        f"; 0:00 is {datetime.fromtimestamp(prediction.origin_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )  # fmt: skip
    synthetic = "SYNTHETIC data: " if prediction.synthetic else ""
    figure.text(0.012, 1 - 0.24 / (rows * height + 1.0), f"{synthetic}{title}{began}", fontsize=10, va="center")
    stamp(figure, [{"synthetic": prediction.synthetic}])
    save(figure, file)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60}:{whole % 60:02}"
    return minutes if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _row_s(end_s: float) -> float:
    if end_s <= 300:
        return end_s
    return next((60.0 * m for m in _MINUTES if end_s <= 60 * m * _ROWS), 60.0 * _MINUTES[-1])


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Spans that touch and have the same label as one."""
    merged: list[Span] = []
    for start, stop, label in spans:
        if merged and merged[-1][2] == label and start - merged[-1][1] < 1e-6:
            merged[-1] = (merged[-1][0], stop, label)
        else:
            merged.append((start, stop, label))
    return merged


def _gaps(prediction: Prediction) -> list[tuple[float, float]]:
    edges = [(start, start + len(trace) / rate) for start, rate, trace in prediction.stretches]
    between = [(one[1], other[0]) for one, other in itertools.pairwise([(0.0, 0.0), *edges])]
    return [(start, stop) for start, stop in between if stop - start > 0.05]


def _colour(label: str) -> str:
    return COLOURS.get(label, _OTHER)


def _bands(axis: Axes, bands: Sequence[tuple[str, Sequence[Span]]], left: float, right: float) -> None:
    for number, (_, spans) in enumerate(reversed(bands)):
        for start, stop, label in spans:
            start, stop = max(start, left), min(stop, right)
            if stop <= start:
                continue
            axis.broken_barh([(start, stop - start)], (number + 0.06, 0.88), facecolors=_colour(label))
            if stop - start > 0.009 * len(label) * (right - left):
                axis.text((start + stop) / 2, number + 0.48, label, fontsize=7, ha="center", va="center",
                          color="white" if label in COLOURS else "black",
                          clip_on=True)  # fmt: skip
    axis.set_ylim(0, len(bands))
    axis.set_yticks(np.arange(len(bands)) + 0.5, [name for name, _ in reversed(bands)])
    axis.tick_params(axis="y", length=0)
    axis.spines[:].set_visible(False)


def _signal(axis: Axes, prediction: Prediction, left: float, right: float, highest: float) -> None:
    for start, rate, trace in prediction.stretches:
        first, last = (int(np.clip((edge - start) * rate, 0, len(trace))) for edge in (left, right))
        part = trace[first:last]
        if len(part) < 2:
            continue
        times = start + np.arange(first, last) / rate
        step = int((right - left) * rate / _POINTS) + 1
        if step <= 2:
            axis.plot(times, part, color="#333333", linewidth=0.6)
        else:
            edges = np.arange(0, len(part), step)
            low, high = np.minimum.reduceat(part, edges), np.maximum.reduceat(part, edges)
            axis.fill_between(times[edges], low, high, color="#333333", linewidth=0.4)
    axis.axhline(STANDARD_GRAVITY, color="#d00000", linewidth=0.5, linestyle=":")
    axis.set_ylim(0, highest)
    axis.set_ylabel("|a|, m/s²", fontsize=7, rotation=0, ha="right", va="center")


def _chance(axis: Axes, prediction: Prediction) -> None:
    middle = prediction.spans_s.mean(axis=1)
    best = prediction.probabilities.max(axis=1)
    # NaN between windows that do not touch breaks the line there.
    breaks = np.flatnonzero(prediction.spans_s[1:, 0] - prediction.spans_s[:-1, 1] > 1e-6) + 1
    middle, best = np.insert(middle, breaks, np.nan), np.insert(best, breaks, np.nan)
    axis.plot(middle, best, color="#0072b2", linewidth=0.8)
    axis.set_ylim(0, 1.05)
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.grid(axis="y", alpha=0.3)
    axis.set_ylabel("probability", fontsize=7, rotation=0, ha="right", va="center")


def _legend(figure: Figure, bands: Sequence[tuple[str, Sequence[Span]]], gaps: Sequence[object]) -> None:
    present = {label for _, spans in bands for *_, label in spans}
    handles = [Patch(facecolor=COLOURS[label], label=label) for label in VOCABULARY if label in present]
    if present - set(VOCABULARY):
        handles.append(Patch(facecolor=_OTHER, label="not in the vocabulary"))
    if gaps:
        handles.append(Patch(facecolor=_GAP, edgecolor="#bbbbbb", hatch="////", linewidth=0, label="gap"))
    height = figure.get_figheight()
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.008, 1 - 0.5 / height), ncols=len(handles),
                  fontsize=7.5, frameon=False, handlelength=1.2, columnspacing=1.2)  # fmt: skip
