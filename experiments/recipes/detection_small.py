"""Object detection on a folder of images in the format of COCO, small enough for two CPU cores.

Command   paramshare train experiments/recipes/detection_small.py --workdir runs/detection \
              --data.path FOLDER
Time      4 minutes for 205 images on 2 CPU cores
Result    AP 35.0%, AP50 57.8% on the 72 test images of BCCD, blood cells (mean of three seeds),
          with 574,591 parameters for its three categories; more in results/detection.md
Source    our choice; Kang & Kim's detector and schedule are not known to us
"""

from paramshare.data import Coco
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("retinanet-resnet32-s16u1-head64x2"),
    data=Coco(image_size=128),
    augment=Augment(flip=True, zoom=(0.8, 1.25), colour=0.2),
    optimizer=Optimizer("adam", learning_rate=2e-3, weight_decay=0.0, clip_norm=10.0),
    schedule=Schedule("cosine", warmup_epochs=2),
    penalty=Penalty(orthogonality=1.0),
    epochs=30,
    batch_size=16,
    validate_every=5,
    similarity_every=0,
)
