"""Pictures are complete PNG files and show their data."""

import numpy as np
import pytest
from PIL import Image

from paramshare import Site
from paramshare.report.pictures import (
    blank,
    gradient_flow,
    learning_curves,
    ring_curve,
    save,
    similarity_maps,
    site_labels,
)
from paramshare.storage import StorageError
from paramshare.tasks import Measure


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has(file, colour: tuple[int, int, int]) -> bool:
    return bool(np.any(np.all(pixels(file).reshape(-1, 3) == colour, axis=1)))


SCORE = Measure("hits", "hit rate", "hits")
C0, C1, C2 = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # matplotlib's cycle


def epoch(number: int, **more) -> dict:
    line = {"kind": "epoch", "epoch": number, "loss": 2.0 / number, "hits": 1 - 1 / (1 + number)}
    return line | more


@pytest.mark.parametrize("epochs", [1, 5])
def test_learning_curves(tmp_path, epochs):
    numbers = range(1, epochs + 1)
    held_out = [epoch(i, validation_loss=3.0 / i, validation_hits=0.5) for i in numbers]
    full, bare, loss = (tmp_path / f"{name}.png" for name in ("full", "bare", "loss"))
    lines = [{"kind": "start"}, *held_out]
    learning_curves(lines, full, score=SCORE, title="a run", test={"last": 0.9, "best": 0.8})
    learning_curves([epoch(i) for i in numbers], str(bare), score=SCORE)
    assert pixels(full).shape == (480, 1200, 3)
    assert has(full, C0) and has(full, C1) and has(full, C2)
    assert has(bare, C0) and not has(bare, C1) and not has(bare, C2)
    # A task without measures of training batches.
    learning_curves(
        [{"kind": "epoch", "epoch": i, "loss": 1.0} for i in numbers], loss, score=SCORE
    )
    assert has(loss, C0)


def test_a_picture_replaces_the_old_one_completely(tmp_path):
    file = tmp_path / "curves.png"
    file.write_bytes(b"old")
    learning_curves([epoch(1)], file, score=SCORE)
    assert has(file, C0) and [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError, match="move it away"):
        learning_curves([epoch(1)], tmp_path / "folder.png", score=SCORE)


@pytest.mark.parametrize("banks", [1, 4])
def test_similarity_maps(tmp_path, banks):
    # Values are written into small maps only.
    matrices = {f"stage{i}": np.eye(3 + 10 * i) for i in range(banks)}
    labels = {"stage0": ["a", "b", "c"]}
    similarity_maps(matrices, tmp_path / "maps.png", labels=labels, title="a run")
    shown = pixels(tmp_path / "maps.png").reshape(-1, 3)
    for colour in ((68, 1, 84), (253, 231, 36)):  # viridis of 0 and of 1
        assert np.sum(np.all(np.abs(shown.astype(int) - colour) <= 1, axis=1)) > 1000


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (
            ["stage1/block2/conv1/kernel", "stage1/block3/conv2/kernel"],
            ["block2/conv1", "block3/conv2"],
        ),
        (["stage1/block2/conv1/kernel", "stage1/block3/conv1/kernel"], ["block2", "block3"]),
        (["a/kernel", "b/bias"], ["a/kernel", "b/bias"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["stage1/block2/kernel"], ["stage1/block2/kernel"]),
        ([], []),
    ],
)
def test_site_labels(paths, labels):
    assert site_labels(tuple(Site(path, (1,)) for path in paths)) == labels


def test_layers_of_a_stack_keep_their_index():
    assert site_labels(tuple(Site("layers/dense/kernel", (1,), index=i) for i in range(3))) == [
        "kernel[0]",
        "kernel[1]",
        "kernel[2]",
    ]


@pytest.mark.parametrize("banks", [1, 2])
def test_gradient_flow_draws_a_line_a_bank(tmp_path, banks):
    def line(step: int) -> dict:
        names = {
            f"gradient_{what}/stage{b}": 10.0 ** (b - step)
            for what in ("mean", "max")
            for b in range(banks)
        }
        return {"kind": "train", "step": step, "loss": 1.0, **names}

    lines = [line(step) for step in range(1, 6)]
    gradient_flow({"on": [*lines, epoch(1)], "off": lines}, tmp_path / "flow.png", title="a run")
    assert has(tmp_path / "flow.png", C0)
    assert has(tmp_path / "flow.png", C1) == (banks == 2)


@pytest.mark.parametrize("levels", [{}, {"plain": [0.9, 0.92], "narrow": [0.7]}])
def test_ring_curve_draws_its_levels(tmp_path, levels):
    ring_curve(
        [(100, 0.5), (100, 0.6), (1000, 0.8), (10_000, 0.85)],
        levels,
        tmp_path / "curve.png",
        title="a network",
    )
    assert has(tmp_path / "curve.png", C0)
    assert has(tmp_path / "curve.png", C2) == bool(levels)


@pytest.mark.parametrize("title", ["$\\frac$", "a $ b $", "é 日本 \U0001f600", "100 % _ ^ {"])
@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(tmp_path, title):
    file = tmp_path / "curves.png"
    learning_curves([epoch(1)], file, score=SCORE, title=title, test={title: 0.5})
    similarity_maps({title: np.eye(3)}, file, labels={title: [title] * 3}, title=title)
    assert file.stat().st_size > 10_000


def test_logarithmic_axes_keep_their_powers(tmp_path):
    """With literal texts everywhere the axis would read $\\mathdefault{10^{0}}$."""
    figure, axes = blank(1, 1, (3, 3))
    axes.plot([1, 2], [0.001, 1])
    axes.set_yscale("log")
    save(figure, tmp_path / "log.png")
    labels = [label for label in axes.get_yticklabels() if label.get_text()]
    assert labels and all(label.get_parse_math() for label in labels)
