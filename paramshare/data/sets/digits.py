"""The handwritten digits of scikit-learn; no download."""

from typing import Any

from paramshare.data.dataset import Dataset
from paramshare.data.prepared import prepared_builder
from paramshare.data.reading import PreparedConfig, read
from paramshare.data.registry import register


@register("digits")
class Digits(PreparedConfig):
    """Handwritten digits: 1,442 grey images of 8x8 to train on, 355 to test, ten classes.

    Example:
      >>> data = Digits(validation=0.2).load(seed=0)  # doctest: +SKIP
      >>> len(data.train), len(data.validation), len(data.test)  # doctest: +SKIP
      (1154, 288, 355)
    """

    name: str = "digits"

    def load(self, seed: int = 0) -> Dataset:
        """The digits; the seed chooses the validation images."""
        builder = prepared_builder(self._builder, self.name, self.data_dir, local=True)
        return read(builder, self, seed)

    def _builder(self, data_dir: str | None) -> Any:
        from paramshare.data.sets.builders.digits import DigitsBuilder

        return DigitsBuilder(data_dir=data_dir)
