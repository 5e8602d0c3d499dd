r"""ImageNet, MobileNetV2-Shared: stages 3 to 6 share one 1x1 expansion. Kang & Kim 2021.

Command   paramshare train experiments/recipes/imagenet_mobilenet.py --workdir runs/mobilenet
          the projections too: --model.name mobilenetv2-sharedpp
          --penalty.pools 'stage\d-expand' 'stage\d-project'
          the plain network: --model.name mobilenetv2 --penalty.orthogonality 0
          several hosts: the same command on each with --distributed; bfloat16: --model.bfloat16
Time      312 million multiply-adds per image (forward pass); we have not run it
Result    not measured yet. The paper's top-1 error is 27.61% (mobilenetv2-sharedpp 28.21). That
          is its best epoch *on the test set*; we report the last epoch and the one chosen by
          validation. 3,243,080 trainable parameters instead of 3,507,272
Source    the authors' public training code: 300 epochs, learning rate times 0.1 after epochs 150
          and 225 and times 0.5 after 285, weight decay 1e-5 on everything; orthogonality penalty
          with weight 10 (its floor is 1.224e-3, since there are more filters than weights in
          one). Batch 256, the initial rate of 0.1 and momentum 0.9 are those of its other
          recipes; we do not know the ones for MobileNetV2. Random area and aspect ratio, flip,
          and the 1% held out for validation are our choice
"""

from paramshare.data import Tfds
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("mobilenetv2-shared"),
    data=Tfds("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-5),
    schedule=Schedule("step", milestones=(150, 225, 285), factors=(0.1, 0.1, 0.5)),
    penalty=Penalty(orthogonality=10.0, pools=(r"stage\d-expand",)),
    epochs=300,
    batch_size=256,
)
