"""The tables of placements and of routing that knows them, for `docs/figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]


def placements(result: dict[str, Any]) -> Table:
    """What tokens cost, how even loads are, what planning took; single domains are left out."""
    body, before = [], None
    for row in result["rows"]:
        if row["trace"].startswith("packaged, ") or row["method"] == "round_robin":
            continue
        where = f"{row['trace']}: {row['experts']} experts, {row['devices']} devices"
        mean, largest = row["batch_load"]
        body.append(
            [
                where if where != before else "",
                row["method"],
                f"{row['fanout']:.2f}",
                f"{row['remote_sends']:.2f}",
                f"{row['load_max_mean']:.2f}",
                f"{mean:.2f}, {largest:.2f}",
                _or_dash(row.get("cut"), ".3f"),
                _or_dash(row.get("plan_ms_per_layer"), ".1f"),
                _or_dash(row["moved"], ".0f"),
            ]
        )
        before = where
    headings = ["trace", "method", "fan-out", "remote sends", "load", "batches' load"]
    return [*headings, "cut", "ms a layer", "moved"], body


def layers(result: dict[str, Any]) -> Table:
    """A layer's time with its experts placed; migration and counting in lines of their own."""
    body, before = [], None
    for row in result["rows"]:
        where = f"{row['trace']}, {row['shape']}"
        rows, moved = row.get("remote_rows"), row["moved"]
        if row["what"] == "migration":
            what = ["migration", f"{moved} experts of a layer", ""]
        else:
            weights = row["weights"] if row["placement"] != "home" else ""
            what = [row["what"].replace("_", " + "), row["placement"] or "", weights or ""]
        body.append(
            [
                where if where != before else "",
                *what,
                _or_dash(rows, ".2f"),
                _or_dash(row.get("load"), ".2f"),
                _or_dash(row.get("predicted_ms"), ".2f"),
                f"{row['ms']:.2f}",
            ]
        )
        before = where
    headings = ["trace and shape", "what", "placement", "weights", "remote rows a token", "load"]
    return [*headings, "at least, ms", "ms"], body


def locality(result: dict[str, Any]) -> Table:
    """Traffic, loss and load of the weights as they are."""
    body, before = [], None
    for row in result["rows"]:
        if row["training"] != "none":
            continue
        body.append(
            [
                row["placement"] if row["placement"] != before else "",
                *_locality_setting(row),
                _sends(row),
                _increase(row, "loss_increase"),
                f"{row['score_mass_kept']:.3f}",
                f"{row['load_max_mean']:.2f}",
            ]
        )
        before = row["placement"]
    headings = ["placement", "penalty", "at most", "other", "remote sends", "loss"]
    return [*headings, "score mass kept", "load"], body


def locality_trained(result: dict[str, Any]) -> Table:
    """The same after further training, with losses against both controls."""
    body = []
    for row in result["rows"]:
        if row["training"] == "none":
            continue
        limit, penalty = row["trained_max_devices"], row["trained_penalty"]
        trained = f"{penalty:g}, {limit} devices" if limit else "without"
        body.append(
            [
                trained,
                row["placement"],
                *_locality_setting(row)[:2],
                _sends(row),
                _increase(row, "loss_increase"),
                _increase(row, "loss_increase_tuned"),
                f"{row['score_mass_kept']:.3f}",
                f"{row['load_max_mean']:.2f}",
            ]
        )
    headings = ["trained with", "placement", "penalty", "at most", "remote sends"]
    headings += ["loss, against the model as it was", "against training without"]
    return [*headings, "score mass kept", "load"], body


def _locality_setting(row: dict[str, Any]) -> list[str]:
    limit, threshold = row["max_devices"], row["local_threshold"]
    other = [] if threshold is None else [f"local from {threshold:g}"]
    other += [] if row["weights"] == "plain" else [f"{row['weights']} weights"]
    return [
        f"{row['penalty']:g}" if row["penalty"] else "",
        "" if limit is None else f"{limit} device{'s' * (limit > 1)}",
        ", ".join(other),
    ]


def _sends(row: dict[str, Any]) -> str:
    change = row["remote_sends_ratio"] - 1
    return f"{row['remote_sends']:.2f}" + (f" ({change:+.0%})" if abs(change) > 0.005 else "")


def _increase(row: dict[str, Any], name: str) -> str:
    error = row[f"{name}_error"]
    return f"{row[name]:+.2%} ± {error:.2%}" if error > 5e-7 else f"{abs(row[name]):.2%}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
