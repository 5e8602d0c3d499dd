"""The whole suite runs on four host devices, with rank promotion and implicit dtype promotion as errors."""

import os

# Before JAX starts its backends. An accelerator is used on request: JAX_PLATFORMS=cuda pytest.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
