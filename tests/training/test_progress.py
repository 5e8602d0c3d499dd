"""Means over steps: a step without a value of a measure does not count."""

import math

from paramshare.training.progress import Progress


def lines(*scores: float) -> list[dict[str, float]]:
    return [{"loss": 2.0 * i, "pck": score, "gradient_max/a": i} for i, score in enumerate(scores)]


def test_batches_without_a_joint_do_not_spoil_the_mean():
    progress = Progress()
    progress.add(lines(0.5, math.nan), ("loss", "pck"))
    progress.add(lines(1.0), ("loss", "pck"))
    assert progress.line_means() == {"loss": 2 / 3, "pck": 0.75, "gradient_max/a": 1}
    restored = Progress(**vars(progress))  # as from a checkpoint
    assert restored.means() == {"loss": 2 / 3, "pck": 0.75}
    # The next epoch has no value at all.
    restored.add(lines(math.nan), ("loss", "pck"))
    means = restored.means()
    assert means["loss"] == 0 and math.isnan(means["pck"])
