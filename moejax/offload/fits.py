"""What is fitted once to a model's routing, for predictors.

A distance counts layers with experts, see `moejax.offload.predictors`: L is the same layer for the
next token.

Shape letters: L layers with experts, E experts, J distances, O distances within a token, D model
width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from moejax.errors import UserError
from moejax.placement.archive import read_arrays, write_arrays

__all__ = ["Fits", "load_fits", "save_fits"]

_KINDS = {
    "layers_L": ("iu", 1),
    "distances_J": ("iu", 1),
    "offsets_O": ("iu", 1),
    "frequency_LE": ("f", 2),
    "coactivation_JLEE": ("f", 4),
    "history_JLFEE": ("f", 5),
    "linear_w_OLDE": ("f", 4),
    "linear_b_OLE": ("f", 3),
}


@dataclass(frozen=True)
class Fits:
    """Statistics and linear maps of a model.

    All estimate, for each expert, the probability that a layer chooses it.

    Attributes:
        layers_L: the model's layer that each layer with experts is.
        distances_J: distances of guesses from choices, ascending.
        offsets_O: distances of guesses from residuals, ascending, 0 for the layer itself.
        frequency_LE: how often each expert is chosen.
        coactivation_JLEE: [j, l, a, b] is the probability that the layer `distances_J[j]` after
            layer l chooses b where l chose a.
        history_JLFEE: linear maps, F = 3: from what the target chose for the token before, from
            what layer l chose, and from what the layer before l chose. Choices count 1, others 0;
            the sum of the rows chosen is added to `frequency_LE` of the target.
        linear_w_OLDE, linear_b_OLE: linear maps from the residual x_D that enters layer l, before
            its attention and norm, divided by the root of its mean square, to the choice of layer
            l + offset of the same token: `x_D / rms(x_D) @ w_DE + b_E`. Zero where there is no such
            layer.
    """

    layers_L: Int64[np.ndarray, " L"]
    distances_J: Int64[np.ndarray, " J"]
    offsets_O: Int64[np.ndarray, " O"]
    frequency_LE: Float32[np.ndarray, "L E"]
    coactivation_JLEE: Float32[np.ndarray, "J L E E"]
    history_JLFEE: Float32[np.ndarray, "J L 3 E E"]
    linear_w_OLDE: Float32[np.ndarray, "O L D E"]
    linear_b_OLE: Float32[np.ndarray, "O L E"]

    def __post_init__(self) -> None:
        layers, experts = self.frequency_LE.shape
        distances, offsets = len(self.distances_J), len(self.offsets_O)
        width = self.linear_w_OLDE.shape[2] if self.linear_w_OLDE.ndim == 4 else -1
        wanted = {
            "layers_L": (layers,),
            "coactivation_JLEE": (distances, layers, experts, experts),
            "history_JLFEE": (distances, layers, 3, experts, experts),
            "linear_w_OLDE": (offsets, layers, width, experts),
            "linear_b_OLE": (offsets, layers, experts),
        }
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape:
                raise UserError(
                    f"{name}: shape {found}: must be {shape}, as frequency_LE, distances_J and "
                    "offsets_O say; write the file anew with python -m moejax.offload"
                )
        for name in _KINDS:
            if not np.isfinite(getattr(self, name)).all():
                raise UserError(
                    f"{name}: holds numbers that are not finite; write the file anew with python "
                    "-m moejax.offload"
                )

    def check(self, layers: int, num_experts: int, d_model: int | None = None) -> None:
        """Refuses the fits of another model.

        Args:
            layers: L.
            num_experts: E.
            d_model: D; None: not looked at.

        Raises:
            UserError: they do not fit.
        """
        found = (*self.frequency_LE.shape, self.linear_w_OLDE.shape[2])
        wanted = (layers, num_experts, found[2] if d_model is None else d_model)
        if found != wanted:
            raise UserError(
                "fits: made for {} layers of {} experts and width {}, the model has {}, {} and "
                "{}; write them for this model with python -m moejax.offload".format(
                    *found, *wanted
                )
            )

    def coactivation(self, layer: int, distance: int) -> Float32[np.ndarray, "E E"] | None:
        """The map from a layer's choice; None where this distance was not fitted."""
        found = np.flatnonzero(self.distances_J == distance)
        return self.coactivation_JLEE[found[0], layer] if len(found) else None

    def history(self, layer: int, distance: int) -> Float32[np.ndarray, "3 E E"] | None:
        """The map from the routing history; None where this distance was not fitted."""
        found = np.flatnonzero(self.distances_J == distance)
        return self.history_JLFEE[found[0], layer] if len(found) else None

    def linear(
        self, layer: int, offset: int
    ) -> tuple[Float32[np.ndarray, "D E"], Float32[np.ndarray, " E"]] | None:
        """The map from the residual before a layer; None where there is none."""
        found = np.flatnonzero(self.offsets_O == offset)
        if not len(found) or layer + offset >= len(self.layers_L):
            return None
        return self.linear_w_OLDE[found[0], layer], self.linear_b_OLE[found[0], layer]


def load_fits(path: str | os.PathLike[str]) -> Fits:
    """Reads fits.

    Raises:
        UserError: the file is none, or does not hold together.
    """
    arrays = read_arrays(path, _KINDS, optional=frozenset())
    try:
        return Fits(
            **{
                name: array.astype(np.float32 if _KINDS[name][0] == "f" else np.int64)
                for name, array in arrays.items()
            }
        )
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None


def save_fits(path: str | os.PathLike[str], fits: Fits) -> None:
    """Writes what `load_fits` reads.

    Raises:
        UserError: the place cannot be written.
    """
    write_arrays(path, **{name: getattr(fits, name) for name in _KINDS})
