"""Fashion-MNIST: soft sharing against plain networks on a small budget.

Command   paramshare train experiments/recipes/fashion_mnist.py --workdir runs/fashion-mnist
          from the four IDX files, if you have them: --data.name idx --data.path FOLDER
Time      about 6 minutes on 2 CPU cores
Result    see results/fashion_mnist.md, which also compares networks:
          python experiments/studies/compare.py experiments/recipes/fashion_mnist.py \\
              --models swrn-16-2-1 wrn-16-2 wrn-16-1.6875 --seeds 0 1 2 --out runs/fashion
Source    our choice: the recipe of wide residual networks, cut to one epoch
"""

from paramshare.data import Tfds
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("swrn-16-2-1"),
    data=Tfds("fashion_mnist"),
    augment=Augment(flip=True),
    optimizer=Optimizer(learning_rate=0.1),
    schedule=Schedule("cosine", warmup_epochs=0.1),
    epochs=1,
    batch_size=128,
)
