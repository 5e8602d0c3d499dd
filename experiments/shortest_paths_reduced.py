"""Shortest paths on grids of half the size, in half the layers: the algorithmic task of soft parameter sharing, for a laptop.

Command   paramshare train experiments/shortest_paths_reduced.py --workdir runs/scnn
          and everything that is compared, over five seeds:
          python experiments/shortest_paths_compare.py experiments/shortest_paths_reduced.py --out runs/paths --processes 2
Time      75 to 80 s a network on a CPU core; the second command, 20 networks and all that is measured of them, 20 minutes on two
Result    see results/shortest_paths.md
Source    shortest_paths.py, with grid, depth, width and windows halved, so that points are as far apart, in layers, as there; and with
          much less training, 16 times 1,000 problems a phase in the place of 50 times 5,000
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Curriculum

config = Config(
    model=Model("spathnet-10-16-10"),
    data=Data(
        "grids",
        validation=0.2,
        curriculum=Curriculum(size=16, windows=(3, 5, 7, 9, 11), examples=1000, tests=500, far_windows=(13, 16), far_sizes=(24, 32)),
    ),
    optimizer=Optimizer("adam", learning_rate=0.01, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=80,  # 16 a phase
    batch_size=32,
    log_every=4,
    checkpoint_every=16,
    similarity_every=4,
)
