"""Placements of `infer.py`: what is refused, the planner's thread, what a server tells of it."""

import dataclasses
import json
import os
import threading
import time
import urllib.request
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from engine_support import run
from inference_support import CONFIG
from serve_placement_support import Blocked

from moejax.errors import UserError
from moejax.inference.params import SamplingParams
from moejax.inference.placement_choice import choose_placement
from moejax.inference.placing import ServingPlacement
from moejax.inference.request import PlacementStats
from moejax.placement import controller
from moejax.placement.arrays import slots_at_home
from moejax.placement.background import BackgroundPlanner
from moejax.placement.controller import Rebalance
from moejax.placement.plan_file import read_slots, write_slots
from moejax.serving.flags import REBALANCE_EVERY, EngineFlags
from moejax.training.metrics import MetricsLog
from sharding.mesh import MeshShape

EXPERTS, LAYERS = 8, 2


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr(controller, "LEAST_TOKENS", 40.0)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name == "moejax-planner"]


def test_a_stop_ends_planning_after_a_few_layers(monkeypatch):
    blocked = Blocked(monkeypatch)
    planner = BackgroundPlanner(EXPERTS, 12, 4)
    assert planner.slots_LP.shape == (12, 8) and len(planner._controllers) == 3
    pairs = np.ones((12, EXPERTS, EXPERTS), np.float32) * (1 - np.eye(EXPERTS, dtype=np.float32))
    load, tokens = np.full((12, EXPERTS), 14, np.float32), np.full(12, 56, np.float32)
    told = []
    planner.begin(
        lambda: controller.Statistics(pairs, load, tokens), lambda *found: told.append(found)
    )
    assert blocked.asked.wait(60) and planner.busy
    assert not planner.begin(lambda: 1 / 0, None)  # one at a time
    threading.Timer(0.1, blocked.go.set).start()
    assert planner.stop(60)
    assert not planner.busy and not told and planner.failure is None
    assert not planner.begin(lambda: 1 / 0, None)


def test_the_next_look_begins_when_one_was_taken(monkeypatch):
    """However long the thread of the one before takes to end after its last word."""
    go = threading.Event()
    run = BackgroundPlanner._run

    def lingering(self, *args):
        run(self, *args)
        assert go.wait(60)

    monkeypatch.setattr(BackgroundPlanner, "_run", lingering)
    planner = BackgroundPlanner(EXPERTS, 2, 4)
    pairs, load, tokens = (np.zeros((2, *more), np.float32) for more in ((8, 8), (8,), ()))
    read = partial(controller.Statistics, pairs, load, tokens)
    told = []
    for _ in range(2):
        assert planner.begin(read, lambda *_: None)
        while (found := planner.take()[1]) is None:
            assert planner.failure is None and not planner.begin(read, lambda *_: None)
            time.sleep(0.01)
        told.append(found.kind)
        threading.Timer(0.05, go.set).start()
    assert told == ["waits", "waits"]
    assert planner.stop(60)


def test_readers_of_lines_and_disks_may_be_gone(tmp_path, monkeypatch):
    """A line that nobody reads and a log that cannot be written end nothing."""

    def gone(line):
        raise BrokenPipeError

    placing = object.__new__(ServingPlacement)
    placing._line, placing._told = gone, ""
    placing._tell("what")
    placing._log = MetricsLog(tmp_path / "placement.jsonl")
    placing._history = SimpleNamespace(looked=lambda *_: None)
    os.close(placing._log._fd)
    told = Rebalance("plan", 1, 0, (0.5, 0.4), (1.0, 1.0), 100.0, 0.1)
    statistics = SimpleNamespace(pairs_LEE=None, load_LE=None)
    closed = []
    monkeypatch.setattr(MetricsLog, "close", lambda self: closed.append(self))
    placing._note_look(4, None, [None], statistics, told)
    assert placing._log is None and len(closed) == 1


def test_what_is_refused(tmp_path, monkeypatch):
    shape, ask = MeshShape(1, 4, 1), choose_placement
    with pytest.raises(UserError, match="--placement auto on a mesh of expert=1: there is one"):
        ask("auto", CONFIG, MeshShape(4, 1, 1))
    with pytest.raises(UserError, match="replicas=9: must lie between 0 and 6"):
        ask("auto", CONFIG, shape, replicas=9)
    dense = dataclasses.replace(CONFIG, first_dense_layers=2, dense_hidden=32)
    with pytest.raises(UserError, match="--placement auto: the model has no layer with experts"):
        ask("auto", dense, shape)
    path = tmp_path / "plan.npz"
    write_slots(path, np.tile(slots_at_home(EXPERTS, 2), (LAYERS, 1)), 2)
    with pytest.raises(UserError, match=r"a plan of 2 layers on 2 devices, for 2 .*=4: plan"):
        ask(str(path), CONFIG, shape)
    write_slots(path, np.zeros((LAYERS, 8), np.int32), 4)
    with pytest.raises(UserError, match=r"plan\.npz: placement: expert 1 has no slot"):
        ask(str(path), CONFIG, shape)
    with pytest.raises(UserError, match=r"none\.npz"):
        ask(str(tmp_path / "none.npz"), CONFIG, shape)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="with 2 processes: each would plan for itself"):
        ask("auto", CONFIG, shape)
    assert ask("home", CONFIG, shape) is None

    for flags, told in (
        ({"placement": "plan"}, "--placement plan: must be home, auto or a file .npz"),
        ({"replicas": 1}, "--replicas 1 with --placement home: nothing is planned there"),
        ({"placement": "x.npz", "placement_log": "d"}, "--placement-log d with --placement x.npz"),
        ({"placement": "auto", "replicas": -1}, "--replicas -1 --rebalance-every 1000: must be"),
        ({"placement": "auto", "rebalance_every": 0}, "--rebalance-every 0: must be at least"),
        ({"placement": "auto", "deterministic": True}, "auto with --deterministic: another"),
    ):
        with pytest.raises(UserError, match=told):
            EngineFlags(**flags)


