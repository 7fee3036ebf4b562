"""The experts that a model chooses for texts, against its router alone on each token."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from inference_support import CONFIG as SMALL
from inference_support import random_weights
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

import infer
from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import save_model_folder
from moejax.placement import record
from moejax.placement.record import trace_of
from moejax.placement.statistics import read_statistics, statistics_of
from moejax.placement.trace import read_trace
from moejax.serving import routes
from moejax.serving.route_pictures import lift
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh
from sharding.specs import specs_of

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import inference as inference_benchmark

CONTEXT = SMALL.max_context
CONFIG = dataclasses.replace(
    SMALL, num_layers=4, first_dense_layers=1, dense_hidden=32, top_k_by_layer=(1, 2, 3, 3)
)
NEAR = 1e-4  # scores that are no further apart may change places by rounding


def config_of(scan):
    # Two equal layers at the end are scanned.
    return dataclasses.replace(CONFIG, scan_layers=scan)


@functools.cache
def router_inputs():
    """A program: one window [S] to what each router sees, [L, S, D], layer by layer."""
    blueprint = Blueprint(CONFIG, make_mesh(MeshShape()))

    def run(params, biases, tokens_S):
        model = blueprint.merge(params, biases)
        positions_BS = jnp.arange(len(tokens_S), dtype=jnp.int32)[None]
        x_BSD, seen = model.embedding(tokens_S[None], jnp.float32), []
        for group in model.groups:
            block = model.layers[group.name]
            if block.moe is not None:
                attended_BSD, _ = block.attention(block.attention_norm(x_BSD), positions_BS)
                seen.append(block.mlp_norm(x_BSD + attended_BSD)[0])
            x_BSD, _, _ = block(x_BSD, positions_BS)
        return jnp.stack(seen)

    specs = (specs_of(blueprint.params), blueprint.bias_specs, P())
    mapped = jax.shard_map(run, mesh=blueprint.mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return blueprint, jax.jit(mapped)


def oracle(flat, documents):
    """Experts of each token [N, L, K] as sets in order of ids, and whether all are clear."""
    blueprint, run = router_inputs()
    weights = load_weights(flat, blueprint, jnp.float32)
    found, clear = [], True
    for document in documents:
        for start in range(0, len(document), CONTEXT):
            window = document[start : start + CONTEXT]
            padded = np.zeros(CONTEXT, np.int32)  # causal: what comes later changes nothing
            padded[: len(window)] = window
            inputs_LSD = np.asarray(run(*weights, padded), np.float64)[:, : len(window)]
            chosen = np.full((len(window), len(inputs_LSD), 3), -1)
            for index, x_SD in enumerate(inputs_LSD):
                name, top_k = f"layers.{index + 1}.moe.router", CONFIG.top_k_by_layer[index + 1]
                logits_SE = x_SD @ flat[f"params/{name}.w_DE"].astype(np.float64)
                odds_SE = np.exp(logits_SE - logits_SE.max(1, keepdims=True))
                scores_SE = odds_SE / odds_SE.sum(1, keepdims=True)
                scores_SE += flat[f"bias/{name}.selection_bias_E"]
                order_SE = np.argsort(-scores_SE, axis=1)
                best_SE = np.take_along_axis(scores_SE, order_SE, axis=1)
                clear &= (best_SE[:, top_k - 1] - best_SE[:, top_k]).min() > NEAR
                chosen[:, index, :top_k] = np.sort(order_SE[:, :top_k], axis=1)
            found.append(chosen)
    return np.concatenate(found), clear


def drawn(rng, lengths):
    """Weights, documents of these lengths and the oracle's experts, none of them a near tie."""
    for _ in range(20):
        flat = random_weights(CONFIG, rng)
        documents = [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]
        experts, clear = oracle(flat, documents)
        if clear:
            return flat, documents, experts
    raise AssertionError("near ties in every draw")


def sets(experts_NLK):
    """Choices in order of ids, −1 last."""
    ids = np.sort(np.where(experts_NLK < 0, 99, experts_NLK), axis=-1)
    return np.where(ids == 99, -1, ids)


def loaded_on(flat, sizes, scan=False):
    blueprint = Blueprint(config_of(scan), make_mesh(MeshShape(*sizes)))
    return blueprint, *load_weights(flat, blueprint, jnp.float32)


@pytest.mark.parametrize("sizes, scan", [((2, 2, 2), False), ((1, 4, 1), True), ((1, 1, 1), False)])
def test_a_trace_is_the_router_on_each_token(rng, sizes, scan, monkeypatch):
    """Documents shorter and longer than a window; padded rows, rows without a document."""
    monkeypatch.setattr(record, "_TOGETHER", 2)
    lengths = [7, 1, 2 * CONTEXT + 5, 0, CONTEXT, 3]
    flat, documents, experts = drawn(rng, lengths)
    loaded = loaded_on(flat, sizes, scan)
    assert any(group.scanned for group in loaded[0].groups) == scan
    trace = trace_of(*loaded, documents, domains="abcabc")
    assert trace.lens.tolist() == lengths and trace.domains == tuple("abcabc")
    assert trace.num_experts == 8 and trace.experts_NLK.dtype == np.int16
    assert trace.experts_NLK.shape == (sum(lengths), 3, 3)
    np.testing.assert_array_equal(sets(trace.experts_NLK), experts)

    counted = record.record(*loaded, documents, tokens=False)
    assert counted.experts_NLK is None and counted.num_tokens == sum(lengths)
    one_NLE = (experts[..., None] == np.arange(8)).any(axis=2).astype(int)
    both_LEE = np.einsum("nle,nlf->lef", one_NLE, one_NLE)
    np.testing.assert_array_equal(counted.load_LE, np.diagonal(both_LEE, axis1=1, axis2=2))
    np.testing.assert_array_equal(counted.pairs_LEE, both_LEE * (1 - np.eye(8, dtype=int)))


