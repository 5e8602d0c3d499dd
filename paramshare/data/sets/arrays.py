"""The configuration of a run whose data are arrays that the user passes to `train`."""

from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError
from paramshare.data.registry import PASSED, DataConfig, register


@register(PASSED)
class InMemory(DataConfig):
    """A data set that is passed as an object: `train(config, workdir, data=from_arrays(...))`."""

    name: str = PASSED

    def load(self, seed: int = 0) -> Dataset:
        """Raises `DataError`: the arrays are not stored with the configuration."""
        raise DataError(
            f"the data set {self.name!r} was passed as arrays and is not stored; pass it again: "
            "train(config, workdir, data=from_arrays(...))"
        )
