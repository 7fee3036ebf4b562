"""A product and its table, for the tests of tuning."""

from contextlib import nullcontext
from dataclasses import asdict

import jax

from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.hopper.config import RING, choose_config
from pallas_kernels.tuning import Cut, Entry, Measured, Product, Table
from pallas_kernels.tuning.lookup import device_kind
from pallas_kernels.tuning.works import Layer

ON_GPU = jax.default_backend() == "gpu"
OLD = jax.__version_info__ < (0, 11) and not ON_GPU  # its interpreter has no transposed views
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
    return Cut(found.tile_n, found.stages, found.band)


def table_of(cuts, device=None):
    return Table(device or device_kind(), {p: Entry(cut, MEASURED) for p, cut in cuts.items()})


def small_layer(backward):
    return Layer(tokens=6, d_model=64, hidden=128, experts=2, top_k=1, backward=backward)
