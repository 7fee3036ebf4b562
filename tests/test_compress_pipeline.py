"""Whole models with fewer experts: what runs layer by layer, what is written, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from compress_model_support import CONFIG, SEQ, E, K, options, save, weights_of, write_text
from draws import draws
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.compress.__main__ import main
from moejax.compress.config import MergeConfig
from moejax.compress.layers import LayerRunner, experts_of
from moejax.compress.measure import agreement
from moejax.compress.pipeline import compress
from moejax.compress.prune import saliency
from moejax.config import (
    ExchangeConfig,
)
from moejax.errors import UserError
from moejax.inference.model_folder import load_model_folder
from moejax.inference.source import open_model
from moejax.sharing_config import SharingConfig
from moejax.training.state import Blueprint, load_weights
from sharding.costs import count_parameters
from sharding.mesh import MeshShape, make_mesh
from sharding.specs import specs_of


def final_hidden(config, flat, tokens_WS):
    """The whole model's hidden states before its final norm is undone: after it, [W, S, D]."""
    blueprint = Blueprint(dataclasses.replace(config, scan_layers=True), make_mesh(MeshShape()))
    params, biases = load_weights(
        {n: jnp.asarray(np.asarray(a)) for n, a in flat.items()}, blueprint, jnp.float32
    )
    run = jax.shard_map(
        lambda p, b, t: blueprint.merge(p, b)(t).hidden_BSD,
        mesh=blueprint.mesh,
        in_specs=(specs_of(blueprint.params), blueprint.bias_specs, P()),
        out_specs=P(),
        check_vma=False,
    )
    return np.asarray(jax.jit(run)(params, biases, tokens_WS))


def normed(x, weight, eps):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * weight


def flat_after(flat, found):
    gone = found.changed.keys() | found.removed
    return {n: a for n, a in flat.items() if n not in gone} | found.changed


@pytest.fixture(scope="module")
def tokens():
    return draws(__name__).integers(0, 257, (9, SEQ)).astype(np.int32)


def test_layer_by_layer_is_the_model(rng, tmp_path, tokens, monkeypatch):
    monkeypatch.setattr("moejax.compress.layers._TOGETHER", 4 * SEQ)  # 9 windows in 3 parts
    flat = weights_of(rng)
    stored = save(tmp_path / "model", flat)
    run, x = LayerRunner(stored.config), flat["params/embedding.w"][tokens]
    for index, layer in enumerate(stored.config.layers()):
        passed = run(layer, stored.layer(index), x)
        x = passed.x_WSD
        assert (passed.sample is None) == (layer.moe is None)
    found = normed(x, flat["params/final_norm.scale"], CONFIG.norm_eps)
    right = final_hidden(CONFIG, flat, tokens)
    assert np.linalg.norm(found - right) <= 1e-5 * np.linalg.norm(right)
    sample = passed.sample
    assert sample.x_TD.shape == (9 * SEQ, 16) and sample.experts_TK.shape == (9 * SEQ, K)
    assert (sample.experts_TK >= 0).all() and (sample.scores_TK > 0).all()


def test_twins_become_one_and_nothing_else_changes(rng, tmp_path, tokens):
    flat = weights_of(rng)
    for index, (one, other) in ((1, (0, 4)), (2, (3, 5))):
        bank = f"params/layers.{index}.moe.bank."
        order = rng.permutation(8)
        flat[bank + "w_in"][other] = flat[bank + "w_in"][one][..., order]
        flat[bank + "w_out"][other] = flat[bank + "w_out"][one][order]
        # Nearly always chosen together.
        router = f"layers.{index}.moe.router."
        flat[f"params/{router}w_DE"][:, other] = flat[f"params/{router}w_DE"][:, one]
        flat[f"bias/{router}selection_bias_E"][[one, other]] = 0.5
    stored = save(tmp_path / "model", flat)
    for similarity in "outputs", "parameters":
        merge = MergeConfig(similarity=similarity)
        found = compress(stored, tokens, options(experts=E - 1, merge=merge))
        router = found.config.moe.router
        assert (router.num_experts, router.merged_from) == (E - 1, E)
        for index, twins in ((1, (0, 4)), (2, (3, 5))):
            table = found.changed[f"bias/layers.{index}.moe.router.table_R"]
            assert len(set(table)) == E - 1 and table[twins[0]] == table[twins[1]]
        assert max(r.error for r in found.reports) < 1e-5
        assert min(r.used for r in found.reports) < K
        right = final_hidden(CONFIG, flat, tokens)
        after = final_hidden(found.config, flat_after(flat, found), tokens)
        assert np.linalg.norm(after - right) < 1e-4 * np.linalg.norm(right)


