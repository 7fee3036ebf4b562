"""The cost model of the exchange: a pipeline of chunks, and what `auto` makes of it."""

import json
from dataclasses import asdict, replace

import jax
import pytest

from moejax.config import ExchangeConfig, MoEConfig, RouterConfig, WireConfig
from moejax.errors import UserError
from moejax.exchange.cost import Work, pipeline_seconds
from moejax.exchange.suggest import main, suggest
from sharding import measure as command
from sharding.machine import Machine, machine_file, machine_of, read_machine, write_machine

MACHINE = Machine("Made Up 9000", 4, 600e12, 3e12, 300e9, 30e-6, "0.0")
QWEN = Work(2048, 768, 2, "bfloat16")
QWEN3 = MoEConfig(RouterConfig(num_experts=128, top_k=8))
MIXTRAL = MoEConfig(RouterConfig(num_experts=8, top_k=2))


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


def best(machine, config=QWEN3, work=QWEN, tokens=8192, devices=4):
    ways = suggest(config, work, machine, tokens=tokens, devices=devices)
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
    assert best(slow, MIXTRAL, replace(QWEN, d_model=4096, hidden=14336))[0].mode == "all_to_all"
    assert best(MACHINE, devices=1)[0].mode == "local"


def test_prediction_counts_bytes_and_flops():
    def of_two_chunks(config):
        ways = suggest(config, QWEN, MACHINE, tokens=8192, devices=4)
        return next(t for b, t in ways if (b.mode, b.chunks) == ("ring", 2))

    time, rows = of_two_chunks(QWEN3), 4096
    assert time.dispatch == pytest.approx(30e-6 + 3 * rows * (2048 * 2 + 8 * 8) / 300e9)
    assert time.combine == pytest.approx(30e-6 + 3 * rows * 2048 * 2 / 300e9)
    padded = rows * 8 + 32 * 64
    assert time.experts == pytest.approx(6 * padded * 2048 * 768 / 600e12)
    parts = time.dispatch, time.experts, time.combine
    assert time.total == pytest.approx(pipeline_seconds(2, *parts))
    narrow = of_two_chunks(
        replace(QWEN3, exchange=ExchangeConfig(wire=WireConfig(dispatch_dim=1024)))
    )
    assert narrow.experts == pytest.approx(time.experts * 2 / 3)
    with pytest.raises(NotImplementedError, match="between hosts"):
        of_two_chunks(replace(QWEN3, exchange=ExchangeConfig(host_devices=2)))


def test_the_command(tmp_path, capsys):
    write_machine(MACHINE, tmp_path / "figures.json")
    what = ["--preset", "qwen3-30b-a3b", "--tokens", "8192", "--devices", "4"]
    main([*what, "--machine", str(tmp_path / "figures.json")])
    lines = capsys.readouterr().out.splitlines()
    mode, chunks, ms, *_ = lines[1].split()
    assert f"--model.moe.exchange.mode {mode} --model.moe.exchange.chunks {chunks}" in lines[-1]
    assert 1 < float(ms) < 2
    with pytest.raises(SystemExit, match="no figures of 'cpu': run python"):
        main(what)


def test_figures_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sharding.machine.MACHINES", tmp_path)
    machine_of.cache_clear()
    assert machine_of(MACHINE.device) is None
    machine_of.cache_clear()
    write_machine(MACHINE, machine_file(MACHINE.device))
    assert [p.name for p in tmp_path.iterdir()] == ["made_up_9000.json"]
    assert machine_of("MADE up-9000") == MACHINE
    machine_of.cache_clear()


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
