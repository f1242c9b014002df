"""Whether one method is better than another, person by person."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harlora.report.tables import Record


@dataclass(frozen=True)
class Comparison:
    """Macro-F1 of one method less that of another, over the people that both were tested on.

    difference: the mean. low, high: its 95 % interval, from resampling people. p: that of Wilcoxon's signed-rank test,
    two-sided; None where there are fewer than six people, with which no difference could reach 0.05.
    """

    people: int
    difference: float
    low: float
    high: float
    p: float | None


def macro_f1_of_confusion(confusion: Sequence[Sequence[int]]) -> float:
    """The mean F1 over the labels that occur in the rows; one that never does says nothing about a person."""
    counts = np.array(confusion, dtype=np.float64)
    true, taken, right = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
    present = true > 0
    return float((2 * right / np.maximum(true + taken, 1))[present].mean())


def by_person(records: Sequence[Record]) -> dict[str, float]:
    """The macro-F1 of each person, the mean over the seeds that tested them: one person is one observation."""
    found: dict[str, list[float]] = {}
    for record in records:
        for person, confusion in record.get("confusion_by_subject", {}).items():
            found.setdefault(person, []).append(macro_f1_of_confusion(confusion))
    return {person: statistics.fmean(values) for person, values in found.items()}


def compare(ones: Sequence[Record], others: Sequence[Record]) -> Comparison | None:
    """``ones`` less ``others``, results of two methods on the same target; of seeds that both have.

    None if no seed is common or the results do not say who was tested.
    """
    from scipy.stats import wilcoxon  # see train/metrics.py

    seeds = {record["config"]["seed"] for record in ones} & {record["config"]["seed"] for record in others}
    one, other = (
        by_person([record for record in records if record["config"]["seed"] in seeds]) for records in (ones, others)
    )
    people = sorted(one.keys() & other.keys())
    if not people:
        return None
    differences = np.array([one[person] - other[person] for person in people])
    drawn = np.random.default_rng(0).integers(len(people), size=(10_000, len(people)))
    low, high = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    p = None
    if len(people) >= 6:
        p = 1.0 if not differences.any() else float(wilcoxon(differences, zero_method="zsplit").pvalue)
    return Comparison(len(people), float(differences.mean()), float(low), float(high), p)


def adjusted(comparisons: Iterable[Comparison]) -> list[float | None]:
    """The p of each, adjusted for all of them being looked at (Benjamini and Hochberg, 1995); None where it has none.

    Of the differences with at most 0.05, one in twenty is expected to be chance.
    """
    from scipy.stats import false_discovery_control

    all_ = [comparison.p for comparison in comparisons]
    found = iter(false_discovery_control([p for p in all_ if p is not None]).tolist())
    return [None if p is None else float(next(found)) for p in all_]
