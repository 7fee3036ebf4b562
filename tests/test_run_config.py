"""The configuration of a run as JSON: what is read back, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from rundir_support import Sgd, Train, one_line

import train
from moejax.config import ExchangeConfig, LocalityConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.presets import tiny
from moejax.training.config_json import config_differences, config_from_json, config_to_json
from moejax.training.rundir import RunDir


@pytest.mark.parametrize(
    "config",
    [
        Train(),
        Train(
            model=ModelConfig(
                num_layers=2,
                top_k_by_layer=(1, 2),
                moe=MoEConfig(exchange=ExchangeConfig(bucket_slack=math.inf, bucket_rows=7)),
            ),
            optimizer=Sgd(0.5),
            schedule="wsd",
            limit=2.0,
            data=("a", "b"),
            tokenizer=Path("x/y.json"),
            resume=False,
        ),
    ],
)
def test_config_round_trip(config):
    data = json.loads(json.dumps(config_to_json(config), allow_nan=False))
    back = config_from_json(Train, data)
    assert back == config
    assert type(back.limit) is type(config.limit)
    assert type(back.tokenizer) is type(config.tokenizer)


def test_config_names_every_wrong_key():
    data = config_to_json(Train())
    data["stepz"] = 3
    del data["schedule"]
    del data["model"]["attention"]["head_dim"]
    data["model"]["moe"]["router"]["tokk"] = 1
    with pytest.raises(UserError) as error:
        config_from_json(Train, data, "config.json")
    for name in (
        "config.json",
        "unknown key stepz",
        "missing key schedule",
        "missing key model.attention.head_dim",
        "unknown key model.moe.router.tokk",
    ):
        assert name in one_line(error)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", "10"),
        ("steps", 1.5),
        ("steps", True),
        ("schedule", "linear"),
        ("resume", 1),
        ("data", [1]),
        ("data", "ab"),
        ("tokenizer", 3),
        ("limit", "many"),
        ("optimizer", {"type": "Adagrad", "rate": 1.0}),
        ("optimizer", 3),
        ("model", [1]),
    ],
)
def test_config_names_wrong_values(name, value):
    with pytest.raises(UserError) as error:
        config_from_json(Train, config_to_json(Train()) | {name: value})
    assert name in one_line(error) and ("must" in one_line(error) or "no" in one_line(error))


def test_config_of_before_a_field_was_added(tmp_path):
    """It reads as the field's default, and a run that has it so is continued."""
    data = config_to_json(Train())
    del data["model"]["moe"]["locality"]
    assert config_from_json(Train, data) == Train()
    with RunDir.create_or_open(tmp_path / "run") as run:
        run.bind_config(Train())
        run.config_path.write_text(json.dumps(data))
        assert run.check_config(Train()) is True
        moe = MoEConfig(locality=LocalityConfig(0.5))
        with pytest.raises(UserError) as error:
            run.check_config(Train(model=ModelConfig(moe=moe)))
        assert "model.moe.locality.device_penalty is 0.0 there and 0.5 here" in one_line(error)
    assert "missing key" not in one_line(error)
    del data["model"]["moe"]["router"]
    with pytest.raises(UserError, match=r"missing key model\.moe\.router"):
        config_from_json(Train, data)


def test_config_refused_by_the_class_itself():
    data = config_to_json(Train())
    data["model"]["moe"]["router"]["top_k"] = 99
    with pytest.raises(UserError, match="top_k=99"):
        config_from_json(Train, data)


def test_config_differences():
    a = {"x": 1, "y": {"z": [1, 2], "w": None}, "t": True}
    b = {"x": 1, "y": {"z": [1, 3], "v": 4}, "t": 1}
    assert config_differences(a, b) == [("y.z", [1, 2], [1, 3]), ("y.v", None, 4), ("t", True, 1)]
    assert config_differences(a, a) == []


def test_config_of_a_foreign_type_is_a_mistake_in_the_program():
    @dataclass(frozen=True)
    class Odd:
        x: object = dataclasses.field(default_factory=dict)

    with pytest.raises(TypeError, match="cannot hold dict"):
        config_to_json(Odd())


# ── the directory ────────────────────────────────────────────────────────────


def test_model_is_bound_and_the_rest_may_change(tmp_path):
    with RunDir.create_or_open(tmp_path / "a" / "run") as run:
        assert run.bind_config(Train(steps=3)) is False
        assert run.read_config(Train) == Train(steps=3)
    with RunDir.create_or_open(run.path) as run:
        assert run.bind_config(Train(steps=5)) is True
        assert run.read_config(Train).steps == 5
        before = run.config_path.read_bytes()
        other = Train(model=ModelConfig(d_model=64, moe=MoEConfig(RouterConfig(num_experts=16))))
        with pytest.raises(UserError) as error:
            run.bind_config(other)
        text = one_line(error)
        assert "model.d_model is 128 there and 64 here" in text
        assert "model.moe.router.num_experts is 8 there and 16 here" in text
        assert "head_dim" not in text
        assert run.config_path.read_bytes() == before


def test_how_layers_run_may_change(tmp_path):
    """Scanning and recomputing belong to the machine; what the weights are does not."""
    config = tiny()
    with RunDir.create_or_open(tmp_path) as run:
        run.bind_config(config, train.FIXED, train.FREE)
        for change, free in (
            ({"scan_layers": True, "remat": "layer"}, True),
            ({"num_layers": 5}, False),
        ):
            other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
            if free:
                assert run.check_config(other, train.FIXED, train.FREE) is True
                continue
            with pytest.raises(UserError, match=r"model\.num_layers is 4 there and 5 here"):
                run.check_config(other, train.FIXED, train.FREE)


def test_config_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        RunDir(tmp_path).read_config(Train)
    for text in ("{", "[1]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json") as error:
            RunDir(tmp_path).read_config(Train)
        one_line(error)
