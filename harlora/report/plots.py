"""Pictures of a study: confusion matrices, accuracy by rank, accuracy by bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps

from harlora.files import replacing
from harlora.report.tables import TITLES, Record, held, method_title
from harlora.train.finetune import METHODS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_COLOURS = {
    "zero_shot": "#999999",
    "linear_probe": "#cc79a7",
    "scratch": "#e69f00",
    "bitfit": "#009e73",
    "partial": "#56b4e9",
    "full": "#000000",
    "lora": "#0072b2",
    "qlora": "#d55e00",
}
_MARKERS = {
    "zero_shot": "X", "linear_probe": "v", "scratch": "s", "bitfit": "P", "partial": "<", "full": "D", "lora": "o",
    "qlora": "^",
}  # fmt: skip

_OTHERS = "hdp*H8>X"


def colour(method: str) -> Any:
    """The colour of a method in every picture; of other adapters than LoRA one for dense weights and 4 bits."""
    if method in _COLOURS:
        return _COLOURS[method]
    adapters = list(dict.fromkeys(entry.adapter for entry in METHODS.values()))
    return colormaps["tab20"](adapters.index(METHODS[method].adapter) / len(adapters))


def marker(method: str) -> str:
    """The marker of a method in every picture; of other adapters than LoRA one for each, with its colour."""
    if method in _MARKERS:
        return _MARKERS[method]
    adapters = list(dict.fromkeys(entry.adapter for entry in METHODS.values()))
    return _OTHERS[adapters.index(METHODS[method].adapter) % len(_OTHERS)]


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG and close it."""
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)


def stamp(figure: Figure, records: Sequence[Record]) -> None:
    """Write SYNTHETIC DATA across a figure if any of its results is."""
    if any(record["synthetic"] for record in records):
        figure.text(0.5, 0.5, "SYNTHETIC DATA", fontsize=34, color="#d00000", alpha=0.18, rotation=20, ha="center")


def confusion(records: Sequence[Record], file: Path) -> None:
    """Confusion matrices side by side, each row in percent of the true label."""
    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns + 0.6, 3.3 * rows + 0.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(records) :]:
        axis.set_axis_off()
    for position, (axis, record) in enumerate(zip(axes.flat, records, strict=False)):
        score = record["scores"]
        matrix = np.array(score["confusion"], dtype=float)
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(share):
            if value >= 0.5:
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 55 else "black")  # fmt: skip
        ticks = np.arange(len(score["labels"]))
        axis.set_xticks(ticks, score["labels"], rotation=45, ha="right", fontsize=7)
        axis.set_yticks(ticks, score["labels"] if position % columns == 0 else [], fontsize=7)
        axis.set_title(f"{method_title(record)}: macro-F1 {score['macro_f1']:.3f}", fontsize=9)
    figure.supxlabel("predicted", fontsize=8)
    figure.supylabel("true (rows sum to 100 %)", fontsize=8)
    stamp(figure, records)
    save(figure, file)


def curve(records: Sequence[Record], x: str, file: Path, *, reference: Mapping[float, float]) -> None:
    """Macro-F1 by the setting ``x``, one line a method, with the standard deviation over seeds.

    A method whose results do not vary in ``x`` is a line across. reference: the paper's scores by ``x``.
    """
    lines = len({record["config"]["method"] for record in records}) + bool(reference)
    figure, axis = plt.subplots(figsize=(6.4, max(3.6, 0.6 + 0.2 * lines)), layout="constrained")
    values = sorted({record["config"][x] for record in records}, key=lambda value: (str(type(value)), value))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    place = {value: value if numbers else position for position, value in enumerate(values)}
    for method, title in TITLES.items():
        same = [record for record in records if record["config"]["method"] == method]
        if not same:
            continue
        if len({str(record["config"][x]) for record in same}) == 1 and len(values) > 1:
            for record in same:
                axis.axhline(record["scores"]["macro_f1"], color=colour(method), linestyle="--", linewidth=1,
                             label=title)  # fmt: skip
            continue
        same.sort(key=lambda record: place[record["config"][x]])
        spread = [record.get("spread", {}).get("macro_f1", 0.0) for record in same]
        at = [place[record["config"][x]] for record in same]
        axis.errorbar(at, [record["scores"]["macro_f1"] for record in same], yerr=spread, capsize=3,
                      marker=marker(method), color=colour(method), label=title)  # fmt: skip
    if reference:
        axis.plot(*zip(*sorted(reference.items()), strict=True), color="#777777", marker=".", linestyle=":",
                  label="LoRA in the paper")  # fmt: skip
    if numbers and min(values) > 0 and max(values) / min(values) >= 8:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if not numbers:
        axis.set_xticks(range(len(values)), [str(value) for value in values])
    axis.set_xlabel(x.replace("_", " "))
    axis.set_ylabel("macro-F1")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    stamp(figure, records)
    save(figure, file)


