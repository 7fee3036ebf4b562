"""Predicted step times: each term by hand, and facts that must hold."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from planner_support import predicted, run_config

from moejax.config import LatentConfig
from moejax.errors import UserError
from moejax.training.state import Blueprint
from sharding import device_kinds
from sharding.costs import flops_per_token
from sharding.device_kinds import KINDS, Hardware, find_kind, hardware_of
from sharding.flops import PEAK_FLOPS, attention_matrix_parameters
from sharding.local_weights import Weights, weights_of
from sharding.machine import Machine
from sharding.mesh import MeshShape, abstract_mesh, over_hosts
from sharding.planner import plan
from sharding.step_time import (
    StepTime,
    collective_seconds,
    neighbours,
    operation_seconds,
    predict_plan,
)
from sharding.step_work import BACKWARD, FLASH, Operation, operations
from sharding.traffic import Crossing

MACHINE = Machine("Made Up 9000", 8, 500e12, 2e12, 100e9, 1e-5, "0.0")
H100, V5E = find_kind("h100"), find_kind("v5e")
WEIGHTS = Weights(used=1000, stored=100, scanned=600)


def hardware(kind="h100", machine=MACHINE, host_devices=8, **sheet) -> Hardware:
    kind = dataclasses.replace(find_kind(kind), **sheet)
    return Hardware(kind, machine, host_devices, measured=True)


def summed(found, part, what):
    return sum(op.times * getattr(op, what) for op in found if op.part == part)


# ── what is computed ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("remat, again", [("none", 0), ("dots", 0), ("local", 1), ("layer", 1)])
@pytest.mark.parametrize("latent", [None, LatentConfig(32, 8, 12, 48)])
def test_products_are_those_of_the_model(latent, remat, again):
    heads = {"num_heads": 8, "num_kv_heads": 8 if latent else 4}
    config = run_config(
        attention={**heads, "latent": latent},
        experts={"shared_hidden": 32},
        model={"remat": remat, "vocab_size": 192},
        train={"accumulate": 2},
    )
    mesh = MeshShape(2, 2, 2)
    found = operations(config, mesh, WEIGHTS, H100)
    tokens = 16 * 16 // (2 * 2)  # a device's, of both microbatches
    attention = attention_matrix_parameters(128, config.model.attention)
    if latent:  # what all heads share is not split: latent, rotated key, source of the queries
        whole = 128 * (32 + 8 + 48)
        attention = whole + (attention - whole) / 2
    else:
        attention /= 2
    shared_in, shared_out = 128 * 32 * 2 / 2, 32 * 128 / 2
    router = 3 * 128 * 8  # three bfloat16 products each
    forward = 2 * 2 * tokens * (attention + shared_in + router)
    expected = 3 * (forward + 2 * 2 * tokens * shared_out)
    # The router is no product of bfloat16 rows to JAX: `dots` computes it again, too.
    expected += forward if again else (remat == "dots") * 2 * 2 * tokens * router
    assert summed(found, "products", "flops") == pytest.approx(expected)
    assert summed(found, "head", "flops") == pytest.approx(3 * 2 * tokens * 128 * 192 / 2)


def test_experts_fill_tiles_and_read_their_weights():
    config = run_config(router={"num_experts": 6, "top_k": 2}, model={"remat": "layer"})
    found = operations(config, MeshShape(1, 4, 2), WEIGHTS, H100)
    # 6 experts on 4 devices: 2 slots each. 64 tokens, 2 experts each, and half a tile for a slot.
    rows, slots, up, down = 64 * 2 + 2 * 64, 2, 128 * 2 * 32, 128 * 32
    expected = 2 * 2 * rows * (2 * up + down + 2 * (up + down))
    assert summed(found, "experts", "flops") == expected
    kept = 2 * 2 * 2 * 128 * (128 + 2 * 32)  # layers, passes, bytes, assignments, numbers
    read = 2 * 2 * slots * (2 * up + down + 2 * (up + down))
    assert summed(found, "experts", "moved") == read + kept
    slow = 0.4 * 32 / 82  # kernels want a width of 64
    rates = sorted({op.rate for op in found if op.part == "experts"})
    assert rates == pytest.approx([BACKWARD * slow, slow])
    wide = operations(config, MeshShape(1, 4, 1), WEIGHTS, H100)
    assert {op.rate for op in wide if op.part == "experts"} == {64 / 114, BACKWARD * 64 / 114}
    chunked = run_config(
        router={"num_experts": 6}, exchange={"chunks": 4}, model={"remat": "layer"}
    )
    more = operations(chunked, MeshShape(1, 4, 2), WEIGHTS, H100)
    rows += 3 * 2 * 64
    assert summed(more, "experts", "flops") == expected / 256 * rows


def test_attention_by_kernel_or_by_scores():
    config = run_config(attention={"head_dim": 128}, seq_len=32, model={"remat": "dots"})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    on_gpu, on_tpu = (operations(config, MeshShape(), WEIGHTS, kind) for kind in (H100, V5E))
    tokens, heads, width = 16 * 32, 4, 256
    triangle = 2 * tokens * 16 * heads * width
    assert summed(on_gpu, "attention", "flops") == triangle * (2 + 2.5)
    assert summed(on_gpu, "attention", "moved") == 0
    rates = [op.rate for op in on_gpu if op.part == "attention"]
    assert rates == [pytest.approx(share * 16 / 144) for share in FLASH]
    assert summed(on_tpu, "attention", "flops") == 2 * triangle * (2 + 2)
    assert summed(on_tpu, "attention", "moved") == (20 * 2 + 24) * tokens * 32 * heads


def test_logits_are_read_in_chunks():
    config = run_config(train={"loss_chunk": 24, "accumulate": 2}, model={"vocab_size": 192})
    found = operations(config, MeshShape(2, 1, 2), WEIGHTS, H100)
    logits = 2 * 64 * 96 * 16  # two microbatches of 64 tokens, in 3 chunks each
    summed_up = 2 * 3 * 8 * 128 * 96
    read = sum(op.times * op.moved for op in found if op.part == "head" and not op.flops)
    assert read == logits + summed_up


def test_weights_are_copied_summed_and_updated():
    def bytes_of(**changes):
        found = operations(run_config(**changes), MeshShape(2, 1, 1), WEIGHTS, H100)
        return summed(found, "weights", "moved"), summed(found, "optimizer", "moved")

    scanned = {"scan_layers": True}
    assert bytes_of() == (6 * 100 + 2 * 3 * 2 * 600 + 6 * 1000, 3200)
    # In every microbatch, with another copy for the recomputation, and into float32 sums.
    many = bytes_of(model={**scanned, "remat": "layer"}, train={"accumulate": 4})
    assert many == (6 * 100 + 4 * (2 * 4 * 2 * 600 + 10 * 1000), 3200)


def test_weights_of_a_device():
    config = run_config(model={"scan_layers": True, "num_layers": 3, "vocab_size": 256})
    for sizes in ((1, 1, 1), (4, 2, 2)):
        mesh = MeshShape(*sizes)
        blueprint = Blueprint(config.model, abstract_mesh(mesh))
        found = weights_of(config, mesh, blueprint.params, blueprint.storage)
        _, expert, tensor = sizes
        attention = 2 * 128 * (4 + 2) * 16 / tensor + 2 * 128
        experts = 8 // expert * 3 * 128 * 64 / tensor
        layers = 3 * (attention + 128 * 8 + experts)
        assert found.scanned == layers
        assert found.used == layers + 2 * 256 * 128 / tensor + 128
    # Stored is what the plan counts as masters.
    made = plan(config, mesh)
    assert made.weights == found and made.memory.masters == 4 * found.stored


def test_operation_takes_products_or_memory():
    seconds = operation_seconds
    both = Operation("head", 3, flops=1e15, moved=2e12, exposed=1e12, rate=0.5)
    assert seconds(both, MACHINE) == pytest.approx(3 * (4 + 0.5))
    assert seconds(dataclasses.replace(both, moved=20e12), MACHINE) == pytest.approx(30)


# ── what is sent ─────────────────────────────────────────────────────────────


def test_neighbours_by_counting(rng):
    for _ in range(40):
        mesh = MeshShape(*(int(n) for n in rng.integers(1, (6, 6, 5))))
        size = int(rng.integers(1, 10))
        laid = over_hosts(mesh, list(range(mesh.size)), lambda device, size=size: device // size)
        for count in (1, 2, 3):
            for axes in itertools.combinations(("data", "expert", "tensor"), count):
                groups: dict[tuple, list[int]] = {}
                for place in np.ndindex(*mesh.sizes):
                    named = dict(zip(("data", "expert", "tensor"), place))
                    key = tuple(v for name, v in named.items() if name not in axes)
                    groups.setdefault(key, []).append(laid[place] // size)
                fewest = min(g.count(host) for g in groups.values() for host in g)
                hosts = max(len(set(g)) for g in groups.values())
                members = len(next(iter(groups.values())))
                assert neighbours(mesh, axes, size) == (members, fewest, hosts)


def test_collectives_by_hand():
    made = hardware(host_link_bytes=10e9 / device_kinds.HOST_LINKS)
    hop = device_kinds.HOST_LINK_SECONDS

    def seconds(mesh, kind, axes, on=made, times=2, phase="forward", **more):
        crossing = Crossing("x", phase, kind, axes, times, 4e9, **more)
        return collective_seconds(crossing, MeshShape(*mesh), on)

    inside = 2e-5 + 4e9 / 100e9
    assert seconds((1, 4, 2), "all-to-all", ("expert",)) == pytest.approx(inside)
    assert seconds((1, 4, 2), "all-reduce", ("tensor",)) == pytest.approx(inside)
    # `data` over 4 hosts: one of a group in each, two, and so many that the links are slower.
    far = 2 * (1e-5 + 2 * hop)
    assert seconds((4, 8, 1), "all-gather", ("data",)) == pytest.approx(far + 4e9 / 10e9)
    assert seconds((8, 4, 1), "all-gather", ("data",)) == pytest.approx(far + 4e9 / 20e9)
    near = hardware(host_link_bytes=60e9)
    assert seconds((8, 4, 1), "all-gather", ("data",), near) == pytest.approx(far + 4e9 / 96e9)
    near = hardware(host_link_bytes=90e9)
    assert seconds((8, 4, 1), "all-gather", ("data",), near) == pytest.approx(far + 4e9 / 100e9)
    # Of 15 others 8 are in the other host.
    both = 2 * (1e-5 + hop)
    sixteen = seconds((1, 16, 1), "all-to-all", ("expert",))
    assert sixteen == pytest.approx(both + 8 / 15 * 4e9 / 10e9)
    assert seconds((1, 16, 1), "permute", ("expert",)) == pytest.approx(both + 4e9 / 10e9)
    part = {"part": "inside hosts"}
    assert seconds((1, 16, 1), "all-to-all", ("expert",), **part) == pytest.approx(inside)
    part = {"part": "between hosts"}
    assert seconds((1, 16, 1), "all-to-all", ("expert",), **part) == pytest.approx(both + 0.4)
    # Many small ones outside of loops are joined: 4e9 bytes are 128 pieces of 30 MiB.
    assert seconds((1, 4, 1), "all-gather", ("expert",), times=500, phase="") == pytest.approx(
        128 * 1e-5 + 0.04
    )
    # A ring of TPUs: an all-to-all passes a quarter of it, at most four devices.
    torus = hardware("v5e", host_devices=256)
    assert seconds((1, 8, 1), "all-to-all", ("expert",), torus) == pytest.approx(2e-5 + 0.08)
    assert seconds((1, 64, 1), "all-to-all", ("expert",), torus) == pytest.approx(2e-5 + 0.16)
    assert seconds((1, 64, 1), "all-gather", ("expert",), torus) == pytest.approx(inside)


# ── the whole step ───────────────────────────────────────────────────────────


def test_total_leaves_out_what_is_hidden():
    assert StepTime(experts=3.0, exchange=2.0, hidden=0.5).total == 4.5


def test_one_device_sends_nothing():
    time = predicted(run_config(), MeshShape(), hardware()).time
    assert time.exchange == time.tensor == time.reduction == time.hidden == 0
    assert time.experts > 0 and time.total > time.experts


@pytest.mark.parametrize("sizes", [(4, 4, 2), (1, 8, 1), (2, 1, 2)])
def test_faster_parts_make_faster_steps(sizes):
    config, mesh, base = run_config(model={"remat": "layer"}), MeshShape(*sizes), hardware()
    usual = predicted(config, mesh, base).time

    def doubled(field):
        machine = dataclasses.replace(MACHINE, **{field: 2 * getattr(MACHINE, field)})
        return predicted(config, mesh, hardware(machine=machine)).time

    for field in ("product_flops", "memory_bytes", "link_bytes"):
        assert doubled(field).total < usual.total
    assert doubled("link_bytes").experts == usual.experts
    assert doubled("link_seconds").total > usual.total
    network = hardware(host_link_bytes=2 * base.kind.host_link_bytes)
    faster = predicted(config, mesh, network).time.total
    assert faster < usual.total if mesh.size > 8 else faster == usual.total


def test_what_is_computed_again_takes_time():
    times = [
        predicted(run_config(model={"remat": remat}), MeshShape(2, 4, 1), hardware()).time
        for remat in ("none", "dots", "layer")
    ]
    assert times[0].total < times[1].total < times[2].total
    assert times[0].products < times[1].products < times[2].products
    assert times[1].experts == times[2].experts == pytest.approx(times[0].experts * 11 / 9, rel=0.1)


def test_where_no_kernel_serves():
    def slow(kind="h100", sizes=(1, 4, 1), **changes):
        return predicted(run_config(**changes), MeshShape(*sizes), hardware(kind)).slow

    assert slow() is None
    assert "64" in slow(sizes=(1, 4, 2))
    assert "biases" in slow(experts={"bias": True})
    assert slow("a100") == "there are none for NVIDIA A100-SXM4-80GB"
    dense = {"first_dense_layers": 2, "dense_hidden": 100}
    assert slow(model=dense, sizes=(4, 1, 1)) is None


def test_utilisation_and_tokens():
    config, mesh = run_config(), MeshShape(2, 4, 1)
    made = plan(config, mesh)
    found = predict_plan(made, hardware())
    assert made.formulas_agree and found.tokens == 256
    assert found.tokens_per_second == 256 / found.time.total
    needed = 256 * flops_per_token(config.model, 16).step / 8
    peak = PEAK_FLOPS["NVIDIA H100 80GB HBM3"]
    assert found.utilisation == pytest.approx(needed / found.time.total / peak)


def test_formulas_predict_what_the_traced_program_does():
    # Rates so low that nobody counts executions, which formulas count otherwise.
    slow = dataclasses.replace(MACHINE, link_bytes=1e7, memory_bytes=1e8, product_flops=1e9)
    model = {"remat": "layer", "scan_layers": True}
    config = run_config(model=model, train={"accumulate": 2}, batch_size=32)
    for sizes in ((2, 4, 2), (2, 8, 1)):
        machine = dataclasses.replace(slow, link_seconds=1e-12)
        mesh, on = MeshShape(*sizes), hardware(machine=machine, host_devices=64)
        traced = predict_plan(plan(config, mesh), on).time
        assert predicted(config, mesh, on).time.total == pytest.approx(traced.total, rel=1e-3)


def test_chunks_travel_beside_experts_on_tpus():
    def time(kind, **exchange):
        config = run_config(exchange=exchange, batch_size=512)
        return predicted(config, MeshShape(1, 8, 1), hardware(kind, host_devices=256)).time

    for kind in ("v5e", "h100"):
        assert time(kind).hidden == 0
    assert time("h100", chunks=4).hidden == 0
    found = time("v5e", chunks=4)
    assert 0 < found.hidden <= min(found.exchange, found.experts) * (1 + 1e-9)
    # Where experts take longest, one of four chunks' ways out and one's way home remain.
    slow = dataclasses.replace(MACHINE, product_flops=1e9, link_seconds=1e-9)
    config = run_config(exchange={"chunks": 4, "bucket_slack": math.inf}, batch_size=512)
    found = predicted(config, MeshShape(1, 8, 1), hardware("v5e", slow, 256)).time
    assert found.hidden == pytest.approx(found.exchange * 3 / 4, rel=1e-6)
    remote = time("h100", mode="remote")
    assert remote.hidden == 0  # of this machine's name nobody knows that it is a Hopper GPU
    hopper = dataclasses.replace(MACHINE, device="NVIDIA H200")
    config = run_config(exchange={"mode": "remote"}, batch_size=512)
    found = predicted(config, MeshShape(1, 8, 1), hardware(machine=hopper)).time
    assert 0 < found.hidden <= found.exchange / 4 + found.experts


def test_float32_is_refused():
    config = run_config(model={"compute_dtype": "float32"})
    with pytest.raises(UserError, match=r"compute_dtype=float32: .*--model.compute-dtype bfloat16"):
        predicted(config, MeshShape(), hardware())


# ── devices ──────────────────────────────────────────────────────────────────


def test_kinds_have_peaks_and_are_found():
    for kind in KINDS:
        assert kind.peak_flops == PEAK_FLOPS[kind.name]
        for name in (kind.name, kind.short, kind.short.upper(), *kind.others):
            assert find_kind(name) is kind
        made = hardware_of(kind.short)
        assert made.machine.product_flops < kind.peak_flops
        assert made.host_devices == kind.host_devices and kind.usable_memory < kind.memory
        assert hardware_of(kind.short, 4).host_devices == 4
    assert find_kind("cpu") is None
    with pytest.raises(UserError, match="'b300': no such kind of device; choose one of h100, h200"):
        hardware_of("b300")


def test_measured_figures_come_first(monkeypatch):
    measured = {"NVIDIA H200": dataclasses.replace(MACHINE, device="NVIDIA H200")}
    monkeypatch.setattr(device_kinds, "machine_of", measured.get)
    found = hardware_of("h200")
    assert found.measured and found.machine == measured["NVIDIA H200"]
    assert "measured with 8" in found.source
    assert not hardware_of("h100").measured and "not measured" in hardware_of("h100").source
    # One device says nothing of links.
    alone = dataclasses.replace(MACHINE, devices=1, link_bytes=0, link_seconds=0)
    measured["NVIDIA H200"] = alone
    found = hardware_of("h200")
    assert found.machine.memory_bytes == MACHINE.memory_bytes
    assert found.machine.link_bytes == device_kinds.LINKS * 450e9
