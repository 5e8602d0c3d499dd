"""The persistent cache of compiled programs."""

import argparse
import hashlib
import os
import pathlib
import platform
import warnings
from typing import Any

from paramshare.errors import warn


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --no-compilation-cache."""
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything again; by default compiled programs are kept in "
        "~/.cache/paramshare (in $XDG_CACHE_HOME if set), or where JAX_COMPILATION_CACHE_DIR says",
    )


def use(args: argparse.Namespace) -> None:
    """Lets JAX keep compiled programs; where they cannot be written, it goes on without a word."""
    import jax

    place = folder()
    if args.no_compilation_cache or place is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(place))
        if getattr(warnings.showwarning, "place", None) != place:
            warnings.showwarning = _Show(place)
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")


class _Show:
    """Shows warnings, and empties a cache that cannot be read.

    JAX compiles what it cannot read, such as what a killed process has half written, but never
    writes it again.
    """

    def __init__(self, place: pathlib.Path):
        self.place, self._show = place, warnings.showwarning

    def __call__(self, message: Any, *args: Any, **options: Any) -> None:
        if "Error reading persistent compilation cache" not in str(message):
            return self._show(message, *args, **options)
        warn(f"a program in {self.place} is damaged; what is kept there is compiled again")
        for file in self.place.glob("*-cache"):
            file.unlink(missing_ok=True)


def folder() -> pathlib.Path | None:
    """Where compiled programs are kept: a folder for each kind of CPU. None without a home.

    JAX's keys name the accelerator and its versions, but not the features of a CPU; a program that
    was compiled for another one could fail.
    """
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # a user without an entry in the list of users, as in a container
        return None
    kind = platform.machine() + platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        pass
    return pathlib.Path(caches, "paramshare", hashlib.sha256(kind.encode()).hexdigest()[:12])
