"""Rotated MNIST with an equivariant network, a repeated one, or the plain baseline.

Command   paramshare train experiments/recipes/rotated_digits.py --workdir runs/rotated
          the paper's other networks: --model.name rotnet (the baseline), rotnet-c8, rotnet-c16,
          rotnet-c4-repeat, rotnet-c8-repeat, rotnet-c16-repeat; digits of your own files instead
          of a download: --data.path FOLDER_OR_FILE; random flips, as in the paper's code:
          --augment.flip
Time      not run: about 70 minutes on 2 CPU cores by the speed of a step
Result    not run; rotated_digits_small.py was
Source    Chavan et al., ICIP 2021, arXiv:2101.05650, and its code: networks, Adam, rates, weight
          decay, clipped gradients, batch size, turned training images. The images are made anew
          (12,000 and 50,000 digits of MNIST, turned by any angle), so they are not those of the
          original rotated MNIST; and they are normalised by their mean and standard deviation,
          which the paper's code does not do.
"""

from paramshare.data import RotatedDigits
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("rotnet-c4"),
    data=RotatedDigits(source="mnist", validation=0.0),
    augment=Augment(turn=180),
    optimizer=Optimizer(
        "adam", learning_rate=1e-3, weight_decay=1e-7, decay_coefficients=True, clip_norm=1.0
    ),
    schedule=Schedule("step", milestones=tuple(range(10, 30)), factor=0.8),
    epochs=30,
    batch_size=64,
)
