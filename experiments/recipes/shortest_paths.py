"""Shortest paths on grids, a curriculum of five phases: the full recipe of soft sharing.

Command   paramshare train experiments/recipes/shortest_paths.py --workdir runs/scnn
          the whole comparison over five seeds:
          python experiments/studies/shortest_paths_compare.py \\
              experiments/recipes/shortest_paths.py --out runs/paths
Time      not run: 1.25 million grids of 32 x 32 through twenty layers of 32 channels would take
          about six hours per network on 2 CPU cores; use shortest_paths_reduced.py there
Result    of the reduced recipe: see results/shortest_paths.md
Source    Savarese & Maire, ICLR 2019, section 4.3, known to us second-hand and not checked
          against its text. Batch size, constant learning rate and no weight decay are our choice,
          and so are the details of the problems in paramshare.data.sets.grids
"""

from paramshare.data import Curriculum, Grids
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("spathnet-20-32-20"),
    data=Grids(
        validation=0.1,
        curriculum=Curriculum(size=32, windows=(5, 9, 13, 17, 21), examples=5000),
    ),
    optimizer=Optimizer("adam", learning_rate=0.01, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=250,  # 50 a phase
    batch_size=32,
    log_every=10,
    checkpoint_every=10,
    similarity_every=5,
)
