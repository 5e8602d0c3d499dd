"""CIFAR-100, ResNet18 out of one ring of 2,359,296 numbers, as many as one of its layers has: RPG, Wang et al. 2021.

Command   paramshare train experiments/cifar100_rpg.py --workdir runs/cifar100-rpg
          another ring: --model.name resnet18-rpg-500000; the plain network: --model.name resnet18
Time      556 million multiply-adds an image and pass; 200 epochs were not run by us yet
Result    not measured yet. The ring has 2,359,296 numbers, the private parameters are 62,628: 2,421,924 together, instead of
          11,220,132
Source    a usual recipe, not established as the paper's: 200 epochs, batch 128, SGD at 0.1 with momentum 0.9, weight decay 5e-4, times 0.1
          at epochs 60, 120 and 160; flip, pad 4 and crop. 5,000 training images are held out for validation
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("resnet18-rpg"),
    data=Data("cifar100"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(60, 120, 160), factor=0.1),
    epochs=200,
    batch_size=128,
)
