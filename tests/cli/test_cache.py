"""Where compiled programs are kept."""

import argparse

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
    assert first.parent == cache.folder().parent == tmp_path / "paramshare"
    assert first != cache.folder() and not first.exists()
    cache.use(argparse.Namespace(no_compilation_cache=True))
    assert settings["jax_enable_compilation_cache"] is False
