"""Training with compressed gradients: as good, continued in the same bits, and on other meshes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from train_support import batches, blueprint_of, host, initial, make_config

from moejax.model.canonical import canonical
from moejax.training.checkpoint import Checkpoints
from moejax.training.config import TrainConfig
from moejax.training.config_json import config_from_json, config_to_json
from moejax.training.residuals import (
    PREFIX,
    continuation_notes,
    make_reducer,
    residual_arrays,
    residual_metadata,
    residual_targets,
    with_residuals,
)
from moejax.training.state import (
    from_logical,
    in_logical_order,
    logical_targets,
    to_logical,
)
from moejax.training.step import BATCH_SPEC, make_train_step
from sharding import zero
from sharding.compression.config import GradCompression
from sharding.compression.interface import RESIDUAL

SIZES, STEPS = (4, 2, 1), 30
EXACT = make_config(experts=6, model={"num_layers": 2, "top_k_by_layer": (1, 2)})
FEEDBACK = GradCompression("int4", rounding="error_feedback", weight_gather="int8")
TOKENS = batches(np.random.default_rng(1), STEPS)


def with_method(method: GradCompression) -> TrainConfig:
    return dataclasses.replace(EXACT, grad_compression=method)


@pytest.fixture(autouse=True, scope="module")
def everything_is_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALLEST", 64)
        yield


class Run:
    """A compiled step of a method on a mesh, and how to begin, save and read."""

    def __init__(self, config, sizes=SIZES):
        self.config, self.blueprint = config, blueprint_of(config, sizes)
        self.where = NamedSharding(self.blueprint.mesh, BATCH_SPEC)
        self._step = None

    def begin(self, flat):
        state = jax.block_until_ready(from_logical(flat, self.blueprint))
        return with_residuals(state, self.blueprint, self.config)

    def steps(self, state, tokens):
        losses = []
        for batch in tokens:
            rows = jax.device_put(batch[None], self.where)
            if self._step is None:
                traced = make_train_step(self.blueprint, self.config).trace(state, rows, None)
                with jax.numpy_dtype_promotion("standard"):
                    self._step = traced.lower().compile()
            state, metrics = jax.block_until_ready(self._step(state, rows, None))
            losses.append(float(metrics["loss"]))
        return state, np.array(losses)

    def save(self, state, folder):
        flat = jax.block_until_ready(to_logical(state)) | residual_arrays(state)
        metadata = {"residuals": residual_metadata(self.blueprint, self.config)}
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(int(state.step), flat, metadata)

    def restore(self, folder):
        def targets(content):
            found = residual_targets(self.blueprint, self.config, content)
            return logical_targets(self.blueprint) | found

        def targets_and_notes(content):
            self.content = content
            self.notes = continuation_notes(self.blueprint, self.config, content, 4)
            return targets(content)

        with Checkpoints(folder) as checkpoints:
            _, flat, metadata = checkpoints.restore_latest(targets_and_notes, partial=PREFIX)
        state = jax.block_until_ready(from_logical(flat, self.blueprint))
        return with_residuals(state, self.blueprint, self.config, flat, metadata)


@pytest.fixture(scope="module")
def start():
    return initial(EXACT)


@pytest.fixture(scope="module")
def feedback():
    return Run(with_method(FEEDBACK))


@pytest.fixture(scope="module")
def exact_losses(start):
    run = Run(EXACT)
    return run.steps(run.begin(start), TOKENS)[1]


@pytest.fixture(scope="module")
def after_some(feedback, start, tmp_path_factory):
    """The state after 4 steps, saved."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state, _ = feedback.steps(feedback.begin(start), TOKENS[:4])
    feedback.save(state, folder)
    return state, folder


def test_losses_with_feedback_are_near_the_exact_ones(feedback, start, exact_losses):
    _, losses = feedback.steps(feedback.begin(start), TOKENS)
    assert losses[0] == pytest.approx(exact_losses[0], rel=0.01)  # rounded weights
    end, want = losses[-8:].mean(), exact_losses[-8:].mean()
    assert want < 0.95 * exact_losses[0]  # something was learned
    assert end == pytest.approx(want, rel=0.01)
    assert (losses != exact_losses).any()


@pytest.mark.slow
def test_losses_with_chance_are_near_the_exact_ones(start, exact_losses):
    """A key of step, parameter and rank: twice the same run gives the same bits."""
    run = Run(with_method(GradCompression("int8")))
    state = run.begin(start)
    assert state.residuals is None
    state, losses = run.steps(state, TOKENS)
    np.testing.assert_array_equal(run.steps(run.begin(start), TOKENS[:5])[1], losses[:5])
    assert losses[0] == pytest.approx(exact_losses[0], rel=1e-6)  # weights are exact
    assert losses[-8:].mean() == pytest.approx(exact_losses[-8:].mean(), rel=0.01)


