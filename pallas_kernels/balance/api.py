"""Settling a batch's loads: replicas on devices above the limit hand assignments to others.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. All give the same numbers.

Shape letters: E experts, R most replicas of an expert, G devices.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels import backends
from pallas_kernels.balance import reference, warp_settle
from pallas_kernels.hopper.compat import hopper_refusal

__all__ = ["BACKENDS", "explain", "settle"]

BACKENDS = ("mosaic_gpu", "reference")


def _refusal(experts: int, replicas: int, devices: int) -> Callable[[str, bool], str | None]:
    def refusal(backend: str, forced: bool) -> str | None:
        if backend != "mosaic_gpu":
            return None
        # What is asked here is the device: integers are counted.
        reason = warp_settle.refusal(experts, replicas, devices)
        return reason or hopper_refusal(jnp.bfloat16, forced=forced)

    return refusal


def explain(experts: int, replicas: int, devices: int) -> str:
    """One line: the backend that serves these sizes, and why those before it do not."""
    return backends.explain("settle", BACKENDS, _refusal(experts, replicas, devices))


def settle(
    count_ER: Int32[Array, "E R"],
    device_ER: Int32[Array, "E R"],
    real_ER: Bool[Array, "E R"],
    devices: int,
    fixed_G: Int32[Array, " G"] | None = None,
    *,
    percent: int,
    rounds: int,
    backend: str | None = None,
) -> Int32[Array, "E R"]:
    """How many assignments each replica shall have; each expert's sum is unchanged.

    In every round a device above the limit pushes its excess to the least loaded replicas of its
    experts: those below the limit if they suffice, or else further ones with less load, by half of
    the difference, which push on in the next round.

    Args:
        count_ER: int32, assignments of each replica now, below 2³⁰ in all; 0 where there is none.
        device_ER: int32, the devices of the replicas; of what is no replica any device.
        real_ER: whether there is a replica; the first of an expert is one.
        devices: G.
        fixed_G: int32, assignments that stay where they are; None: none.
        percent: the limit, of the mean load; at least 100.
        rounds: static.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        int32 [E, R].

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
    """
    experts, replicas = count_ER.shape
    refusal = _refusal(experts, replicas, devices)
    chosen = backends.choose("settle", BACKENDS, backend, refusal)
    function = warp_settle.settle if chosen == "mosaic_gpu" else reference.settle
    fixed_G = jnp.zeros(devices, jnp.int32) if fixed_G is None else fixed_G
    return function(count_ER, device_ER, real_ER, devices, fixed_G, percent=percent, rounds=rounds)
