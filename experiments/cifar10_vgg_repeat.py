"""CIFAR-10, VGG11 whose later convolutions repeat earlier ones: learnable repetition in depth, Chavan et al., ICIP 2021.

Command   paramshare train experiments/cifar10_vgg_repeat.py --workdir runs/cifar10-vgg-repeat
          from rep-vgg-4 to rep-vgg-10: --model.name rep-vgg-8; what is repeated, alone: --model.name vgg6; the whole: --model.name vgg11
Time      228 million multiply-adds an image and pass, as VGG11; 200 epochs were not run by us yet
Result    not measured yet; the paper's tables were not at hand. 568,746 trainable numbers, where VGG6 has 559,178 and VGG11 9,416,010
Source    the authors' public training code: 200 epochs, batch 64, SGD at 0.1 with momentum 0.9, weight decay 5e-4 on everything, the
          repetition's scalars too, times 0.2 every 60 epochs; gradients cut to norm 1. Flip, pad 4 and crop, and 5,000 training
          images held out for validation are ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("rep-vgg-6"),
    data=Data("cifar10"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4, decay_coefficients=True, clip_norm=1.0),
    schedule=Schedule("step", milestones=(60, 120, 180), factor=0.2),
    epochs=200,
    batch_size=64,
)
