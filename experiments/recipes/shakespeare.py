"""A decoder of six layers on a text, such as Tiny Shakespeare: the next character.

Command   paramshare train experiments/recipes/shakespeare.py --workdir runs/shakespeare
          --data.path shakespeare.txt
          paramshare sample runs/shakespeare --prompt "ROMEO:"
Time      TIME
Result    RESULT
"""

from paramshare.data import Text
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    model=Model("decoder-6-128-tied", options=("heads=4",)),
    data=Text(length=64),
    optimizer=Optimizer(
        "adamw", learning_rate=2e-3, weight_decay=0.1, decay_vectors=False, clip_norm=1.0
    ),
    schedule=Schedule("cosine", warmup_epochs=0.1),
    epochs=1,
    batch_size=32,
)
