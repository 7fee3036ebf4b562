"""The table of layouts, counted and predicted by formulas, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence

Table = tuple[Sequence[str], list[list[str]]]

PRESET, KIND = "mixtral_8x7b", "h100"
MESHES = ((64, 1, 1), (16, 4, 1), (8, 8, 1), (8, 4, 2), (4, 8, 2), (8, 1, 8), (1, 8, 8))


def layouts() -> Table:
    """What a device holds and sends in a step on several meshes of 64, by closed formulas."""
    from moejax.presets import PRESETS
    from moejax.training.residuals import reducer_of
    from moejax.training.state import Blueprint
    from sharding.device_kinds import hardware_of
    from sharding.layout import Layout
    from sharding.local_weights import weights_of
    from sharding.memory import memory_of
    from sharding.mesh import AXES, MeshShape, abstract_mesh
    from sharding.step_time import predict_step
    from sharding.traffic_formulas import expected_collectives, tokens_at_once
    from sharding.zero import storage_tree

    run, hardware = PRESETS[PRESET](), hardware_of(KIND, 0)
    params = Blueprint(run.model, abstract_mesh(MeshShape())).params
    body = []
    for sizes in MESHES:
        mesh = MeshShape(*sizes)
        config = Layout(mesh, 1, "local").of(run)
        storage = storage_tree(params, dict(zip(AXES, mesh.sizes)))
        reducer = reducer_of(params, storage, mesh, config)
        memory = memory_of(config, mesh, params, storage, None, reducer)
        crossings = expected_collectives(config, mesh, params, storage, reducer)
        weights = weights_of(config, mesh, params, storage)
        step = predict_step(config, mesh, weights, crossings, hardware)
        over = {"expert": 0.0, "tensor": 0.0, "rest": 0.0}
        for crossing in crossings:
            of_rows = crossing.name in ("dispatch", "combine")
            axis = "expert" if of_rows else "tensor" if crossing.axes == ("tensor",) else "rest"
            over[axis] += 0.0 if crossing.extra else crossing.sent
        gib = [memory.masters + memory.moments, memory.weights + memory.gradients, *over.values()]
        body.append(
            [
                " × ".join(map(str, sizes)),
                f"{tokens_at_once(config, mesh)}",
                *(f"{count / 2**30:.1f}" for count in gib),
                f"{step.time.total:.2f}",
            ]
        )
    headings = ["data × expert × tensor", "tokens of a device", "masters and moments, GiB"]
    headings += ["weights and gradients, GiB", "rows sent, GiB", "sums over `tensor` sent, GiB"]
    return [*headings, "weights and gradients sent, GiB", "step, s, predicted"], body
