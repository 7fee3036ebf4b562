"""The search for better cuts, on made-up operations and times, and the command."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import pytest
from jax import numpy as jnp
from tuning_support import OLD, ON_GPU, PLACE, PRODUCT, ask, small_layer, table_of

from pallas_kernels.tuning import __main__ as command
from pallas_kernels.tuning.product import candidates
from pallas_kernels.tuning.search import Search, asked_by
from pallas_kernels.tuning.table import read_table, store_table
from pallas_kernels.tuning.timing import by_name


class Made:
    """An operation of plain JAX that asks for the cuts of two products."""

    name = "made up"

    def __init__(self, wrong=(), refused=(), inaccurate=False, kernels=("first", "second")):
        self.wrong, self.refused, self.inaccurate = set(wrong), set(refused), inaccurate
        self.products = [replace(PRODUCT, kernel=name) for name in kernels]

    def shapes(self):
        return (jax.ShapeDtypeStruct((4,), jnp.float32),)

    def inputs(self):
        return (jnp.ones((4,), jnp.float32),)

    def function(self, x):
        outs = []
        for product in self.products:
            cut = ask(product)
            if (product.kernel, cut) in self.refused:
                raise ValueError("this tile\nmakes the compiler sick")
            outs.append(x * (1.5 if (product.kernel, cut) in self.wrong else 1.0))
        return tuple(outs)

    def errors(self, inputs, outputs):
        return {"x": 0.5 if self.inaccurate else 1e-6}


class Clock:
    """Made-up times: of a cut, relative to the heuristic's, on a clock that gets slower."""

    def __init__(self, better, late=None, names=("first", "second")):
        self.better, self.late, self.names, self.calls = better, late, names, 0

    def __call__(self, program, inputs, kernels):
        assert set(kernels) <= {"first", "second"}
        program.call(*inputs)
        self.calls += 1
        drift = 1.0 + 0.0005 * self.calls
        table = self.better
        if self.late is not None and len(program.cuts) and self.calls > self.late[0]:
            table = self.late[1]
        cuts = {p.kernel: c for p, c in program.cuts.items()}
        return {n: drift * table.get((n, cuts.get(n)), 1.0) for n in self.names}


def search(work, clock, **options):
    lines = []
    with ThreadPoolExecutor(2) as pool:
        found = Search(work, pool, most=6, say=lines.append, **options).finish(
            timer=clock, rounds=5
        )
    return {product.kernel: finding for product, finding in found.items()}, lines


def options_of(count=6):
    return candidates(PRODUCT, ask(PRODUCT), count)


def test_the_search_finds_the_best():
    cuts = options_of()
    times = {("first", cuts[4]): 0.8, ("first", cuts[2]): 0.9, ("second", cuts[1]): 0.985}
    found, lines = search(Made(), Clock(times))
    assert found["first"].cut == cuts[4]
    assert found["first"].ms / found["first"].heuristic_ms == pytest.approx(0.8, rel=0.02)
    assert found["second"].cut is None  # 1.5 % are not worth an entry
    assert found["second"].ms == found["second"].heuristic_ms
    assert "  7 programs, 5 rounds" in lines


def test_luck_is_not_stored():
    """What was fast when it was chosen, and is not when timed again."""
    cuts = options_of()
    lucky = Clock({("first", cuts[0]): 0.5}, late=(7 * 5, {}))
    assert search(Made(), lucky)[0]["first"].cut is None


def test_wrong_and_impossible_cuts_are_left_out():
    cuts = options_of()
    work = Made(wrong=[("first", cuts[0])], refused=[("second", cuts[1])])
    times = {
        ("first", cuts[0]): 0.1,
        ("second", cuts[0]): 0.7,
        ("first", cuts[1]): 0.6,
        ("second", cuts[1]): 0.1,
    }
    found, lines = search(work, Clock(times))
    assert found["first"].cut == cuts[1] and found["second"].cut == cuts[0]
    left = [line for line in lines if "left out" in line]
    assert len(left) == 2 and not any("\n" in line for line in left)
    assert any("results differ" in line for line in left)
    assert any("this tile" in line for line in left)


def test_what_the_search_refuses():
    with pytest.raises(RuntimeError, match="made up: the heuristic's result is wrong"):
        search(Made(inaccurate=True), Clock({}))
    with pytest.raises(RuntimeError, match="no launch of 'second' was seen"):
        search(Made(), Clock({}, names=("first",)))
    work = Made(kernels=("first", "first", "second"))
    work.products[1] = replace(work.products[1], groups=3)
    found, lines = search(work, Clock({}))
    assert set(found) == {"second"} and sum("two products" in line for line in lines) == 2
    assert search(Made(), Clock({}), known=Made().products)[0] == {}


def test_the_table_after_a_run(tmp_path, capsys):
    """Entries of others stay, one that is no longer better goes; Ctrl-C keeps what was found."""
    path, cuts, device = tmp_path / "table.json", options_of(), "NVIDIA H100 80GB HBM3"
    first, second = Made().products
    other = replace(PRODUCT, groups=5)
    store_table(table_of({other: cuts[0], first: cuts[0], second: cuts[0]}, device), path)

    class Interrupted(Made):
        def inputs(self):
            raise KeyboardInterrupt

    clock = Clock({("first", cuts[3]): 0.5})
    works = [Made(), Interrupted(kernels=("third",)), Made(kernels=("fourth",))]
    command.run(works, path, device, timer=clock, most=6, rounds=3)
    table = read_table(path, device)
    assert {p: e.cut for p, e in table.entries.items()} == {other: cuts[0], first: cuts[3]}
    measured = table.entries[first].measured
    assert measured.ms < 0.6 * measured.heuristic_ms and measured.jax == jax.__version__
    assert measured.commit
    printed = capsys.readouterr().out
    assert "interrupted; what was found before is kept" in printed and "% less" in printed


@pytest.mark.parametrize(
    "backward", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "backward"]
)
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


# The command

SHAPE = ["--shape", "640,64,128,4,2"]


@pytest.mark.skipif(ON_GPU, reason="there is a Hopper GPU")
def test_the_command_refuses_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="tuning: no Hopper GPU here: the device is 'cpu'"):
        command.main([*SHAPE, "--output", str(tmp_path / "table.json")])
    assert not list(tmp_path.iterdir())


def test_a_dry_run(capsys, tmp_path):
    command.main([*SHAPE, "--product", "256,64,128,2", "--most", "3", "--dry-run"])
    printed = capsys.readouterr().out
    for kernel in ("experts_up", "experts_down_backward", "w_out_gradient", "grouped_matmul"):
        assert f"  {kernel} " in printed
    assert printed.count("(the heuristic's)") == printed.count(" groups, ")


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "nothing to tune"),
        (["--shape", "64,64,128,4"], "5 positive integers T,D,H,E,K"),
        (["--shape", "64,64,128,4,-2"], "5 positive integers T,D,H,E,K"),
        ([*SHAPE, "--rounds", "0"], "--rounds 0: at least 1"),
        ([*SHAPE, "--tokens", "16", "0"], "--tokens 0: at least 1"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert message in capsys.readouterr().err


def test_wrong_layers():
    for words, message in (
        (["--shape", "64,64,128,4,5"], "5 experts a token, and there are 4"),
        ([*SHAPE, "--activation", "mish"], "activation 'mish' is none of"),
        (["--shape", "64,60,128,4,2"], "d_model=60 is no multiple of 64"),
    ):
        with pytest.raises(SystemExit, match=message):
            command.main([*words, "--dry-run"])
