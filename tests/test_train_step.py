"""The whole train step: the same training on every mesh, however it is stored and computed.

The tokens are fixed, because two almost equal router scores may swap under another rounding and
fresh tokens would bring that about now and then.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_support import (
    BATCH,
    SEQ,
    STEPS,
    assert_same_training,
    batches,
    initial,
    make_config,
    train,
)

from moejax.training.optimizer import learning_rate
from sharding import zero
from sharding.gradients import global_norm, reduce_gradients
from sharding.mesh import AXES, DATA, EXPERT, TENSOR, MeshShape, make_mesh
from sharding.zero import Storage, gather_weights, scatter_gradients, storage_of

TOKENS = batches(np.random.default_rng(1))


@pytest.fixture(scope="module")
def start():
    return initial(make_config())


@pytest.fixture(scope="module")
def one_device(start):
    return train(make_config(), (1, 1, 1), start, TOKENS)


@pytest.fixture(scope="module")
def in_pieces(start):
    """2 × 2 × 2 with every parameter that `data` divides stored in pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALLEST", 2)
        return train(make_config(), (2, 2, 2), start, TOKENS)


def test_one_device_learns_and_balances(one_device):
    losses = one_device.each("loss")
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    config = make_config()
    np.testing.assert_allclose(
        one_device.each("learning_rate"),
        [float(learning_rate(config.optimizer, config.steps, s)) for s in range(STEPS)],
    )
    # The bias moves by its rate against every load, and stays 0 on average.
    counts_LE = one_device.metrics[0]["moe"].counts_E
    assert counts_LE.shape == (2, 10)
    np.testing.assert_array_equal(counts_LE.sum(1), [2 * BATCH * SEQ, 3 * BATCH * SEQ])
    biases = [v for n, v in one_device.first.items() if n.startswith("bias/")]
    assert len(biases) == 2
    for bias_E, counts_E in zip(biases, counts_LE):
        moved = 0.01 * np.sign(counts_E.mean() - counts_E)
        np.testing.assert_allclose(bias_E - bias_E.mean(), moved - moved.mean(), atol=1e-7)


def test_2x2x2_with_stored_pieces_equals_one_device(in_pieces, one_device):
    assert_same_training(in_pieces, one_device)
    storage = dict(nnx.to_flat_state(in_pieces.blueprint.storage))
    masters = dict(nnx.to_flat_state(in_pieces.state.masters))
    moments = [dict(nnx.to_flat_state(m)) for m in in_pieces.state.moments]
    split = 0
    for path, stored in storage.items():
        for tree in (masters, *moments):
            value = tree[path].get_value()
            shards = np.prod([in_pieces.blueprint.mesh.shape[a] for a in _axes(stored.stored)])
            assert value.sharding.shard_shape(value.shape) == value.addressable_shards[0].data.shape
            assert value.addressable_shards[0].data.size * shards == value.size
        split += stored.dim is not None
        if stored.dim is not None:
            assert DATA in _axes(stored.stored) and DATA not in _axes(stored.spec)
    assert split > 0.9 * len(storage)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 3, 1)])
def test_meshes_on_which_ten_experts_do_not_divide(sizes, start, one_device):
    assert_same_training(train(make_config(), sizes, start, TOKENS), one_device)


def test_clipping_counts_every_parameter_once(in_pieces, one_device):
    """After one step the first moment is (1 − b1) times the clipped gradient."""
    for run in (in_pieces, one_device):
        gradient = [v / 0.1 for n, v in run.first.items() if n.startswith("mu/")]
        clipped = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient))
        assert run.each("grad_norm")[0] > 0.5  # something was clipped
        np.testing.assert_allclose(clipped, 0.5, rtol=1e-4)


# ── ways to compute the same ─────────────────────────────────────────────────


def plain(scan_layers=False, remat="none", **changes):
    """Equal layers without the load-balance loss, which is not linear in the batch."""
    model = {"top_k_by_layer": (), "scan_layers": scan_layers, "remat": remat}
    return make_config(model=model, router={"load_balance_coef": 0.0}, **changes)


@pytest.fixture(scope="module")
def plain_run(start):
    return train(plain(), (1, 1, 1), start, TOKENS)


def test_scanned_layers_with_further_waves(start, plain_run):
    """Scanned over 2 × 2 × 2 with buckets so small that rows travel in further waves.

    What layers have received is kept for the backward.
    """
    config = plain(scan_layers=True, remat="local", bucket_rows=5)
    run = train(config, (2, 2, 2), start, TOKENS)
    assert any(group.scanned for group in run.blueprint.groups)
    assert min(m["moe"].counters.waves.min() for m in run.metrics) >= 2
    assert_same_training(run, plain_run)


def test_accumulated_microbatches(start, plain_run):
    run = train(plain(accumulate=2, loss_chunk=16), (1, 4, 1), start, TOKENS)
    assert_same_training(run, plain_run)


