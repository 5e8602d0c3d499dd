"""Three tasks from one ring: class, place and angle of a turned digit on a canvas.

Command   paramshare train experiments/recipes/several_tasks.py --workdir runs/several
          a ring per task, as large together: --model.name networks-resnet8-rpg-3000-apart; one
          network with three heads: --model.name heads-resnet8-rpg-9000; unshared networks:
          --model.name networks-resnet8; weights: --loss-weights place=2 digit=0.5
Time      153 s on 2 CPU cores that other work shared, the fastest of three runs
Result    digit 95.2%, mean errors of 5.9 degrees and 0.64 pixels (3 seeds,
          results/several_tasks.md); 11,717 trainable parameters instead of 223,901
Source    our choice. Wang et al. 2021 train several tasks from one ring; their networks and tasks
          are not known to us.
"""

from paramshare.data import Canvases
from paramshare.data.canvases import Drawing
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("networks-resnet8-rpg-9000"),
    data=Canvases(
        task="several",
        examples=4000,
        tests=1000,
        drawing=Drawing(size=24, most=1, smallest=9, largest=14, turn=60),
    ),
    optimizer=Optimizer("adam", learning_rate=3e-3, weight_decay=0.0),
    schedule=Schedule("cosine", warmup_epochs=1),
    epochs=15,
    batch_size=64,
)
