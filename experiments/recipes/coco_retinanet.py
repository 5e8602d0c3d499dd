"""COCO detection: a RetinaNet on ResNet50 with shared bottlenecks, by the usual 1x schedule.

Command   paramshare train experiments/recipes/coco_retinanet.py --workdir runs/coco \
              --data.path FOLDER
          the plain network: --model.name retinanet-resnet50; filter bases: --model.name
          retinanet-resnet34-s32u1; bfloat16: --model.bfloat16; from tensorflow-datasets:
          --data.name coco/2017
Time      we have not run it
Result    not measured yet. FOLDER is COCO 2017 as it is downloaded: annotations/, train2017/ and
          val2017/. For its 80 categories there are 26,544,948 parameters
Source    network and schedule: Lin et al. 2017: batch 16, 12 epochs, rate 0.01, divided by 10 after
          8 and 11, weight decay 1e-4 (here of norms and biases, too). Here images are 640x640
          instead of 800 on the shorter side, gradients are clipped, the coarsest level is made from
          the pyramid and not from the backbone, every object has its nearest anchor, and 1,000
          candidates are kept of all levels, not of each. From scratch 12 epochs are too few: train
          imagenet_basis.py first, then add --init-from runs/imagenet-basis --init-into backbone.
          Kang & Kim's detector and schedule are not known to us
"""

from paramshare.data import Coco
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("retinanet-resnet50-sharedpp"),
    data=Coco(image_size=640),
    augment=Augment(flip=True),
    optimizer=Optimizer(
        "sgd", learning_rate=0.01, momentum=0.9, nesterov=False, weight_decay=1e-4, clip_norm=10.0
    ),
    schedule=Schedule("step", milestones=(8, 11), factor=0.1, warmup_epochs=0.1),
    epochs=12,
    batch_size=16,
    similarity_every=0,
)
