"""What computing experts in groups should cost on an H100, before it is tried: numpy and scipy.

A layer's forward from the first product's rows to the tokens' sums, without router. Rows are
distributed over experts, or groups, independently and evenly; a product takes the longer of its
FLOPs, whole tiles of 128 rows for each expert that has any, and of its bytes, each touched expert's
weights once and its rows. What is no product takes its bytes.

Shape letters as in `layer_shapes`; M members of a group, Q = E / M groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from layer_shapes import Shape
from scipy.stats import binom

TILE = 128
FLOPS = 650e12  # bf16 FLOP/s of a grouped product with full tiles, about what the layer reaches
BYTES = 3.0e12  # bytes/s of the memory
ITEM = 2  # bytes of a number
REACHES = ("random", "chosen together", "perfect")


@dataclass(frozen=True)
class Work:
    """One way to compute a layer.

    rows: pairs of a token and an expert, or a group, in the mean.
    flops: of the products, tiles' padding included.
    weight_bytes: of experts that have any token.
    row_bytes: of rows, hidden units and outputs, read and written.
    seconds: by the model above.
    """

    rows: float
    flops: float
    weight_bytes: float
    row_bytes: float
    seconds: float


def pairs_of_a_token(shape: Shape, members: int, away: float = 1.0) -> float:
    """Groups that a token's experts lie in, in the mean.

    Args:
        shape: E and K are read.
        members: M.
        away: 1: K of E experts at random; 0: as few groups as hold K; between: the share of the
            way from these to the random number.
    """
    groups = shape.experts // members
    missed = comb(shape.experts - members, shape.top_k) / comb(shape.experts, shape.top_k)
    least = -(-shape.top_k // members)
    return least + away * (groups * (1 - missed) - least)


def work(
    shape: Shape, members: int, pairs: float | None = None, *, fused: bool | None = None
) -> Work:
    """What a forward takes.

    Args:
        shape: the layer and its tokens.
        members: M; 1: single experts.
        pairs: groups of a token in the mean; None: at random.
        fused: whether hidden units are activated and weighted by the product that makes them, and
            rows gathered by it, as the kernels for single experts do; None: of single experts.
    """
    fused = members == 1 if fused is None else fused
    pairs = pairs_of_a_token(shape, members) if pairs is None else pairs
    groups, wide = shape.experts // members, shape.hidden * members
    tokens, width = shape.tokens, shape.d_model
    rows = tokens * pairs
    count_N = np.arange(tokens + 1)
    chance_N = binom.pmf(count_N, tokens, min(1.0, pairs / groups))
    tiles = groups * float(chance_N @ -(-count_N // TILE))
    touched = groups * float(1 - chance_N[0])
    up_weights, down_weights = (n * touched * width * wide * ITEM for n in (2, 1))
    up_flops, down_flops = (n * 2.0 * tiles * TILE * width * wide for n in (2, 1))
    hidden, row = rows * wide * ITEM, rows * width * ITEM
    # Read by the product, and written: activated, or both projections.
    up_rows, down_rows = row + hidden * (1 if fused else 2), hidden + row
    # Otherwise rows are gathered first, and both projections become weighted units.
    others = 0.0 if fused else 2 * row + 3 * hidden
    others += row + tokens * width * ITEM  # the tokens' sums
    seconds = max(up_flops / FLOPS, (up_weights + up_rows) / BYTES)
    seconds += max(down_flops / FLOPS, (down_weights + down_rows) / BYTES)
    seconds += others / BYTES
    return Work(
        rows,
        up_flops + down_flops,
        up_weights + down_weights,
        up_rows + down_rows + others,
        seconds,
    )


def ratio(
    shape: Shape, members: int, pairs: float | None = None, *, fused: bool | None = None
) -> float:
    """Predicted time in groups over that of single experts; arguments as for `work`."""
    return work(shape, members, pairs, fused=fused).seconds / work(shape, 1).seconds
