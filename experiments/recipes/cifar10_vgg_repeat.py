"""CIFAR-10, VGG11 whose later layers repeat earlier ones. Chavan et al., ICIP 2021.

Command   paramshare train experiments/recipes/cifar10_vgg_repeat.py --workdir runs/vgg-repeat
          rep-vgg-4 to rep-vgg-10: --model.name rep-vgg-8; the small network alone: --model.name
          vgg6; the large one without sharing: --model.name vgg11
Time      228 million multiply-adds per image (forward pass), as for VGG11; we have not run the
          200 epochs
Result    not measured yet; we did not have the paper's tables. 568,746 trainable parameters; VGG6
          has 559,178 and VGG11 9,416,010
Source    the authors' public training code: 200 epochs, batch 64, SGD at 0.1 with momentum 0.9,
          weight decay 5e-4 on everything including the scalars of the repetition, learning rate
          times 0.2 every 60 epochs; gradients clipped to norm 1. The flip, the padded crop by 4
          and the 5,000 held-out validation images are our choice
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("rep-vgg-6"),
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
