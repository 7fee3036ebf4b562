"""What a Hopper GPU's 8-bit sums do to experts, shown by those sums done in numpy."""

import backend_cases
import numpy as np
import pytest
from float8_flips import cut_hidden, cut_product, e4m3_rows, matrix_of
from kernel_support import BFLOAT16
from oracle import activate
from test_every_backend import TOKENS, problem, routed


def simulated(case, ids):
    """The layer of a problem with rows of 8 bits, its sums cut off as on a GPU."""
    arrays, out = case.arrays, np.zeros(case.exact["out"].shape)
    for slot in range(arrays["w_in"].values.shape[0]):
        at, js = np.nonzero(ids == slot)
        h, _ = cut_hidden(arrays["x"][at], arrays["w_in"], slot)
        hidden, _ = activate(h, "swiglu")
        y, _ = cut_product(*e4m3_rows(hidden), *matrix_of(arrays["w_out"], slot))
        np.add.at(out, at, arrays["scores"][at, js][:, None] * y)
    return out


def test_cut_sums(rng):
    """By hand: 14 bits of the largest, and no more; blocks of 128 are added whole."""
    x, w = np.zeros((1, 256)), np.ones((1, 256))
    x[0, :3] = 64.0, 2.0**-7, -(2.0**-8)
    x[0, 40] = 2.0**-7
    x[0, 128] = 2.0**-9
    one = np.ones((1, 2))
    got, deviation = cut_product(x, one, w, one)
    assert got == 64.0 + 2.0**-7 + 2.0**-7 + 2.0**-9  # a bit of 2⁻⁸ lies below 2⁶⁻¹³
    assert 2.0**-8 <= deviation < 2.0**-6
    x = rng.normal(size=(4, 128))
    w = rng.normal(size=(64, 128))
    got, deviation = cut_product(x, np.ones((4, 1)), w, np.ones((1, 1)))
    ratio = np.sqrt(np.mean((got - x @ w.T) ** 2) / np.mean(deviation**2))
    assert 0.8 < ratio < 1.25


def test_flips_are_told_from_errors(rng, monkeypatch):
    """What cut sums do is explained by roundings to the other side, and another error is not."""
    monkeypatch.setattr(backend_cases, "ON_GPU", True)
    monkeypatch.setattr(backend_cases, "poison", lambda: None)
    flips = []
    for _ in range(3):
        ids = routed(rng, TOKENS, "mixed")
        case = problem(rng, "float8 rows", ids)
        exact, got = case.exact["out"], simulated(case, ids)
        before, after = (np.linalg.norm(a - exact) for a in (got, case.without_flips(got)))
        size = np.linalg.norm(exact)
        flips.append(before / size)
        assert after < 1e-3 * size
        noise = rng.normal(size=exact.shape)
        noise *= 0.01 * size / np.linalg.norm(noise)
        assert np.linalg.norm(case.without_flips(got + noise) - exact) > 0.009 * size
        case.check({"out": got.astype(BFLOAT16)})
        # Half of a small one's output is less than the check sees, 1 % of all.
        token = np.linalg.norm(exact, axis=1).argmax()
        with pytest.raises(AssertionError):
            case.check({"out": np.where(np.arange(TOKENS)[:, None] == token, 0.5 * got, got)})
    assert np.mean(flips) > 1.5e-3