def test_pruning_keeps_those_that_matter(rng, tmp_path, tokens):
    flat = weights_of(rng)
    stored = save(tmp_path / "model", flat)
    found = compress(stored, tokens, options(method="prune"))
    assert (found.config.moe.router.num_experts, found.config.moe.router.merged_from) == (4, None)
    first = LayerRunner(stored.config)
    layers = stored.config.layers()
    x = first(layers[0], stored.layer(0), flat["params/embedding.w"][tokens]).x_WSD
    sample = first(layers[1], stored.layer(1), x).sample
    matter = saliency(experts_of(stored.layer(1), layers[1]), sample)
    kept = np.sort(np.argsort(-matter)[:4])
    for name, axis in (
        ("params/layers.1.moe.bank.w_in", 0),
        ("params/layers.1.moe.router.w_DE", 1),
        ("bias/layers.1.moe.router.selection_bias_E", 0),
    ):
        np.testing.assert_array_equal(found.changed[name], np.take(flat[name], kept, axis))
    assert all(0.01 < r.error < 2 and r.used == K for r in found.reports)


@pytest.mark.parametrize("method", ["merge", pytest.param("prune", marks=pytest.mark.slow)])
def test_layers_may_keep_different_numbers(rng, tmp_path, tokens, method):
    flat = weights_of(rng)
    bank = "params/layers.1.moe.bank."
    if method == "merge":  # one layer's experts are nearly alike
        flat[bank + "w_in"][:] = flat[bank + "w_in"][:1]
        flat[bank + "w_out"][:] = flat[bank + "w_out"][:1]
    else:  # one layer's experts but two do nothing
        flat[bank + "w_out"][2:] *= 1e-3
    stored = save(tmp_path / "model", flat)
    found = compress(stored, tokens, options(method=method, by_layer=True))
    assert found.config.num_experts_by_layer == (0, 2, E)
    after = flat_after(flat, found)
    save(tmp_path / "smaller", after, found.config)
    assert np.isfinite(final_hidden(found.config, after, tokens)).all()
    if method == "merge":
        assert found.reports[0].error < 1e-5 and found.reports[1].error < 1e-5


def test_a_threshold_says_how_many(rng, tmp_path, tokens):
    flat = weights_of(rng)
    bank = "params/layers.2.moe.bank."
    flat[bank + "w_in"][1] = flat[bank + "w_in"][0]
    flat[bank + "w_out"][1] = flat[bank + "w_out"][0]
    stored = save(tmp_path / "model", flat)
    # Experts that have nothing in common are left alone, however seldom they are used.
    merge = MergeConfig(threshold=0.9)
    found = compress(stored, tokens, options(experts=0, merge=merge))
    assert found.config.num_experts_by_layer == (0, E, E - 1)
    # What is merged can be merged further: tables are followed.
    again = save(tmp_path / "smaller", flat_after(flat, found), found.config)
    once_more = compress(again, tokens, options(experts=2))
    assert once_more.config.moe.router == dataclasses.replace(
        found.config.moe.router, num_experts=2
    )
    for index in 1, 2:
        table = once_more.changed[f"bias/layers.{index}.moe.router.table_R"]
        assert len(table) == E and set(table) == {0, 1}
    with pytest.raises(UserError, match="--method prune: the model's experts are merged"):
        compress(again, tokens, options(experts=2, method="prune"))
    # A token still needs as many experts as it chooses.
    least = compress(stored, tokens, options(experts=0, merge=MergeConfig(threshold=-9.0)))
    assert least.config.moe.router.num_experts == K


