"""Means with bootstrap intervals, over pictures."""

from __future__ import annotations

import numpy as np


def bootstrap(values: np.ndarray, rounds: int, seed: int) -> tuple[float, float, float]:
    """Mean of [N] values and its 95% percentile interval, resampling pictures; NaN values are left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def compare(a: np.ndarray, b: np.ndarray, better: int, rounds: int, seed: int) -> dict:
    """The paired difference a - b over pictures.

    Returns: mean, low, high (95%), wins (share of pictures where a is better, ties half), n, and verdict: "better" or
        "worse" for a where the interval excludes 0, else "undecided".
    """
    difference = (a - b)[np.isfinite(a - b)]
    mean, low, high = bootstrap(difference, rounds, seed)
    wins = float((difference * better > 0).mean() + (difference == 0).mean() / 2) if len(difference) else float("nan")
    decided = low > 0 or high < 0
    verdict = ("better" if mean * better > 0 else "worse") if decided else "undecided"
    return {"mean": mean, "low": low, "high": high, "wins": wins, "n": len(difference), "verdict": verdict}
