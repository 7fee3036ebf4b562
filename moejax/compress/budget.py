"""How many experts each layer keeps when only their total is given.

Layers differ in how many of their experts matter; the same share of each is seldom the best. Shape
letters as in `moejax.compress.experts`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from moejax.compress.clusters import merge_heights
from moejax.errors import UserError

__all__ = ["share_out", "share_out_merges"]


def share_out(
    importances: Sequence[Float[np.ndarray, " E"]], total: int, minimum: int
) -> list[int]:
    """Experts that each layer keeps by pruning: those that matter most, over all layers.

    An expert counts with its share of its layer's importance, since outputs grow from layer to
    layer. Among equals those go first to each layer that are the first there, so that equal layers
    keep equally many.

    Args:
        importances: for each layer, as of `moejax.compress.prune.saliency`: 0 or more.
        total: experts to keep, over all layers.
        minimum: experts that each layer keeps at least, such as those that a token chooses.

    Returns:
        A count for each layer, `total` together.

    Raises:
        UserError: an impossible total or minimum, or an importance that is negative or not finite.
    """
    ranked = []
    for layer, importance_E in enumerate(importances):
        importance_E = np.asarray(importance_E, np.float64)
        if not (np.isfinite(importance_E).all() and (importance_E >= 0).all()):
            raise UserError(
                f"importances[{layer}] reaches from {importance_E.min()} to {importance_E.max()}: "
                "must be finite and not negative; look for NaN in the weights or the sample"
            )
        # A layer without importance, such as one never reached, falls to its minimum.
        ranked.append(np.sort(importance_E)[::-1] / (importance_E.sum() or 1.0))
    return _share_out(ranked, total, minimum)


def share_out_merges(
    similarities: Sequence[Float[np.ndarray, "E E"]],
    total: int,
    minimum: int,
    uses: Sequence[Float[np.ndarray, " E"]] | None = None,
) -> list[int]:
    """Experts that each layer keeps by merging: the most similar of all layers become one first.

    Costs are those of `moejax.compress.clusters.merge_heights`. They compare between layers as they
    are: cosines have no unit, and that of `output_agreement` is the layer's own.

    Args:
        similarities: of each layer, as of `moejax.compress.similarity`.
        total: experts to keep, over all layers.
        minimum: experts that each layer keeps at least.
        uses: of each layer, for Ward's criterion; None: average linkage.

    Returns:
        A count for each layer, `total` together: for `moejax.compress.clusters.cluster`.

    Raises:
        UserError: an impossible total or minimum, or a matrix that is not finite or not square.
    """
    # One expert is left when all merges are done; the last merge is the first to be spared.
    trees = [
        merge_heights(matrix, None if uses is None else uses[layer])
        for layer, matrix in enumerate(similarities)
    ]
    ranked = [np.append(np.inf, heights[::-1]) for heights in trees]
    return _share_out(ranked, total, minimum)


def _share_out(ranked: list[np.ndarray], total: int, minimum: int) -> list[int]:
    """Counts of the `total` largest values of lists in descending order, by the rules above."""
    sizes = [len(values) for values in ranked]
    if not sizes or not 1 <= minimum <= min(sizes):
        raise UserError(
            f"minimum={minimum}: layers of {sizes} experts keep at least 1 and at most all of "
            "their own; choose within that"
        )
    if not minimum * len(sizes) <= total <= sum(sizes):
        raise UserError(
            f"total={total}: {len(sizes)} layers of {sum(sizes)} experts together keep between "
            f"{minimum * len(sizes)} ({minimum} each) and {sum(sizes)}; choose within that"
        )
    counts = [minimum] * len(sizes)
    rest = [
        (-value, rank, layer)
        for layer, values in enumerate(ranked)
        for rank, value in enumerate(values.tolist())
        if rank >= minimum
    ]
    for _, _, layer in sorted(rest)[: total - sum(counts)]:
        counts[layer] += 1
    return counts