def metrics_of(served):
    """Values by name."""
    with urllib.request.urlopen(served.url.replace("/v1", "/metrics"), timeout=30) as page:
        assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = page.read().decode().splitlines()
    values = dict(line.split() for line in lines if not line.startswith("#"))
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE "))
    assert kinds == {n: "counter" if n.endswith("_total") else "gauge" for n in values}
    return values


def test_metrics_of_a_server(monkeypatch):
    pytest.importorskip("uvicorn")
    from serve_support import COMPLETION, book_server

    with book_server(monkeypatch) as served:
        served.ask("/v1/completions", {**COMPLETION, "max_tokens": 7})
        stats, found = served.settled(), metrics_of(served)
        assert found["moejax_generated_tokens_total"] == str(stats.generated_tokens)
        assert not any("placement" in name or "offload" in name for name in found)
        assert len(found) == len(dataclasses.fields(stats)) - 2
        placement = PlacementStats(True, 3, 17, 5, 2, 1.25)
        values: dict[str, str] = {}
        for _ in range(100):  # the loop may still write its own, once, after its last step
            served.loop.stats = dataclasses.replace(stats, placement=placement)
            values = {n: v for n, v in metrics_of(served).items() if "placement" in n}
            if values:
                break
        assert values == {
            "moejax_placement_following": "1",
            "moejax_placement_looks_total": "3",
            "moejax_placement_experts_moved_total": "17",
            "moejax_placement_copies": "5",
            "moejax_placement_layers_waiting": "2",
            "moejax_placement_planner_seconds_total": "1.25",
        }


@pytest.mark.slow
def test_a_server_tells_what_it_did(rng, tmp_path, tmp_path_factory, monkeypatch, capsys):
    modes = pytest.importorskip("modes_support")
    from serve_support import serving

    from moejax.inference.source import open_model
    from moejax.serving import start
    from moejax.serving.loop import EngineLoop
    from moejax.serving.text_model import TextModel

    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    folder, log = modes.make_folder(tmp_path_factory, modes.make_weights()), tmp_path / "log"
    source = open_model(folder)
    model = TextModel.open(source, chats=False)
    flags = EngineFlags(
        mesh="1x4x1",
        placement="auto",
        replicas=1,
        rebalance_every=4,
        placement_log=str(log),
        max_len=64,
        max_rows=4,
        page_len=4,
        prefill_chunk=16,
    )
    engine = start.make_engine(source, flags)
    engine.expect(8, 64)
    with serving(EngineLoop(engine, model.tokenizer), model) as served:
        body = {"model": model.name, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        answers = []
        for _ in range(200):
            prompt = rng.integers(1, 257, 20).tolist()
            status, answer = served.ask("/v1/completions", {**body, "prompt": prompt})
            assert status == 200
            answers.append((prompt, answer["choices"][0]["text"]))
            found = metrics_of(served)
            moved, looks = (
                int(found[f"moejax_placement_{name}_total"]) for name in ("experts_moved", "looks")
            )
            if moved and looks:
                break
        assert moved and looks
        assert float(found["moejax_placement_planner_seconds_total"]) > 0
        assert found["moejax_placement_following"] == "1"
        assert {"moejax_placement_copies", "moejax_placement_layers_waiting"} <= found.keys()
        assert int(found["moejax_generated_tokens_total"]) > 0
        assert served.ask("/health")[1]["placement"]["looks"] >= 1
    engine.close()
    rows = [json.loads(line) for line in (log / "placement.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "start" and any(row["kind"] == "plan" for row in rows)
    assert (log / "placement.png").read_bytes().startswith(b"\x89PNG")
    assert "experts moved" in capsys.readouterr().err

    # What was planned is a plan for the next start.
    assert read_slots(log / "placement.npz")[0].shape == (LAYERS, 12)
    again = dataclasses.replace(
        flags,
        placement=str(log / "placement.npz"),
        replicas=0,
        rebalance_every=REBALANCE_EVERY,
        placement_log="",
    )
    engine = start.make_engine(source, again)
    engine.expect(8, 64)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt, _ in answers]
    made, _ = run(engine)
    texts = [model.tokenizer.decode(made[id, 0][0]) for id in ids]
    assert texts == [text for _, text in answers]
