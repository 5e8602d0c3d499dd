"""Object detection on drawn canvases: a RetinaNet whose backbone shares filter bases.

Command   paramshare train experiments/recipes/canvases_retinanet.py --workdir runs/canvases
Time      18 minutes on 2 CPU cores that other work shared
Result    AP 83.1%, AP50 98.3% on 500 test canvases (one seed); 572,582 trainable parameters
Source    our choice: digits of scikit-learn, one to four on a canvas of 64x64. The detector is that
          of Lin et al. 2017 with a narrow pyramid; Kang & Kim's detector is not known to us.
"""

from paramshare.data import Canvases
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule

config = Config(
    model=Model("retinanet-resnet20-s16u1-head64x2"),
    data=Canvases(),
    augment=Augment(zoom=(0.8, 1.25)),
    optimizer=Optimizer("adam", learning_rate=2e-3, weight_decay=0.0, clip_norm=10.0),
    schedule=Schedule("cosine", warmup_epochs=1),
    penalty=Penalty(orthogonality=1.0),
    epochs=20,
    batch_size=32,
)
