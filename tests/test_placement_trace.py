"""Traces, their files and counts, and what placements cost on tokens."""

import io
import zipfile

import numpy as np
import pytest
from placement_support import assert_counts, brute_force

from moejax.errors import UserError
from moejax.placement.evaluate import (
    cut,
    devices_of,
    load_max_mean,
    mean_of,
    measure,
    measure_slots,
    measure_trace,
)
from moejax.placement.plan_file import read_slots, write_slots
from moejax.placement.statistics import (
    Statistics,
    read_statistics,
    statistics_of,
    write_statistics,
)
from moejax.placement.topology import Topology
from moejax.placement.trace import Trace, read_trace, write_trace


def random_trace(rng, tokens=50, layers=2, choices=3, experts=7, domains=None) -> Trace:
    """Distinct choices, some of them none; documents of uneven length, one of them empty."""
    chosen = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)[..., :choices]
    chosen[rng.random(chosen.shape) < 0.1] = -1
    cuts = np.sort(rng.integers(0, tokens + 1, 4))
    lens = np.diff(np.concatenate([[0], cuts[:2], [cuts[1]], cuts[2:], [tokens]]))
    return Trace(chosen.astype(np.int16), lens.astype(np.int64), experts, domains)


# ---- traces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [None, ("a", "b", "b", "a", "ö", "a")])
def test_round_trip(tmp_path, rng, domains):
    trace = random_trace(rng, domains=domains)
    write_trace(tmp_path / "t.npz", trace)
    again = read_trace(tmp_path / "t.npz")
    assert np.array_equal(again.experts_NLK, trace.experts_NLK)
    assert np.array_equal(again.lens, trace.lens)
    assert (again.num_experts, again.domains) == (trace.num_experts, domains)


def test_read_what_anybody_wrote(tmp_path, rng):
    """Without `num_experts`, in any dtype of whole numbers, not compressed, with other arrays."""
    trace = random_trace(rng)
    path = tmp_path / "t.npz"
    experts = trace.experts_NLK.astype(np.int64)
    np.savez(path, experts=experts, lens=trace.lens.astype(np.uint16), other=np.ones(3))
    again = read_trace(path)
    assert np.array_equal(again.experts_NLK, experts) and again.experts_NLK.dtype == np.int16
    assert again.num_experts == experts.max() + 1


EXPERTS = np.arange(6, dtype=np.int32).reshape(3, 1, 2)
LENS = np.array([1, 2])


