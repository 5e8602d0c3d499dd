"""Array operations that have a faster form than XLA's on some machines."""

from paramshare.ops.conv import convolution, fast_convolutions
from paramshare.ops.form import FORMS, Form, OpsError, form
from paramshare.ops.gather import computed_first

__all__ = [
    "FORMS",
    "Form",
    "OpsError",
    "computed_first",
    "convolution",
    "fast_convolutions",
    "form",
]
