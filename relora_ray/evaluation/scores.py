"""The scores of GLUE (Wang et al. 2018, section 3): how predictions agree with labels. Held against scikit-learn and
scipy by a test.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def accuracy(labels: Values, predicted: Values) -> float:
    return float(np.mean(labels == predicted))


def f1(labels: Values, predicted: Values) -> float:
    """Of class 1; 0 if there is none, neither there nor predicted."""
    both = float(np.sum((labels == 1) & (predicted == 1)))
    either = float(np.sum(labels == 1) + np.sum(predicted == 1))
    return 2 * both / either if either else 0.0


def matthews(labels: Values, predicted: Values) -> float:
    """Matthews' correlation of two classes, 0 where one side is always the same."""
    return _pearson(labels, predicted, otherwise=0.0)  # of ones and zeros it is Pearson's


def pearson(labels: Values, predicted: Values) -> float:
    """nan where one side is always the same: it is not defined."""
    return _pearson(labels, predicted, otherwise=float("nan"))


def spearman(labels: Values, predicted: Values) -> float:
    """Pearson's correlation of ranks; what is equal shares the mean of its ranks."""
    return pearson(_ranks(labels), _ranks(predicted))


SCORES: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman,
}  # fmt: skip


def _pearson(x: Values, y: Values, *, otherwise: float) -> float:
    a, b = x - x.mean(), y - y.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if np.ptp(x) and np.ptp(y) and size else otherwise


def _ranks(values: Values) -> Values:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Values = ((last - count + 1 + last) / 2)[place]
    return ranks
