"""CIFAR-10, a small vision transformer whose six blocks use the same kernels, on a small budget.

Command   paramshare train experiments/recipes/cifar10_vit.py --workdir runs/cifar10-vit
          the plain network: --model.name vit-6-64-4; all images, with an accelerator:
          --data.train-examples None --epochs 100
Time      5 minutes of CPU time, so less than 3 minutes on 2 free cores
Result    42.4% test accuracy (one seed, on copies of the images that were compressed as JPEG):
          9,000 images for 6 epochs are few for a transformer. It has 62,154 trainable parameters
Source    sizes and schedule are ours
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
