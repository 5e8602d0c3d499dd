"""ImageNet, SWRN-50-2: a Wide-ResNet-50-2 whose bottlenecks draw on three banks per stage.

Command   paramshare train experiments/recipes/imagenet_swrn50_2.py --workdir runs/imagenet-swrn50-2
          several hosts: the same command on each with --distributed; bfloat16: --model.bfloat16
          TFDS prepares imagenet2012 from the two archives that you download from image-net.org; its
          error message says where to put them
Time      11.4 billion multiply-adds per image (forward pass); we have not run it, since neither
          the images nor an accelerator were available
Result    not measured yet. 57,807,728 trainable parameters instead of 68,883,240
Source    second-hand, so not necessarily the paper's: batch 256, SGD at 0.1 divided by 10 every
          30 epochs, weight decay 1e-4, 100 epochs. Crops of random area and aspect ratio, flip;
          evaluation on the central crop of 224
"""

from paramshare.data import Tfds
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("swrn-50-2-2"),
    data=Tfds("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    schedule=Schedule("step", milestones=(30, 60, 90), factor=0.1),
    epochs=100,
    batch_size=256,
    checkpoint_every=1,
)
