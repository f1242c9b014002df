"""Plain advice from the results of one experiment: which method to take where one thing is scarce."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from harlora.data.catalog import title
from harlora.report.tables import Record, held, megabytes, timed, total

_WITHIN = (0.005, 0.02)  # of the best macro-F1: hardly told from it; and what some would give for the rest


def _mb(value: float) -> str:
    return f"{megabytes(round(value))} MB"


_Cost = Callable[[Record], float | None]
_SCARCE: Mapping[str, tuple[_Cost, Callable[[float], str]]] = {
    "memory held in training": (held, _mb),
    "memory at the fullest moment of a step": (total, _mb),
    "room on disk for each adapter": (lambda record: record.get("adapter_file"), _mb),
    "trained parameters": (lambda record: record["parameters"]["trainable"], lambda value: f"{value:,.0f}"),
}
HEADER = ("what is scarce", *(f"cheapest within {within:g} of the best" for within in _WITHIN))


def rows(groups: Mapping[str, Sequence[tuple[str, Record]]]) -> tuple[str, list[list[str]]]:
    """What is said of the best, and a line, as `HEADER`, for each thing that may be scarce.

    groups: by target, the results pooled over seeds with their names. Scores and costs are means over the targets, of
    what has a result on every one.
    """
    found: dict[str, list[Record]] = {}
    for members in groups.values():
        for name, record in members:
            found.setdefault(name, []).append(record)
    everywhere = {name: records for name, records in found.items() if len(records) == len(groups)}
    if len(everywhere) < 2:
        return "", []
    scores = {name: statistics.fmean(r["scores"]["macro_f1"] for r in same) for name, same in everywhere.items()}
    best = max(scores, key=lambda name: scores[name])
    lines = []
    seconds = timed([record for same in everywhere.values() for record in same])
    for what, (cost, text) in {**_SCARCE, "time to adapt": (seconds, lambda value: f"{value:.0f} s")}.items():
        costs: dict[str, float] = {}
        for name, same in everywhere.items():
            values = [value for value in map(cost, same) if value is not None]
            if len(values) == len(same):
                costs[name] = statistics.fmean(values)
        cells = []
        for within in _WITHIN:
            enough = [name for name in costs if scores[name] >= scores[best] - within]
            cheapest = min(enough, key=lambda name: (costs[name], -scores[name]), default=None)
            cells.append("" if cheapest is None else f"{cheapest}: {text(costs[cheapest])}, {scores[cheapest]:.3f}")
        lines.append([what, *cells])
    means = " Scores and costs are means over the datasets." if len(groups) > 1 else ""
    synthetic = "SYNTHETIC data: " if any(r["synthetic"] for same in found.values() for r in same) else ""
    said = f"{synthetic}the best macro-F1 on {' and '.join(map(title, groups))} has {best}: {scores[best]:.3f}.{means}"
    return said[0].upper() + said[1:], lines