def test_a_model_reports_no_experts_unless_asked(monkeypatch, rng):
    blueprint, params, biases = loaded_on(random_weights(CONFIG, rng), (1, 1, 1))

    def aux_of(reported):
        def run(params, biases, tokens_BS):
            model = blueprint.merge(params, biases)
            if reported:
                model.report_experts(2)
            return model(tokens_BS, inference=True).aux

        mapped = jax.shard_map(
            run, mesh=blueprint.mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
        return jax.eval_shape(mapped, params, biases, jnp.zeros((2, 5), jnp.int32))

    assert aux_of(False).experts_TK is None
    assert aux_of(True).experts_TK.shape == (3, 5, 3)  # 10 tokens, every second one


def test_experts_touched(rng):
    """Of the benchmark of inference: those of the last tokens, as a mean over layers."""
    flat, documents, experts = drawn(rng, [6] * 5)
    loaded = loaded_on(flat, (1, 1, 1))
    touched = inference_benchmark.make_experts_touched(*loaded, np.stack(documents))
    for texts in (1, 2, 5):
        last_BLK = experts[5::6][:texts]
        want = np.mean([len({*last_BLK[:, layer].flat} - {-1}) for layer in range(3)])
        assert touched(texts) == pytest.approx(want)
    assert touched(1) == np.mean(CONFIG.top_k_by_layer[1:])


# ── infer.py routes ──────────────────────────────────────────────────────────


@pytest.fixture
def script(rng, tmp_path, monkeypatch, capsys):
    """`infer.py routes` on two files: flags to what is told at the end."""
    folder, flat = tmp_path / "model", random_weights(CONFIG, rng)
    save_model_folder(folder, flat, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    monkeypatch.setattr(routes, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("code.py").write_text("def f(x):\n    return x\n" * 4)
    Path("prose.txt").write_text("Über den Wolken")

    def run(*flags):
        argv = ["routes", "--model", folder, "--text", "code.py", "prose.txt", *flags]
        code = infer.main([str(word) for word in argv])
        told = capsys.readouterr().err.splitlines()
        assert code == 0, told
        return flat, told[-1]

    return run


def test_routes_write_a_trace(script):
    flags = ("--trace", "t.npz", "--placement-stats", "s.npz", "--pairs-picture", "p.png")
    flat, told = script(*flags, "--mesh", "1x2x1")
    assert all(f in told for f in ("t.npz", "s.npz", "p.png", "routes.npz", "routes.png"))
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    trace, tokenizer = read_trace("t.npz"), Tokenizer()
    documents = [tokenizer.encode(Path(f).read_text()) for f in ("code.py", "prose.txt")]
    assert trace.domains == ("code", "prose")
    assert trace.lens.tolist() == [len(d) for d in documents] == [92, 16]
    loaded = loaded_on(flat, (1, 2, 1))
    np.testing.assert_array_equal(trace.experts_NLK, trace_of(*loaded, documents).experts_NLK)

    want, found = statistics_of(trace), read_statistics("s.npz")
    for name in ("pairs_LEE", "load_LE", "tokens_L"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
    counts = np.load("routes.npz")
    np.testing.assert_array_equal(counts["counts"], want.load_LE)
    assert counts["layers"].tolist() == [1, 2, 3] and counts["tokens"] == 92 + 16


@pytest.mark.parametrize("labels, domains", [(["x"], ("x", "x")), (["x", "code"], ("x", "code"))])
def test_domains(script, labels, domains):
    script("--trace", "t.npz", "--picture", "", "--mesh", "1x1x1", "--domain", *labels)
    assert read_trace("t.npz").domains == domains
    assert not Path("routes.png").exists()


def test_lift(rng):
    """1 where experts are chosen independently, whatever their load; 8 if always together."""
    tokens, shares = 200_000, np.array([0.5, 0.2, 0.1, 0.05])
    chosen_NE = rng.random((tokens, 4)) < shares
    pairs_EE = chosen_NE.T.astype(int) @ chosen_NE
    values_EE = lift(pairs_EE, np.diagonal(pairs_EE), tokens)
    assert np.isnan(np.diagonal(values_EE)).all()
    np.testing.assert_allclose(values_EE[~np.eye(4, dtype=bool)], 1, atol=0.15)
    together = np.array([[100, 100], [100, 100]])
    assert lift(together, np.array([100, 100]), 800)[0, 1] == pytest.approx(8, rel=0.1)
    assert lift(np.zeros((2, 2)), np.zeros(2), 100)[0, 1] == 1
