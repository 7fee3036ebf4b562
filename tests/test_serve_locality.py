"""Flags of `infer.py` that make routing prefer near experts."""

import dataclasses

import jax
import numpy as np
import pytest
from inference_support import CONFIG, random_weights
from jax.sharding import PartitionSpec as P

from moejax.config import LocalityConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import ModelSource, open_model
from moejax.serving.flags import ModelFlags
from moejax.serving.locality import check_deterministic, check_limits, with_locality
from moejax.serving.start import load_model
from sharding.mesh import TOKEN_AXES, MeshShape
from sharding.specs import specs_of


def source_of(path, config=CONFIG):
    return ModelSource(path, config, None, lambda _: {})


def test_flags_go_before_the_model(tmp_path):
    source = source_of(tmp_path)
    assert with_locality(source, ModelFlags()) is source
    flags = ModelFlags(locality_penalty=0.2, locality_host_penalty=0.5, max_devices=2)
    near = with_locality(source, flags)
    assert near.config.moe.locality == LocalityConfig(0.2, 0.5, max_devices=2)
    assert near.config.moe.router == CONFIG.moe.router
    again = with_locality(near, ModelFlags(locality_penalty=0.0, local_threshold=0.1))
    assert again.config.moe.locality == LocalityConfig(0.0, 0.5, local_threshold=0.1, max_devices=2)


def test_refused(tmp_path):
    source = source_of(tmp_path)
    with pytest.raises(UserError, match=r"--locality-penalty 1\.0: device_penalty=1\.0: must be"):
        with_locality(source, ModelFlags(locality_penalty=1.0))
    with pytest.raises(UserError, match=r"--max-devices 0: max_devices=0"):
        with_locality(source, ModelFlags(max_devices=0))
    dense = dataclasses.replace(CONFIG, first_dense_layers=2, dense_hidden=16)
    with pytest.raises(UserError, match=r"--local-threshold 0\.1: the model has no experts"):
        with_locality(source_of(tmp_path, dense), ModelFlags(local_threshold=0.1))
    near = with_locality(source, ModelFlags(locality_penalty=0.1)).config
    with pytest.raises(UserError, match=r"--deterministic with expert=2 and a model that prefers"):
        check_deterministic(near, MeshShape(expert=2), True)
    off = with_locality(dataclasses.replace(source, config=near), ModelFlags(locality="off"))
    assert off.config == CONFIG
    check_deterministic(off.config, MeshShape(expert=2), True)
    with pytest.raises(UserError, match=r"--locality off with --max-devices 2: leave one"):
        with_locality(source, ModelFlags(locality="off", max_devices=2))
    check_deterministic(near, MeshShape(expert=2), False)
    check_deterministic(near, MeshShape(expert=1), True)
    check_deterministic(CONFIG, MeshShape(expert=2), True)


def test_the_loaded_model_stays_on_its_devices(tmp_path, rng):
    """A threshold of 0: every device holds experts enough, so that nothing is sent."""
    flat = random_weights(CONFIG, rng)
    save_model_folder(tmp_path / "m", flat, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    tokens = rng.integers(0, 257, (4, 8)).astype(np.int32)
    sent = []
    for flags in ModelFlags(), ModelFlags(local_threshold=0.0):
        source = with_locality(open_model(tmp_path / "m"), flags)
        blueprint, params, biases = load_model(source, MeshShape(expert=2), "float32")

        def run(params, biases, tokens_BS, blueprint=blueprint):
            aux = blueprint.merge(params, biases)(tokens_BS, inference=True).aux
            return aux.over_devices()

        mapped = jax.shard_map(
            run,
            mesh=blueprint.mesh,
            in_specs=(specs_of(blueprint.params), blueprint.bias_specs, P(TOKEN_AXES)),
            out_specs=P(),
            check_vma=False,
        )
        aux = jax.jit(mapped)(params, biases, tokens)
        sent.append(int(aux.counters.rows_host.sum()))
        assert (aux.kept is None) == (flags.local_threshold is None)
    assert sent[0] > 0 == sent[1]


def test_limits_are_checked_before_anything_is_loaded(tmp_path):
    """The packaged shapes: 8 experts, 2 for a token; what changes nothing is told."""
    experts, top_k = CONFIG.moe.router.num_experts, CONFIG.moe.router.top_k
    source = source_of(tmp_path)
    few = with_locality(source, ModelFlags(max_devices=1)).config
    assert experts >= 4 and top_k >= 2
    with pytest.raises(UserError, match=rf"max_devices=1 with top_k={top_k}: 1 of the mesh hold"):
        check_limits(few, MeshShape(expert=experts), None)
    assert check_limits(few, MeshShape(expert=experts), top_k) == []  # with room for copies
    assert check_limits(CONFIG, MeshShape(expert=experts), None) == []
    assert "nothing changes" in check_limits(few, MeshShape(), None)[0]
    many = with_locality(source, ModelFlags(max_devices=4, locality_host_penalty=0.5)).config
    told = check_limits(many, MeshShape(expert=2), None)
    assert len(told) == 2 and "limits nothing" in told[0] and "one host" in told[1]
