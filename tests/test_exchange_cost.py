"""The cost model of the exchange: a pipeline of chunks, what is suggested, measured figures."""

import json
from dataclasses import asdict, replace

import jax
import pytest

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig, WireConfig
from moejax.errors import UserError
from moejax.exchange.cost import pipeline_seconds
from moejax.exchange.suggest import main, suggest
from moejax.presets import PRESETS
from sharding import measure as command
from sharding.machine import Machine, machine_file, machine_of, read_machine, write_machine

MACHINE = Machine("Made Up 9000", 4, 600e12, 3e12, 300e9, 30e-6, "0.0")
ALONE = replace(MACHINE, devices=1, link_bytes=0, link_seconds=0)
QWEN3 = MoEConfig(RouterConfig(num_experts=128, top_k=8), ExpertsConfig(hidden=768))
MIXTRAL = MoEConfig(RouterConfig(num_experts=8, top_k=2), ExpertsConfig(hidden=14336))
ARGUMENTS = ["--preset", "qwen3-30b-a3b", "--tokens", "8192", "--devices"]


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """An empty folder in the place of the library's figures, which somebody may have measured."""
    monkeypatch.setattr("sharding.machine.MACHINES", tmp_path / "machines")
    machine_of.cache_clear()
    yield tmp_path / "machines"
    machine_of.cache_clear()


def by_events(chunks, dispatch, experts, combine):
    """The same pipeline tick by tick: a resource takes its next job when that can begin."""
    order = ["d0"]
    for i in range(chunks):
        order += [f"d{i + 1}"] * (i + 1 < chunks) + [f"c{i}"]
    jobs = {"d": dispatch, "e": experts, "c": combine}
    done: dict[str, int] = {}
    queues = {"links": order, "device": [f"e{i}" for i in range(chunks)]}
    busy: dict[str, tuple[str, int] | None] = dict.fromkeys(queues)
    before = {"e": "d", "c": "e"}
    tick = 0
    while len(done) < 3 * chunks:
        for resource in queues:
            if busy[resource] and busy[resource][1] == tick:
                done[busy[resource][0]] = tick
                busy[resource] = None
        for resource, queue in queues.items():
            if not busy[resource] and queue:
                kind, number = queue[0][0], queue[0][1:]
                if kind not in before or before[kind] + number in done:
                    busy[resource] = (queue.pop(0), tick + jobs[kind])
        tick += 1
    return max(done.values())


def test_pipeline_is_that_of_two_resources(rng):
    for _ in range(60):
        chunks, *times = (int(n) for n in rng.integers(1, (6, 30, 30, 30)))
        assert pipeline_seconds(chunks, *times) == by_events(chunks, *times)


def ways_of(machine, config=QWEN3, tokens=8192, devices=4, d_model=2048):
    return suggest(
        config, machine, d_model=d_model, dtype="bfloat16", tokens=tokens, devices=devices
    )


def best(machine, *args, **kwargs):
    ways = ways_of(machine, *args, **kwargs)
    totals = [prediction.total for _, prediction in ways]
    assert totals == sorted(totals)
    return ways[0]


def test_suggestions_follow_the_links():
    """Slow links want buckets, or few bytes; fast ones few chunks; so do few tokens."""
    assert best(MACHINE)[0].chunks in (2, 4)
    endless = replace(MACHINE, link_bytes=1e18, link_seconds=1e-9)
    assert best(endless)[0].chunks == 1
    few = best(MACHINE, tokens=16)[0]
    assert few.chunks == 1, "what a transfer takes at least is paid for each chunk"
    slow = replace(MACHINE, link_bytes=5e9)
    assert best(slow, MIXTRAL, d_model=4096)[0].mode == "all_to_all"
    assert best(MACHINE, devices=1)[0].mode == "local"


