"""The compiler option on which the speed of XLA's convolutions on CPUs depends."""

import os
import re
from importlib.util import find_spec

import jax

OPTION = "xla_cpu_experimental_ynn_fusion_type"
# A list of what XLA gives to the YNNPACK library; "-" takes convolutions off it.
WITHOUT_CONVOLUTIONS = f"--{OPTION}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"


def compute_convolutions_without_ynnpack() -> None:
    """Adds the option to `XLA_FLAGS`, which JAX reads when it computes for the first time.

    jaxlib 0.10 to 0.12 compute convolutions on CPUs by the YNNPACK library, unless told otherwise.
    The gradients of kernels take two to five times as long as XLA's own code then. Nothing is
    changed if `XLA_FLAGS` has the option already; for other versions of JAX, which might not know
    it and would abort; and on machines with a TPU, whose compiler reads `XLA_FLAGS` too.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    known = (0, 10) <= jax.__version_info__[:2] < (0, 13)
    if known and OPTION not in flags and find_spec("libtpu") is None:
        os.environ["XLA_FLAGS"] = f"{flags} {WITHOUT_CONVOLUTIONS}".strip()


def ynnpack_convolutions() -> bool:
    """Whether convolutions on CPUs are left to YNNPACK, according to `XLA_FLAGS`.

    The last option of that name counts, which may be a list: "-" takes a kind off.
    """
    values = re.findall(rf"--{OPTION}=(\S*)", os.environ.get("XLA_FLAGS", ""))
    return WITHOUT_CONVOLUTIONS.partition("=")[2] not in (values or [""])[-1].split(",")
