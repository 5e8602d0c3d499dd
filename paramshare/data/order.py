"""The order of examples: every draw is a pure function of a seed and a place.

All draws are the raw output of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011), which NumPy promises never to change. It may change `Generator` methods between
releases.
"""

import functools
import operator

import numpy as np

from paramshare.data.error import DataError

# One stream for each purpose: a held-out split must not follow from the order of an epoch.
EPOCH, HELD_OUT, CROP, SAMPLE, CANVAS, TURN = range(6)


def raw(count: int, seed: int, purpose: int, *place: int) -> np.ndarray:
    """`count` raw draws of the stream (seed, purpose, place): (count,) uint64.

    Args:
      count: number of draws.
      seed: 0 <= seed < 2**64.
      purpose: one of EPOCH, HELD_OUT, CROP, SAMPLE, CANVAS, TURN.
      *place: up to two integers below 2**64, such as (epoch, index). They are the high words of
        Philox's counter, so that streams of different places do not overlap.

    Raises:
      DataError: if the seed is not an integer in this range.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise DataError(f"seed is {seed!r}; it must be an integer from 0 to 2**64 - 1")
    high = [int(p) for p in place] + [0] * (2 - len(place))
    return np.random.Philox(
        key=np.array([number, purpose], np.uint64), counter=np.array([0, 0, *high], np.uint64)
    ).random_raw(count)


def permutation(n: int, seed: int, purpose: int, *place: int) -> np.ndarray:
    """A permutation of range(n), (n,) int64: the order that sorts n raw draws.

    Ties, of probability n**2 / 2**65, go to the lower index.
    """
    return np.argsort(raw(n, seed, purpose, *place), kind="stable")


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch `epoch` visits n examples.

    Args:
      n: number of examples.
      seed: 0 <= seed < 2**64.
      epoch: 0, 1, ...

    Returns:
      (n,) int64, a permutation of range(n), the same on every machine.

    Raises:
      DataError: if an argument is out of range.

    Example:
      >>> sorted(epoch_order(5, seed=0, epoch=3).tolist())
      [0, 1, 2, 3, 4]
    """
    if n < 0 or epoch < 0:
        raise DataError(f"n is {n} and epoch is {epoch}; both must be 0 or more")
    return permutation(n, seed, EPOCH, epoch)


@functools.lru_cache(maxsize=4)
def _cached_order(n: int, seed: int, epoch: int) -> np.ndarray:
    # Without the cache each batch would sort its epoch again. Prefetching reads two epochs at once.
    order = epoch_order(n, seed, epoch)
    order.flags.writeable = False
    return order


def train_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The examples of the global batch of training step `step`.

    An epoch has n // batch_size steps. The remainder of its order is dropped, a different one each
    epoch.

    Args:
      n: number of training examples.
      batch_size: examples in a global batch, over all processes.
      seed: 0 <= seed < 2**64.
      step: 0, 1, ...

    Returns:
      (batch_size,) int64.

    Raises:
      DataError: if batch_size < 1, batch_size > n or step < 0.

    Example:
      >>> both = [*train_indices(10, 5, seed=0, step=0), *train_indices(10, 5, seed=0, step=1)]
      >>> sorted(int(i) for i in both)
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if not 1 <= batch_size <= n:
        raise DataError(
            f"batch_size is {batch_size}; it must be from 1 to {n}, the number of training examples"
        )
    if step < 0:
        raise DataError(f"step is {step}; it must be 0 or more")
    epoch, batch = divmod(int(step), n // batch_size)
    return _cached_order(int(n), seed, epoch)[batch * batch_size : (batch + 1) * batch_size].copy()


def held_out(
    n: int, fraction: float, seed: int, keep: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divides n training examples into those trained on and those held out for validation.

    The held-out part depends on (n, fraction, seed) only, and a smaller `keep` gives a subset of a
    larger one. So runs on subsets of a data set share their validation examples.

    Args:
      n: number of examples.
      fraction: share held out, in [0, 1): round(fraction * n) examples, and at least one unless
        fraction is 0.
      seed: 0 <= seed < 2**64.
      keep: number of remaining examples to train on; None for all.

    Returns:
      (training, validation), two disjoint ascending int64 arrays.

    Raises:
      DataError: if the fraction is out of range or leaves nothing to train on, or `keep` is more
        than remain.

    Example:
      >>> training, validation = held_out(10, 0.2, seed=0)
      >>> len(training), len(validation), len(set(training) & set(validation))
      (8, 2, 0)
    """
    if not 0 <= fraction < 1:
        raise DataError(f"validation is {fraction}; it must be in [0, 1)")
    count = max(round(fraction * n), 1) if fraction else 0
    if count >= n:
        raise DataError(
            f"validation is {fraction}, which holds out {count} of {n} training examples and "
            "leaves none to train on; make it smaller"
        )
    remaining = n - count
    if keep is not None and not 1 <= keep <= remaining:
        raise DataError(
            f"train_examples is {keep}; it must be from 1 to {remaining}, the number of training "
            "examples"
        )
    order = permutation(n, seed, HELD_OUT)
    return np.sort(order[count:][:keep]), np.sort(order[:count])


def held_out_groups(
    group_N: np.ndarray, fraction: float, seed: int, keep: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `held_out`, but examples of one group are all held out or none of them.

    Args:
      group_N: the group of each example, (N,) integers.
      fraction: part of the groups that is held out.
      seed: 0 <= seed < 2**64.
      keep: train on this many of the other examples only; None for all.

    Returns:
      Indices of the training and of the held-out examples.

    Example:
      >>> train, held = held_out_groups(np.array([0, 0, 1, 1]), 0.5, seed=0)
      >>> sorted([train.tolist(), held.tolist()])
      [[0, 1], [2, 3]]
    """
    names, number = np.unique(group_N, return_inverse=True)
    out = np.isin(number, held_out(len(names), fraction, seed)[1])
    training = np.flatnonzero(~out)
    return training[held_out(len(training), 0, seed, keep)[0]], np.flatnonzero(out)