def pareto(records: Sequence[Record], names: Sequence[str], file: Path) -> None:
    """Macro-F1 by what is held in training and by what trains, each with the line of those that none beats in both.

    names: of the records; those of one method after the first are drawn hollow.
    """
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, max(4.6, 0.8 + 0.19 * len(records))), sharey=True, layout="constrained"
    )
    costs = (
        ("MB held in training (weights, gradients, optimiser)", lambda record: held(record) / 1e6),
        ("trained parameters", lambda record: record["parameters"]["trainable"]),
    )
    for axis, (what, cost) in zip(axes, costs, strict=True):
        points = sorted((cost(record), -record["scores"]["macro_f1"]) for record in records)
        best, edge = -np.inf, []
        for value, score in points:
            if -score > best:
                best = -score
                edge.append((value, best))
        axis.step(*zip(*edge, strict=True), where="post", color="#999999", linewidth=1, zorder=1)
        seen = set()
        for record, name in zip(records, names, strict=True):
            method, at = record["config"]["method"], (cost(record), record["scores"]["macro_f1"])
            axis.errorbar(
                *at, yerr=record.get("spread", {}).get("macro_f1"), linestyle="", elinewidth=0.8, color=colour(method),
                alpha=0.35, zorder=2,
            )  # fmt: skip
            axis.plot(
                *at, marker=marker(method), color=colour(method), linestyle="", markersize=7, label=name, zorder=3,
                markerfacecolor="white" if method in seen else colour(method),
            )  # fmt: skip
            seen.add(method)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e5 else f"{value / 1e6:g} million")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (2, 3, 5, 20, 30, 50) else "")
        axis.tick_params(which="both", labelsize=8)
        axis.set_xlabel(what, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("macro-F1")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    stamp(figure, records)
    save(figure, file)


def by_bytes(groups: Sequence[tuple[str, Sequence[Record]]], file: Path) -> None:
    """Macro-F1 by the bytes held through training, one panel for each group of results.

    The scale is that of the methods trained on the target, which lie close together; a zero-shot score far below them
    stands at the lower edge with its value.
    """
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 0.6, 3.0 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (title, records) in zip(axes.flat, groups, strict=False):
        everything = [record["scores"]["macro_f1"] for record in records]
        adapted = [r["scores"]["macro_f1"] for r in records if METHODS[r["config"]["method"]].on_target]
        highest, least = max(everything), min(adapted or everything)
        margin = 0.12 * (highest - least) + 0.003
        lowest = least - margin
        axis.set_ylim(lowest - margin, highest + margin)
        for record in records:
            method, score = record["config"]["method"], record["scores"]["macro_f1"]
            at = (held(record) / 1e6, max(score, lowest))
            axis.scatter(*at, s=52, marker=marker(method), color=colour(method), label=method_title(record),
                         zorder=3)  # fmt: skip
            if score < lowest:
                axis.annotate(f"{score:.3f} ↓", at, xytext=(8, 0), textcoords="offset points", fontsize=8, va="center")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (2, 3, 5, 20, 30, 50) else "")
        axis.tick_params(which="both", labelsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("MB held in training (weights, gradients, optimiser)", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("macro-F1")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 * columns, fontsize=8, frameon=False)
    stamp(figure, [record for _, records in groups for record in records])
    save(figure, file)
