"""Techniques together: every pair of settings in some train step, and what cannot be is refused.

What is exact in a row must change nothing: the row is compared with the plainest one of the same
model. Where locality or compressed gradients make a mesh or a placement part of what is computed,
the plain row has these too. What rounds rows on the wire is compared with what does not, within a
bound.
"""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from composition_support import (
    FACTORS,
    PLAIN,
    SHARING,
    WIRES,
    config_of,
    laid_together,
    pairwise,
    placement_of,
    slots_of,
)
from draws import seed_of
from jax.sharding import NamedSharding
from offload_support import SOFTMAX, Offloaded, assert_close, generate, prompts_of, replaced
from train_support import BATCH, SEQ, batches, blueprint_of, host, initial

from moejax.config import LocalityConfig
from moejax.errors import UserError
from moejax.training.residuals import with_residuals
from moejax.training.state import from_logical, to_logical
from moejax.training.step import BATCH_SPEC, make_train_step
from sharding import zero

REFUSED = {
    (("sharing", "together"), ("wire", "fewer_columns")): "needs the weights of single experts",
    (("sharing", "together"), ("mode", "remote")): "needs the weights of single experts",
    (("sharing", "together"), ("mesh", (1, 4, 2))): "split between its members; set tensor=1",
    (("sharing", "together"), ("mesh", (2, 2, 2))): "split between its members; set tensor=1",
    (("sharing", "together"), ("placement", "moved")): "computed together lie together",
    (("sharing", "together"), ("placement", "copies")): "computed together lie together",
}
ROWS = pairwise(FACTORS, {frozenset(pair) for pair in REFUSED}, np.random.default_rng(0))

# Of weights and tokens, which the rows share: other ones in each process.
SEED = seed_of(__name__)
TOKENS = batches(np.random.default_rng(SEED), 2)

WIRE_BOUND = {"compute": 0.0, "fewer_columns": 0.0, "int8": 0.03, "float8": 0.12}
"""Relative error of all gradients together. A rounding is off by at most 1/254 of a block's largest
number, in the mean by 0.7 % of the row's norm (int8), or by 1/16 of each number, in the mean by
2.6 % (float8); a gradient has been through at most eight, two layers' four."""
CHOICE_BOUND = {"none": 0.0, "low_rank": 0.0, "int8": 1e-3, "top_k": 0.05}
"""What may come of it that a last bit decides: a step of 1/127, or whether a number is sent."""


@pytest.fixture(autouse=True, scope="module")
def everything_is_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALLEST", 64)
        yield


@cache
def start_of(sharing, wire):
    """Weights, of experts and routers some times those of a fresh model, so that they matter."""
    flat = initial(config_of(PLAIN | {"sharing": sharing, "wire": wire}), SEED)
    scales = {".moe.bank.": 4.0, ".router.w": 8.0}
    return {
        name: value * next((s for part, s in scales.items() if part in name), np.float32(1))
        for name, value in flat.items()
    }


@dataclasses.dataclass
class Ran:
    """Losses of two steps, tokens of each expert in the first, the state after it."""

    losses: np.ndarray
    counts: np.ndarray
    first: dict[str, np.ndarray]

    def grads(self) -> dict[str, np.ndarray]:
        """Adam's first moments after one step: a tenth of the clipped gradients."""
        found = {name: a for name, a in self.first.items() if name.startswith("mu/")}
        assert found
        return found


