"""Where compiled programs are kept."""

import argparse
import subprocess
import sys

import jax

from paramshare.cli import cache


def test_compiled_programs_are_kept_for_this_kind_of_cpu(monkeypatch, tmp_path):
    """A path that the user has set wins; one option turns it off."""
    settings = {"jax_compilation_cache_dir": None}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = argparse.Namespace(no_compilation_cache=False)
    cache.use(args)  # conftest.py has set a path
    assert settings == {"jax_compilation_cache_dir": None}
    monkeypatch.setattr(cache.platform, "processor", lambda: "a")
    first = cache.folder()
    monkeypatch.setattr(cache.platform, "processor", lambda: "b")
    other = cache.folder()
    assert first and other and first != other and not first.exists()
    assert first.parent == other.parent == tmp_path / "paramshare"
    cache.use(argparse.Namespace(no_compilation_cache=True))
    assert settings["jax_enable_compilation_cache"] is False


def test_without_a_home_nothing_is_kept(monkeypatch):
    def fail() -> None:
        raise RuntimeError("Could not determine home directory.")

    settings = {}
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.pathlib.Path, "home", fail)
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    cache.use(argparse.Namespace(no_compilation_cache=False))
    assert settings == {"jax_enable_compilation_cache": False}


def test_a_damaged_program_is_compiled_again_and_kept(environment, tmp_path):
    code = """
import argparse, sys
from paramshare.cli import cache
cache.use(argparse.Namespace(no_compilation_cache=False))
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 3 + 1)(2))
"""
    variables = environment(1, XDG_CACHE_HOME=str(tmp_path))
    del variables["JAX_COMPILATION_CACHE_DIR"]

    def run() -> tuple[str, str, dict[str, int]]:
        ended = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
        )
        sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*-cache")}
        return ended.stdout, ended.stderr, sizes

    expected, _, sizes = run()
    assert sizes
    for path in tmp_path.rglob("*-cache"):
        path.write_bytes(path.read_bytes()[:-100])
    again, told, mended = run()
    assert (again, mended.keys()) == (expected, sizes.keys())
    assert told.count("is damaged; what is kept there is compiled again") >= 1
    assert all(mended[name] > sizes[name] - 100 for name in sizes)
    assert not run()[1]
