"""COCO keypoints: two stacked hourglasses from one ring of one stage's worth of parameters.

Command   paramshare train experiments/recipes/coco_pose.py --workdir runs/coco --data.path FOLDER
          the plain network: --model.name hourglass2-256; more stages from the same ring:
          --model.name hourglass8-256-rpg-3047424; bfloat16: --model.bfloat16
Time      we have not run it
Result    not measured yet. FOLDER is COCO 2017 as it is downloaded: annotations/, train2017/ and
          val2017/. People are cropped by their annotated boxes in evaluation too. There are
          3,506,914 trainable parameters, 3,047,424 of them in the ring, instead of 6,554,338
Source    network: Newell et al. 2016, two of eight stages, images of 256x256. Schedule: Xiao et al.
          2018, "Simple Baselines for Human Pose Estimation": Adam, 140 epochs, rate 1e-3, divided
          by 10 after 90 and 120, batch 128; they also rotate images by up to 40 degrees. Wang et
          al. 2021 generate the sub-networks of a pose network from one ring; which network and
          schedule they used is not known to us
"""

from paramshare.data import Coco
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("hourglass2-256-rpg-3047424"),
    data=Coco(task="pose", image_size=256),
    augment=Augment(flip=True, zoom=(0.7, 1.3)),
    optimizer=Optimizer("adam", learning_rate=1e-3, weight_decay=0.0),
    schedule=Schedule("step", milestones=(90, 120), factor=0.1),
    epochs=140,
    batch_size=128,
)
