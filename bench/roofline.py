"""Draws a result of cpu.py against the ceilings of its machine: python bench/roofline.py RESULT.json PICTURE.png"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from harlora.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by the colour-blind; the markers by everyone.
STYLES = {
    "H": ("#d55e00", "o", "harlora"),
    "H16": ("#e69f00", "D", "harlora, bfloat16"),
    "H8": ("#009e73", "v", "harlora, int8"),
    "P": ("#0072b2", "s", "bitsandbytes + PEFT"),
    "D": ("#000000", "^", "float32 + PEFT"),
}
Row = dict[str, Any]


def draw(result: Row, file: Path) -> None:
    """One panel a layer shape: GFLOP/s by rows, under the ceilings; a last one: GB/s of weight for one row."""
    rows = [row for row in result["rows"] if row["case"] == "layer" and row["status"] == "ok"]
    if not rows:
        sys.exit("the result has no timed case `layer`; run bench/cpu.py with --cases layer ceilings")
    shapes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in rows))
    columns = min(3, len(shapes) + 1)
    lines = -(-(len(shapes) + 1) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 3.5 * lines + 0.9), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes.flat, shapes, strict=False):
        _rates(axis, [row for row in rows if (row["in_features"], row["out_features"]) == shape], result["ceilings"])
        axis.set_title(f"{shape[0]} × {shape[1]}", fontsize=10)
    _bandwidths(axes.flat[len(shapes)], [row for row in rows if row["rows"] == 1], shapes, result["ceilings"])
    for axis in axes.flat[len(shapes) + 1 :]:
        axis.set_axis_off()
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    facts = result["provenance"]
    figure.suptitle(f"{facts['device']}, {facts['threads']} threads, float32 input, rank 16", fontsize=10)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)


def _rates(axis: Axes, rows: Sequence[Row], ceilings: Row | None) -> None:
    for name, (colour, marker, title) in STYLES.items():
        same = sorted((row for row in rows if row["competitor"] == name), key=lambda row: row["rows"])
        rates = [row["flop"] / row["median_us"] / 1e3 for row in same]
        axis.plot([row["rows"] for row in same], rates, color=colour, marker=marker, markersize=5, label=title)
    if ceilings is not None:
        if ceilings["fma_float32_gflops"] is not None:
            axis.axhline(
                ceilings["fma_float32_gflops"], color="#555555", linestyle="-", linewidth=1, label="float32 FMA"
            )
        axis.axhline(ceilings["mm_float32_gflops"], color="#555555", linestyle="--", linewidth=1, label="torch.mm")
        # flop per byte of packed weight, x and y, times the bandwidth. A small layer stays in cache and may pass it.
        by_rows = {row["rows"]: row for row in sorted(rows, key=lambda row: row["rows"])}
        bytes_moved = [
            row["packed_bytes"] + 4 * count * (row["in_features"] + row["out_features"])
            for count, row in by_rows.items()
        ]
        roof = [
            ceilings["copy_gb_s"] * row["flop"] / moved
            for row, moved in zip(by_rows.values(), bytes_moved, strict=True)
        ]
        axis.plot(
            list(by_rows), roof, color="#555555", linestyle=":", linewidth=1.5, label="4-bit weight, x, y from DRAM"
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if ceilings is not None:
        # The DRAM line goes on far above what the units can do. A competitor may pass float32's ceiling: in bfloat16.
        fastest = max(row["flop"] / row["median_us"] / 1e3 for row in rows)
        axis.set_ylim(top=2 * max(fastest, ceilings["fma_float32_gflops"] or 0, ceilings["mm_float32_gflops"]))
    ticks = sorted({row["rows"] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axis.set_xlabel("rows M", fontsize=8)
    axis.set_ylabel("GFLOP/s", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(color="#dddddd", linewidth=0.6)


def _bandwidths(axis: Axes, rows: Sequence[Row], shapes: Sequence[tuple[int, int]], ceilings: Row | None) -> None:
    for number, (name, (colour, _, _)) in enumerate(STYLES.items()):
        for row in rows:
            if row["competitor"] == name:
                # D reads a float32 weight; for the others codes and scales count.
                read = 4 * row["in_features"] * row["out_features"] if name == "D" else row["packed_bytes"]
                rate = read / row["median_us"] / 1e3
                place = shapes.index((row["in_features"], row["out_features"])) + 0.17 * (number - 2)
                axis.bar(place, rate, width=0.16, color=colour)
                axis.text(place, rate, f"{rate:.2g}", ha="center", va="bottom", fontsize=6)
    if ceilings is not None:
        axis.axhline(ceilings["copy_gb_s"], color="#555555", linestyle="-.", linewidth=1, label="DRAM copy")
    axis.set_xticks(range(len(shapes)), [f"{a}×{b}" for a, b in shapes], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylabel("GB/s of weight as it is held", fontsize=8)
    axis.set_title("weight read, M = 1" if rows else "weight read: M = 1 was not measured", fontsize=10)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
