"""Routing: which experts a token uses and with what weights.

`router.py` ties it together; `choice.py` picks the experts, `losses.py` keeps them evenly used,
`bias.py` does so without a loss, `metrics.py` says how evenly. `locality.py` scales scores by how
far experts are, `two_stage.py` keeps to near ones, `near.py` chooses by both. `merged.py` knows
what experts have become.
"""

from moejax.routing.bias import RouterBias, RouterState, update_bias
from moejax.routing.losses import RouterLosses
from moejax.routing.merged import RouterTable
from moejax.routing.metrics import router_metrics
from moejax.routing.router import Router, Routing, route

__all__ = [
    "Router",
    "RouterBias",
    "RouterLosses",
    "RouterState",
    "RouterTable",
    "Routing",
    "route",
    "router_metrics",
    "update_bias",
]
