"""Quickstart: a soft-shared wide residual network on scikit-learn's 1,797 digits.

Command   paramshare train experiments/quickstart.py --workdir runs/quickstart
Time      about 1 minute on 2 CPU cores
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("swrn-28-1-2"),
    data=Data("digits"),
    augment=Augment(pad_crop=1),
    optimizer=Optimizer(learning_rate=0.1),
    schedule=Schedule("cosine", warmup_epochs=1),
    epochs=30,
    batch_size=64,
)
