"""Rotated digits: classification of digits turned by any angle."""

from typing import Annotated, Literal

import numpy as np
import pydantic

from paramshare.data import order
from paramshare.data.dataset import Dataset, from_arrays
from paramshare.data.registry import DataConfig, register
from paramshare.data.rotation import SIDE, rotated
from paramshare.data.sets.grey_digits import grey_digits
from paramshare.data.sets.idx import Folder
from paramshare.tasks.config import Count, Fraction

SEED = 0  # of the division and of the angles: the images do not depend on the seed of a run
TRAIN, TEST = 1, 2  # the shuffle draws from part 0


@register("rotated_digits")
class RotatedDigits(DataConfig):
    """Digits turned by any angle, as in rotated MNIST: 12,000 images to train on, 50,000 to test.

    Like rotated MNIST, made anew: all digits of the source are shuffled and divided. If there are
    fewer digits than images, they are divided in the same proportion, and every digit is shown
    several times, each time at a different angle. No digit is in two of the training, validation
    and test parts.

    Raises:
      DataError: if a value is out of range, or the digits cannot be read.

    References:
      Larochelle et al., An Empirical Evaluation of Deep Architectures on Problems with Many Factors
      of Variation, ICML 2007: the original rotated MNIST.
    """

    name: str = "rotated_digits"
    path: Folder = None
    """Folder of four IDX files, or an .npz file of `image` and `label`; stored as an absolute path.
    None for the digits of `source`."""
    source: Literal["digits", "mnist"] = "digits"
    """Where digits come from without a path: scikit-learn, or tensorflow-datasets' MNIST."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps the prepared digits; None for ~/tensorflow_datasets."""
    examples: Count = 12_000
    """Images to train on, before some are held out for validation."""
    tests: Count = 50_000
    """Images to test on."""
    validation: Fraction = 0.1
    """Fraction of `examples` held out for validation, chosen by the seed; 0 for none."""
    size: Annotated[int, pydantic.Field(ge=SIDE)] = 29
    """Side of an image in pixels; digits of 28 pixels are padded to it."""
    turn: Annotated[float, pydantic.Field(ge=0, le=180)] = 180.0
    """Digits are turned by random angles between minus and plus this, in degrees."""

    def load(self, seed: int = 0) -> Dataset:
        """The images, made in a second for each 5,000."""
        digits, classes = grey_digits(self.path, self.data_dir, mnist=self.source == "mnist")
        image = np.concatenate([part[0] for part in digits.values()])
        label = np.concatenate([part[1] for part in digits.values()])
        shuffled = order.permutation(len(image), SEED, order.TURN)
        wanted = self.examples + self.tests
        first = self.examples
        if len(image) < wanted:
            first = min(max(1, round(len(image) * self.examples / wanted)), len(image) - 1)
        parts = {TRAIN: (shuffled[:first], self.examples), TEST: (shuffled[first:], self.tests)}

        def made(part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            which, count = parts[part]
            which = np.resize(which, count)  # repeats the digits if they are too few
            images, _ = rotated(image[which], self.turn, self.size, SEED, part, range(count))
            return images, label[which], which

        images, labels, which = made(TRAIN)
        chosen, held_out = order.held_out_groups(which, self.validation, seed)
        return from_arrays(
            (images[chosen], labels[chosen]),
            made(TEST)[:2],
            validation_data=(images[held_out], labels[held_out]),
            name=self.name,
            num_classes=classes,
        )
