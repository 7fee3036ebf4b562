"""How much room a wave has, and which mode to use: decided from static shapes by counted bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moejax.config import EXACT_WIRE, ExchangeConfig, WireConfig
from moejax.errors import UserError

__all__ = ["Budget", "choose", "probability_of_device"]


@dataclass(frozen=True)
class Budget:
    """The static sizes of an exchange.

    mode: `local`, `all_to_all` or `ring`.
    devices: G.   slots: S, a device.   tokens: T, a device.   top_k: K.
    copies: J = min(K, S), the most assignments of one token on one device.
    rows: C, rows a (source, device) pair may send in one wave.
    quota: assignments after which a pair's next row opens a new wave; a wave of a pair holds at
        most quota + J − 1.
    reason: why this mode, for people.
    wire: rounding of what travels.
    """

    mode: str
    devices: int
    slots: int
    tokens: int
    top_k: int
    rows: int
    quota: int
    reason: str
    wire: WireConfig = EXACT_WIRE

    @property
    def copies(self) -> int:
        """J."""
        return min(self.top_k, self.slots)

    @property
    def received_rows(self) -> int:
        """Rows R that arrive at a device in one wave, filled or not."""
        return self.devices * self.rows

    @property
    def assignments(self) -> int:
        """The most assignments a device computes in one wave."""
        pair = min(self.quota + self.copies - 1, self.rows * self.copies)
        return self.devices * pair

    @property
    def single_wave(self) -> bool:
        """True when no routing can need a further wave."""
        return self.rows >= self.tokens and self.quota >= self.tokens * self.copies

    @property
    def moved_rows(self) -> int:
        """Rows, filled or not, that leave a device for others in one wave, one way."""
        return (self.devices - 1) * self.rows


def probability_of_device(num_experts: int, slots: int, top_k: int) -> float:
    """Probability that a token with K distinct uniform experts needs a given device's S experts."""
    if top_k + slots > num_experts:
        return 1.0
    miss = 1.0
    for i in range(top_k):
        miss *= (num_experts - slots - i) / (num_experts - i)
    return 1.0 - miss


def _with_slack(count: float, slack: float, limit: int) -> int:
    """`count` times the slack, plus four Poisson standard deviations; at most `limit`."""
    if math.isinf(slack):
        return limit
    roomy = math.ceil(slack * count + 4 * math.sqrt(count))
    return max(1, min(limit, -(-roomy // 8) * 8))


def choose(
    config: ExchangeConfig,
    *,
    tokens: int,
    top_k: int,
    num_experts: int,
    slots: int,
    devices: int,
) -> Budget:
    """Sizes of the buckets and the mode.

    `auto` compares the bytes that leave a device: all_to_all sends C rows to each other device,
    ring T. With equal bytes ring wins, because it needs no permutation of the rows.

    Raises:
        UserError: mode `local` with more than one device.
    """
    copies = min(top_k, slots)
    if devices == 1:
        return Budget("local", 1, slots, tokens, top_k, tokens, tokens * copies, "one device")
    if config.mode == "local":
        raise UserError(
            f"exchange mode 'local' with expert={devices} devices: tokens must travel; use 'auto'"
        )
    hit = probability_of_device(num_experts, slots, top_k)
    rows = config.bucket_rows or _with_slack(tokens * hit, config.bucket_slack, tokens)
    rows = min(rows, tokens)
    per_row = top_k / devices / hit
    full = rows * copies
    bucket_quota = _with_slack(rows * per_row, max(1.0, config.bucket_slack), full)
    ring_quota = _with_slack(tokens * top_k / devices, config.bucket_slack, tokens * copies)

    mode, wire = config.mode, config.wire
    if mode == "auto":
        mode = "all_to_all" if rows < tokens else "ring"
        reason = f"{rows} rows to each other device by buckets, {tokens} by a ring"
    else:
        reason = "asked for"
    if mode == "ring":
        return Budget("ring", devices, slots, tokens, top_k, tokens, ring_quota, reason, wire)
    return Budget("all_to_all", devices, slots, tokens, top_k, rows, bucket_quota, reason, wire)
