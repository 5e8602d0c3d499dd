"""CIFAR-100, ResNet18 from one ring of 2,359,296 parameters: RPG, Wang et al. 2021.

Command   paramshare train experiments/recipes/cifar100_rpg.py --workdir runs/cifar100-rpg
          another ring: --model.name resnet18-rpg-500000; the plain network: --model.name resnet18
Time      556 million multiply-adds per image (forward pass); we have not run the 200 epochs
Result    not measured yet. The ring is as large as one layer. With 62,628 private parameters that
          makes 2,421,924 trainable parameters instead of 11,220,132
Source    a common recipe; we do not know the paper's: 200 epochs, batch 128, SGD at 0.1 with
          momentum 0.9, weight decay 5e-4, learning rate times 0.1 at epochs 60, 120 and 160;
          flip, padded crop by 4. 5,000 training images are held out for validation
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("resnet18-rpg"),
    data=Tfds("cifar100"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(60, 120, 160), factor=0.1),
    epochs=200,
    batch_size=128,
)
