"""CIFAR-10, ResNet16 of width 4 made from width 1: repetition in width, Chavan et al., ICIP 2021.

Command   paramshare train experiments/recipes/cifar10_resnet16_repeat.py --workdir runs/repeat
          wider: --model.name resnet16-8-repeat; the small network alone: --model.name resnet16-1;
          the large one without sharing: --model.name resnet16-4
Time      393 million multiply-adds per image (forward pass), as for resnet16-4; we have not run
          the 200 epochs
Result    not measured yet; we did not have the paper's tables. 183,498 trainable parameters;
          width 1 has 175,258 and width 4 has 2,749,786
Source    the authors' public training code: 200 epochs, batch 64, SGD at 0.1 with momentum 0.9,
          weight decay 5e-4 on everything including the scalars of the repetition, learning rate
          times 0.2 every 60 epochs; gradients clipped to norm 1. The flip, the padded crop by 4
          and the 5,000 held-out validation images are our choice
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("resnet16-4-repeat"),
    data=Tfds("cifar10"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer(
        "sgd",
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        decay_coefficients=True,
        clip_norm=1.0,
    ),
    schedule=Schedule("step", milestones=(60, 120, 180), factor=0.2),
    epochs=200,
    batch_size=64,
)
