"""Products, tables, and a made-up operation with made-up times, for the tests of tuning."""

from contextlib import nullcontext
from dataclasses import asdict, replace

import jax
from jax import numpy as jnp
from kernel_support import ON_GPU

from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.hopper.config import RING, choose_config
from pallas_kernels.tuning import Cut, Entry, Measured, Product, Table
from pallas_kernels.tuning.lookup import device_kind
from pallas_kernels.tuning.product import KERNELS, bucket, candidates
from pallas_kernels.tuning.works import Layer

PLACE = nullcontext if ON_GPU else interpreted
MEASURED = Measured(1.5, 2.0, "0.11.2", "0.11.2", "abc1234+")
PRODUCT = Product(
    kernel="experts_up",
    contraction=4096,
    columns=14336,
    groups=8,
    assignments=32768,
    parts=2,
    tile_rows=128,
    widest=256,
    ring=RING,
    flags=("gather", "keep"),
    dtype="bfloat16",
)


def asking(product, **changed):
    """choose_config's arguments that ask for a product."""
    values = asdict(product) | changed
    names = ("kernel", "contraction", "groups", "assignments", "parts", "widest", "ring", "dtype")
    return (values["columns"],), {
        **{name: values[name] for name in names},
        "rows": values["tile_rows"],
        "flags": {"few": False} | dict.fromkeys(values["flags"], True),
    }


def ask(product, **changed):
    args, options = asking(product, **changed)
    found = choose_config(*args, **options)
    return Cut(found.tile_n, found.stages, found.band, found.cluster)


def table_of(cuts, device=None):
    return Table(device or device_kind(), {p: Entry(cut, MEASURED) for p, cut in cuts.items()})


def small_layer(backward):
    return Layer(tokens=6, d_model=64, hidden=128, experts=2, top_k=1, backward=backward)


class Made:
    """An operation of plain JAX that asks for the cuts of two products."""

    name = "made up"

    def __init__(
        self, wrong=(), refused=(), inaccurate=False, kernels=("experts_up", "experts_down")
    ):
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

    def __init__(self, better, late=None, names=("experts_up", "experts_down")):
        self.better, self.late, self.names, self.calls = better, late, names, 0

    def __call__(self, program, inputs, kernels):
        assert set(kernels) <= set(KERNELS)
        program.call(*inputs)
        self.calls += 1
        drift = 1.0 + 0.0005 * self.calls
        table = self.better
        if self.late is not None and len(program.cuts) and self.calls > self.late[0]:
            table = self.late[1]
        cuts = {p.kernel: c for p, c in program.cuts.items()}
        return {n: drift * table.get((n, cuts.get(n)), 1.0) for n in self.names}


def options_of(count=6):
    return candidates(PRODUCT, ask(PRODUCT), count)


def random_products(rng, count):
    for _ in range(count):
        parts = int(rng.integers(1, 3))
        yield replace(
            PRODUCT,
            kernel=str(rng.choice(["experts_up", "rows_gradient"])),
            contraction=64 * int(rng.integers(1, 400)),
            columns=64 * int(rng.integers(1, 400)),
            groups=int(rng.integers(1, 512)),
            assignments=bucket(int(rng.integers(1, 10**6))),
            parts=parts,
            flags=tuple(f for f in ("few", "gather", "keep") if rng.random() < 0.5),
        )
