"""The benchmarks of the exchange, rehearsed on four fake devices."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from wire_support import run_sharded

from sharding import collectives
from sharding.mesh import EXPERT, MeshShape, make_mesh

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import common
import ep_alone
import ep_layer
import ep_options
import ep_shapes
import ep_timeline
import links
from ep_check import SmallCase
from ep_programs import Arrays, lower
from ep_shapes import PEER, Variant
from layer_shapes import Shape

DEVICES = 4
ROW = {
    "impl", "shape", "routing", "wire", "pass", "ms", "tflops_per_gpu", "ms_no_comm",
    "ms_no_compute", "hidden_fraction", "bytes_sent", "mode", "chunks", "options",
    "max_over_mean_load", "predicted_ms",
}  # fmt: skip
SMALL = Shape(tokens=8, d_model=128, hidden=64, experts=8, top_k=2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(expert=DEVICES))


def variant(impl="moejax", which="fwd", **changes):
    how = {"mode": "all_to_all", "chunks": 1, "wire": "exact", "options": "default"}
    how |= {"slack": 1.5, "reserve_sms": 0}
    return Variant(impl, "mixtral_8x7b", which, **(how | changes))


@pytest.mark.slow
def test_a_small_run_writes_its_rows(mesh, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setitem(ep_options.OPTIONS, "unheard_of", {"xla_gpu_unheard_of": True})
    written = []
    monkeypatch.setattr(
        ep_layer, "write_results", lambda *a, **k: written.append(common.write_results(*a, **k))
    )
    words = "--tiny --shapes mixtral_8x7b --passes fwd --modes all_to_all --chunks 1 --rounds 1"
    words += " --options default unheard_of --name try --threads 2 --tflops 1 --link-gbs 1"
    ep_layer.measure(ep_layer.parse(words.split()), mesh)
    assert len(written) >= 3, "before anything is compiled, before it is timed, after a round"

    content = json.loads((tmp_path / "try.json").read_text())
    rows = {(r["impl"], r["routing"], r["options"]): r for r in content["rows"]}
    assert content["devices"] == DEVICES and len(rows) == len(content["rows"]) == 6
    for (impl, routing, options), row in rows.items():
        assert row.keys() >= ROW
        assert row["predicted_ms"] > 0 and row["max_over_mean_load"] >= 1
        if options == "unheard_of":
            assert row["ms"] is None and "No such compile option" in row["error"]
            continue
        assert "error" not in row
        assert row["hidden_fraction"] is None or np.isfinite(row["hidden_fraction"])
        assert row["tflops_per_gpu"] == pytest.approx(
            6 * 32 * 128 * 64 * 2 / row["ms"] / 1e9, rel=0.1, abs=0.01
        )
        if impl == PEER:
            assert routing == "balanced"
            # Two exchanges of two copies of 32 tokens, three quarters of them off the device.
            assert row["bytes_sent"] == 2 * 0.75 * (32 * 2 * 128 * 2)
        else:
            # Buckets of all 32 tokens, each with two ids and scores; on the way home without.
            buckets = 4 * 32 * (128 * 2 + 2 * 8) + 4 * 32 * 128 * 2
            assert row["waves"] == 1 and row["bytes_sent"] == 0.75 * buckets
        assert row["predicted_ms"] == pytest.approx(
            6 * 32 * 128 * 64 * 2 * row["max_over_mean_load"] / 1e9 + row["bytes_sent"] / 1e6,
            rel=1e-3,
        )


def test_the_peer_equals_an_oracle_and_the_check_can_fail(mesh, monkeypatch):
    monkeypatch.setattr("ep_check.small_shape", lambda devices: SMALL)
    case, peer = SmallCase(mesh), variant(PEER)
    compiled = {k: p.compile() for k, p in case.lower(peer).items()}
    errors = case.check(peer, compiled)
    assert set(errors) == {"y", "x", "w_in", "w_out"} and min(errors.values()) > 0

    arrays, inputs = case.arrays, case.inputs
    y_TD = np.asarray(compiled["fwd"](*arrays.arguments(peer, "balanced")), np.float64)
    weights = {k: np.asarray(w).astype(np.float64) for k, w in arrays.weights.items()}
    want_TD = np.zeros_like(y_TD)
    for t, x_D in enumerate(np.asarray(arrays.x_TD).astype(np.float64)):
        assert len(set(inputs.ids_TK[t])) == SMALL.top_k
        for e, score in zip(inputs.ids_TK[t], inputs.scores_TK[t], strict=True):
            gate_H, up_H = np.einsum("d,dnh->nh", x_D, weights["w_in"][e])
            want_TD[t] += score * (gate_H / (1 + np.exp(-gate_H)) * up_H) @ weights["w_out"][e]
    assert np.linalg.norm(y_TD - want_TD) < 1e-2 * np.linalg.norm(want_TD)

    broken = dict(compiled, fwd=lambda *a: compiled["fwd"](*a) * jnp.bfloat16(1.03))
    with pytest.raises(ArithmeticError, match=r"even routing: y is off by 0\.03"):
        case.check(peer, broken)


def test_parts_send_what_they_should(mesh):
    """With gradients: nothing without exchange; as much without experts as with them."""
    inputs = ep_shapes.make_inputs(SMALL, DEVICES)
    arrays = Arrays(SMALL, inputs, mesh)
    ours = variant(which="fwdbwd", mode="ring")
    sent = {}
    for part in ep_alone.PARTS:
        with ep_alone.left_out(part):
            arguments = arrays.arguments(ours, "zipf")
            sent[part] = lower(SMALL, ours, part, mesh, arguments).sent
    assert sent["no_comm"] == sent["neither"] == 0
    assert sent["no_compute"] == sent["total"] > 0
    with pytest.raises(ArithmeticError, match="no_comm: a device sends"):
        lower(SMALL, ours, "no_comm", mesh, arguments)


@pytest.mark.parametrize("total, hidden", [(9.0, 0.0), (6.0, 1.0), (6.75, 0.75), (10.5, -0.5)])
def test_hidden_fraction(total, hidden):
    """Computation of 6 and an exchange of 3: one after the other, one behind the other, others."""
    ms = {"total": total, "no_comm": 6.0, "no_compute": 5.0, "neither": 2.0}
    assert ep_alone.hidden_fraction(ms) == hidden
    assert ep_alone.hidden_fraction(ms | {"neither": 5.0}) is None


def test_clones_exchange_like_equal_devices(rng):
    """What stands for an exchange gives what a real one gives among devices that hold the same."""
    x = np.tile(rng.normal(size=(DEVICES, 2, 3)).astype(np.float32), (DEVICES, 1, 1))

    def both(x):
        def exchange():
            return collectives.all_to_all(x, EXPERT), collectives.all_gather(x, EXPERT)

        real = exchange()
        with ep_alone.left_out("no_comm"):
            return real, exchange()

    found = jax.tree.unflatten(jax.tree.structure(((0, 0), (0, 0))), run_leaves(both, x))
    for real, alone in zip(*found, strict=True):
        assert np.array_equal(real, alone) and np.ptp(real) > 0


def run_leaves(body, x):
    return run_sharded(lambda x: tuple(jax.tree.leaves(body(x))), x)


def test_inputs():
    inputs = ep_shapes.make_inputs(SMALL, DEVICES)
    for ids_TK in np.split(inputs.ids_TK, DEVICES):
        assert (np.bincount(ids_TK.ravel(), minlength=SMALL.experts) == 2).all()
    logits_TE = inputs.x_TD @ inputs.router_DE
    assert 0.8 < logits_TE.std() < 1.2
    with pytest.raises(ValueError, match="3 × 2 assignments over 8 experts: not even"):
        ep_shapes.make_inputs(Shape(3, 8, 8, 8, 2), DEVICES)


SCHEDULE = """HloModule jit_layer, is_scheduled=true

ENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1024] {
  %out-start = ((bf16[1024,1024]), bf16[1024,1024]) all-to-all-start(%x), channel_id=1
  %call.1 = bf16[8] custom-call(%x), metadata={op_name="jit(layer)/experts_up/mpmd_map"}
  %out-done = bf16[1024,1024] all-to-all-done(%out-start)
  %ids-start = (s32[8], s32[32]) all-gather-start(%ids), channel_id=2
  %call.2 = bf16[8] custom-call(%x), metadata={op_name="jit(layer)/experts_down/mpmd_map"}
  %ids-done = s32[32] all-gather-done(%ids-start)
  %home-start = ((f32[1024,1536]), f32[1024,1536]) all-to-all-start(%y), channel_id=3
  %call.3 = bf16[8] custom-call(%x), metadata={op_name="jit(layer)/top_k/mpmd_map"}
  ROOT %home-done = f32[1024,1536] all-to-all-done(%home-start)
}
"""


def test_schedule_is_read():
    found = {"transfers": 2, "behind_experts": 1, "bytes_behind": 0.25}
    assert ep_options.scheduled(SCHEDULE) == found
    for options in ep_options.OPTIONS.values():
        assert all(name.startswith("xla_gpu_") for name in options)


def test_timeline_is_read_and_drawn(tmp_path):
    def event(name, start, ms):
        return SimpleNamespace(name=name, start_ns=start * 1e6, duration_ns=ms * 1e6)

    one = [
        ("experts_up", 0.0, 4.0, 1),
        ("experts_down", 4.0, 1.0, 1),
        ("ncclSendRecv", 3.0, 4.0, 2),
    ]
    lines = [
        SimpleNamespace(
            name=f"Stream #{n}",
            events=[
                event(k, s + 10 * call, m) for call in range(3) for k, s, m, l in one if l == n
            ],
        )
        for n in (1, 2)
    ]
    lines.append(SimpleNamespace(name="XLA Ops", events=[event("fusion", 0, 99)]))
    planes = [SimpleNamespace(name="/device:GPU:0", lines=lines)]
    planes.append(SimpleNamespace(name="/device:GPU:1", lines=lines))
    intervals = ep_timeline.last_call(ep_timeline.read(planes), 3)
    assert [(i.name, round(i.start_ms, 6), i.ms) for i in intervals] == [
        ("experts_up", 0.0, 4.0),
        ("ncclSendRecv", 3.0, 4.0),
        ("experts_down", 4.0, 1.0),
    ]
    assert ep_timeline.share_under_experts(intervals) == pytest.approx(2 / 4)
    assert ep_timeline.share_under_experts(intervals[:1]) is None

    key = {"impl": "moejax", "shape": "s", "pass": "fwd", "mode": "ring"}
    longer = [i._replace(ms=2 * i.ms) for i in intervals]
    rows = [
        {**key, "chunks": 2, "intervals": longer},
        {**key, "impl": "xla_all_to_all", "mode": "all_to_all", "chunks": 1, "intervals": longer},
        {**key, "chunks": 1, "intervals": longer},
        {**key, "mode": "remote", "chunks": 1, "intervals": intervals},
        {**key, "chunks": 8, "intervals": []},
    ]
    panels = ep_timeline.shown(json.loads(json.dumps(rows)))
    assert [(r["impl"], r["mode"], r["chunks"]) for r in panels] == [
        ("xla_all_to_all", "all_to_all", 1),
        ("moejax", "ring", 1),
        ("moejax", "remote", 1),
    ]
    baseline, ring, remote = map(ep_timeline.kinds_of, panels)
    assert baseline("nvjet_tss") == ring("experts_up") == "experts"
    assert remote("experts_up") == "experts, rows arriving meanwhile"
    assert remote("push_sums_mosaic_gpu_kernel") == "exchange"
    ep_timeline.save(ep_timeline.draw(panels), tmp_path / "timeline.svg")
    assert (tmp_path / "timeline.svg").read_text().count("<path") > 6


def test_links(mesh, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    words = "--ragged --sizes 8192 --rounds 1 --name try"
    links.measure(links.parse(words.split()), mesh)
    content = json.loads((tmp_path / "try.json").read_text())
    rows = {row["collective"]: row for row in content["rows"]}
    assert list(rows) == [*links.COLLECTIVES, links.RAGGED]
    assert "not supported" in rows.pop(links.RAGGED)["error"]
    for name, row in rows.items():
        assert row["bytes"] == 8192 and row["sent"] == (8192 if name == "permute" else 6144)
        assert row["gbs"] == pytest.approx(row["sent"] / row["ms"] / 1e6, rel=0.2, abs=0.01)
        assert content["latency_ms"][name] == row["ms"]


def test_wrong_results_of_links_are_seen(rng):
    x = rng.normal(size=(DEVICES, 8, links.WIDTH)).astype(np.float32)
    for name in links.COLLECTIVES:
        right = links.expected(name, x)
        links.check(name, right, x)
        with pytest.raises(ArithmeticError, match="wrong"):
            links.check(name, right[:, ::-1], x)
