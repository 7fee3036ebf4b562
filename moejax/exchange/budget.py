"""How much room a wave has, and which mode to use: decided from static shapes by counted bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moejax.config import EXACT_WIRE, ExchangeConfig, MoEConfig, WireConfig
from moejax.errors import UserError
from moejax.placement.arrays import num_slots
from sharding.collectives import AxisGroups
from sharding.mesh import EXPERT

__all__ = ["Budget", "choose", "choose_for", "probability_of_device"]


@dataclass(frozen=True)
class Budget:
    """The static sizes of an exchange, of one chunk of a device's tokens.

    mode: `local`, `all_to_all`, `ring` or `remote`.
    devices: G.   slots: S, a device.   tokens: T, a device, in one chunk.   top_k: K.
    copies: J = min(K, S), the most assignments of one token on one device.
    rows: C, rows a (source, device) pair may send in one wave.
    quota: assignments after which a pair's next row opens a new wave; a wave of a pair holds at
        most quota + J − 1.
    reason: why this mode, for people.
    wire: rounding of what travels.
    chunks: how many of them a device's tokens are cut into.
    reserve_sms: multiprocessors that expert kernels leave to transfers.
    axis: what it runs over: all devices along `expert`, or groups of them.
    inside: of an exchange between hosts: the exchange inside a host that spreads what arrived. The
        outer one's "devices" are then hosts, its slots those of a whole host, and the inner one's
        tokens are the outer one's received rows.
    hit: probability that a token has a row for a given device.
    fused: in mode `remote`: the experts' own kernels send rows and sums.
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
    chunks: int = 1
    axis: str | AxisGroups = EXPERT
    inside: Budget | None = None
    reserve_sms: int = 0
    fused: bool = False
    hit: float = 1.0

    @property
    def innermost(self) -> Budget:
        """The exchange whose rows the experts compute."""
        return self if self.inside is None else self.inside

    @property
    def copies(self) -> int:
        """J."""
        return min(self.top_k, self.slots)

    @property
    def carried(self) -> int:
        """Assignments that a row on its way out has room for: J, or all K where rows are tokens."""
        return self.top_k if self.rows_are_tokens else self.copies

    @property
    def rows_are_tokens(self) -> bool:
        """Whether a received row g·T + t is token t of device g, and not one of a bucket."""
        return self.mode in ("ring", "remote")

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
    def most_waves(self) -> int:
        """As many as a routing can need."""
        by_assignments = (self.tokens * self.copies - 1) // self.quota
        return (self.tokens - 1) // self.rows + 1 + by_assignments

    @property
    def moved_rows(self) -> int:
        """Rows, filled or not, that leave a device for others in one wave, one way.

        In mode `remote`, where only filled ones do, their expectation, if all go in one wave.
        """
        pair = round(self.tokens * self.hit) if self.mode == "remote" else self.rows
        return (self.devices - 1) * pair


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

    The tokens are cut into as many chunks as asked for, or the next smaller number that divides
    them. With several hosts of several devices each (`host_devices`) there are two exchanges, one
    inside the other, each with buckets and mode of its own.

    Raises:
        UserError: mode `local` with more than one device, `remote` with several hosts of several,
            or hosts of different sizes.
    """
    if devices == 1:
        full = tokens * min(top_k, slots)
        return Budget("local", 1, slots, tokens, top_k, tokens, full, "one device")
    if config.mode == "local":
        raise UserError(
            f"exchange mode 'local' with expert={devices} devices: tokens must travel; use 'auto'"
        )
    chunks = next(n for n in range(max(1, min(config.chunks, tokens)), 0, -1) if tokens % n == 0)
    tokens //= chunks
    local = config.host_devices or devices
    if local > 1 and local < devices and devices % local:
        raise UserError(
            f"host_devices={local} with expert={devices} devices: every host must have as many; "
            f"use a divisor of {devices}, None, or another mesh"
        )
    if config.mode == "remote" and 1 < local < devices:
        raise UserError(
            f"exchange mode 'remote' with host_devices={local} and expert={devices} devices: rows "
            "are written into the memory of GPUs of one host; use 'auto', or host_devices=None"
        )
    hit = probability_of_device(num_experts, slots, top_k)
    share = top_k / devices  # assignments of a token on one device
    reserve_sms = config.reserve_sms
    flat = Budget(
        "", devices, slots, tokens, top_k, 0, 0, "", config.wire, chunks, reserve_sms=reserve_sms
    )
    if local == 1 or local >= devices:
        return _sized(flat, config, "device", tokens, hit, share)
    hosts, of_host = devices // local, slots * local
    host_hit = probability_of_device(num_experts, of_host, top_k)
    between, within = _groups(hosts, local)
    outer = replace(flat, devices=hosts, slots=of_host, axis=between)
    outer = _sized(outer, config, "host", tokens, host_hit, share * local)
    # Rounding pays where links are slow; columns that were left out stay so.
    wire = replace(
        EXACT_WIRE, dispatch_dim=config.wire.dispatch_dim, combine_dim=config.wire.combine_dim
    )
    inner = replace(flat, devices=local, tokens=outer.received_rows, top_k=outer.carried)
    inner = replace(inner, wire=wire, chunks=1, axis=within)
    return replace(outer, inside=_sized(inner, config, "device", hosts * tokens, hit, share))


def choose_for(config: MoEConfig, *, tokens: int, devices: int, slots: int | None = None) -> Budget:
    """`choose` for a layer.

    Args:
        config: of the layer.
        tokens: T of a device.
        devices: G along `expert`.
        slots: S of a device; None: as many as the experts need without replicas.
    """
    experts = config.router.num_experts
    return choose(
        config.exchange,
        tokens=tokens,
        top_k=config.router.top_k,
        num_experts=experts,
        slots=num_slots(experts, devices) if slots is None else slots,
        devices=devices,
    )


def _sized(
    budget: Budget, config: ExchangeConfig, other: str, sources: int, hit: float, share: float
) -> Budget:
    """Completes a budget with mode, reason, C and quota.

    Args:
        budget: without them.
        config: of the exchange.
        other: what it sends to, for people.
        sources: tokens that may have a row for a destination.
        hit: probability that one has.
        share: its expected assignments there.
    """
    tokens, copies, slack = budget.tokens, budget.copies, config.bucket_slack
    bucket = min(config.bucket_rows or _with_slack(sources * hit, slack, tokens), tokens)
    mode, reason = config.mode, "asked for"
    if mode == "auto":
        mode = "all_to_all" if bucket < tokens else "ring"
        reason = f"{bucket} rows to each other {other} by buckets, {tokens} by a ring"
    budget = replace(budget, mode=mode, reason=reason, hit=hit)
    if budget.rows_are_tokens:
        bucket, quota = tokens, _with_slack(sources * share, slack, tokens * copies)
    else:
        quota = _with_slack(bucket * (share / hit), max(1.0, slack), bucket * copies)
    return replace(budget, rows=bucket, quota=quota)


def _groups(hosts: int, local: int) -> tuple[AxisGroups, AxisGroups]:
    """The devices along `expert` with one place in their host each, and those of one host each."""
    place = [[host * local + i for i in range(local)] for host in range(hosts)]
    return (
        AxisGroups(EXPERT, tuple(zip(*place, strict=True))),
        AxisGroups(EXPERT, tuple(map(tuple, place))),
    )
