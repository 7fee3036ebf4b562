"""What cannot be compressed, or asked for, and what is told of a model that is."""

import dataclasses

import pytest
from compress_model_support import CONFIG, E, K, options, save, weights_of, write_text

from moejax.compress.__main__ import main
from moejax.compress.changed import check, notes, smaller_model
from moejax.config import (
    ExchangeConfig,
    ExpertsConfig,
    LocalityConfig,
    MoEConfig,
    RouterConfig,
    WireConfig,
)
from moejax.errors import UserError
from moejax.sharing_config import SharingConfig


def model_with(**changes):
    router = {"selection_bias": True} | changes.pop("router", {})
    moe = MoEConfig(RouterConfig(E, K, **router), ExpertsConfig(8), **changes.pop("moe", {}))
    return dataclasses.replace(CONFIG, moe=moe, **changes)


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ({"num_experts_by_layer": (0, 4, E)}, {}, "the layers have 4, 6 experts"),
        (
            {"moe": {"exchange": ExchangeConfig(wire=WireConfig(dispatch_dim=8))}},
            {},
            "fewer columns",
        ),
        (
            {},
            {"method": "share", "experts": 0, "sharing": SharingConfig("basis", 9)},
            "rank=9 with num_experts=6",
        ),
        ({"router": {"num_groups": 2}}, {"method": "prune"}, "2 groups of equal size"),
        ({"first_dense_layers": 3}, {}, "no layer with experts"),
    ],
)
def test_models_that_are_refused(model, flags, words):
    with pytest.raises(UserError, match=words):
        check(model_with(**model), options(**flags))


def test_what_is_lost_is_told():
    model = model_with(router={"bias_update_rate": 0.01}, moe={"locality": LocalityConfig(0.1)})
    assert not notes(model, options(method="prune")) and len(notes(model, options())) == 2
    after = smaller_model(model, [0, 4, 4], E, SharingConfig())
    assert after.moe.router.bias_update_rate == 0 and not after.moe.locality.active
    fewer = dataclasses.replace(model, top_k_by_layer=(2, 1, 1))
    assert smaller_model(fewer, [0, 1, 1], None, SharingConfig()).moe.router.top_k == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experts", "1"], "--experts 1: a token chooses 2 of 6, so between these two"),
        (["--experts", "7"], "--experts 7: a token chooses 2 of 6"),
        (["--merge.threshold", "0.9", "--by-layer"], "--merge.threshold 0.9: takes the place of"),
        (["--data.seq-len", "49"], "longer than the model's context of 48"),
        (["--tokens", "0"], "tokens 1 or more"),
        (["--method", "share"], "sharing needs a kind"),
        (["--sharing.kind", "up"], "a kind needs --method share"),
        (["--method", "share", "--sharing.kind", "in", "--experts", "4"], "all are kept"),
        (["--merge.ridge", "-1"], "--merge.ridge -1"),
        (["--method", "prune", "--merge.ridge", "3"], "--merge.* with --method prune"),
    ],
)
def test_flags_that_are_refused(rng, tmp_path, capsys, flags, words):
    text = write_text(tmp_path, rng)
    save(tmp_path / "model", weights_of(rng))
    assert main([str(tmp_path / "model"), str(tmp_path / "out"), *text, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