@pytest.mark.slow
def test_the_largest_numbers_are_enough(start, exact_losses, tmp_path):
    """A tenth of the numbers, everything at first; continued in the same bits."""
    run = Run(with_method(GradCompression("top_k", density=0.1, warmup_steps=15)))
    state, losses = run.steps(run.begin(start), TOKENS)
    assert losses[0] == pytest.approx(exact_losses[0], rel=1e-6)
    assert losses[-8:].mean() == pytest.approx(exact_losses[-8:].mean(), rel=0.05)
    half, _ = run.steps(run.begin(start), TOKENS[:10])
    run.save(half, tmp_path)
    _, rest = run.steps(run.restore(tmp_path), TOKENS[10:])
    np.testing.assert_array_equal(rest, losses[10:])
    names = {name for held in state.residuals.values() for name in held}
    assert names == {RESIDUAL, "momentum"}


def test_continued_on_the_same_mesh_in_the_same_bits(feedback, after_some):
    state, folder = after_some
    there = feedback.restore(folder)
    want = {n: np.asarray(x) for n, x in residual_arrays(state).items()}
    got = residual_arrays(there)
    assert got.keys() == want.keys() and want
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert np.abs(value).max() > 0, name
    copied = jax.tree.map(jnp.copy, state)  # the step donates its buffers
    first, losses = feedback.steps(copied, TOKENS[4:6])
    second, again = feedback.steps(there, TOKENS[4:6])
    np.testing.assert_array_equal(losses, again)
    for name, value in host(to_logical(first)).items():
        np.testing.assert_array_equal(to_logical(second)[name], value, err_msg=name)


def logical_sums(run: Run, state) -> dict[str, np.ndarray]:
    """What all ranks together have left to send of each parameter, experts in logical order."""
    params, found = dict(nnx.to_flat_state(run.blueprint.params)), {}
    for leaf in make_reducer(run.blueprint, run.config).leaves:
        if leaf.name in state.residuals:
            held = np.asarray(state.residuals[leaf.name][RESIDUAL], np.float64)
            total = held.sum(tuple(range(len(leaf.axes)))).astype(np.float32)
            variable = params[leaf.path].replace(jnp.asarray(total))
            for name, value in canonical(nnx.from_flat_state([(leaf.path, variable)])).items():
                found[name] = np.asarray(in_logical_order(value))
    return found


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
def test_residuals_are_handed_out_anew_on_another_mesh(feedback, after_some, sizes):
    """Their sum over ranks stays; 6 experts lie on 4 devices with padding between them."""
    state, folder = after_some
    other = Run(feedback.config, sizes)
    there = other.restore(folder)
    want, got = logical_sums(feedback, state), logical_sums(other, there)
    assert got.keys() & want.keys()
    shared = got.keys() & want.keys()
    assert any("bank" in name for name in shared) and any("head" in name for name in shared)
    for name in shared:
        atol = 1e-5 * np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=atol, err_msg=name)
    for leaf in make_reducer(other.blueprint, other.config).leaves:
        if leaf.name in there.residuals:
            held = np.asarray(there.residuals[leaf.name][RESIDUAL])
            flat = held.reshape(-1, *leaf.whole)
            np.testing.assert_array_equal(flat, np.broadcast_to(flat[:1], flat.shape))
            value = there.residuals[leaf.name][RESIDUAL]
            spec = make_reducer(other.blueprint, other.config).specs[leaf.name][RESIDUAL]
            where = NamedSharding(other.blueprint.mesh, spec)
            assert value.sharding.is_equivalent_to(where, value.ndim)


