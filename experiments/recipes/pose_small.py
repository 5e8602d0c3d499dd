"""Human pose on a small folder: two hourglasses, all of whose kernels come from one ring.

Command   paramshare train experiments/recipes/pose_small.py --workdir runs/pose --data.path FOLDER
          one ring per stage: --model.name hourglass2-64-stage-rpg-190464; the same kernels in both
          stages: --model.name hourglass2-64-tied; unshared: --model.name hourglass2-64; images of
          one person each, without cropping: --data.no-person-crop
Time      about 14 minutes for 3,600 training images on 2 CPU cores that other work shared
Result    depends on the folder; it holds keypoints in the format of COCO. On 1,000 people of Leeds
          Sports Pose Extended PCK@0.2 39.3% (3 seeds, results/pose.md; unshared 36.8%). With
          COCO's 17 joints there are 229,330 trainable parameters, as many as with tied stages,
          instead of 419,794
Source    our choice. Wang et al. 2021 generate the sub-networks of a pose network from one ring;
          their network and schedule are not known to us. The network is that of Newell et al. 2016
          with a quarter of the width and two of the eight stages; evaluation averages heatmaps of
          an image and its mirror image, as there
"""

from paramshare.data import Coco
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("hourglass2-64-rpg-190464"),
    data=Coco(task="pose", image_size=96),
    augment=Augment(flip=True, zoom=(0.85, 1.2)),
    optimizer=Optimizer("adam", learning_rate=2e-3, weight_decay=0.0),
    schedule=Schedule("cosine", warmup_epochs=1),
    epochs=10,
    batch_size=16,
)
