"""A chi-square test without SciPy."""

import math

import numpy as np


def chi_square_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of observed ``counts`` under ``probabilities``; bins that expect fewer than 5 are merged.

    The tail is Wilson and Hilferty's (1931) normal approximation, good to a few per cent of p at 3 or more bins.
    """
    expected = probabilities / probabilities.sum() * counts.sum()
    order = np.argsort(-expected)
    counts, expected = counts[order].astype(float), expected[order]
    small = expected < 5
    if small.any():
        first = max(1, int(np.argmax(small)))
        counts = np.append(counts[:first], counts[first:].sum())
        expected = np.append(expected[:first], expected[first:].sum())
        if expected[-1] < 5:
            counts = np.append(counts[:-2], counts[-2:].sum())
            expected = np.append(expected[:-2], expected[-2:].sum())
    freedom = len(expected) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
