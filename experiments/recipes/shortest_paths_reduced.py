"""Shortest paths on grids of half the size with half the layers, for a laptop.

Command   paramshare train experiments/recipes/shortest_paths_reduced.py --workdir runs/scnn
          the whole comparison over five seeds:
          python experiments/studies/shortest_paths_compare.py \\
              experiments/recipes/shortest_paths_reduced.py --out runs/paths --processes 2
Time      75 to 80 s per network on one CPU core; the comparison of 20 networks takes 20 minutes on
          two
Result    see results/shortest_paths.md
Source    shortest_paths.py with grid, depth, width and windows halved, so that the points are as
          far apart, in layers, as there; and with much less training: 16 times 1,000 problems per
          phase instead of 50 times 5,000
"""

from paramshare.data import Curriculum, Grids
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("spathnet-10-16-10"),
    data=Grids(
        validation=0.2,
        curriculum=Curriculum(
            size=16,
            windows=(3, 5, 7, 9, 11),
            examples=1000,
            tests=500,
            far_windows=(13, 16),
            far_sizes=(24, 32),
        ),
    ),
    optimizer=Optimizer("adam", learning_rate=0.01, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=80,  # 16 a phase
    batch_size=32,
    log_every=4,
    checkpoint_every=16,
    similarity_every=4,
)
