"""CIFAR-100, wide residual networks with soft sharing: the recipe of Savarese & Maire, ICLR 2019.

Command   paramshare train experiments/recipes/cifar100_swrn.py --workdir runs/cifar100-swrn
          the plain network: --workdir runs/cifar100-wrn --model.name wrn-28-10
          Cutout: --augment.cutout 16
Time      5.2 billion multiply-adds per image (forward pass); we have not run the 200 epochs,
          since no accelerator was available
Result    the paper's best CIFAR-100 error is 17.43%. We did not have its tables, so we do not
          know its figures for the networks named here. Ours are not measured yet
Source    the authors' public training code: 200 epochs, batch 128, SGD at 0.1 with Nesterov
          momentum 0.9, weight decay 5e-4 on all but coefficients, learning rate times 0.2 at
          epochs 60, 120 and 160; flip, padded crop by 4, normalization. Our choice: 5,000
          training images are held out for validation (--data.validation 0 trains on all 50,000)
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("swrn-28-10-2"),
    data=Tfds("cifar100"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(60, 120, 160), factor=0.2),
    epochs=200,
    batch_size=128,
)
