"""The frontier of traffic and loss: what is recommended, and what a sweep measures and writes."""

import dataclasses
import json

import numpy as np
import pytest
from inference_support import CONFIG as SMALL
from inference_support import random_weights

from moejax.config import ExchangeConfig, LocalityConfig
from moejax.data.corpus import Document
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.model_folder import save_model_folder
from moejax.placement import __main__ as command
from moejax.placement import record, sweep_texts
from moejax.placement.frontier import frontier, parse_budget, recommend
from moejax.placement.frontier_picture import setting_in_words
from moejax.placement.judge import Judge, relative_increase, windows_of
from moejax.placement.sweep import Sweep, placements_of
from moejax.placement.sweep_config import SweepConfig, check_settings, localities_of
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh


def points_of(rng, count):
    """Few different values, so that there are ties."""
    return [tuple(map(float, p)) for p in rng.integers(0, 12, (count, 2)) / 4]


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_frontier_and_recommendation(rng, count):
    for _ in range(50):
        points = points_of(rng, count)
        kept = frontier(points)
        beaten = [
            any(
                q[0] <= p[0] and q[1] <= p[1] and (q != p or j < i)
                for j, q in enumerate(points)
                if j != i
            )
            for i, p in enumerate(points)
        ]
        assert sorted(kept) == [i for i in range(count) if not beaten[i]]
        sends = [points[i][0] for i in kept]
        assert sends == sorted(sends, reverse=True)
        budget = float(rng.integers(0, 12)) / 4
        best = recommend(points, budget)
        within = [p for p in points if p[1] <= budget]
        assert (best is None) == (not within)
        if within:
            assert points[best] == min(within)
            assert points.index(points[best]) == best in kept


def test_budget():
    assert parse_budget("2%") == parse_budget("0.02") == 0.02
    for text in ("", "%", "two", "-1%", "nan", "inf%"):
        with pytest.raises(UserError, match="--loss-budget"):
            parse_budget(text)


def test_increase_and_its_error(rng):
    """The error is about the standard deviation of the ratio over documents drawn anew."""
    count, draws = 40, 2000
    size = rng.uniform(5, 50, (draws, count))
    base = size * rng.uniform(1, 3, (draws, count))
    other = base * 1.03 + size * rng.normal(0, 0.1, (draws, count))
    found = np.array([relative_increase(o, b) for o, b in zip(other, base)])
    np.testing.assert_allclose(found[:, 0], other.sum(1) / base.sum(1) - 1, rtol=1e-9)
    # The mean of 2,000 errors against their deviation, which is known to 1/√4000: 5 of that, and
    # the bias of the linearised error, about 1/D.
    np.testing.assert_allclose(found[:, 1].mean(), found[:, 0].std(), rtol=5 * 0.016 + 0.05)
    assert relative_increase(base[0], base[0]) == (0.0, 0.0)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--penalties", "1.5"], "device_penalty=1.5"),
        (["--max-devices", "0"], "max_devices=0"),
        (["--thresholds", "2"], "local_threshold=2"),
        (["--loss-budget", "much"], "--loss-budget much"),
        (["--devices", "8", "--hosts", "3"], "--hosts 3"),
        (["--devices", "1"], "--devices 1"),
        (["--windows", "0"], "--windows 0"),
        (["--replicas", "-1"], "--replicas -1"),
        (["--text", "a.txt"], "give both"),
        (["--window", "4096"], "--window 4096"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--penalty", "0.1"], "--penalties"),
        (["--out", ""], "--out FILE"),
        (["--out", "/no/such/place/s.json"], "/no/such/place/s.json: No such"),
        (["--picture", "/no/such/place/s.png"], "/no/such/place/s.png: No such"),
        (["--picture", "s.jpg"], "s.jpg: a picture's name ends in .svg, .png, .pdf"),
    ],
)
def test_wrong_flags(words, told, capsys):
    assert command.main(["sweep", *words]) == 2
    assert told in capsys.readouterr().err


def test_settings():
    config = SweepConfig(penalties=(0.0, 0.2), thresholds=(0.1,), max_devices=(3,))
    found = localities_of(config)
    assert found[0] == LocalityConfig() and len(found) == len(set(found)) == 5
    tried = {(setting.device_penalty, setting.max_devices) for setting in found}
    assert tried == {(0.0, None), (0.2, None), (0.0, 3), (0.2, 3)}
    few = {s.max_devices for s in localities_of(SweepConfig(devices=3, max_devices=(4, 3, 2)))}
    assert few == {None, 2}


