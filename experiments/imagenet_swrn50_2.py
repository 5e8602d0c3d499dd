"""ImageNet, SWRN-50-2: a Wide-ResNet-50-2 whose bottlenecks draw on three banks a stage.

Command   paramshare train experiments/imagenet_swrn50_2.py --workdir runs/imagenet-swrn50-2
          on several hosts, the same on each: --distributed; in bfloat16: --model.bfloat16
          TFDS prepares imagenet2012 from the two archives that image-net.org gives out by hand; its error message says where to put them
Time      11.4 billion multiply-adds an image and pass; not run by us: neither the images nor an accelerator were at hand
Result    not measured yet. 57,807,728 trainable numbers instead of 68,883,240
Source    second-hand, and so a recipe rather than the paper's word: batch 256, SGD at 0.1 divided by 10 every 30 epochs, weight
          decay 1e-4, 100 epochs. Crops: random area and aspect, flip; evaluation on the centre crop of 224
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule

config = Config(
    model=Model("swrn-50-2-2"),
    data=Data("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    schedule=Schedule("step", milestones=(30, 60, 90), factor=0.1),
    epochs=100,
    batch_size=256,
    checkpoint_every=1,
)