def test_kernels_that_send_rows_are_suggested_where_there_are_some():
    hopper = replace(MACHINE, device="NVIDIA H200")
    budget, time = best(hopper)
    assert (budget.mode, budget.chunks) == ("remote", 1)
    assert time.total == pytest.approx(max(time.dispatch, time.experts) + time.combine)
    sent = 3 * round(8192 * budget.hit) * 2048 * 2
    assert time.combine == pytest.approx(30e-6 + sent / 300e9)
    rounded = replace(QWEN3, exchange=ExchangeConfig(wire=WireConfig(combine="int8")))
    for machine, config in ((MACHINE, QWEN3), (hopper, rounded)):
        assert all(b.mode != "remote" for b, _ in ways_of(machine, config))


def test_prediction_counts_bytes_and_flops():
    def of_two_chunks(config):
        ways = ways_of(MACHINE, config)
        return next(t for b, t in ways if (b.mode, b.chunks) == ("ring", 2))

    time, rows = of_two_chunks(QWEN3), 4096
    assert time.dispatch == pytest.approx(30e-6 + 3 * rows * (2048 * 2 + 8 * 8) / 300e9)
    assert time.combine == pytest.approx(30e-6 + 3 * rows * 2048 * 2 / 300e9)
    padded = rows * 8 + 32 * 64
    assert time.experts == pytest.approx(6 * padded * 2048 * 768 / 600e12)
    parts = time.dispatch, time.experts, time.combine
    assert time.total == pytest.approx(pipeline_seconds(2, *parts))
    with pytest.raises(NotImplementedError, match="between hosts"):
        of_two_chunks(replace(QWEN3, exchange=ExchangeConfig(host_devices=2)))


@pytest.mark.parametrize(
    "columns, share, folded_and_moved",
    [
        ({"dispatch_dim": 1024}, 2 / 3, {1024: 2}),
        ({"combine_dim": 1024}, 5 / 6, {1024: 1}),
        ({"dispatch_dim": 512, "combine_dim": 1024}, (2 * 512 + 1024) / 6144, {512: 2, 1024: 1}),
        ({"dispatch_dim": 2048}, 1, {2048: 2}),
    ],
)
@pytest.mark.parametrize("devices", [1, 4])
def test_prediction_counts_projections(columns, share, folded_and_moved, devices):
    """Narrow products in every chunk; folding, narrowing and widening once; on one device, too."""
    narrow = replace(QWEN3, exchange=ExchangeConfig(wire=WireConfig(**columns)))
    full, found = (ways_of(MACHINE, config, devices=devices) for config in (QWEN3, narrow))
    assert {(b.mode, b.chunks) for b, _ in found} == {(b.mode, b.chunks) for b, _ in full}
    whole = {(b.mode, b.chunks): time for b, time in full}
    once = sum(
        128 // devices * 2 * 2048 * columns * times * 768 + 2 * 8192 * 2048 * columns
        for columns, times in folded_and_moved.items()
    )
    for budget, time in found:
        same = whole[budget.mode, budget.chunks]
        assert time.experts == pytest.approx(share * same.experts)
        assert time.dispatch <= same.dispatch and time.combine <= same.combine
        parts = time.dispatch, time.experts, time.combine
        travelling = pipeline_seconds(budget.chunks, *parts)
        assert time.total == pytest.approx(travelling + once / 600e12, rel=1e-9)


def test_the_command(tmp_path, capsys, machines):
    write_machine(MACHINE, tmp_path / "figures.json")
    main([*ARGUMENTS, "4", "--machine", str(tmp_path / "figures.json")])
    lines = capsys.readouterr().out.splitlines()
    mode, chunks, ms, *_ = lines[1].split()
    assert f"--model.moe.exchange.mode {mode} --model.moe.exchange.chunks {chunks}" in lines[-1]
    assert "compiled with sharding.schedule.compile_overlapped (train.py does not" in lines[-1]
    assert 1 < float(ms) < 2
    with pytest.raises(SystemExit, match="no figures of 'cpu': run python"):
        main([*ARGUMENTS, "4"])


