r"""CIFAR-100, ResNet34 on shared filter bases: the recipe of Kang & Kim, NeurIPS 2021.

Command   paramshare train experiments/cifar100_basis.py --workdir runs/cifar100-basis
          other ranks: --model.name resnet34-s16u1; MobileNetV2: --model.name mobilenetv2-shared, or
          --model.name mobilenetv2-sharedpp --penalty.pools 'stage\d-expand' 'stage\d-project'
          the plain network: --model.name resnet34 --penalty.orthogonality 0
          what reaches the shared filters, with and without the penalty: --gradient-flow
Time      772 million multiply-adds an image and pass; 300 epochs were not run by us yet
Result    not measured yet. The paper's error is 21.79 % (resnet34-s16u1 22.64, mobilenetv2-shared 27.70, mobilenetv2-sharedpp 27.54):
          its best epoch *on the test set*, whereas we tell the last epoch and the one that validation chose. 7,726,676 trainable
          numbers instead of 21,328,292
Source    the authors' public training code: 150, 75 and 75 epochs at 0.1, 0.01 and 0.001; orthogonality weighed by 10. Batch, momentum
          and weight decay are those of its CIFAR-10 recipe, and not established for CIFAR-100. Flip, pad 4 and crop, and 5,000
          training images held out for validation are ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Penalty, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("resnet34-s32u1"),
    data=Data("cifar100"),
    augment=Augment(flip=True, pad_crop=4),
    optimizer=Optimizer("sgd", learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4),
    schedule=Schedule("step", milestones=(150, 225), factor=0.1),
    penalty=Penalty(orthogonality=10.0),
    epochs=300,
    batch_size=256,
)
