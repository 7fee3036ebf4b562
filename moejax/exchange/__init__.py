"""Dispatch and combine: one row per (token, device), exact, in bounded memory."""

from moejax.exchange.budget import Budget, choose, choose_for
from moejax.exchange.capacity import drop_over_capacity, expert_capacity
from moejax.exchange.counters import ExchangeCounters, count
from moejax.exchange.hierarchy import inside_hosts, make_plans
from moejax.exchange.modes import Rows, combine, dispatch
from moejax.exchange.plan import Plan
from moejax.exchange.waves import run_waves

__all__ = [
    "Budget",
    "ExchangeCounters",
    "Plan",
    "Rows",
    "choose",
    "choose_for",
    "combine",
    "count",
    "dispatch",
    "drop_over_capacity",
    "expert_capacity",
    "inside_hosts",
    "make_plans",
    "run_waves",
]