def test_what_cannot_be_predicted_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"

    def refused(machine, devices):
        write_machine(machine, path)
        with pytest.raises(SystemExit) as caught:
            main([*ARGUMENTS, devices, "--machine", str(path)])
        assert "\n" not in caught.value.code and not capsys.readouterr().out
        return caught.value.code

    assert refused(ALONE, "4") == (
        "suggest: 'Made Up 9000' was measured with 1 device: the links between 4 are not known; "
        "measure again with several"
    )
    assert "num_experts=128 on expert=256 devices" in refused(MACHINE, "256")
    model = PRESETS["qwen3_30b_a3b"]()
    hosts = replace(model.model.moe, exchange=ExchangeConfig(host_devices=2))
    model = replace(model, model=replace(model.model, moe=hosts))
    monkeypatch.setitem(PRESETS, "qwen3_30b_a3b", lambda: model)
    assert refused(MACHINE, "4").startswith("suggest: an exchange between hosts")

    main([*ARGUMENTS, "1", "--machine", str(path)])
    write_machine(ALONE, path)
    main([*ARGUMENTS, "1", "--machine", str(path)])
    tables = capsys.readouterr().out.splitlines()
    assert tables[:3] == tables[3:] and tables[1].startswith("local")


def test_figures_are_written_and_read(machines):
    assert machine_of(MACHINE.device) is None
    machine_of.cache_clear()
    write_machine(MACHINE, machine_file(MACHINE.device))
    assert [p.name for p in machines.iterdir()] == ["made_up_9000.json"]
    assert machine_of("MADE up-9000") == MACHINE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"link_bytes": 0}, "link_bytes is 0"),
        ({"product_flops": float("nan")}, "product_flops is nan"),
        ({"devices": 2.5}, "devices is 2.5"),
        ({"device": ""}, "device is ''"),
        ({"speed": 1}, "'speed'"),
    ],
)
def test_wrong_figures_are_one_line(tmp_path, change, message):
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(asdict(MACHINE) | change))
    with pytest.raises(UserError, match=message) as caught:
        read_machine(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_measuring_this_machine(tmp_path, capsys, monkeypatch):
    """The command, on fake devices: figures of the right order, no more can be said of them."""
    monkeypatch.setattr(command.measure, "__defaults__", (1e-3,))
    command.main(["--output", str(tmp_path / "here.json")])
    machine = read_machine(tmp_path / "here.json")
    assert machine.device == jax.devices()[0].device_kind and machine.devices == 8
    assert 1e8 < machine.product_flops < 1e15 and 1e7 < machine.memory_bytes < 1e13
    assert 1e5 < machine.link_bytes < 1e13 and 1e-7 < machine.link_seconds < 1
    assert str(tmp_path / "here.json") in capsys.readouterr().out


def test_operands_lie_where_they_are_used(monkeypatch):
    """No part of an operand moves to its device when a call is timed, and none is a constant."""
    timed = []
    monkeypatch.setattr(command, "_seconds", lambda run, *operands: timed.append(operands) or 1.0)
    command._links(1.0)
    devices = jax.device_count()
    for (x,) in timed:
        shards = {shard.device: shard.data.shape[0] for shard in x.addressable_shards}
        assert shards == dict.fromkeys(jax.devices(), devices)
    timed.clear()
    command._product(1.0)
    assert [x.ndim for x in timed[0]] == [2, 3, 1]


def test_figures_that_cannot_be_written_are_one_line(tmp_path, capsys, monkeypatch):
    """What was measured is told nevertheless."""
    monkeypatch.setattr(command, "measure", lambda: MACHINE)
    with pytest.raises(SystemExit) as caught:
        command.main(["--output", str(tmp_path)])
    told = f"measure: {tmp_path}: Is a directory; name another file with --output"
    assert caught.value.code == told
    printed = capsys.readouterr().out
    assert "600 TFLOP/s" in printed and "written" not in printed