def run(row, slots_LP) -> Ran:
    config = config_of(row)
    blueprint = blueprint_of(config, row["mesh"])
    together = row["sharing"] == "together"
    columns = row["wire"] if row["wire"] == "fewer_columns" else "compute"
    flat = start_of("none" if together else row["sharing"], columns)
    flat = laid_together(flat) if together else flat
    state = jax.block_until_ready(from_logical(flat, blueprint))
    state = with_residuals(state, blueprint, config)
    where = NamedSharding(blueprint.mesh, BATCH_SPEC)
    rows = TOKENS.reshape(len(TOKENS), config.accumulate, BATCH // config.accumulate, SEQ + 1)
    placement = placement_of(slots_LP)
    step = make_train_step(blueprint, config)
    traced = step.trace(state, jax.device_put(rows[0], where), placement)
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes
        compiled = traced.lower().compile()
    losses, counts, first = [], None, None
    for batch in rows:
        state, out = jax.block_until_ready(compiled(state, jax.device_put(batch, where), placement))
        losses.append(float(out["loss"]))
        if first is None:
            counts = np.asarray(out["moe"].counts_E)
            first = host(jax.block_until_ready(to_logical(state)))
    return Ran(np.array(losses), counts, first)


def plainest(row):
    """The plainest row that computes the same, and whether placement has a part in it."""
    keep = {"accumulate"}  # statistics of the losses beside are those of a microbatch
    keep |= {"sharing"} if row["sharing"] != "together" else set()
    keep |= {"wire"} if row["wire"] == "fewer_columns" else set()
    # Compressed sums are of what each device has, which of shared parts depends on its experts.
    placed = row["locality"] != "none" or row["compression"] != "none"
    if placed:
        keep |= {"locality", "placement", "mesh"}
    if row["compression"] != "none":
        keep |= {"compression", "scan_layers", "sharing"}
    # A scan compiles faster.
    plain = PLAIN | {"mesh": (1, 1, 1), "scan_layers": True} | {name: row[name] for name in keep}
    if placed and row["compression"] == "none":
        plain["mesh"] = *row["mesh"][:2], 1
    return plain, placed


@cache
def plain_run(row, placed):
    """Once for all rows that are compared with it; `placed` are the slots, as bytes, if any."""
    slots_LP = None if placed is None else np.frombuffer(placed, np.int64).reshape(2, -1)
    return run(dict(row), slots_LP)


def compare(row, rng):
    slots_LP = slots_of(rng, row["placement"], row["mesh"][1])
    plain, placed = plainest(row)
    placed = placed and slots_LP is not None
    held = slots_LP.astype(np.int64).tobytes() if placed else None
    want, got = plain_run(tuple(plain.items()), held), run(row, slots_LP)
    wire, choice = WIRE_BOUND[row["wire"]], CHOICE_BOUND[row["compression"]]
    if not wire:
        np.testing.assert_array_equal(got.counts, want.counts)
        np.testing.assert_allclose(got.losses[0], want.losses[0], rtol=1e-6)
    elif choice:
        choice = max(choice, 3 * wire)  # rounded rows decide more often than last bits
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5 + wire / 10 + choice / 10)
    wanted, found = want.grads(), got.grads()
    if row["sharing"] == "together" and plain["sharing"] == "none":
        wanted = laid_together(wanted)
    assert wanted.keys() == found.keys()
    errors = {name: np.linalg.norm(found[name] - g) for name, g in wanted.items()}
    norms = {name: np.linalg.norm(g) for name, g in wanted.items()}
    whole = np.linalg.norm([*errors.values()]) / np.linalg.norm([*norms.values()])
    assert whole <= 1e-5 + wire + choice, (whole, errors)
    if wire and row["mesh"][1] > 1:
        assert whole > wire / 1000, "nothing was rounded"
    if not wire and not choice:
        for name, error in errors.items():
            assert error <= 5e-5 * norms[name], name


def test_rows_hold_every_pair():
    """That is not refused, and no row holds one that is."""
    refused = {frozenset(pair) for pair in REFUSED}
    held = {frozenset([(a, row[a]), (b, row[b])]) for row in ROWS for a in FACTORS for b in FACTORS}
    pairs = {
        frozenset([(a, x), (b, y)])
        for a in FACTORS
        for b in FACTORS
        if a != b
        for x in FACTORS[a]
        for y in FACTORS[b]
    }
    assert not refused & held and refused < pairs
    assert pairs - held == refused
    assert len(ROWS) < 36


@pytest.mark.parametrize(
    "pair", REFUSED, ids=lambda pair: "-".join(str(value) for _, value in pair)
)
def test_what_cannot_be_combined(pair, rng):
    with pytest.raises(UserError, match=REFUSED[pair]):
        run(PLAIN | dict(pair), slots_of(rng, dict(pair).get("placement", "home"), 4))


@pytest.mark.parametrize("number", range(1))
def test_a_row(number, rng):
    compare(ROWS[number], rng)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(ROWS)))
def test_every_row(number, rng):
    print(f"{ROWS[number]}, weights and tokens of seed {SEED}")
    compare(ROWS[number], rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharing", "wire", "weights"),
    [("in", "int8", "none"), ("none", "float8", "int8"), ("basis", "fewer_columns", "none")],
)
def test_offloaded(sharing, wire, weights, rng):
    """On one device no row travels and all experts are near: the resident engine's texts."""
    config = replaced(SOFTMAX, experts=SHARING[sharing])
    exchange = dataclasses.replace(
        config.moe.exchange,
        chunks=2,
        wire=dataclasses.replace(config.moe.exchange.wire, **WIRES[wire]),
    )
    moe = dataclasses.replace(
        config.moe, exchange=exchange, locality=LocalityConfig(device_penalty=0.3)
    )
    small = Offloaded(dataclasses.replace(config, moe=moe), rng, weights)
    prompts = prompts_of(rng, 4, 18, 7)
    want = generate(small.engine(None, max_len=32), prompts)
    compared = 0
    for slots in (1, 5):
        experts = small.experts(slots)
        compared += assert_close(generate(small.engine(experts, max_len=32), prompts), want)
        assert experts.stats().decode.missed > 0
    assert compared > 12
