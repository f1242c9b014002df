"""Scores of predicted labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# sklearn is imported where it is used: the command line without the study does not need it, and starts faster.


def scores(truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 as means over the labels; F1 of each label; the confusion matrix.

    truth, predicted: ``(n,)``, indices into ``labels``. Every label counts, predicted or not; one that is never
    predicted has precision 0. Rows of the confusion matrix are true labels.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    classes = np.arange(len(labels))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=classes, average=None, zero_division=0.0
    )
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(np.mean(f1)),
        "precision": float(np.mean(precision)),
        "recall": float(np.mean(recall)),
        "labels": list(labels),
        "f1": [float(value) for value in f1],
        "support": [int(value) for value in support],
        "confusion": confusion_matrix(truth, predicted, labels=classes).tolist(),
    }


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean F1 over the classes that occur in ``truth``; for choosing an epoch on a validation part."""
    from sklearn.metrics import precision_recall_fscore_support

    present = np.unique(truth)
    _, _, f1, _ = precision_recall_fscore_support(truth, predicted, labels=present, average="macro", zero_division=0.0)
    return float(f1)
