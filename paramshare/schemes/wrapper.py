"""Schemes that change what another scheme makes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from paramshare.schemes.interface import Scheme, SchemeError, Site


@dataclasses.dataclass(frozen=True)
class Wrapper(Scheme):
    """Base class of schemes around another one; asks the other one about sites and initializers.

    Args:
      scheme: the wrapped scheme.

    Raises:
      SchemeError: if it is not a scheme.
    """

    scheme: Scheme

    def __post_init__(self):
        if not isinstance(self.scheme, Scheme):
            raise SchemeError(
                f"{type(self).__name__}({self.scheme!r}): the first argument must be a sharing "
                "scheme such as Tied()"
            )

    def bind(self, shapes_of: Callable[[Any], Mapping[str, tuple[int, ...]]]) -> Scheme:
        """The same around the bound scheme."""
        return dataclasses.replace(self, scheme=self.scheme.bind(shapes_of))

    @property
    def measures_initializer(self) -> bool:
        """Whether the wrapped scheme needs the sites' `mean` and `std`."""
        return self.scheme.measures_initializer

    def check_initializer(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` if the wrapped scheme cannot start from the sites' initializers."""
        self.scheme.check_initializer(sites)

    def _check(self, sites: tuple[Site, ...]) -> None:
        self.scheme.check(sites)
