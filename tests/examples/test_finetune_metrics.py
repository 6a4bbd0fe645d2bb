"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from examples.finetune import metrics


def test_two_classes():
    #          true 0: 3 right, 1 taken for 1; true 1: 2 taken for 0, 4 right
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    found = [0, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    table = metrics.confusion(np.array(labels), np.array(found), 2)
    assert table.tolist() == [[3, 1], [2, 4]]
    assert metrics.accuracy(table) == 0.7
    assert metrics.f1(table) == pytest.approx(8 / 11)  # 2 * 4 / (5 + 6)
    # (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))
    expected = (4 * 3 - 1 * 2) / np.sqrt(5 * 6 * 4 * 5)
    assert metrics.matthews(table) == pytest.approx(expected)


def test_three_classes():
    table = metrics.confusion(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2]), 3)
    assert metrics.f1(table) == pytest.approx((1 + 0 + 0.8) / 3)
    # n = 4, 3 right, sum p t = 1*1 + 0*1 + 3*2 = 7; 16 - (1+0+9) and 16 - (1+1+4)
    assert metrics.matthews(table) == pytest.approx((4 * 3 - 7) / np.sqrt(6 * 10))


def test_ends():
    labels = np.array([0, 1, 1])
    right = metrics.confusion(labels, labels, 2)
    wrong = metrics.confusion(labels, 1 - labels, 2)
    one = metrics.confusion(labels, np.zeros(3, int), 2)
    assert [f(right) for f in (metrics.accuracy, metrics.f1, metrics.matthews)] == [
        1
    ] * 3
    assert [metrics.accuracy(wrong), metrics.f1(wrong)] == [0, 0]
    assert metrics.matthews(wrong) == pytest.approx(-1)
    assert metrics.f1(one) == metrics.matthews(one) == 0  # never says 1
    assert metrics.pearson(np.array([1, 2, 4]), np.array([2, 4, 8])) == pytest.approx(1)
    assert metrics.pearson(np.array([1, 2, 4]), np.array([5, 5, 5])) == 0
