"""Shortest paths on grids, a curriculum of five phases: the algorithmic task of soft parameter sharing, the full recipe.

Command   paramshare train experiments/shortest_paths.py --workdir runs/scnn
          and everything that is compared, over five seeds:
          python experiments/shortest_paths_compare.py experiments/shortest_paths.py --out runs/paths
Time      not run: 1.25 million grids of 32 x 32 through twenty layers of 32 channels would be about six hours a network on 2 CPU cores;
          shortest_paths_reduced.py is for those
Result    of the reduced recipe, see results/shortest_paths.md
Source    Savarese & Maire, ICLR 2019, section 4.3, as it has come to us second-hand, not checked against its text. Batch size, constant
          rate and no weight decay are ours, and so is what paramshare.training.data.grids says of the problems
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Curriculum

config = Config(
    model=Model("spathnet-20-32-20"),
    data=Data("grids", validation=0.1, curriculum=Curriculum(size=32, windows=(5, 9, 13, 17, 21), examples=5000)),
    optimizer=Optimizer("adam", learning_rate=0.01, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=250,  # 50 a phase
    batch_size=32,
    log_every=10,
    checkpoint_every=10,
    similarity_every=5,
)
