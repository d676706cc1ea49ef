"""The metrics of GLUE (Wang et al., arXiv 1804.07461), of scikit-learn and scipy, in percent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def matthews(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Matthews' correlation coefficient of the most probable classes; logits: (examples, classes)."""
    from sklearn.metrics import matthews_corrcoef

    return 100 * float(matthews_corrcoef(labels, logits.argmax(-1)))


def pearson(values: NDArray[Any], labels: NDArray[Any]) -> float:
    """Pearson's correlation with the labels; values: (examples, 1). 0 where the values are all the same."""
    from scipy.stats import pearsonr

    values = values.reshape(-1).astype(np.float64)
    return 0.0 if np.ptp(values) == 0 else 100 * float(pearsonr(values, labels.reshape(-1)).statistic)


def f1(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """F1 of class 1; logits: (examples, 2)."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(labels, logits.argmax(-1), zero_division=0))


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """The share of the examples whose most probable class is right; logits: (examples, classes)."""
    return accuracy_of_classes(logits.argmax(-1), labels)


def accuracy_of_classes(predicted: ArrayLike, labels: ArrayLike) -> float:
    """The share of the examples whose class is right, of two arrays of as many classes."""
    return 100 * float(np.mean(np.ravel(predicted) == np.ravel(labels)))