def test_capacities_and_distances_do_not_matter_to_the_sample(rng, tmp_path, tokens):
    flat, samples = weights_of(rng), []
    for name, exchange in ("a", ExchangeConfig()), ("b", ExchangeConfig(capacity_factor=0.3)):
        config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, exchange=exchange))
        stored = save(tmp_path / name, flat, config)
        x = flat["params/embedding.w"][tokens]
        samples.append(LayerRunner(config)(config.layers()[1], stored.layer(1), x).y_TD)
    np.testing.assert_array_equal(*samples)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        pytest.param("basis", E, marks=pytest.mark.slow),
        ("basis", 2),
        ("up", None),
        pytest.param("in", None, marks=pytest.mark.slow),
    ],
)
def test_experts_may_share_parameters(rng, tmp_path, tokens, kind, rank):
    flat = weights_of(rng)
    stored = save(tmp_path / "model", flat)
    sharing = SharingConfig(kind, rank)
    found = compress(stored, tokens, options(method="share", experts=0, sharing=sharing))
    assert found.config.moe.experts.sharing == sharing
    after = flat_after(flat, found)
    save(tmp_path / "smaller", after, found.config)  # names and shapes are the model's
    assert count_parameters(found.config).total == (
        sum(a.size for n, a in after.items() if n.startswith("params/")) - 63 * 16 * 2
    )
    errors = [report.error for report in found.reports]
    hidden = final_hidden(found.config, after, tokens)
    right = final_hidden(CONFIG, flat, tokens)
    difference = np.linalg.norm(hidden - right) / np.linalg.norm(right)
    if rank == E:
        assert max(errors) < 1e-4 and difference < 1e-3
    else:
        assert 0.01 < max(errors) < 1.5 and difference > 1e-3


def test_the_command(rng, tmp_path, capsys):
    text = write_text(tmp_path, rng)
    save(tmp_path / "model", weights_of(rng))
    origin = {"path": "/there", "family": "olmoe", "end_ids": [7, 256], "bos_id": 3}
    (tmp_path / "model" / "origin.json").write_text(json.dumps(origin))
    argv = [str(tmp_path / "model"), str(tmp_path / "out"), "--experts", "4", "--tokens", "960"]
    argv += [*text, "--measure-windows", "2"]
    assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "layer 2: 6 experts become 4" in out and "held-out bits per byte" in out
    folder = load_model_folder(tmp_path / "out")
    assert folder.config.moe.router.merged_from == E
    opened = open_model(tmp_path / "out")
    assert (opened.end_ids, opened.bos_id) == ((7, 256), 3)
    assert folder.record["how"]["experts"] == 4 and len(folder.record["layers"]) == 2
    assert set(folder.arrays["bias/layers.1.moe.router.table_R"].read()) == {0, 1, 2, 3}
    # Again over its own output, but never over what it reads or something else.
    assert main([*argv[:2], "--method", "prune", *argv[2:-1], "0"]) == 0
    assert load_model_folder(tmp_path / "out").config.moe.router.merged_from is None
    capsys.readouterr()
    for out, words in (("model", "is the model that is read"), (".", "no model folder")):
        assert main([argv[0], str(tmp_path / out), *argv[2:]]) == 2
        assert words in capsys.readouterr().err


def test_agreement_of_continuations():
    one = [np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8]), np.array([1])]
    other = [np.array([1, 2, 3, 4]), np.array([5, 6, 0, 8]), np.array([1, 9])]
    exact, leading = agreement(one, other)
    assert exact == pytest.approx(1 / 3) and leading == pytest.approx((1 + 0.5 + 0.5) / 3)
