"""CIFAR-10, ResNet32 on shared filter bases: the recipe of Kang & Kim, NeurIPS 2021.

Command   paramshare train experiments/cifar10_basis.py --workdir runs/cifar10-basis
          two bases a stage: --model.name resnet32-s16u1-double; deeper: --model.name resnet56-s16u1
          the plain network: --model.name resnet32 --penalty.orthogonality 0
          to see what reaches the shared filters: --gradient-flow
Time      79 million multiply-adds an image and pass; 300 epochs were not run by us yet
Result    not measured yet. The paper's error is 7.43 % (resnet32-s16u1-double 6.93, resnet56-s16u1 7.46): its best epoch *on the test
          set*, whereas we tell the last epoch and the one that validation chose. 197,258 trainable numbers instead of 464,154
Source    the authors' public training code: 300 epochs, batch 256, SGD at 0.1 with momentum 0.9, weight decay 5e-4 on everything,
          times 0.1 after epochs 150 and 225; orthogonality weighed by 10, on CIFAR-10 of unique filters too. Flip, pad 4 and crop,
          and 5,000 training images held out for validation are ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Penalty, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("resnet32-s16u1"),
    data=Data("cifar10"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(150, 225), factor=0.1),
    penalty=Penalty(orthogonality=10.0, unique=True),
    epochs=300,
    batch_size=256,
)
