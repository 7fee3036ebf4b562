"""How a device's memory is divided: other weights, pages, experts on their way, and then slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moejax.errors import UserError
from moejax.offload.config import OffloadConfig
from moejax.offload.parts import BankLayout

__all__ = ["Room", "divide", "pages_that_fit"]

_SPARE = 1 / 16  # of the device, for what steps need on their way
_GROUPS = 3  # of streamed experts: one on its way, one that is there, one side by side in a program
_GUESSES = 2
_PAGES = 1 / 4  # of what is left, at most, unless their number is given


@dataclass(frozen=True)
class Room:
    """What the experts of a model get.

    slots_L: S of each layer with experts.
    wave: W, experts that are streamed together.
    guess_bytes: the most that guesses for one layer take.
    """

    slots_L: tuple[int, ...]
    wave: int
    guess_bytes: int


def pages_that_fit(memory: int, dense: int, page: int, wanted: int) -> int:
    """How many pages of the key-value cache: as many as are wanted, or fit a part of the memory.

    Args:
        memory: of the device, bytes.
        dense: bytes of all weights but experts.
        page: bytes of a page.
        wanted: pages.

    Raises:
        UserError: there is no room for a page.
    """
    left = memory * (1 - _SPARE) - dense
    fit = int(left * _PAGES // page)
    if fit < 1:
        least = math.ceil((dense + page / _PAGES) / (1 - _SPARE))
        raise UserError(_too_little(memory, least, "weights other than experts, and pages"))
    return min(wanted, fit)


def divide(
    banks: Sequence[BankLayout], config: OffloadConfig, *, memory: int, taken: int, top_k: int
) -> Room:
    """Divides what is left among the layers, alike.

    Args:
        banks: of each layer with experts.
        config: may say how much is streamed and guessed.
        memory: of the device, bytes.
        taken: by other weights and pages, bytes.
        top_k: K, experts of a token.

    Raises:
        UserError: there is not a slot for each layer; it says how much memory there must be.
    """
    largest = max(bank.expert_bytes for bank in banks)
    most = max(bank.experts for bank in banks)
    guess = largest * top_k if config.prefetch_bytes is None else config.prefetch_bytes
    if config.predictor == "none":
        guess = 0
    elif guess < largest:
        raise UserError(
            f"--prefetch-bytes of {guess} bytes: an expert has {largest}; allow as much, or choose "
            "--offload-predictor none"
        )
    wave = config.wave or -(-most // 8)
    each = sum(bank.expert_bytes for bank in banks)
    while True:
        moving = _GROUPS * wave * largest + _GUESSES * guess
        left = int(memory * (1 - _SPARE)) - taken - moving
        if left >= each or wave == 1 or config.wave is not None:
            break
        wave = -(-wave // 2)
    if left < each:
        least = math.ceil((taken + moving + each) / (1 - _SPARE))
        told = "other weights, pages, experts on their way and a slot for each layer"
        raise UserError(_too_little(memory, least, told))
    slots = 1
    while slots < most and _size(banks, slots + 1) <= left:
        slots += 1
    return Room(tuple(min(slots, bank.experts) for bank in banks), wave, guess)


def _size(banks: Sequence[BankLayout], slots: int) -> int:
    return sum(min(slots, bank.experts) * bank.expert_bytes for bank in banks)


def _too_little(memory: int, least: int, told: str) -> str:
    return (
        f"--device-memory of {memory} bytes ({memory / 2**30:.2f} GiB): {told} need {least} bytes "
        f"({least / 2**30:.2f} GiB); allow as much, or give fewer --max-rows, --pages, a shorter "
        "--max-len, or less --prefetch-bytes"
    )
