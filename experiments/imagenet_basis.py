r"""ImageNet, ResNet50-Shared++: a stage's later blocks share one 3x3 and one 1x1 expansion. Kang & Kim, NeurIPS 2021.

Command   paramshare train experiments/imagenet_basis.py --workdir runs/imagenet-basis
          the 3x3 alone: --model.name resnet50-shared --penalty.pools 'stage\d-conv2'
          basic blocks: --model.name resnet34-s32u1 --penalty.pools 'stage\d'
          on several hosts, the same on each: --distributed; in bfloat16: --model.bfloat16
Time      4.1 billion multiply-adds an image and pass; not run by us yet
Result    not measured yet. The paper's top-1 error is 23.95 % (resnet50-shared 23.64, resnet34-s32u1 27.83): its best epoch *on the
          test set*, whereas we tell the last epoch and the one that validation chose. 18,262,056 trainable numbers instead of 25,557,032
Source    the authors' public training code: 150 epochs, batch 256, times 0.1 after epochs 60, 100 and 140, weight decay 1e-4 on
          everything; orthogonality weighed by 10, a mean for the 3x3s and one for the expansions, added. The first rate of 0.1 and
          momentum 0.9 are those of its CIFAR-10 recipe. Random area and aspect, flip, and the 1 % held out for validation are ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("resnet50-sharedpp"),
    data=Data("imagenet2012", validation=0.01),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
    schedule=Schedule("step", milestones=(60, 100, 140), factor=0.1),
    penalty=Penalty(orthogonality=10.0, pools=(r"stage\d-conv2", r"stage\d-conv3")),
    epochs=150,
    batch_size=256,
)