def test_bfloat16(start, plain_run):
    config = plain(scan_layers=True)
    model = dataclasses.replace(config.model, compute_dtype="bfloat16", remat="layer")
    run = train(dataclasses.replace(config, model=model), (2, 2, 2), start, TOKENS)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(run.each(name), plain_run.each(name), rtol=0.05)
    for name, value in run.last.items():
        assert np.isfinite(value).all(), name
        assert value.dtype in (np.float32, np.int32), name


# ── reductions, by brute force ───────────────────────────────────────────────


def _axes(spec):
    return [a for entry in spec if entry for a in ([entry] if isinstance(entry, str) else entry)]


def _on_mesh(function, mesh, in_specs, out_specs):
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def test_gradients_are_summed_over_the_axes_that_do_not_split_them(rng):
    """Every device has its own gradient; along `tensor` whole parameters have equal ones."""
    mesh = make_mesh(MeshShape(2, 2, 2))
    specs = {"dense": P(), "heads": P(None, TENSOR), "experts": P(EXPERT, None, TENSOR)}
    local = {  # [data, expert, tensor, *local shape]
        "dense": np.repeat(rng.normal(size=(2, 2, 1, 4, 6)), 2, axis=2),
        "heads": rng.normal(size=(2, 2, 2, 4, 3)),
        "experts": rng.normal(size=(2, 2, 2, 2, 4, 3)),
    }
    local = {n: v.astype(np.float32) for n, v in local.items()}
    want = {
        "dense": local["dense"][:, :, 0].sum((0, 1)),
        "heads": np.concatenate([local["heads"][:, :, t].sum((0, 1)) for t in (0, 1)], axis=1),
        "experts": np.concatenate(
            [
                np.concatenate([local["experts"][:, e, t].sum(0) for t in (0, 1)], axis=2)
                for e in (0, 1)
            ]
        ),
    }
    storage = {
        "dense": Storage(P(), 1),
        "heads": Storage(P(None, TENSOR), 0),
        "experts": Storage(P(EXPERT, None, TENSOR), 1),
    }

    def both(local):
        grads = jax.tree.map(lambda g: lax.squeeze(g, (0, 1, 2)), local)
        reduced, pieces = reduce_gradients(grads, specs), scatter_gradients(grads, storage)
        stored = {n: s.stored for n, s in storage.items()}
        return reduced, pieces, global_norm(reduced, specs), global_norm(pieces, stored)

    stored = {n: s.stored for n, s in storage.items()}
    run = _on_mesh(both, mesh, (P(*AXES),), (specs, stored, P(), P()))
    reduced, pieces, *norms = run(jax.device_put(local, NamedSharding(mesh, P(*AXES))))
    norm = np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in want.values()))
    for name, value in want.items():
        np.testing.assert_allclose(reduced[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(pieces[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        size = pieces[name].addressable_shards[0].data.size
        assert size * 2 == reduced[name].addressable_shards[0].data.size
    np.testing.assert_allclose(norms, norm, rtol=1e-5)


def test_stored_pieces_are_gathered_whole_and_rounded_once(rng):
    mesh = make_mesh(MeshShape(2, 2, 2))
    storage = {"w": Storage(P(None, TENSOR), 0), "scale": Storage(P(), 0, np.dtype("float32"))}
    values = {
        "w": rng.normal(size=(4, 6)).astype(np.float32),
        "scale": rng.normal(size=8).astype(np.float32),
    }
    run = _on_mesh(
        lambda v: gather_weights(v, storage, jax.numpy.bfloat16),
        mesh,
        ({n: s.stored for n, s in storage.items()},),
        {n: s.spec for n, s in storage.items()},
    )
    got = run(values)
    np.testing.assert_array_equal(got["scale"], values["scale"])
    assert got["scale"].dtype == np.float32 and got["w"].dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(np.asarray(got["w"]), values["w"].astype(jax.numpy.bfloat16))


def test_what_is_split_over_data(monkeypatch):
    monkeypatch.setattr(zero, "SMALLEST", 100)
    sizes = {"data": 4, "expert": 2, "tensor": 2}

    def dim(shape, spec):
        return storage_of(shape, spec, sizes, float32=False).dim

    assert dim((16, 32), P()) == 1  # the largest
    assert dim((32, 30), P()) == 0  # 4 does not divide 30
    assert dim((16, 32), P(None, TENSOR)) == 0  # the other one is split already
    assert dim((7, 30), P()) is None
    assert dim((4, 24), P()) is None  # too small
    assert dim((10, 16), P(None, TENSOR)) is None  # small on a device
    assert storage_of((64, 64), P(), sizes | {"data": 1}, float32=False).dim is None
    assert storage_of((4, 24), P(), sizes, float32=True).dtype == np.float32
