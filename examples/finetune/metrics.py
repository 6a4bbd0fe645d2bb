"""`confusion` counts what a classifier took for what; the metrics of GLUE from it.

With `n` items, `t` of a class and `p` predictions of it (Gorodkin's form of Matthews'
correlation for any number of classes, https://doi.org/10.1016/j.compbiolchem.2004.09.006).
A ratio without a denominator is 0.
"""

from typing import Any

import numpy as np


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often class `i` was taken for class `j`, `[classes, classes]`."""
    flat = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def accuracy(table: np.ndarray) -> float:
    return _ratio(np.trace(table), table.sum())


def f1(table: np.ndarray) -> float:
    """Of the second class where there are two, else the mean over the classes."""
    hits, found, there = np.diag(table), table.sum(axis=0), table.sum(axis=1)
    each = [_ratio(2 * h, f + t) for h, f, t in zip(hits, found, there, strict=True)]
    return each[1] if len(each) == 2 else float(np.mean(each))


def matthews(table: np.ndarray) -> float:
    table = table.astype(np.float64)
    n, found, there = table.sum(), table.sum(axis=0), table.sum(axis=1)
    spread = (n * n - found @ found) * (n * n - there @ there)
    return _ratio(n * np.trace(table) - found @ there, np.sqrt(max(spread, 0)))


def pearson(values: np.ndarray, predicted: np.ndarray) -> float:
    """Correlation of real labels and predictions."""
    a, b = (np.asarray(x, np.float64) - np.mean(x) for x in (values, predicted))
    return _ratio(a @ b, np.sqrt((a @ a) * (b @ b)))


def _ratio(above: Any, below: Any) -> float:
    return float(above / below) if below else 0.0
