"""The search for better cuts, on made-up operations and times."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from kernel_support import OLD
from tuning_support import PLACE, Clock, Made, options_of, small_layer

from pallas_kernels.tuning.product import candidates
from pallas_kernels.tuning.search import Search, asked_by
from pallas_kernels.tuning.timing import by_name


def search(work, clock, **options):
    lines = []
    with ThreadPoolExecutor(2) as pool:
        found = Search(work, pool, most=6, say=lines.append, **options).finish(
            timer=clock, rounds=5
        )
    return {product.kernel: finding for product, finding in found.items()}, lines


def test_the_search_finds_the_best():
    cuts = options_of()
    times = {
        ("experts_up", cuts[4]): 0.8,
        ("experts_up", cuts[2]): 0.9,
        ("experts_down", cuts[1]): 0.985,
    }
    found, lines = search(Made(), Clock(times))
    assert found["experts_up"].cut == cuts[4]
    assert found["experts_up"].ms / found["experts_up"].heuristic_ms == pytest.approx(0.8, rel=0.02)
    assert found["experts_down"].cut is None  # 1.5 % are not worth an entry
    assert found["experts_down"].ms == found["experts_down"].heuristic_ms
    assert "  7 programs, 5 rounds" in lines


def test_luck_is_not_stored():
    """What was fast when it was chosen, and is not when timed again."""
    cuts = options_of()
    lucky = Clock({("experts_up", cuts[0]): 0.5}, late=(7 * 5, {}))
    assert search(Made(), lucky)[0]["experts_up"].cut is None


def test_wrong_and_impossible_cuts_are_left_out():
    cuts = options_of()
    work = Made(wrong=[("experts_up", cuts[0])], refused=[("experts_down", cuts[1])])
    times = {
        ("experts_up", cuts[0]): 0.1,
        ("experts_down", cuts[0]): 0.7,
        ("experts_up", cuts[1]): 0.6,
        ("experts_down", cuts[1]): 0.1,
    }
    found, lines = search(work, Clock(times))
    assert found["experts_up"].cut == cuts[1] and found["experts_down"].cut == cuts[0]
    left = [line for line in lines if "left out" in line]
    assert len(left) == 2 and not any("\n" in line for line in left)
    assert any("results differ" in line for line in left)
    assert any("this tile" in line for line in left)


def test_what_the_search_refuses():
    with pytest.raises(RuntimeError, match="made up: the heuristic's result is wrong"):
        search(Made(inaccurate=True), Clock({}))
    with pytest.raises(RuntimeError, match="no launch of 'experts_down' was seen"):
        search(Made(), Clock({}, names=("experts_up",)))
    work = Made(kernels=("experts_up", "experts_up", "experts_down"))
    work.products[1] = replace(work.products[1], groups=3)
    found, lines = search(work, Clock({}))
    assert set(found) == {"experts_down"} and sum("two products" in line for line in lines) == 2
    assert search(Made(), Clock({}), known=Made().products)[0] == {}


def test_nothing_is_timed_again_where_nothing_is_better():
    clock = Clock({})
    found, lines = search(Made(), clock)
    assert clock.calls == 7 * 5 and not any(finding.cut for finding in found.values())
    assert "  candidates compiled 6/6" in lines and lines[-1] == "  round 5/5"


def test_what_looked_better_and_fails_with_others_is_taken_out():
    """The program of all that looks better is wrong, and so are its parts the second time."""
    cuts, kept = options_of(), []
    work = Made()

    def keep(findings):
        kept.append({p.kernel: found.cut for p, found in findings.items()})
        work.wrong |= {("experts_up", cuts[0])}

    clock = Clock({("experts_up", cuts[0]): 0.5})
    with ThreadPoolExecutor(2) as pool:
        options = dict(timer=clock, rounds=3, keep=keep)
        found = Search(work, pool, most=6, say=str).finish(**options)
    assert kept == [{"experts_up": cuts[0], "experts_down": None}]
    assert not any(finding.cut for finding in found.values()) and clock.calls == 7 * 3
    assert all(finding.ms == finding.heuristic_ms for finding in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_layer_is_tuned(backward):
    """The search on the kernels themselves, interpreted, with made-up times."""
    if backward and OLD:
        pytest.skip("jax 0.10 cannot interpret transposed operands")
    work = replace(small_layer(backward), experts=1)
    with PLACE():
        asked = asked_by(work)
    best = {p: candidates(p, cut, 1)[0] for p, cut in asked.items()}

    def timer(program, inputs, kernels):
        assert set(kernels) == {p.kernel for p in asked}
        return {p.kernel: 0.5 if p in program.cuts else 1.0 for p in asked}

    with PLACE(), ThreadPoolExecutor(1) as pool:
        found = Search(work, pool, most=1, say=str).finish(timer=timer, rounds=1)
    assert {p: finding.cut for p, finding in found.items()} == best


def test_launches_by_name():
    launches = [
        ("experts_down_backward_kernel", 2.0),
        ("experts_down_kernel", 1.0),
        ("fusion", 9.0),
        ("experts_down_kernel", 0.5),
    ]
    kernels = ["experts_down", "experts_down_backward", "experts_up"]
    assert by_name(launches, kernels) == {"experts_down": 1.5, "experts_down_backward": 2.0}
