"""Fashion-MNIST, from its IDX files or through tensorflow-datasets: sharing against plain networks on a small budget.

Command   paramshare train experiments/fashion_mnist.py --workdir runs/fashion-mnist
          and, where the four IDX files are at hand already: --data.name idx --data.path FOLDER
Time      about 6 minutes on 2 CPU cores
Result    see results/fashion_mnist.md, which also compares networks:
          python experiments/compare.py experiments/fashion_mnist.py \\
              --models swrn-16-2-1 wrn-16-2 wrn-16-1.6875 --seeds 0 1 2 --out runs/fashion
Source    the recipe of wide residual networks, cut down to one epoch; ours
"""

from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("swrn-16-2-1"),
    data=Data("fashion_mnist"),
    augment=Augment(flip=True),
    optimizer=Optimizer(learning_rate=0.1),
    schedule=Schedule("cosine", warmup_epochs=0.1),
    epochs=1,
    batch_size=128,
)
