"""Codebooks: the levels that a set of numbers is best rounded to, by Lloyd's algorithm."""

from typing import Any

import numpy as np

ITERATIONS = 300


def kmeans(values: Any, count: int, start: Any = ()) -> np.ndarray:
    """The levels of a codebook, rising, (count,): k-means in one dimension (Lloyd 1982).

    Lloyd's algorithm stops at a local optimum, so it runs from several starts, all of them
    deterministic, and the best result is taken: quantiles of the numbers; groups that the widest
    gaps divide, which finds clusters that are well separated; and `start`, than which the result is
    no worse. If there are fewer different numbers than levels, the last level is repeated.

    Args:
      values: numbers, any shape.
      count: the number of levels.
      start: further levels to start from, (count,).

    Example:
      >>> kmeans([1.0, 1.25, 5.0, 5.5, -3.0], 3).tolist()
      [-3.0, 1.125, 5.25]
    """
    values_N = np.sort(np.asarray(values, np.float64).ravel())
    different = np.unique(values_N)
    if len(different) <= count:
        last = different[-1:] if different.size else np.zeros(1)
        return np.concatenate([different, np.repeat(last, count - len(different))])
    cumulative = np.concatenate([[0.0], np.cumsum(values_N)])
    gaps = np.sort(np.argsort(-np.diff(values_N), kind="stable")[: count - 1]) + 1
    quantiles = np.quantile(values_N, (np.arange(count) + 0.5) / count)
    starts = [quantiles, _means(cumulative, gaps, np.zeros(count))]
    if np.size(start):
        starts.append(np.sort(np.asarray(start, np.float64)))
    results = [_lloyd(values_N, cumulative, levels_K) for levels_K in starts]
    return min(results, key=lambda levels_K: _error(values_N, levels_K))


def _lloyd(values_N: np.ndarray, cumulative: np.ndarray, levels_K: np.ndarray) -> np.ndarray:
    """Moves every level to the mean of the numbers nearest to it, until none moves."""
    for _ in range(ITERATIONS):
        moved_K = _means(cumulative, _edges(values_N, levels_K), levels_K)
        if np.array_equal(moved_K, levels_K):
            break
        levels_K = moved_K
    return levels_K


def _edges(values_N: np.ndarray, levels_K: np.ndarray) -> np.ndarray:
    """Where the numbers of each level but the first begin."""
    return np.searchsorted(values_N, (levels_K[1:] + levels_K[:-1]) / 2, side="right")


def _means(cumulative: np.ndarray, edges: np.ndarray, empty_K: np.ndarray) -> np.ndarray:
    """The mean of each group of numbers; `empty_K` where a group has none."""
    bounds = np.concatenate([[0], edges, [len(cumulative) - 1]])
    counts_K, sums_K = np.diff(bounds), np.diff(cumulative[bounds])
    return np.where(counts_K > 0, sums_K / np.maximum(counts_K, 1), empty_K)


def _error(values_N: np.ndarray, levels_K: np.ndarray) -> float:
    bounds = np.concatenate([[0], _edges(values_N, levels_K), [len(values_N)]])
    return float(np.sum((values_N - np.repeat(levels_K, np.diff(bounds))) ** 2))
