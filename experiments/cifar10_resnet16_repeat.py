"""CIFAR-10, a residual network of width 4 on the kernels of width 1: learnable repetition in width, Chavan et al., ICIP 2021.

Command   paramshare train experiments/cifar10_resnet16_repeat.py --workdir runs/cifar10-resnet16-repeat
          wider: --model.name resnet16-8-repeat; what is repeated, alone: --model.name resnet16-1; the whole: --model.name resnet16-4
Time      393 million multiply-adds an image and pass, as resnet16-4; 200 epochs were not run by us yet
Result    not measured yet; the paper's tables were not at hand. 183,498 trainable numbers, where width 1 has 175,258 and width 4 has
          2,749,786
Source    the authors' public training code: 200 epochs, batch 64, SGD at 0.1 with momentum 0.9, weight decay 5e-4 on everything, the
          repetition's scalars too, times 0.2 every 60 epochs; gradients cut to norm 1. Flip, pad 4 and crop, and 5,000 training
          images held out for validation are ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("resnet16-4-repeat"),
    data=Data("cifar10"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4, decay_coefficients=True, clip_norm=1.0),
    schedule=Schedule("step", milestones=(60, 120, 180), factor=0.2),
    epochs=200,
    batch_size=64,
)
