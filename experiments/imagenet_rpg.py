"""ImageNet, ResNet18 out of one ring of 2,359,296 numbers, the size of one of its layers: RPG, Wang et al. 2021.

Command   paramshare train experiments/imagenet_rpg.py --workdir runs/imagenet-rpg
          another ring: --model.name resnet34-rpg-50000; the plain network: --model.name resnet18
          on several hosts, the same on each: --distributed; in bfloat16: --model.bfloat16
Time      1.8 billion multiply-adds an image and pass; not run by us yet
Result    not measured yet. The paper has 67.2 % top-1 accuracy for ResNet18 with one layer's worth of weights. The ring has 2,359,296
          numbers, the private parameters are 532,008: 2,891,304 together, instead of 11,689,512
Source    an author's public re-implementation: 90 epochs, batch 256 to 512, rate 0.1 to 0.3 times 0.1^(epoch / 45) at every step, momentum
          0.9, weight decay 1e-4; which of these made the 67.2 % is not established. Random area and aspect, flip, and the 1 % held
          out for validation are ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule

config = Config(
    model=Model("resnet18-rpg"),
    data=Data("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
    schedule=Schedule("exponential", factor=0.1, period=45.0),
    epochs=90,
    batch_size=256,
)
