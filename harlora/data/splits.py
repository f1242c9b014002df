"""Who trains, who validates, who is tested: two protocols, label fractions, few labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harlora.data.labels import VOCABULARY
from harlora.data.windows import Windows
from harlora.errors import InputError

PROTOCOLS = ("subject", "paper")
TEST_FRACTION = 0.3
VALIDATION_FRACTION = 0.12


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of windows; no window is in two parts.

    With the ``subject`` protocol no subject is in two parts either.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(windows: Windows, protocol: str, seed: int, tested: Sequence[str] = ()) -> Split:
    """Three parts of a dataset: 30 % test, 12 % validation (for early stopping), the rest training.

    protocol: ``"paper"``, windows at random, as in the paper: overlapping neighbours and the same people are on both
    sides, so its scores say little about new people; or ``"subject"``, whole subjects.
    tested: with ``"subject"`` the people of the test part, instead of those that the seed draws.
    Raises: InputError if the protocol is unknown, there are fewer than three subjects to split, or one of those to be
    tested is not among them, or all are.
    """
    if tested and protocol != "subject":
        raise InputError(f"people to be tested can be named with protocol subject alone, got {protocol}")
    rng = np.random.default_rng([seed, PROTOCOLS.index(protocol) if protocol in PROTOCOLS else 99])
    if protocol == "paper":
        order = rng.permutation(len(windows))
        first, second = round(TEST_FRACTION * len(order)), round((TEST_FRACTION + VALIDATION_FRACTION) * len(order))
        parts = order[:first], order[first:second], order[second:]
    elif protocol == "subject":
        subjects = rng.permutation(np.unique(windows.subjects))
        if len(subjects) < 3:
            raise InputError(
                f"{windows.dataset}: the subject protocol requires 3 subjects or more, got {len(subjects)}"
            )
        count = max(1, round(TEST_FRACTION * len(subjects)))
        if tested:
            names = [windows.subject_names[subject] for subject in subjects]
            unknown = sorted(set(tested) - set(names))
            count = len(set(tested))
            if unknown or len(subjects) - count < 2:
                raise InputError(
                    f"{windows.dataset}: people to be tested must be some, all but two at most, of "
                    f"{', '.join(sorted(names))}; got {', '.join(unknown or sorted(set(tested)))}"
                )
            subjects = subjects[np.argsort([name not in tested for name in names], kind="stable")]
        validated = max(1, round(VALIDATION_FRACTION * len(subjects)))
        groups = subjects[:count], subjects[count : count + validated], subjects[count + validated :]
        parts = tuple(np.flatnonzero(np.isin(windows.subjects, group)) for group in groups)  # type: ignore[assignment]
    else:
        raise InputError(f"unknown protocol {protocol!r}; required one of {', '.join(PROTOCOLS)}")
    test, validation, train = (np.sort(part) for part in parts)
    return Split(train=train, validation=validation, test=test)


def fewer_labels(
    windows: Windows, train: np.ndarray, *, fraction: float = 1.0, per_class: int | None = None, seed: int
) -> np.ndarray:
    """A random part of the training windows, each class by itself; no class disappears.

    fraction: of the training windows of each class. per_class: that many windows of each class.
    Raises: InputError if the fraction is not in (0, 1] or a class has fewer than ``per_class`` windows.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"label fraction must be above 0 and at most 1, got {fraction}")
    if per_class is not None and per_class < 1:
        raise InputError(f"windows per class must be at least 1, got {per_class}")
    rng = np.random.default_rng([seed, 7])
    kept = []
    for label in np.unique(windows.labels[train]):
        members = rng.permutation(train[windows.labels[train] == label])
        count = max(1, round(fraction * len(members))) if per_class is None else per_class
        if count > len(members):
            raise InputError(
                f"{windows.dataset}: {VOCABULARY[label]} has {len(members)} training windows, "
                f"fewer than the {count} windows per class asked for"
            )
        kept.append(members[:count])
    return np.sort(np.concatenate(kept))
