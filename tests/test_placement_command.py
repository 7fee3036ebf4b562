"""`python -m moejax.placement`."""

import numpy as np
import pytest

from moejax.placement.__main__ import main
from moejax.placement.generator import generate, make_traffic
from moejax.placement.plan_file import read_slots
from moejax.placement.trace import write_trace


def test_command(tmp_path, capsys, rng):
    seed = int(rng.integers(1 << 30))
    trace, out = str(tmp_path / "t.npz"), str(tmp_path / "plan.npz")
    write_trace(trace, generate(make_traffic(16, 2, seed=seed), 2000, mean_length=50, seed=seed))
    flags = ["--trace", trace, "--devices", "4", "--load-cap", "1.3", "--out", out]
    assert main(["plan", *flags, "--held-out", "0.3", "--hosts", "2"]) == 0
    told = capsys.readouterr().out
    assert "unseen documents" in told and "contiguous: fan-out" in told
    slots_LP, devices = read_slots(out)
    assert devices == 4 and slots_LP.shape == (2, 16)
    assert main(["measure", "--trace", trace, "--plan", out, "--hosts", "2"]) == 0
    assert capsys.readouterr().out.count("fan-out") == 3
    present = ["--present", out, "--most-moved", "2", "--slots", "4"]
    assert main(["plan", *flags[:-1], str(tmp_path / "next.npz"), *present]) == 0
    assert "experts that move" in capsys.readouterr().out
    assert (read_slots(tmp_path / "next.npz")[0] != slots_LP).sum() <= 2 * 2
    with_replica = np.concatenate([slots_LP.reshape(2, 4, 4), np.full((2, 4, 1), -1)], axis=2)
    with_replica[:, 1, 4] = with_replica[:, 0, 0]
    np.savez(out, slots=with_replica.reshape(2, 20), devices=np.array(4))
    assert main(["measure", "--trace", trace, "--plan", out]) == 0


@pytest.mark.parametrize(
    "argv,told",
    [
        ([], "no mode"),
        (["draw"], "draw"),
        (["plan"], "--trace"),
        (["plan", "--trace", "nothing.npz"], "nothing.npz"),
        (["plan", "--devices", "0"], "--devices 0"),
        (["plan", "--held-out", "1"], "--held-out"),
        (["measure", "--trace", "nothing.npz"], "nothing.npz"),
    ],
)
def test_command_refuses(argv, told, capsys):
    assert main(argv) == 2
    assert told in capsys.readouterr().err
