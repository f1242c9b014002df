"""Scores of predicted labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# sklearn is imported where it is used: the command line without the study does not need it, and starts faster.


def scores(truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 as means over the labels; F1 of each label; the confusion matrix.

    truth, predicted: ``(n,)``, indices into ``labels``. Means are over the labels that occur in ``truth``: nobody
    could find one that is not there. One that is never predicted has precision 0. Rows of the confusion matrix are
    true labels.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    classes = np.arange(len(labels))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=classes, average=None, zero_division=0.0
    )
    there = support > 0
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(np.mean(f1[there])),
        "precision": float(np.mean(precision[there])),
        "recall": float(np.mean(recall[there])),
        "labels": list(labels),
        "f1": [float(value) for value in f1],
        "support": [int(value) for value in support],
        "confusion": confusion(truth, predicted, len(labels)),
    }


def confusion(truth: np.ndarray, predicted: np.ndarray, labels: int) -> list[list[int]]:
    """How often each true label (row) was taken for each label (column)."""
    counts = np.bincount(truth * labels + predicted, minlength=labels * labels)
    found: list[list[int]] = counts.reshape(labels, labels).tolist()
    return found


BINS = 15


def calibration(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """How far confidence and accuracy lie apart: ECE, MCE, ACE, the Brier score, and the bins of the first two.

    Bins of equal width by the highest probability; ECE is the mean of |accuracy - confidence| over them, weighted by
    windows, MCE its maximum (Guo et al. 2017, arXiv 1706.04599, equations 3 and 5). ACE is the mean of the same over
    as many bins of equally many windows for each label, by its probability (Nixon et al. 2019, arXiv 1904.01685); with
    fewer windows than bins each is a bin. The Brier score is the mean over
    windows of the squared distance from the true class's unit vector, between 0 and 2 (Brier 1950).

    probabilities: ``(n, labels)``, rows sum to 1. truth: ``(n,)``, indices of labels.
    bins: of each, how many windows, their mean confidence and their accuracy; empty bins are left out.
    """
    probabilities = probabilities.astype(np.float64)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        (int(of.sum()), float(confidence[of].mean()), float(right[of].mean()))
        for of in (number == n for n in range(BINS))
        if of.any()
    ]
    gaps = [abs(accuracy - sure) for _, sure, accuracy in bins]
    adaptive = [
        abs(float((truth[part] == label).mean() - of_label[part].mean()))
        for label, of_label in enumerate(probabilities.T)
        for part in np.array_split(of_label.argsort(kind="stable"), min(BINS, len(truth)))
    ]
    distance = probabilities.copy()
    distance[np.arange(len(truth)), truth] -= 1
    return {
        "ece": sum(count * gap for (count, *_), gap in zip(bins, gaps, strict=True)) / len(truth),
        "mce": max(gaps),
        "ace": float(np.mean(adaptive)),
        "brier": float(np.square(distance).sum(axis=1).mean()),
        "bins": [list(entry) for entry in bins],
    }


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean F1 over the classes that occur in ``truth``, as in `scores`."""
    from sklearn.metrics import precision_recall_fscore_support

    present = np.unique(truth)
    _, _, f1, _ = precision_recall_fscore_support(truth, predicted, labels=present, average="macro", zero_division=0.0)
    return float(f1)
