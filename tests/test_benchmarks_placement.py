"""What the placement benchmark compares with, and how it measures."""

import json
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import common
import placement
import placement_baselines as baselines

from moejax.placement.choice_reference import at_random, reference
from moejax.placement.evaluate import cut, devices_of, measure
from moejax.placement.generator import generate, make_traffic
from moejax.placement.statistics import statistics_of
from moejax.placement.topology import Topology


def trace(rng, experts=16, tokens=1500, share=0.8):
    drawn = make_traffic(experts, 2, choices=4, share=share, seed=int(rng.integers(1 << 30)))
    return generate(drawn, tokens, seed=int(rng.integers(1 << 30)))


@pytest.mark.parametrize(
    "method", [baselines.in_order, baselines.in_turn, baselines.eplb, baselines.metis]
)
def test_baselines_hold_every_expert(rng, method):
    if method is baselines.metis:
        pytest.importorskip("pymetis")
    statistics, topology = statistics_of(trace(rng)), Topology(4, 4)
    device_LE = devices_of(method(statistics, topology), topology, 16)  # raises if not
    in_order = devices_of(baselines.in_order(statistics, topology), topology, 16)
    if method is baselines.in_turn:
        assert (device_LE == np.arange(16) % 4).all()
    if method is baselines.metis:
        shares = [cut(statistics.pairs_LEE, d).mean() for d in (device_LE, in_order)]
        assert shares[0] < shares[1] - 0.05


def test_eplb(rng):
    """Packing by falling load, never far above the best; copies to what has most load a copy."""
    load = rng.exponential(size=6).astype(np.float32)
    pack = baselines.balanced_packing(load, 3)
    best = min(load[list(p)].reshape(3, 2).sum(1).max() for p in permutations(range(6)))
    assert (np.bincount(pack) == 2).all()
    assert np.bincount(pack, load).max() <= 4 / 3 * best + 1e-6
    assert np.bincount(baselines.copies(np.array([1.0, 5.0, 2.0]), 6)).tolist() == [1, 3, 2]
    statistics = statistics_of(trace(rng))
    for hosts in (None, (0, 0, 1, 1)):
        slots_LP = baselines.eplb(statistics, Topology(4, 5, hosts))
        for slots_P, load_E in zip(slots_LP, statistics.load_LE):
            count_E = np.bincount(slots_P, minlength=16)
            assert count_E.sum() == 20 and count_E.min() == 1
            if hosts is None:  # no copies at all leave less for the fullest one
                most = (load_E / count_E).max()
                assert np.ceil(load_E / (most * (1 - 1e-6))).sum() > 20


def test_measured(rng):
    """Streams of whole tokens: with one device a stream, the same as measuring them at once."""
    tokens, topology = trace(rng, tokens=2048), Topology(4, 5)
    slots_LP = baselines.eplb(statistics_of(tokens), topology)
    row = placement.measured(tokens, slots_LP, topology, at_random, 2048)
    source = np.repeat(np.arange(4), 512)
    each = [
        measure(tokens.experts_NLK[:, layer], slots_P, topology, source, at_random)
        for layer, slots_P in enumerate(slots_LP)
    ]
    for name in ("fanout", "remote_sends", "load_max_mean"):
        assert np.isclose(row[name], np.mean([getattr(m, name) for m in each]), atol=6e-4)
    chosen = placement.measured(tokens, slots_LP, topology, reference, 512)
    assert chosen["remote_sends"] < row["remote_sends"]
    assert chosen["batch_load"][0] <= chosen["batch_load"][1]


@pytest.mark.slow
def test_a_small_run_writes_its_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(placement, "packaged_trace", lambda tokens: trace_with_domains(tokens))
    words = ["placement.py", "--tiny", "--name", "try"]
    monkeypatch.setattr(sys, "argv", words)
    placement.main()
    rows = json.loads((tmp_path / "try.json").read_text())["rows"]
    keys = {"trace", "experts", "devices", "method", "fanout", "remote_sends", "load_max_mean"}
    keys |= {"moved"}
    assert all(keys <= set(row) for row in rows if "skipped" not in row)
    assert {"planner", "eplb", "online", "planner, replicas"} <= {row["method"] for row in rows}


def trace_with_domains(tokens):
    drawn = generate(make_traffic(64, 2, choices=8, seed=3), tokens, mean_length=64, seed=4)
    domains = tuple("ab"[i % 2] for i in range(len(drawn.lens)))
    return type(drawn)(drawn.experts_NLK, drawn.lens, 64, domains)
