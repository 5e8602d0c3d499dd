r"""ImageNet, ResNet50-Shared++: later blocks of a stage share one 3x3 and one 1x1. Kang & Kim 2021.

Command   paramshare train experiments/recipes/imagenet_basis.py --workdir runs/imagenet-basis
          the 3x3 alone: --model.name resnet50-shared --penalty.pools 'stage\d-conv2'
          basic blocks: --model.name resnet34-s32u1 --penalty.pools 'stage\d'
          several hosts: the same command on each with --distributed; bfloat16: --model.bfloat16
Time      4.1 billion multiply-adds per image (forward pass); we have not run it
Result    not measured yet. The paper's top-1 error is 23.95% (resnet50-shared 23.64,
          resnet34-s32u1 27.83). That is its best epoch *on the test set*; we report the last
          epoch and the one chosen by validation. 18,262,056 trainable parameters instead of
          25,557,032
Source    the authors' public training code (NeurIPS 2021): 150 epochs, batch 256, learning rate
          times 0.1 after epochs 60, 100 and 140, weight decay 1e-4 on everything; orthogonality
          penalty with weight 10, the sum of one mean over the 3x3s and one over the 1x1
          expansions. The initial rate of 0.1 and momentum 0.9 are those of its CIFAR-10 recipe.
          Random area and aspect ratio, flip, and the 1% held out for validation are our choice
"""

from paramshare.data import Tfds
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("resnet50-sharedpp"),
    data=Tfds("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
    schedule=Schedule("step", milestones=(60, 100, 140), factor=0.1),
    penalty=Penalty(orthogonality=10.0, pools=(r"stage\d-conv2", r"stage\d-conv3")),
    epochs=150,
    batch_size=256,
)
