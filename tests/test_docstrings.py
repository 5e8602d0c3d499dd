"""Every example in a docstring runs, and everything public has a docstring."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import pytest

import paramshare

MODULES = sorted(
    {
        "paramshare",
        *(module.name for module in pkgutil.walk_packages(paramshare.__path__, "paramshare.")),
    }
    - {"paramshare.__main__"}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    # As a user would run them: without the strictness of this suite.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        results = doctest.testmod(
            importlib.import_module(name),
            optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
        )
    assert results.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    own = [
        x
        for key, x in vars(module).items()
        if not key.startswith("_") and getattr(x, "__module__", None) == name
    ]
    for thing in own:
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        documentation = thing.__doc__ or ""
        assert documentation.strip(), f"{name}.{thing.__name__} has no docstring"
        # What dataclasses write for those who write nothing: "Layer(path: str, ...)".
        assert not documentation.startswith(f"{thing.__name__}("), (
            f"{name}.{thing.__name__} has no docstring of its own"
        )
        if not inspect.isclass(thing):
            continue
        for key, member in vars(thing).items():
            if (
                not key.startswith("_")
                and inspect.isfunction(member)
                and member.__module__ == name
                and member.__name__ == key
                and not inherits(thing, key)
            ):
                assert inspect.getdoc(member), f"{name}.{thing.__name__}.{key} has no docstring"


def inherits(cls: type, name: str) -> bool:
    """Whether a base class or Flax asks for the method, and so says what it is."""
    return name == "setup" or any(hasattr(base, name) for base in cls.__mro__[1:])


def test_the_public_face_is_sorted_and_whole():
    assert list(paramshare.__all__) == sorted(paramshare.__all__)
    for name in paramshare.__all__:
        assert inspect.getdoc(getattr(paramshare, name)), name
