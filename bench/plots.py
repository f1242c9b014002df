"""Pictures of a result: how many times faster, and how near to the machine's ceilings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from harlora.bench.peers import COMPETITORS, DENSE, OURS, PEER, RANK
from harlora.bench.report import OF_VARIANTS, cases, ratio
from harlora.bench.run import Row, where
from harlora.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = "#555555"
COLUMNS = 3


def draw(result: Row, folder: Path, prefix: str = "") -> list[tuple[str, Path]]:
    """Draws what the result has rows for into ``folder``; titles and files."""
    made = []
    for title, name, figure in (
        ("Whole models: times faster with harlora", "models", _models(result)),
        ("One layer, inference: times faster with harlora", "layers", _layers(result, ("forward",))),
        ("One layer, training: times faster with harlora", "training", _layers(result, ("backward", "both"))),
        ("Inference of one layer under the machine's ceilings", "roofline", _roofline(result)),
    ):
        if figure is None:
            continue
        file = folder / f"{prefix}{name}.png"
        figure.suptitle(f"{title}\n{_machine(result)}", fontsize=11)
        with replacing(file) as temporary:
            figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
        plt.close(figure)
        made.append((title, file))
    return made


def _machine(result: Row) -> str:
    facts = result["provenance"]
    return facts["device"] + (f", {facts['threads']} threads" if facts["device_type"] == "cpu" else "")


def _timed(rows: dict[str, Row]) -> list[str]:
    return [name for name in COMPETITORS if name != OURS and ratio(rows, name) is not None]


def _models(result: Row) -> Figure | None:
    found = [rows for rows in cases(result, "encoder", "step").values() if _timed(rows)]
    if not found:
        return None
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    most = max(len(_timed(rows)) for rows in found)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.4 * columns, (0.34 * most + 0.9) * lines + 0.7), squeeze=False, layout="constrained"
    )
    for axis, rows in zip(axes.flat, found, strict=False):
        names = _timed(rows)
        for place, name in enumerate(names):
            pair = ratio(rows, name)
            assert pair is not None
            axis.barh(place, pair.value, color=COMPETITORS[name].colour, height=0.7)
            axis.text(pair.value, place, f" {pair.text}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color=GREY, linewidth=1)
        axis.set_xlim(0, 1.15 * max(pair.value for name in names if (pair := ratio(rows, name)) is not None))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"{where(rows[OURS])}: harlora {rows[OURS]['median_us'] / 1e3:.3g} ms", fontsize=9)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    figure.supxlabel("time of the competitor / time of harlora; right of 1 harlora is faster", fontsize=8)
    return figure


def _groups(result: Row, directions: Sequence[str]) -> dict[tuple[Any, ...], list[dict[str, Row]]]:
    """The cases of one layer by shape, direction and dtype, the usual rank alone, rows ascending."""
    found: dict[tuple[Any, ...], list[dict[str, Row]]] = {}
    for rows in cases(result, "layer").values():
        row = next(iter(rows.values()))
        if row["direction"] in directions and row["rank"] == RANK and _timed(rows):
            kind = (row["in_features"], row["out_features"], row["direction"], row["dtype"])
            found.setdefault(kind, []).append(rows)
    return {kind: sorted(group, key=lambda rows: next(iter(rows.values()))["rows"]) for kind, group in found.items()}


def _grid(count: int) -> tuple[Figure, Any]:
    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(max(4.4 * columns, 8.0), 3.3 * lines + 1.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes


def _layers(result: Row, directions: Sequence[str]) -> Figure | None:
    groups = _groups(result, directions)
    if not groups:
        return None
    figure, axes = _grid(len(groups))
    for axis, (kind, group) in zip(axes.flat, groups.items(), strict=False):
        for name, style in COMPETITORS.items():
            points = [
                (rows[OURS]["rows"], pair.value) for rows in group if name != OURS and (pair := ratio(rows, name))
            ]
            if points:
                counts, values = zip(*points, strict=True)
                axis.plot(counts, values, color=style.colour, marker=style.marker, markersize=5, label=name)
        axis.axhline(1, color=COMPETITORS[OURS].colour, linewidth=1.5, label=f"{OURS}; above it harlora is faster")
        axis.set_yscale("log")
        _plain_ticks(axis)
        _rows_axis(axis, [rows[OURS]["rows"] for rows in group])
        axis.set_ylabel("its time / harlora's", fontsize=8)
        axis.set_title(f"{kind[0]}→{kind[1]}, {kind[2]}, {kind[3]}", fontsize=9)
    _legend(figure, axes)
    return figure


def _plain_ticks(axis: Axes) -> None:
    low, high = axis.get_ylim()
    marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= mark <= high]
    axis.set_yticks(marks, [f"{mark:g}" for mark in marks], fontsize=8)
    axis.minorticks_off()


def _rows_axis(axis: Axes, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    ticks = sorted(set(counts))
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("rows M", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(color="#dddddd", linewidth=0.6)


def _legend(figure: Figure, axes: Any) -> None:
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _roofline(result: Row) -> Figure | None:
    groups, ceilings = _groups(result, ("forward",)), result["ceilings"]
    if not groups or not ceilings:
        return None
    figure, axes = _grid(len(groups) + 1)
    for axis, (kind, group) in zip(axes.flat, groups.items(), strict=False):
        _rates(axis, group, ceilings)
        axis.set_title(f"{kind[0]}→{kind[1]}, {kind[3]}", fontsize=9)
    _bandwidths(axes.flat[len(groups)], groups, ceilings)
    _legend(figure, axes)
    return figure


def _rates(axis: Axes, group: Sequence[dict[str, Row]], ceilings: Row) -> None:
    best = 0.0
    for name, style in COMPETITORS.items():
        same = [rows[name] for rows in group if "median_us" in rows.get(name, {})]
        rates = [row["flop"] / row["median_us"] / 1e3 for row in same]
        if rates:
            counts = [row["rows"] for row in same]
            axis.plot(counts, rates, color=style.colour, marker=style.marker, markersize=5, label=name)
            best = max(best, *rates)
    lines = {
        "float32 FMA": (ceilings.get("fma_float32_gflops"), "-"),
        "torch.mm, float32": (ceilings["mm_float32_gflops"], "--"),
        "torch.mm, bfloat16": (ceilings["mm_bfloat16_gflops"], "-."),
    }
    for title, (rate, dashes) in lines.items():
        if rate is not None:
            axis.axhline(rate, color=GREY, linestyle=dashes, linewidth=1, label=title)
            best = max(best, rate)
    firsts = [next(iter(rows.values())) for rows in group]
    size = 2 if firsts[0]["dtype"] == "bfloat16" else 4
    # flop per byte of packed weight, x and y, times the bandwidth. A small layer stays in cache and may pass it.
    roof = [
        ceilings["copy_gb_s"] * row["flop"]
        / (row["packed_bytes"] + size * row["rows"] * (row["in_features"] + row["out_features"]))
        for row in firsts
    ]  # fmt: skip
    counts = [row["rows"] for row in firsts]
    axis.plot(counts, roof, color=GREY, linestyle=":", linewidth=1.5, label="4-bit weight, x, y from memory")
    axis.set_yscale("log")
    axis.set_ylim(top=2 * best)  # the line of the memory goes on far above what the units can do
    _rows_axis(axis, counts)
    axis.set_ylabel("GFLOP/s", fontsize=8)


def _bandwidths(axis: Axes, groups: dict[tuple[Any, ...], list[dict[str, Row]]], ceilings: Row) -> None:
    singles = {kind: group[0] for kind, group in groups.items() if next(iter(group[0].values()))["rows"] == 1}
    variants = [of for _, of in OF_VARIANTS if not COMPETITORS[of].captured]  # that is a step, not a layer
    chosen = [OURS, *variants, PEER, DENSE]
    for number, name in enumerate(chosen):
        for place, rows in enumerate(singles.values()):
            if "median_us" in rows.get(name, {}):
                row = rows[name]
                # A dense weight is read as it is; for the others codes and scales count.
                dense = (2 if row["dtype"] == "bfloat16" else 4) * row["in_features"] * row["out_features"]
                rate = (dense if name.startswith("dense") else row["packed_bytes"]) / row["median_us"] / 1e3
                x = place + 0.17 * (number - (len(chosen) - 1) / 2)
                axis.bar(x, rate, width=0.16, color=COMPETITORS[name].colour)
                axis.text(x, rate, f"{rate:.2g}", ha="center", va="bottom", fontsize=5)
    axis.axhline(ceilings["copy_gb_s"], color=GREY, linestyle=(0, (1, 1)), linewidth=1, label="copy in memory")
    axis.set_xticks(range(len(singles)), [f"{kind[0]}\n→{kind[1]}" for kind in singles], fontsize=7)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylabel("GB/s of weight as it is held", fontsize=8)
    axis.set_title("weight read, M = 1" if singles else "weight read: M = 1 was not measured", fontsize=9)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
