"""The persistent cache of compiled programs."""

import argparse
import hashlib
import os
import pathlib
import platform
import warnings


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

    if args.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder()))
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def folder() -> pathlib.Path:
    """Where compiled programs are kept: a folder for each kind of CPU.

    JAX's keys name the accelerator and its versions, but not the features of a CPU; a program that
    was compiled for another one could fail.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    kind = platform.machine() + platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        pass
    return pathlib.Path(caches, "paramshare", hashlib.sha256(kind.encode()).hexdigest()[:12])
