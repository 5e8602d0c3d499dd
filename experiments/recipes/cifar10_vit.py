"""CIFAR-10, a small vision transformer whose six blocks use the same kernels, on a small budget.

Command   paramshare train experiments/recipes/cifar10_vit.py --workdir runs/cifar10-vit
          the plain network: --model.name vit-6-64-4; soft attention: --model.name vit-6-64-4-soft-2;
          all images: --data.train-examples None --epochs 100
Time      TIME
Result    RESULT
Source    sizes and schedule are ours; patches of 4 pixels
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("vit-6-64-4-tied", options=("heads=4",)),
    data=Tfds("cifar10", train_examples=10_000),
    augment=Augment(flip=True, pad_crop=2),
    optimizer=Optimizer(
        "adamw", learning_rate=2e-3, weight_decay=0.05, decay_vectors=False, clip_norm=1.0
    ),
    schedule=Schedule("cosine", warmup_epochs=0.5),
    epochs=6,
    batch_size=64,
)