@pytest.mark.parametrize(
    "arrays,told",
    [
        ({"lens": LENS}, "no array 'experts'"),
        ({"experts": EXPERTS}, "no array 'lens'"),
        ({"experts": EXPERTS.astype(float), "lens": LENS}, "float64"),
        ({"experts": EXPERTS[0], "lens": LENS}, "3 dimensions"),
        ({"experts": EXPERTS.astype(object), "lens": LENS}, "object"),
        ({"experts": EXPERTS, "lens": LENS.astype(object)}, "object"),
        ({"experts": EXPERTS, "lens": LENS + 1}, "sum"),
        ({"experts": EXPERTS, "lens": np.array([4, -1])}, "lens"),
        ({"experts": EXPERTS, "lens": np.array([2**63 - 1, 2**63 - 1, 5])}, "lens"),
        ({"experts": EXPERTS, "lens": LENS, "num_experts": np.array(5)}, "holds 5"),
        ({"experts": EXPERTS, "lens": LENS, "num_experts": np.array(1 << 40)}, "num_experts"),
        ({"experts": EXPERTS, "lens": LENS, "num_experts": np.array([6])}, "num_experts"),
        ({"experts": EXPERTS - 2, "lens": LENS}, "holds -2"),
        ({"experts": EXPERTS.astype(np.int64) + (1 << 32), "lens": LENS}, "holds"),
        ({"experts": EXPERTS * 0, "lens": LENS}, "twice"),
        ({"experts": EXPERTS[:0], "lens": LENS[:0]}, "no choice"),
        ({"experts": EXPERTS, "lens": LENS, "domains": np.array(["a"])}, "domains"),
        ({"experts": EXPERTS, "lens": LENS, "domains": np.array(["a", 1], object)}, "domains"),
    ],
)
def test_hostile_files(tmp_path, arrays, told):
    """One line, that names the file and the field."""
    np.savez(tmp_path / "bad.npz", allow_pickle=True, **arrays)
    with pytest.raises(UserError, match=told) as caught:
        read_trace(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def _header(shape: str, descr: str = "'<i4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "member",
    [
        _header("(1000000000000, 1, 2)"),
        _header("(-3, 1, -2)") + EXPERTS.tobytes(),
        _header("(3, 1, 2)") + EXPERTS.tobytes()[:-4],
        _header("(3, 1, 2)") + EXPERTS.tobytes() + b"more",
        _header("(3, 1, 2", "'<i4'"),
        _header("(3, 1, 2)", "'|O'") + b"cos\nsystem\n(S'true'\ntR.",
        b"\x93NUMPY\x09\x00",
        b"no array at all",
        b"",
    ],
)
def test_hostile_members(tmp_path, member):
    """Headers that lie about the size, or hold pickled objects."""
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("experts.npy", member)
        lens = io.BytesIO()
        np.save(lens, LENS)
        archive.writestr("lens.npy", lens.getvalue())
    with pytest.raises(UserError, match="experts"):
        read_trace(tmp_path / "bad.npz")


def test_no_archives(tmp_path, rng):
    write_trace(tmp_path / "t.npz", random_trace(rng))
    whole = (tmp_path / "t.npz").read_bytes()
    for name, content in {"a": b"", "b": b"PK nonsense", "c": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"npz"):
            read_trace(tmp_path / name)
    with pytest.raises(UserError, match="none"):
        read_trace(tmp_path / "none")
    with pytest.raises(UserError):
        read_trace(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        write_trace(tmp_path / "nowhere" / "t.npz", random_trace(rng))


def test_split_keeps_documents_whole(rng):
    tokens = 400
    experts = np.full((tokens, 1, 2), -1, np.int16)
    lens = np.bincount(np.sort(rng.integers(0, 20, tokens)), minlength=20)
    experts[:, 0, 0] = np.repeat(np.arange(20), lens)  # a token chooses its document's number
    trace = Trace(experts, lens.astype(np.int64), 20, tuple(f"d{i % 3}" for i in range(20)))
    one, other = trace.split(0.7, seed=3)
    seen, unseen = (set(t.experts_NLK[:, 0, 0].tolist()) for t in (one, other))
    assert not seen & unseen and seen | unseen == set(np.flatnonzero(lens).tolist())
    assert one.num_tokens + other.num_tokens == tokens
    assert 0.5 < one.num_tokens / tokens < 0.9
    for part in (one, other):
        first = np.cumsum(part.lens) - part.lens
        for start, length, domain in zip(first, part.lens, part.domains):
            document = set(part.experts_NLK[start : start + length, 0, 0].tolist())
            assert len(document) == 1 and domain == f"d{document.pop() % 3}"
    again = trace.split(0.7, seed=3)[0]
    assert np.array_equal(again.experts_NLK, one.experts_NLK)
    only = trace.of_domain("d1")
    assert set((only.experts_NLK[:, 0, 0] % 3).tolist()) == {1} and set(only.domains) == {"d1"}
    assert trace.first_tokens(33).num_tokens == 33
    with pytest.raises(UserError, match="nothing"):
        trace.of_domain("nothing")
    with pytest.raises(UserError, match="share=1"):
        trace.split(1)
    with pytest.raises(UserError, match="one document"):
        trace.documents([int(np.flatnonzero(lens)[0])]).split(0.5)


# ---- statistics -------------------------------------------------------------------------------


def test_statistics_by_brute_force(rng, monkeypatch):
    monkeypatch.setattr("moejax.placement.statistics._TOKENS_TOGETHER", 16)
    trace = random_trace(rng)
    wanted = brute_force(trace.experts_NLK, 7)
    found = statistics_of(trace)
    assert_counts(found, wanted)
    assert np.array_equal(found.layer(1).pairs_LEE, wanted[0][1:])


def test_statistics_of_windows(tmp_path, rng):
    one, other = (statistics_of(random_trace(rng)) for _ in range(2))
    both = one.decay(0.5).plus(other)
    assert np.array_equal(both.load_LE, one.load_LE / 2 + other.load_LE)
    assert np.array_equal(both.pairs_LEE, one.pairs_LEE / 2 + other.pairs_LEE)
    assert np.array_equal(both.tokens_L, one.tokens_L / 2 + other.tokens_L)
    write_statistics(tmp_path / "s.npz", both)
    again = read_statistics(tmp_path / "s.npz")
    for name in ("pairs_LEE", "load_LE", "tokens_L"):
        assert np.array_equal(getattr(again, name), getattr(both, name))
    with pytest.raises(UserError, match="factor"):
        one.decay(1.5)
    with pytest.raises(UserError, match="added"):
        one.plus(statistics_of(random_trace(rng, experts=8)))


@pytest.mark.parametrize(
    "change,told",
    [
        (lambda s: (s.pairs_LEE + np.eye(7, dtype=np.float32), s.load_LE, s.tokens_L), "diagonal"),
        (lambda s: (np.tril(s.pairs_LEE), s.load_LE, s.tokens_L), "symmetric"),
        (lambda s: (s.pairs_LEE, -s.load_LE, s.tokens_L), "negative"),
        (lambda s: (s.pairs_LEE * np.float32(np.nan), s.load_LE, s.tokens_L), "finite"),
        (lambda s: (s.pairs_LEE, s.load_LE[:, 1:], s.tokens_L), "shape"),
        (lambda s: (s.pairs_LEE, s.load_LE.astype(float), s.tokens_L), "float64"),
    ],
)
def test_strange_statistics(rng, change, told):
    with pytest.raises(UserError, match=told):
        Statistics(*change(statistics_of(random_trace(rng))))


# ---- topology and measures --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,told",
    [
        ({"slots": 0}, "slots=0"),
        ({"hosts": (0, 0)}, "hosts: 2 values"),
        ({"speeds": (1.0, 0.0, 1.0)}, "speeds: 0.0"),
        ({"room": (1, 2, 5)}, "room: 5"),
        ({"room": (1, 2, -1)}, "room: -1"),
    ],
)
def test_strange_topologies(change, told):
    with pytest.raises(UserError, match=told):
        Topology(**{"devices": 3, "slots": 4, **change})


def test_topology():
    topology = Topology(4, 3, hosts=(7, 2, 7, 2), speeds=(1, 2, 1, 4), room=(3, 0, 3, 3))
    assert topology.host_G.tolist() == [0, 1, 0, 1] and topology.num_hosts == 2
    assert np.allclose(topology.speed_G, [1 / 6, 0, 1 / 6, 4 / 6])
    topology.check_fits(9)
    with pytest.raises(UserError, match="9 slots"):
        topology.check_fits(10)
    even = Topology.even(10, 4, hosts=2)
    assert (even.slots, even.hosts) == (3, (0, 0, 1, 1))
    with pytest.raises(UserError, match="hosts=3"):
        Topology.even(8, 4, hosts=3)


@pytest.mark.parametrize("with_source", [False, True])
def test_measure_by_brute_force(rng, with_source):
    topology = Topology(4, 3, hosts=(0, 0, 0, 1), speeds=(1, 2, 1, 3))
    trace = random_trace(rng, layers=1, experts=9)
    slots_P = np.full(12, -1, np.int32)
    slots_P[rng.permutation(12)[:9]] = rng.permutation(9)
    source_N = rng.integers(0, 4, trace.num_tokens) if with_source else None
    home = {int(e): p // 3 for p, e in enumerate(slots_P) if e >= 0}
    fanout, sends, hosts, tokens = 0, 0.0, 0.0, 0
    load = np.zeros(4)
    for token, chosen in enumerate(trace.experts_NLK[:, 0]):
        mine = [home[int(e)] for e in chosen if e >= 0]
        tokens += bool(mine)
        np.add.at(load, mine, 1)
        fanout += len(set(mine))
        sources = [source_N[token]] if with_source else range(4)
        for source in sources:
            sends += len(set(mine) - {source}) / len(sources)
            there = {topology.hosts[d] for d in mine} - {topology.hosts[source]}
            hosts += len(there) / len(sources)
    found = measure(trace.experts_NLK[:, 0], slots_P, topology, source_N)
    per_speed = load / np.array([1, 2, 1, 3])
    worst = per_speed.max() / (load.sum() / 7)
    expected = [fanout / tokens, sends / tokens, hosts / tokens, worst]
    np.testing.assert_allclose(
        [found.fanout, found.remote_sends, found.remote_hosts, found.load_max_mean], expected
    )
    assert mean_of([found, found]) == pytest.approx(found)
    assert measure_trace(trace, slots_P[None], topology, source_N) == (found,)


def test_measure_replicas(rng):
    """Several copies need a function that chooses."""
    topology = Topology(2, 3)
    slots_P = np.array([0, 1, -1, 2, 0, 3], np.int32)
    experts_NK = np.array([[0, 1], [0, 2], [3, -1]])
    with pytest.raises(ValueError, match="several"):
        measure(experts_NK, slots_P, topology)
    chosen_NK = np.array([[0, 1], [4, 3], [5, -1]])
    by_function = measure(experts_NK, slots_P, topology, None, lambda *_: chosen_NK)
    assert by_function == measure_slots(chosen_NK, topology)
    assert by_function.fanout == 1 and by_function.load_max_mean == pytest.approx(3 / 2.5)
    with pytest.raises(ValueError, match="no slot"):
        measure(np.array([[4, 0]]), np.array([0, 1, 2, 3, -1, -1]), topology)


def test_cut_and_load(rng):
    pairs = rng.random((2, 6, 6))
    pairs = pairs + pairs.transpose(0, 2, 1)
    slots = np.stack([rng.permutation(6), rng.permutation(6)])
    topology = Topology(3, 2)
    device = devices_of(slots, topology, 6)
    for layer in range(2):
        apart = sum(
            pairs[layer, e, f]
            for e in range(6)
            for f in range(6)
            if list(slots[layer]).index(e) // 2 != list(slots[layer]).index(f) // 2
        )
        assert cut(pairs, device)[layer] == pytest.approx(apart / pairs[layer].sum())
    shut = Topology(2, 2, room=(2, 0))
    assert load_max_mean(np.array([[3.0, 0.0], [3.0, 1.0], [0.0, 0.0]]), shut).tolist() == [
        1,
        np.inf,
        0,
    ]
    with pytest.raises(ValueError, match="once"):
        devices_of(np.array([[0, 1, 2, 3, 4, 4]]), topology, 6)


# ---- files of placements ----------------------------------------------------------------------


def test_slots_round_trip(tmp_path, rng):
    slots = rng.integers(-1, 9, (3, 12)).astype(np.int32)
    write_slots(tmp_path / "p.npz", slots, 4)
    again, devices = read_slots(tmp_path / "p.npz")
    assert np.array_equal(again, slots) and devices == 4 and again.dtype == np.int32
    for strange in ({"devices": np.array(5)}, {"slots": slots - 20}, {"slots": slots[:0]}):
        np.savez(tmp_path / "q.npz", **{"slots": slots, "devices": np.array(4), **strange})
        with pytest.raises(UserError, match=r"q\.npz"):
            read_slots(tmp_path / "q.npz")
