"""Held against scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from relora_ray.evaluation.scores import accuracy, f1, matthews, pearson, spearman

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_scores_of_classes_are_scikit_learns(share: float) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for size in (1, 7, 200):
        labels, predicted = (RANDOM.integers(0, 2, size).astype(float) for _ in range(2))
        predicted = np.where(RANDOM.random(size) < share, labels, predicted)
        assert accuracy(labels, predicted) == pytest.approx(metrics.accuracy_score(labels, predicted))
        assert f1(labels, predicted) == pytest.approx(metrics.f1_score(labels, predicted, zero_division=0))
        assert matthews(labels, predicted) == pytest.approx(metrics.matthews_corrcoef(labels, predicted), abs=1e-12)


def test_correlations_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for size in (2, 30, 500):
        labels = RANDOM.integers(0, 6, size).astype(float)  # with ties
        predicted = labels + RANDOM.normal(size=size).round(1)
        labels[0], predicted[0] = 7, -3  # never all the same
        assert pearson(labels, predicted) == pytest.approx(stats.pearsonr(labels, predicted).statistic)
        assert spearman(labels, predicted) == pytest.approx(stats.spearmanr(labels, predicted).statistic)


def test_what_is_not_defined() -> None:
    same, other = np.ones(4), np.array([0.0, 1.0, 2.0, 3.0])
    assert math.isnan(pearson(same, other))
    assert math.isnan(spearman(other, same))
    assert matthews(same, np.array([0.0, 1.0, 1.0, 0.0])) == 0
    assert f1(np.zeros(3), np.zeros(3)) == 0
