"""A few processes killed at random moments, as `benchmarks/faults.py` does fifty times."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import faults


def kill(**more):
    row = {"kill": 1, "killed": 0, "processes": 2, "others_in_time": True, "exit_codes": [1]}
    return row | {"message": "process 0 of 2 is gone", "was_over": False} | more


def ended(**more):
    row = {"run": "run1", "smaller": False, "steps": 9, "steps_equal_in_every_bit": 9}
    return row | {"largest_difference": 0.0} | more


def test_what_is_told_of_rows():
    assert not faults.wrong([kill(), kill(processes=1, exit_codes=[], message=""), ended()])
    aborted = {"exit_codes": [-6], "message": "JAX distributed service detected fatal errors"}
    assert not faults.wrong([kill(**aborted)])
    assert faults.wrong([kill(**aborted, killed=1)])
    assert not faults.wrong([ended(smaller=True, largest_difference=1e-6)])
    for row in (
        kill(others_in_time=False),
        kill(exit_codes=[0]),
        kill(message="Traceback"),
        ended(largest_difference=1e-7),
        ended(steps_equal_in_every_bit=8),
        ended(smaller=True, largest_difference=1e-4),
        ended(smaller=True, largest_difference=float("nan")),
    ):
        assert len(faults.wrong([row])) == 1, row


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_kills(rng, tmp_path):
    """The rest ends with a reason within a minute; losses are those of a run nobody killed."""
    seed = int(rng.integers(2**31))
    text = faults.write_text(tmp_path / "text")
    case = faults.Case(tmp_path, text, 12, random.Random(seed))
    found = faults.measure(case, 5, smaller=False)
    assert not faults.wrong(found), (seed, faults.wrong(found))
    assert np.sum(["kill" in row for row in found]) == 5
    assert any("largest_difference" in row for row in found)
