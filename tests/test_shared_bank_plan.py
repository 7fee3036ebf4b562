"""Experts that share parameters: what is counted, predicted, stored and refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from planner_support import run_config

from moejax.config import ExpertsConfig, MoEConfig, SharingConfig
from moejax.errors import UserError
from moejax.families import write_config
from moejax.inference.expert_weights import quantized_blueprint
from moejax.placement.arrays import from_slots
from moejax.placement.resident import resident_blueprint
from moejax.shared_bank import SharedExpertBank
from moejax.training.config import TrainConfig
from moejax.training.config_json import config_from_json, config_to_json
from moejax.training.state import Blueprint
from sharding.costs import count_parameters
from sharding.device_kinds import hardware_of
from sharding.local_weights import Weights
from sharding.mesh import MeshShape, abstract_mesh
from sharding.planner import format_plan, plan
from sharding.specs import specs_of
from sharding.step_work import operations
from sharding.traffic import collectives_of
from sharding.traffic_formulas import fetch_collectives

KINDS = {"up": SharingConfig("up"), "in": SharingConfig("in"), "basis": SharingConfig("basis", 3)}


def model_config(kind, **model):
    sharing = SharingConfig() if kind is None else KINDS[kind]
    return run_config(
        router={"num_experts": 6}, experts={"sharing": sharing, "bias": True}, model=model
    )


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_arrays(kind):
    config = model_config(kind, first_dense_layers=1, dense_hidden=32).model
    counted = count_parameters(config)
    arrays = jax.tree.leaves(Blueprint(config, abstract_mesh(MeshShape())).params)
    padding = 2 * (config.padded_vocab - config.vocab_size) * config.d_model
    assert counted.total == sum(a.size for a in arrays) - padding
    # By hand, of the one layer with experts: 6 of width 64, 2 for a token.
    one, biases = 128 * 64, 2 * 64 + 128
    own, shared = {
        "up": (2 * one, one),
        "in": (one, 2 * one),
        "basis": (2 * 3, 3 * 3 * one),
    }[kind]
    assert counted.experts == 6 * (own + biases) + shared
    assert counted.total - counted.active == 4 * (own + biases)


@pytest.mark.parametrize(
    ("remat", "kinds"),
    [
        ("none", ("in",)),
        ("dots", ("basis",)),
        *(pytest.param(r, KINDS, marks=pytest.mark.slow) for r in ("none", "dots", "layer")),
    ],
)
def test_plans_count_what_is_made_and_what_travels(remat, kinds):
    """The matrices of a device's 3 experts: of both layers, or of the one that is made again."""
    mesh = MeshShape(1, 2, 2)
    whole = plan(model_config(None, remat=remat), mesh)
    w_in, w_out = 2 * 3 * 128 * 2 * 32, 2 * 3 * 128 * 32  # bytes in bfloat16
    for kind in kinds:
        shared = plan(model_config(kind, remat=remat), mesh)
        assert shared.formulas_agree
        more = w_in + w_out if kind == "basis" else w_in
        found = shared.memory.kept + shared.memory.working
        before = whole.memory.kept + whole.memory.working
        assert found - before == (2 if remat == "none" else 1) * more, kind
        assert f"sharing '{kind}'" in format_plan(shared)


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_predicted_steps_make_the_matrices(remat):
    """Of 3 experts on a device in each of 2 layers: forward, again where remade, and backward."""
    mesh, nothing = MeshShape(1, 2, 2), Weights(0, 0, 0)
    kind = hardware_of("h100").kind

    def of_weights(kind_of_sharing):
        config = model_config(kind_of_sharing, remat=remat)
        found = [o for o in operations(config, mesh, nothing, kind) if o.part == "weights"]
        return np.array([sum(o.times * getattr(o, n) for o in found) for n in ("flops", "moved")])

    numbers = 2 * 3 * 3 * 128 * 32
    forward = 1 if remat == "none" else 2
    more = of_weights("basis") - of_weights(None)
    assert more.tolist() == [2 * 3 * numbers * (forward + 2), 2 * numbers * (forward + 2)]
    assert (of_weights("up") - of_weights(None)).tolist() == [0, more[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_only_own_parts_travel(kind):
    """Copies that a placement fetches: counted in the traced program, and by formula."""
    config, sizes = model_config(kind, num_layers=1), MeshShape(1, 2, 2)
    slots = np.array([0, 1, 2, 3, 3, 4, 5, 0])
    bank = nnx.eval_shape(
        lambda: SharedExpertBank(
            128, 6, config.model.moe.experts, expert_devices=2, rngs=nnx.Rngs(params=0)
        )
    )
    graph, params = nnx.split(bank)

    def body(params):
        weights = nnx.merge(graph, params).weights(from_slots(slots, 6), jnp.bfloat16)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(weights))

    mapped = jax.shard_map(
        body,
        mesh=abstract_mesh(sizes),
        in_specs=(specs_of(params),),
        out_specs=P(),
        check_vma=False,
    )
    traced = jax.make_jaxpr(mapped)(params)
    found = collectives_of(traced, {"data": 1, "expert": 2, "tensor": 2})
    (fetched,) = [c for c in found if c.name == "replica fetch"]
    formulas = fetch_collectives(config, sizes, 4, [1])
    assert fetched.sent == sum(c.sent for c in formulas if c.phase == "forward")
    # By hand: buckets of 2 experts to the other device, bfloat16; H and b_in split over `tensor`.
    own = {"up": 2 * 128 * 32, "in": 128 * 32, "basis": 2 * 3}[kind] + 2 * 32 + 128
    assert fetched.sent == 2 * own * 2


def test_stored_configs():
    for kind in KINDS:
        config = model_config(kind)
        assert config_from_json(TrainConfig, config_to_json(config)) == config
    old = config_to_json(model_config(None))
    del old["model"]["moe"]["experts"]["sharing"]
    assert config_from_json(TrainConfig, old) == model_config(None)


def test_what_is_refused():
    with pytest.raises(UserError, match="kind='up' with activation='gelu': has no gate"):
        ExpertsConfig(activation="gelu", sharing=SharingConfig("up"))
    with pytest.raises(UserError, match="rank=9 with num_experts=8: 8 matrices of their own"):
        MoEConfig(experts=ExpertsConfig(sharing=SharingConfig("basis", 9)))
    with pytest.raises(UserError, match="rank=None with sharing kind='basis'"):
        SharingConfig("basis")
    with pytest.raises(UserError, match="rank=2 with sharing kind='up': only 'basis' has one"):
        SharingConfig("up", 2)
    config = model_config("up").model
    blueprint = Blueprint(config, abstract_mesh(MeshShape()))
    with pytest.raises(UserError, match=r"make_resident with .*, of experts that share"):
        resident_blueprint(blueprint, 6)
    with pytest.raises(UserError, match="--expert-weights int8 with experts that share"):
        quantized_blueprint(blueprint, "int8")
    moe = dataclasses.replace(config.moe, experts=ExpertsConfig(sharing=SharingConfig("in")))
    with pytest.raises(UserError, match=r"mixtral model cannot be like this one: .*sharing"):
        write_config(dataclasses.replace(config, moe=moe), "mixtral")
