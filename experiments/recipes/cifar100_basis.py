r"""CIFAR-100, ResNet34 with shared filter bases: the recipe of Kang & Kim, NeurIPS 2021.

Command   paramshare train experiments/recipes/cifar100_basis.py --workdir runs/cifar100-basis
          other ranks: --model.name resnet34-s16u1; MobileNetV2: --model.name mobilenetv2-shared, or
          --model.name mobilenetv2-sharedpp --penalty.pools 'stage\d-expand' 'stage\d-project'
          the plain network: --model.name resnet34 --penalty.orthogonality 0
          gradients that reach the shared filters: --gradient-flow
Time      772 million multiply-adds per image (forward pass); we have not run the 300 epochs
Result    not measured yet. The paper's error is 21.79% (resnet34-s16u1 22.64, mobilenetv2-shared
          27.70, mobilenetv2-sharedpp 27.54). That is its best epoch *on the test set*; we report
          the last epoch and the one chosen by validation. 7,726,676 trainable parameters instead
          of 21,328,292
Source    the authors' public training code: 150, 75 and 75 epochs at 0.1, 0.01 and 0.001;
          orthogonality penalty with weight 10. Batch size, momentum and weight decay are those of
          its CIFAR-10 recipe; we do not know the ones for CIFAR-100. The flip, the padded crop by
          4 and the 5,000 held-out validation images are our choice
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("resnet34-s32u1"),
    data=Tfds("cifar100"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(150, 225), factor=0.1),
    penalty=Penalty(orthogonality=10.0),
    epochs=300,
    batch_size=256,
)
