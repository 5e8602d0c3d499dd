"""What a bench measures, but for the times themselves."""

import json

import jax
import pytest

from paramshare import create_model
from paramshare.measure.cost import cost
from paramshare.training import bench as module
from paramshare.training.bench import BenchError, Program, bench

SHAPE = (8, 8, 3)
NAME = "resnet8-rpg-100"


@pytest.mark.slow
def test_a_shared_network_is_compared_with_the_plain_one():
    result = bench("step", [NAME], batch_size=4, input_shape=SHAPE, rounds=1, devices=2)
    shared, plain = result.timings
    assert (shared.name, plain.name) == (NAME, f"{NAME} (plain)")
    assert plain.ratio == 1 and shared.ratio == shared.median / plain.median
    of_shared, of_plain = (cost(create_model(name, 10, SHAPE), SHAPE) for name in (NAME, "resnet8"))
    assert (shared.all_reduced, plain.all_reduced) == (of_shared.all_reduce, of_plain.all_reduce)
    # Gradient and momentum; the schedule counts steps in four bytes.
    assert shared.optimizer == 2 * of_shared.bytes + 4 < plain.optimizer
    # Two copies of the plain network's weights, the optimizer's and its own, are arguments.
    assert plain.memory > 2 * of_plain.bytes
    assert result.about["devices"].startswith("2 x ") and result.about["batch"] == 4
    assert json.loads(result.as_json())["timings"][0]["median"] == shared.median
    assert f"time / {NAME} (plain)" in str(result)


def test_generation_is_measured_in_bytes_beside_a_copy(monkeypatch):
    monkeypatch.setattr(module, "COPY_BYTES", 2**12)
    result = bench("generation", [NAME], input_shape=SHAPE, forms=("auto", "xla"), rounds=2)
    *generation, copy = result.timings
    assert [timing.name for timing in generation] == [
        f"{NAME} ({form}): {what}" for form in ("auto", "xla") for what in ("kernels", "gradient")
    ]
    sites = create_model(NAME, 10, SHAPE).layout.banks[0].sites  # pyright: ignore
    moved = 4 * (100 + sum(site.size for site in sites))
    for timing in generation:
        assert timing.bytes_per_second * timing.median / 1000 == pytest.approx(moved)
    assert copy.bytes_per_second * copy.median / 1000 == pytest.approx(2 * 2**12)


def test_a_baked_network_needs_the_memory_of_the_plain_one():
    shared, plain = bench("baked", [NAME], batch_size=1, input_shape=SHAPE, rounds=1).timings
    assert shared.name != plain.name and shared.memory == plain.memory


def test_programs_take_turns():
    calls = []
    programs = [
        Program(name, lambda name=name: calls.append(name), 0.0, 0.0, 0) for name in ("a", "b")
    ]
    module._timed(programs, rounds=3)
    assert "".join(calls) == "ab" + 3 * "ab"  # the first calls are not timed


def test_the_compilation_cache_is_not_used_and_left_as_it_was():
    assert jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BenchError):
        bench("generation", ["resnet8"], input_shape=SHAPE)
    assert jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("what", "names", "options", "message"),
    [
        ("step", [NAME], {"rounds": 0}, "0 rounds"),
        ("step", [], {}, "0 networks"),
        ("step", [NAME], {"devices": 9}, "devices is 9; there are 4"),
        ("generation", ["resnet8"], {}, "resnet8 shares no parameters"),
        ("step", ["spathnet-2-4-2"], {"input_shape": None}, r"outputs of shape \(32, 32\)"),
    ],
)
def test_what_cannot_be_measured_is_named(what, names, options, message):
    with pytest.raises(BenchError, match=message):
        bench(what, names, **{"input_shape": SHAPE} | options)
