"""The benchmark of routing that knows where experts are: what it says of itself, what it keeps."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import locality
import locality_tuning as tuning


def test_the_command_that_is_written():
    words = ["--windows", "1", "--keep", "some where", "--tune", "2", "3", "--name", "mine"]
    want = "python benchmarks/locality.py --windows 1 --tune 2 3 --name mine"
    assert locality.command(words) == want
    assert locality.command(["--keep=x", *words[:2], *words[4:]]) == want
    assert locality.command([]) == "python benchmarks/locality.py"


def test_a_rehearsal_spares_the_results(capsys):
    for words in (["--tiny"], ["--tiny", "--name", locality.NAME]):
        with pytest.raises(SystemExit):
            locality.parse(words)
        assert "--name" in capsys.readouterr().err
    assert locality.parse(["--tiny", "--name", "try"]).steps == 1
    with pytest.raises(SystemExit):  # `command` would not know it
        locality.parse(["--kee", "x"])


def test_the_key_of_kept_weights(rng):
    """The same of the same; another with any other weight, name, token, slot or setting."""
    flat = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in ("params/a", "bias/b")}
    batches = [rng.integers(0, 99, (2, 5)) for _ in range(3)]
    slots = rng.permutation(8).astype(np.int32)
    first = tuning.key("config", flat, batches, slots)
    assert first == tuning.key("config", dict(reversed(flat.items())), iter(batches), slots.copy())

    def changed(array):
        other = array.copy()
        other.flat[rng.integers(other.size)] += 1
        return other

    others = [
        tuning.key("other", flat, batches, slots),
        tuning.key("config", flat | {"bias/b": changed(flat["bias/b"])}, batches, slots),
        tuning.key("config", {"params/a": flat["params/a"]}, batches, slots),
        tuning.key("config", flat, [*batches[:2], changed(batches[2])], slots),
        tuning.key("config", flat, batches[:2], slots),
        tuning.key("config", flat, batches, changed(slots)),
        tuning.key("config", flat, batches, None),
    ]
    assert len({first, *others}) == 8