def test_what_no_row_could_run_is_refused_at_once():
    """8 experts, 2 of a token."""
    config = SweepConfig(devices=8, replicas=0, max_devices=(2, 1))
    with pytest.raises(UserError, match="max_devices=1 with top_k=2"):
        check_settings(config, SMALL)
    check_settings(dataclasses.replace(config, replicas=1), SMALL)

    def with_moe(**changes):
        return dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, **changes))

    levels = with_moe(exchange=ExchangeConfig(host_devices=4))
    with pytest.raises(UserError, match="host_devices=4 with expert=8"):
        check_settings(dataclasses.replace(config, replicas=1), levels)
    check_settings(SweepConfig(devices=4), levels)  # one host
    forced = dataclasses.replace(SMALL.moe.router, forced_balance=True)
    with pytest.raises(UserError, match="forced_balance"):
        check_settings(SweepConfig(), with_moe(router=forced))


def texts(rng, count):
    return [
        Document(
            f"{i}.txt", rng.integers(97, 123, rng.integers(20, 200), np.uint8).tobytes().decode()
        )
        for i in range(count)
    ]


def test_windows(rng):
    """At most so many of a document; bytes in proportion."""
    documents, tokenizer = texts(rng, 12), Tokenizer()
    windows = windows_of(documents, tokenizer, 16, 3)
    lens = np.array([len(d.text) for d in documents])
    assert (np.bincount(windows.document_N) == np.minimum(-(-lens // 16), 3)).all()
    assert windows.num_bytes == pytest.approx(windows.mask_NS.sum())  # a token is a byte


def test_experts_are_placed_by_routing_that_knows_no_places(rng, monkeypatch):
    """A model's own locality must not shape the trace that places its experts."""
    moe = dataclasses.replace(SMALL.moe, locality=LocalityConfig(device_penalty=0.5))

    class Source:
        config = dataclasses.replace(SMALL, moe=moe)
        need_tokenizer = Tokenizer

        def weights(self, blueprint):
            return random_weights(blueprint.config, rng)

    class Recorded(Exception):
        pass

    def recorded(blueprint, *rest):
        raise Recorded(blueprint.config.moe.locality)

    monkeypatch.setattr(record, "trace_of", recorded)
    config, documents = SweepConfig(devices=2), texts(rng, 2)
    with pytest.raises(Recorded) as found:
        sweep_texts.prepare(config, Source(), documents, documents, lambda line: None)
    assert found.value.args == (LocalityConfig(),)


def test_rows_between_hosts_and_loads(rng):
    """Two hosts of two devices, against sets of devices."""
    hosts, model = (0, 0, 1, 1), dataclasses.replace(SMALL, scan_layers=True)
    blueprint = Blueprint(model, make_mesh(MeshShape(expert=4)), hosts)
    weights = load_weights(random_weights(model, rng), blueprint, np.dtype("float32"))
    windows = windows_of(texts(rng, 7), Tokenizer(), 16, 1)
    slots_LP = np.stack([rng.permutation(8) for _ in range(2)]).astype(np.int32)
    found = Judge(blueprint, windows)(*weights, slots_LP, 1)

    pieces = [t[:-1][m] for t, m in zip(windows.tokens_NS1, windows.mask_NS)]
    chosen_NLK = record.trace_of(blueprint, *weights, pieces).experts_NLK
    window_N = np.repeat(np.arange(len(pieces)), list(map(len, pieces)))
    own_N, batch_N = window_N % 4, window_N // 4
    network = remote = 0
    load_BLG = np.zeros((2, 2, 4))
    for layer, slots_P in enumerate(slots_LP):
        device_NK = np.argsort(slots_P)[chosen_NLK[:, layer]] // 2
        for own, batch, device_K in zip(own_N, batch_N, device_NK):
            others = set(device_K.tolist()) - {int(own)}
            remote += len(others)
            network += sum(hosts[g] != hosts[own] for g in others)
            np.add.at(load_BLG[batch, layer], device_K, 1)
    tokens = 2 * len(own_N)
    assert 0 < network < remote
    assert found.remote_sends == pytest.approx(remote / tokens)
    assert found.network_rows == pytest.approx(network / tokens)
    assert found.load_max_mean == pytest.approx((load_BLG.max(-1) / load_BLG.mean(-1)).mean())

    exchange = ExchangeConfig(host_devices=2)
    levels = dataclasses.replace(model, moe=dataclasses.replace(model.moe, exchange=exchange))
    with pytest.raises(UserError, match="say with --hosts"):
        Judge(Blueprint(levels, blueprint.mesh), windows)


@pytest.mark.slow
def test_a_sweep_counts_what_is_sent(rng):
    """Real counters on 8 fake devices against sets of devices, and placements leave the loss."""
    router = dataclasses.replace(SMALL.moe.router, num_experts=16, top_k=4, selection_bias=False)
    moe = dataclasses.replace(SMALL.moe, router=router)
    model = dataclasses.replace(SMALL, moe=moe, top_k_by_layer=(), first_dense_layers=0)
    mesh = make_mesh(MeshShape(expert=8))
    blueprint = Blueprint(model, mesh)
    flat = random_weights(model, rng)
    weights = load_weights(flat, blueprint, np.dtype("float32"))
    tokenizer, documents = Tokenizer(), texts(rng, 11)
    window = min(16, model.max_context)
    windows = windows_of(documents, tokenizer, window, 2)
    trace = record.trace_of(blueprint, *weights, [rng.integers(0, 256, 60) for _ in range(8)])
    placements = placements_of(trace, 8, 1, 1)
    assert list(placements) == ["contiguous", "planned", "copies"]
    sweep = Sweep(model, windows, placements, mesh)
    rows = list(sweep.rows(flat, [LocalityConfig(), LocalityConfig(device_penalty=0.99)]))

    pieces = [t[:-1][m] for t, m in zip(windows.tokens_NS1, windows.mask_NS)]
    chosen = record.trace_of(blueprint, *weights, pieces).experts_NLK
    device_N = np.repeat(np.arange(len(pieces)) % 8, list(map(len, pieces)))
    for row, (name, slots_LP) in zip(rows[:2], placements.items()):
        assert row["placement"] == name
        sends = 0
        for layer, slots_P in enumerate(slots_LP):
            device_of = {int(e): p // 3 for p, e in enumerate(slots_P) if e >= 0}
            for own, experts_K in zip(device_N, chosen[:, layer]):
                sends += len({device_of[int(e)] for e in experts_K} - {int(own)})
        assert row["remote_sends"] == pytest.approx(sends / chosen[..., 0].size, abs=1e-4)
    for row in rows[:3]:
        assert abs(row["loss_increase"]) < 1e-5 and row["score_mass_kept"] == 1
    assert rows[0]["loss_increase_error"] == 0 and rows[0]["remote_sends_ratio"] == 1
    for off, penalised in zip(rows[:3], rows[3:]):
        assert penalised["remote_sends"] < off["remote_sends"]
        assert 0.3 < penalised["score_mass_kept"] < 1
        assert off["load_max_mean"] >= 1 and setting_in_words(penalised).endswith("penalty 0.99")


@pytest.mark.slow
def test_the_command(rng, tmp_path, capsys):
    folder = tmp_path / "model"
    save_model_folder(folder, random_weights(SMALL, rng), SMALL, Tokenizer(), record={})
    for name in ("judge", "plan"):
        (tmp_path / name).mkdir()
        for document in texts(rng, 6):
            (tmp_path / name / document.path).write_text(document.text)
    words = ["--model", str(folder), "--text", str(tmp_path / "judge"), "--devices", "2"]
    words += ["--plan-text", str(tmp_path / "plan"), "--window", "16"]
    words += ["--penalties", "0.5", "--max-devices", "1"]
    words += ["--out", str(tmp_path / "s.json"), "--picture", str(tmp_path / "s.png")]
    assert command.main(["sweep", *words, "--loss-budget", "1000%"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    rows = found["rows"]
    assert len(rows) == 12 and found["complete"]
    assert found["recommended"] == recommend(
        [(row["remote_sends"], row["loss_increase"]) for row in rows], 10.0
    )
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert "recommended within 1000%" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    none = ["--text", str(tmp_path / "none"), "--plan-text", str(tmp_path / "plan")]
    assert command.main(["sweep", "--model", str(folder), *none, "--window", "16"]) == 2
    assert "error: --text " in capsys.readouterr().err
    same = ["--text", str(tmp_path / "plan"), "--plan-text", str(tmp_path / "plan")]
    assert command.main(["sweep", "--model", str(folder), *same, "--window", "16"]) == 2
    assert "are in both" in capsys.readouterr().err