def test_checkpoints_of_other_methods(feedback, after_some, tmp_path, start):
    """Without residuals, or with those of another method, they begin at zero, which is told.

    Those of 4 bits are as good for 8; extra ones stay.
    """
    _, folder = after_some
    exact = Run(EXACT)
    there = exact.restore(folder)
    assert there.residuals is None and int(there.step) == 4
    lost = "note: what int4 gradients had left to send is not sent any more"
    assert exact.notes == [lost]
    exact.save(there, tmp_path / "checkpoints")
    again = feedback.restore(tmp_path / "checkpoints")
    assert again.residuals is not None
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(again.residuals))
    assert feedback.notes == []
    # A warm-up of top_k is one of the run's first steps: where these are over, it is told.
    sparse = GradCompression("top_k", density=0.1)
    for steps, count in ((0, 2), (4, 2), (5, 1)):
        config = with_method(dataclasses.replace(sparse, warmup_steps=steps))
        notes = continuation_notes(exact.blueprint, config, exact.content, 4)
        assert len(notes) == count
        assert count == 1 or "pass --grad-compression.warmup-steps 4 and as" in notes[1]
    check_warm_up_notes(exact, with_method(sparse))
    other = Run(with_method(GradCompression("low_rank", rank=2)))
    there = other.restore(folder).residuals
    assert not any(np.asarray(held[RESIDUAL]).any() for held in there.values())
    assert other.notes == [lost]
    fewer = Run(with_method(GradCompression("int8", rounding="error_feedback", block=1024)))
    content = exact.content
    kept = {key.split("/")[1] for key in content["arrays"] if key.startswith(PREFIX)}
    served = make_reducer(fewer.blueprint, fewer.config).shapes.keys()
    some = f"note: what int4 gradients had left to send of {len(kept - served)} of {len(kept)} "
    (note,) = continuation_notes(fewer.blueprint, fewer.config, content, 4)
    assert kept > served and note.startswith(some)
    other = Run(with_method(GradCompression("int8", rounding="error_feedback", block=32)))
    held = residual_arrays(other.restore(folder))
    saved = residual_arrays(after_some[0])
    assert held.keys() == saved.keys() and other.notes == []
    for name, value in saved.items():
        np.testing.assert_array_equal(held[name], value, err_msg=name)
    chance = Run(with_method(GradCompression("int8")))
    assert chance.restore(folder).residuals is None and chance.notes == [lost]


def check_warm_up_notes(run, config):
    """Of a run that goes on with `config`: top_k begins for what it compresses, and only there."""
    reducer = make_reducer(run.blueprint, config)
    names = list(reducer.shapes)
    assert len(names) > 1
    held = {
        f"{PREFIX}{name}/{what}": {"shape": list(value.shape)}
        for name, values in reducer.shapes.items()
        for what, value in values.items()
    }
    metadata = {"residuals": residual_metadata(run.blueprint, config)}

    def told(config, arrays, metadata, blueprint=run.blueprint):
        content = {"arrays": arrays, "metadata": metadata}
        return continuation_notes(blueprint, config, content, 4)

    assert told(config, held, metadata) == []  # goes on
    (all_of_them,) = told(config, {}, {})
    assert all_of_them.startswith("note: top_k begins without a warm-up, whose")
    fewer = {key: value for key, value in held.items() if f"/{names[0]}/" not in key}
    (some,) = told(config, fewer, metadata)
    assert f"without a warm-up for 1 of {len(names)} parameters, whose" in some
    # With so many numbers of each sent, nothing would get smaller: all sums are exact.
    none = GradCompression("top_k", density=0.9)
    assert not make_reducer(run.blueprint, with_method(none)).shapes
    assert told(with_method(none), {}, {}) == []
    # Nor is there anything to compress on one device.
    alone = blueprint_of(config, (1, 1, 1))
    assert not make_reducer(alone, config).shapes
    assert told(config, {}, {}, alone) == []
    # What was exact there and is not here begins.
    (begun,) = told(config, {}, {"residuals": residual_metadata(alone, config)})
    assert begun == all_of_them


def test_none_is_the_program_without_compression():
    """The jaxpr of the parts is that of `gather_weights` and `scatter_gradients`."""
    blueprint = blueprint_of(EXACT, SIZES)
    reducer = make_reducer(blueprint, EXACT)
    assert reducer.specs is None and reducer.shapes is None and not reducer.state_bytes

    def traced(function):
        specs = (blueprint.stored_specs,)
        mapped = jax.shard_map(
            function,
            mesh=blueprint.mesh,
            in_specs=specs,
            out_specs=blueprint.stored_specs,
            check_vma=False,
        )
        return str(jax.make_jaxpr(mapped)(blueprint.params))

    storage = blueprint.storage
    ours = traced(lambda m: reducer.reduce(reducer.gather(m, jnp.bfloat16), None, jnp.int32(0))[0])
    theirs = traced(
        lambda m: zero.scatter_gradients(zero.gather_weights(m, storage, jnp.bfloat16), storage)
    )
    assert ours == theirs and "reduce_scatter" in ours


def test_configuration_of_a_run():
    config = with_method(FEEDBACK)
    stored = config_to_json(config)
    assert config_from_json(TrainConfig, stored) == config
    del stored["grad_compression"]
    assert config_from_json(TrainConfig, stored) == EXACT
