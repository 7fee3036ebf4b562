"""Eight fake CPU devices, strict dtype promotion, warnings as errors (pyproject.toml).

With `--gpu` the devices are those of the machine, for the tests of kernels.
"""

import os
import sys

# Compiling takes most of the time: LLVM need not try hard, and fusions are written as loops by the
# older emitters, three times as fast as by those over MLIR. XLA's own passes stay as they are.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    " --xla_cpu_collective_timeout_seconds=300"
    if "--gpu" not in sys.argv
    else ""
)

# XLA's pool of threads has as many as there are devices. A collective holds a thread of each device
# until all have come, and a program has several that are independent of each other: with more
# threads, those that wait cannot keep out those that they wait for.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
import pytest
from draws import seed_of

if "--gpu" not in sys.argv:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run kernels compiled, on this GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(seed_of("hypothesis"))


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Numbers that are other ones after every change; the seed is printed when the test fails."""
    seed = seed_of(request.node.nodeid)
    request.node.user_properties.append(("seed", seed))
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """After each file: a process that compiled those of hundreds of tests holds gigabytes."""
    yield
    jax.clear_caches()
