"""The picture of similarity over training."""

import numpy as np
import pytest
from PIL import Image

from paramshare.measure.snapshots import Snapshot
from paramshare.report.pictures import similarity_over_training


@pytest.mark.parametrize("epochs", [1, 2, 9])
def test_the_picture_over_training(tmp_path, epochs):
    """One row per bank of at most six heat maps; a bank without early snapshots has empty cells."""
    early, late = {"a": np.eye(3)}, {"a": np.full((3, 3), 1.0), "b": np.eye(4)}
    past = [Snapshot(i, i, early if i < epochs - 1 else late) for i in range(epochs)]
    similarity_over_training(past, tmp_path / "p.png", thresholds=[0.5], title="a run")
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        width = image.size[0]
    for colour in ((68, 1, 84), (253, 231, 36)):
        assert np.sum(np.all(np.abs(pixels - colour) <= 1, axis=1)) > 1000
    assert width == round(120 * (1.9 * min(epochs, 6) + 4.2))
