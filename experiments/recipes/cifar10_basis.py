"""CIFAR-10, ResNet32 with shared filter bases: the recipe of Kang & Kim, NeurIPS 2021.

Command   paramshare train experiments/recipes/cifar10_basis.py --workdir runs/cifar10-basis
          two bases per stage: --model.name resnet32-s16u1-double
          deeper: --model.name resnet56-s16u1
          the plain network: --model.name resnet32 --penalty.orthogonality 0
          gradients that reach the shared filters: --gradient-flow
Time      79 million multiply-adds per image (forward pass); we have not run the 300 epochs
Result    not measured yet. The paper's error is 7.43% (resnet32-s16u1-double 6.93, resnet56-s16u1
          7.46). That is its best epoch *on the test set*; we report the last epoch and the one
          chosen by validation. 197,258 trainable parameters instead of 464,154
Source    the authors' public training code: 300 epochs, batch 256, SGD at 0.1 with momentum 0.9,
          weight decay 5e-4 on everything, learning rate times 0.1 after epochs 150 and 225;
          orthogonality penalty with weight 10, on CIFAR-10 including unique filters. The flip,
          the padded crop by 4 and the 5,000 held-out validation images are our choice
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("resnet32-s16u1"),
    data=Tfds("cifar10"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(150, 225), factor=0.1),
    penalty=Penalty(orthogonality=10.0, unique=True),
    epochs=300,
    batch_size=256,
)
