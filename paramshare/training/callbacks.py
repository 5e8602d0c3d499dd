"""Functions of yours that are called while a network trains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from paramshare.training.run import Run


@dataclasses.dataclass
class Moment:
    """What a callback is told.

    Example:
      >>> import pathlib, tempfile
      >>> from paramshare.data import Digits
      >>> from paramshare.training.config import Config, Model, Schedule
      >>> from paramshare.training.loop import train
      >>> def watch(moment):
      ...     if moment.kind == "epoch":
      ...         print(moment.step, sorted(moment.metrics)[:2], len(moment.variables()["banks"]))
      >>> config = Config(Model("resnet8-rpg-1000"), Digits(train_examples=64), epochs=1,
      ...                 batch_size=32, schedule=Schedule("constant"))
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "run"
      >>> result = train(config, folder, quiet=True, callbacks=[watch])
      2 ['accuracy', 'epoch'] 1

    Attributes:
      kind: "line" after a line of training metrics, "validation" after one within an epoch,
        "epoch" after an epoch and its validation, "end" when the run is finished. A run that was
        finished before calls nothing.
      run: the run; of several that are trained together, one of them.
      step: updates made.
      metrics: of the line, validation or epoch, as in `metrics.jsonl`; at the end those of the
        result.
      variables: gives the network's variables at this step, with whole banks, as NumPy arrays that
        may be kept. It can be called within the callback only. If banks are divided over several
        processes (`shard_banks`), all processes must call it.
      stopped: whether `stop` has been called.
    """

    kind: Literal["line", "validation", "epoch", "end"]
    run: Run
    step: int
    metrics: Mapping[str, Any]
    variables: Callable[[], dict[str, Any]]
    stopped: bool = False

    def stop(self) -> None:
        """Stops the training after this step, with its state saved, as SIGTERM does.

        Of several processes, all must stop at the same step. They also see the same moments; if a
        callback raises an error in one of them, it ends, and so do the others.
        """
        self.stopped = True


Callback = Callable[[Moment], None]
