"""Which form of an operation is used: XLA's own, or one that is faster on CPUs."""

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import jax

from paramshare.errors import ParamshareError

Form = Literal["auto", "xla", "fast"]
FORMS: tuple[Form, ...] = get_args(Form)

_form = jax.make_user_context(None)


class OpsError(ParamshareError):
    """A form of an operation does not exist."""


@contextlib.contextmanager
def form(name: Form) -> Iterator[None]:
    """Chooses the form of the operations in this folder, for whatever is traced in this context.

    Functions under `jax.jit` are traced anew in another context. The trainer's steps use the form
    that `Config.ops` names, whatever the context.

    Args:
      name: "auto" for the fast forms on CPUs, where they pay; "xla" for XLA's forms everywhere;
        "fast" for the fast forms everywhere.

    Raises:
      OpsError: if there is no such form.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare import ops
      >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> loss = lambda kernel: ops.convolution(
      ...     x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      ... ).sum()
      >>> with ops.form("fast"):
      ...     jax.grad(loss)(kernel).shape
      (3, 3, 2, 5)
    """
    if name not in FORMS:
        raise OpsError(f"ops.form({name!r}); the form must be one of {', '.join(FORMS)}")
    with _form(name):
        yield


def chosen() -> Form:
    """The form in this context."""
    return _form.value or "auto"
