"""ImageNet, ResNet18 from one ring of 2,359,296 parameters: RPG, Wang et al. 2021.

Command   paramshare train experiments/recipes/imagenet_rpg.py --workdir runs/imagenet-rpg
          another ring: --model.name resnet34-rpg-50000; the plain network: --model.name resnet18
          several hosts: the same command on each with --distributed; bfloat16: --model.bfloat16
Time      1.8 billion multiply-adds per image (forward pass); we have not run it
Result    not measured yet. The paper reports 67.2% top-1 accuracy for ResNet18 with the weights
          of one layer. With 532,008 private parameters there are 2,891,304 trainable parameters
          instead of 11,689,512
Source    one author's public re-implementation: 90 epochs, batch 256 to 512, learning rate 0.1 to
          0.3 times 0.1^(epoch / 45) at every step, momentum 0.9, weight decay 1e-4. We do not
          know which of these gave the 67.2%. Random area and aspect ratio, flip, and the 1% held
          out for validation are our choice
"""

from paramshare.data import Tfds
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("resnet18-rpg"),
    data=Tfds("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
    schedule=Schedule("exponential", factor=0.1, period=45.0),
    epochs=90,
    batch_size=256,
)
