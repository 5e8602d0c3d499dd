"""A decoder whose six blocks use the same kernels predicts the next character of a text.

Command   paramshare train experiments/recipes/shakespeare.py --workdir runs/shakespeare
          --data.path shakespeare.txt
          the plain network: --model.name decoder-6-128; to read what it writes:
          paramshare sample runs/shakespeare --prompt "ROMEO:"
Time      2.5 minutes of CPU time; 3 minutes on 2 cores that ran other programs too
Result    on Tiny Shakespeare (1.1 MB, 65 different characters), one seed: 2.65 bits per character
          on the last 5% of the text with 219,008 parameters. The plain network, with 1,222,528:
          2.53. Without --data.path, the text is 40 kB of documentation: too short to learn much
Source    sizes and schedule are ours
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
