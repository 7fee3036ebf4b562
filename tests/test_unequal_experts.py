"""Layers with unequal numbers of experts: the same on every mesh, counted, kept, or refused."""

import dataclasses
import math

import numpy as np
import pytest
from train_support import batches, initial, make_config, train

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.inference.placement_choice import choose_placement
from moejax.training.config_json import config_from_json, config_to_json
from sharding.costs import count_parameters
from sharding.mesh import MeshShape

COUNTS = (0, 6, 9)


def unequal(scan_layers=False, **more):
    model = {"num_experts_by_layer": COUNTS, "scan_layers": scan_layers, "num_layers": 3} | more
    return make_config(9, model=model)


def test_every_layer_has_its_own_number():
    config = unequal().model
    start = initial(unequal())
    for index, count in enumerate(COUNTS):
        if count:
            assert config.layers()[index].moe.router.num_experts == count
            assert len(start[f"params/layers.{index}.moe.bank.w_in"]) == count
            assert start[f"params/layers.{index}.moe.router.w_DE"].shape[1] == count
    stored = sum(math.prod(a.shape) for n, a in start.items() if n.startswith("params/"))
    padding = (config.padded_vocab - config.vocab_size) * config.d_model * 2
    assert count_parameters(config).total == stored - padding
    assert config.fewest_experts == 6
    assert config_from_json(ModelConfig, config_to_json(config), source="x") == config


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_training_is_the_same_on_every_mesh(rng, scan_layers):
    """Experts of both layers divide the mesh unevenly; loads move the biases of both."""
    counts = (0, 6, 6, 9)
    more = {"num_layers": 4, "num_experts_by_layer": counts, "top_k_by_layer": ()}
    config = unequal(scan_layers, **more)
    start, tokens = initial(config), batches(rng)
    one, many = (train(config, sizes, start, tokens) for sizes in ((1, 1, 1), (1, 4, 1)))
    np.testing.assert_allclose(many.each("loss"), one.each("loss"), rtol=2e-6)
    for name, value in one.last.items():
        np.testing.assert_allclose(many.last[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for index, count in enumerate(counts[1:], 1):
        bias = one.last[f"bias/layers.{index}.moe.router.selection_bias_E"]
        assert len(bias) == count and bias.any()


def test_what_is_refused():
    with pytest.raises(UserError, match="largest number must be num_experts=9; set that to 8"):
        unequal(num_experts_by_layer=(0, 6, 8))
    with pytest.raises(UserError, match="num_experts_by_layer has 2 entries: needs one for each"):
        unequal(num_experts_by_layer=(6, 9))
    with pytest.raises(UserError, match="top_k=3: must lie between 1 and num_experts=2"):
        unequal(num_experts_by_layer=(0, 9, 2))
    config = unequal()
    with pytest.raises(UserError, match="placement=auto with num_experts_by_layer"):
        dataclasses.replace(config, placement="auto")
    with pytest.raises(UserError, match="--placement auto with num_experts_by_layer"):
        choose_placement("auto", config.model, MeshShape(expert=2))
    equal = dataclasses.replace(config.model, num_experts_by_layer=(0, 9, 9))
    assert choose_placement("auto", equal, MeshShape(expert=2)) is not None
